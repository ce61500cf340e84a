"""One script for every controller of claims and warm pools, and what a client's watch of claims sees."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from prodisco_sandbox import SandboxManagerConfig
from prodisco_sandbox._cluster.manifest import sandbox_spec
from prodisco_sandbox.local import LocalCluster
from prodisco_sandbox.testing import FakeCustomObjectsApi
from tests.support.api import GROUP, MERGE, PLURAL
from tests.support.local import STUB, stub
from tests.support.patience import PATIENCE, until

from .test_sandboxes import Maybe, Object, World, just_over

EXTENSIONS = "extensions.agents.x-k8s.io"
POOL, TEMPLATE = "python", "template"
ENV = [{"name": "A", "value": "1"}]
VOLUMES = [{"metadata": {"name": "v"}, "spec": {"accessModes": ["ReadWriteOnce"]}}]
FOREIGN = {"labels": {"example.com/a": "b"}}

NOTES = {
    "controller-first-observed-at": "seen",
    "sandbox-name": "taken",
    "claim-first-ready-at": "first",
    "client-first-requested-at": "asked",
}
TEXTS = {
    "DependenciesReady": "Pod is Ready",
    "DependenciesNotReady": "Pod exists with phase: Pending",
    "SandboxNotReady": "Sandbox is not ready",
    "WarmPoolNotFound": f'SandboxWarmPool "{POOL}" not found',
    "TemplateNotFound": f'SandboxTemplate "{TEMPLATE}" not found',
    "ClaimExpired": "Claim expired. Sandbox cleanup initiated.",
    "PodSucceeded": "Pod completed successfully",
    "InvalidMetadata": "invalid additionalPodMetadata: failed to validate label"
    ' "example.com/a": label domain "example.com" is not in the allowlist',
    "EnvVarsInjectionRejected": "environment variable injection rejected: environment variable injection"
    " is not allowed by the template policy",
    "VolumeClaimTemplatesError": "failed to merge volume claim templates: volume claim templates are"
    " disallowed by the template",
}
READY, FALSE = "Ready=True/DependenciesReady", "Ready=False/{}"


@dataclass
class ClaimWorld(World):
    """The same for claims: its objects are SandboxClaims.

    Attributes:
        known: Names of Sandboxes, in the order in which the claim had them.
    """

    name: str = "claim-a"
    known: list[str] = field(default_factory=list)

    @property
    def at(self) -> tuple[str, str, str, str]:
        return EXTENSIONS, "v1beta1", self.config.namespace, "sandboxclaims"

    async def make(self, kind: str, plural: str, name: str, spec: Object) -> None:
        metadata = {"name": name, "labels": {"app": "sandbox-server"}}
        body = {"apiVersion": f"{EXTENSIONS}/v1beta1", "kind": kind, "metadata": metadata, "spec": spec}
        await self.api.create_namespaced_custom_object(*self.at[:3], plural, body)

    async def create(self, **spec: Any) -> None:
        await self.make("SandboxClaim", "sandboxclaims", self.name, {"warmPoolRef": {"name": POOL}, **spec})

    async def make_template(self) -> None:
        pod = sandbox_spec(self.config, "v1beta1", {})["podTemplate"]
        spec = {"podTemplate": pod, "networkPolicyManagement": "Unmanaged"}
        await self.make("SandboxTemplate", "sandboxtemplates", TEMPLATE, spec)

    async def make_pool(self) -> None:
        spec = {"replicas": 1, "sandboxTemplateRef": {"name": TEMPLATE}}
        await self.make("SandboxWarmPool", "sandboxwarmpools", POOL, spec)

    async def touch(self) -> None:
        """Changes a claim, so that its controller looks at it again, without waiting for a minute."""
        note = "agents.x-k8s.io/client-first-requested-at"
        body = {"metadata": {"annotations": {note: "2026-01-01T00:00:00Z"}}}
        await self.api.patch_namespaced_custom_object(*self.at, self.name, body, _content_type=MERGE)

    async def scaled(self, replicas: int, *, scale: bool = False) -> None:
        """Waits until the pool has so many members that are ready, and says so."""
        at, own = (*self.at[:3], "sandboxwarmpools", POOL), {"spec": {"replicas": replicas}}
        if scale:
            await self.api.patch_namespaced_custom_object(*at, own, _content_type=MERGE)
        async with asyncio.timeout(PATIENCE):
            while True:
                pool = await self.api.get_namespaced_custom_object(*at)
                ready = [is_ready(member) for member in await self.members()]
                status = {
                    "observedGeneration": pool["metadata"]["generation"],
                    "selector": "agents.x-k8s.io/warm-pool-sandbox=0fceff97",
                    **({"readyReplicas": replicas, "replicas": replicas} if replicas else {}),
                }
                if pool.get("status") == status and ready == [True] * replicas:
                    break
                await asyncio.sleep(0.05)

    async def members(self) -> list[Object]:
        label = "agents.x-k8s.io/warm-pool-sandbox"
        return [s for s in await self.sandboxes() if label in s["metadata"]["labels"]]

    async def sandboxes(self) -> list[Object]:
        listed = await self.api.list_namespaced_custom_object(GROUP, "v1beta1", self.config.namespace, PLURAL)
        return list(listed["items"])

    async def bound(self) -> Object:
        name = self.known[-1]
        found: Object = await self.api.get_namespaced_custom_object(
            GROUP, "v1beta1", self.config.namespace, PLURAL, name
        )
        return found

    async def delete_sandbox(self) -> None:
        await self.api.delete_namespaced_custom_object(
            GROUP, "v1beta1", self.config.namespace, PLURAL, self.known[-1]
        )

    async def another(self, name: str, *, members: int = 1) -> None:
        """Goes on with a claim of another name, once what the last one had is gone."""
        self.name = f"claim-{name}"
        old, self.known[:] = self.known[-1:], []
        async with asyncio.timeout(PATIENCE):
            while set(old) & {s["metadata"]["name"] for s in await self.sandboxes()}:
                await asyncio.sleep(0.05)
        await self.scaled(members)

    def shown(self, kind: str, claim: Object) -> str:
        """An event as one line: annotations, conditions with the generation they name, and the Sandbox."""
        if kind == "DELETED":
            return kind
        metadata, status = claim["metadata"], claim.get("status") or {}
        parts = [f"g{metadata['generation']}"]
        parts += sorted(NOTES[key.partition("/")[2]] for key in metadata.get("annotations") or {})
        for c in status.get("conditions") or ():
            parts.append(f"{c['type']}={c['status']}/{c['reason']}/{c['observedGeneration']}")
        sandbox = status.get("sandbox") or {}
        if name := sandbox.get("name"):
            if name not in self.known:
                self.known.append(name)
            parts.append("cold" if name == metadata["name"] else f"warm{self.known.index(name) + 1}")
        parts += ["+ip"] * ("podIPs" in sandbox)
        parts += metadata.get("finalizers") or ()
        return " ".join(parts + ["deleting"] * ("deletionTimestamp" in metadata))

    def check_texts(self, claim: Object) -> None:
        for found in (claim.get("status") or {}).get("conditions") or ():
            assert found["message"] == TEXTS[found["reason"]], found


def is_ready(sandbox: Object) -> bool:
    conditions = (sandbox.get("status") or {}).get("conditions") or ()
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


SEEN = ("g1", "g1 seen")
TAKEN = (*SEEN, "g2 seen taken", f"g2 seen taken {READY}/1 warm1 +ip")
BOUND = (Maybe(f"g2 first seen taken {READY}/1 warm1 +ip"), f"g2 first seen taken {READY}/2 warm1 +ip")


async def play_claims(world: ClaimWorld) -> None:
    """The script: every way in which a claim gets a Sandbox, loses it, and ends."""
    async with world.watched():
        await play_missing(world)
        await play_warm(world)
        await play_expiry(world, "Delete", "DeleteForeground", "Retain")
        await play_never(world)
        await play_scaled(world)


async def play_local(world: ClaimWorld) -> None:
    """As much of it as holds where the pool is no object."""
    async with world.watched():
        await play_warm(world)
        await play_expiry(world, "Delete", "Retain")
        await play_never(world)


async def play_missing(world: ClaimWorld) -> None:
    """A pool and a template that are missing, and then made."""
    missing, template = FALSE.format("WarmPoolNotFound/1"), FALSE.format("TemplateNotFound/1")
    await world.step(world.create(), *SEEN, f"g1 seen {missing}")
    await world.step(world.make_pool(), f"g1 seen {template}")
    await world.step(world.make_template())
    await world.scaled(1)
    await world.step(
        world.touch(),
        f"g1 asked seen {template}",
        f"g2 asked seen taken {template}",
        f"g2 asked seen taken {READY}/1 warm1 +ip",
        Maybe(f"g2 asked first seen taken {READY}/1 warm1 +ip"),
        f"g2 asked first seen taken {READY}/2 warm1 +ip",
    )
    sandbox = await world.bound()
    assert set(sandbox["metadata"]["labels"]) == {
        f"{GROUP}/{label}" for label in ("claim-uid", "launch-type", "sandbox-template-ref-hash")
    }
    assert sandbox["metadata"]["annotations"] == {
        f"{GROUP}/pod-name": world.known[0],
        f"{GROUP}/sandbox-template-ref": TEMPLATE,
    }
    assert [owner["kind"] for owner in sandbox["metadata"]["ownerReferences"]] == ["SandboxClaim"]
    await world.step(world.delete(), "DELETED")


async def play_warm(world: ClaimWorld) -> None:
    """A member that is ready; its Sandbox is deleted, and then a pod."""
    await world.another("b")
    await world.step(world.create(), *TAKEN, *BOUND)
    await world.scaled(1)
    # Another Sandbox, without a word.
    await world.step(
        world.delete_sandbox(),
        f"g2 first seen {READY}/2 warm1 +ip",
        f"g2 first seen taken {READY}/2 warm1 +ip",
        f"g2 first seen taken {READY}/1 warm2 +ip",
        f"g2 first seen taken {READY}/2 warm2 +ip",
    )
    # Another pod in the same Sandbox.
    await world.step(
        world.delete_pod(world.known[-1]),
        Maybe("g2 first seen taken Finished=True/PodSucceeded/2 Ready=False/PodSucceeded/2 warm2 +ip"),
        f"g2 first seen taken {FALSE.format('DependenciesNotReady/2')} warm2",
        f"g2 first seen taken {READY}/2 warm2 +ip",
    )
    await world.step(world.delete(), "DELETED")


async def play_expiry(world: ClaimWorld, *policies: str) -> None:
    expired = f"g3 first seen taken {FALSE.format('ClaimExpired/3')}"
    ends = {
        "Delete": ["DELETED"],
        "DeleteForeground": [
            expired.replace("g3", "g4") + " warm1 +ip foregroundDeletion deleting",
            "DELETED",
        ],
        "Retain": [expired],
    }
    for policy in policies:
        await world.another(policy.lower())
        await world.step(world.create(), *TAKEN, *BOUND)
        await world.step(
            world.patch(lifecycle={"shutdownTime": just_over(), "shutdownPolicy": policy}),
            f"g3 first seen taken {READY}/2 warm1 +ip",
            f"{expired} warm1 +ip",
            *ends[policy],
        )


async def play_never(world: ClaimWorld) -> None:
    await world.another("never")
    for spec, reason in (
        ({"additionalPodMetadata": FOREIGN}, "InvalidMetadata"),
        ({"env": ENV}, "EnvVarsInjectionRejected"),
        ({"volumeClaimTemplates": VOLUMES}, "VolumeClaimTemplatesError"),
    ):
        await world.step(world.create(**spec), *SEEN, f"g1 seen {FALSE.format(f'{reason}/1')}")
        await world.step(world.delete(), "DELETED")


async def play_scaled(world: ClaimWorld) -> None:
    """A pool that is scaled to zero under a claim; the next one starts cold."""
    await world.another("scaled")
    await world.step(world.create(), *TAKEN, *BOUND)
    await world.step(world.scaled(0, scale=True))
    await world.step(world.delete(), "DELETED")
    await world.another("cold", members=0)
    await world.step(
        world.create(),
        *SEEN,
        f"g1 seen {FALSE.format('SandboxNotReady/1')} cold",
        f"g1 seen {FALSE.format('DependenciesNotReady/1')} cold",
        f"g1 seen {READY}/1 cold +ip",
        f"g1 first seen {READY}/1 cold +ip",
    )
    await world.step(world.delete(), "DELETED")


@pytest.mark.looptime
async def test_claims_on_the_fake_api() -> None:
    async with FakeCustomObjectsApi(auto_ready=1.0) as api:

        async def delete_pod(name: str) -> None:
            api.delete_pod(name)

        await play_claims(ClaimWorld(api, SandboxManagerConfig(mode="multi"), delete_pod, delete_pod))


class LocalClaims(ClaimWorld):
    async def scaled(self, replicas: int, *, scale: bool = False) -> None:
        await until(self.has_member)

    async def has_member(self) -> bool:
        return [is_ready(member) for member in await self.members()] == [True]


async def test_claims_on_a_local_cluster(tmp_path: Path) -> None:
    script = STUB.replace("echo", "trap 'exit 0' TERM\necho", 1)
    async with LocalCluster(python=stub(tmp_path, script), warm=1) as cluster:

        async def delete_pod(name: str) -> None:
            cluster.delete_pod(name)

        await play_local(LocalClaims(cluster.custom_objects_api, cluster.config(), delete_pod, delete_pod))
