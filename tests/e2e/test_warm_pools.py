"""Sessions that take their sandboxes from the pool of deploy/overlays/warm-pool, on real pods."""

from __future__ import annotations

import asyncio
import datetime as dt
import secrets
import statistics
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes_asyncio.client import CoreV1Api, CustomObjectsApi

from prodisco_sandbox import SandboxManager
from prodisco_sandbox._cluster.metadata import is_deleting
from tests.support.envtest import CLAIMS, DEPLOY, EXTENSIONS, MERGE_PATCH
from tests.support.patience import until
from tests.support.pods import (
    NAMESPACE,
    READY,
    Object,
    Pods,
    limits,
    managed,
    output,
    pod_template,
    tls_secret,
)

from .test_succession import LEASE, run_and_kill

pytestmark = pytest.mark.cluster

OVERLAY = DEPLOY / "overlays" / "warm-pool"
AT = (EXTENSIONS, "v1beta1", NAMESPACE)
TIMES = 5
PROBE = {"tcpSocket": {"port": 50051}, "periodSeconds": 1}
HOST = "import socket; print(socket.gethostname())"


class Pool:
    """The overlay's pool and its claims, as an administrator sees them."""

    def __init__(self, pods: Pods, name: str) -> None:
        self.name = name
        self._pods = pods
        self._core = CoreV1Api(pods.api)
        self._custom = CustomObjectsApi(pods.api)

    async def create(self) -> None:
        """Empty, and under a name of its own."""
        for file, plural in (("template.yaml", "sandboxtemplates"), ("pool.yaml", "sandboxwarmpools")):
            body = yaml.safe_load((OVERLAY / file).read_text())
            body["metadata"]["name"] = self.name
            if plural == "sandboxwarmpools":
                body["spec"] |= {"replicas": 0, "sandboxTemplateRef": {"name": self.name}}
            await self._custom.create_namespaced_custom_object(*AT, plural, body)

    async def use(self, pod: Object) -> None:
        """Changes the template's pod."""
        change = {"spec": {"podTemplate": {"spec": pod}}}
        await self._custom.patch_namespaced_custom_object(
            *AT, "sandboxtemplates", self.name, change, _content_type=MERGE_PATCH
        )

    async def delete(self) -> None:
        for plural in ("sandboxwarmpools", "sandboxtemplates"):
            await self._custom.delete_namespaced_custom_object(*AT, plural, self.name)

    async def scale(self, members: int) -> None:
        """As an autoscaler does."""
        await self._custom.patch_namespaced_custom_object_scale(
            *AT,
            "sandboxwarmpools",
            self.name,
            {"spec": {"replicas": members}},
            _content_type=MERGE_PATCH,
        )

    async def filled(self, members: int) -> None:
        """Waits until so many sandboxes, and no more, wait for a session."""

        async def counted() -> bool:
            pool = await self._custom.get_namespaced_custom_object(*AT, "sandboxwarmpools", self.name)
            status = pool.get("status") or {}
            counts = (status.get("replicas", 0), status.get("readyReplicas", 0))
            return bool(
                status.get("observedGeneration") == pool["metadata"]["generation"]
                and counts == (members, members)
            )

        await until(counted, f"the pool to have {members} members", READY)

    async def claim(self, name: str) -> Object:
        found: Object = await self._custom.get_namespaced_custom_object(*AT, CLAIMS, name)
        return found

    async def bound(self, claim: str) -> str:
        """The Sandbox that the claim has now, whose name is its pod's."""
        return str((await self.claim(claim))["status"]["sandbox"]["name"])

    async def claims(self) -> list[Object]:
        found = await self._custom.list_namespaced_custom_object(*AT, CLAIMS)
        return [item for item in found["items"] if item["spec"]["warmPoolRef"]["name"] == self.name]

    async def delete_pod(self, pod: str) -> None:
        await self._core.delete_namespaced_pod(pod, NAMESPACE)


@pytest.fixture
async def pool(pods: Pods) -> AsyncIterator[Pool]:
    pool = Pool(pods, f"pool-{secrets.token_hex(4)}")
    await pool.create()
    yield pool
    assert not await pool.claims(), "every manager deletes its own"
    await pool.delete()


async def test_a_warm_sandbox_is_there_at_once(pods: Pods, pool: Pool, session: str) -> None:
    await pool.scale(3)
    await pool.filled(3)
    async with managed(warm_pool=pool.name) as manager:
        claim = manager.sandbox_name(session)
        client = await manager.get_client(session)
        bound = await pool.bound(claim)
        assert bound != claim
        assert await output(client, HOST) == bound
        assert client.sandbox is not None
        assert client.sandbox.uid == (await pool.claim(claim))["metadata"]["uid"]
        stats = manager.stats()
        assert (stats.created, stats.warm, stats.cold) == (1, 1, 0)
        await manager.on_session_closed(session)

        async def gone() -> bool:
            return await pods.sandbox(bound) is None

        await until(gone, "the Sandbox to go with its claim")
        warm = await times(manager, pool, session, TIMES)
        assert (manager.stats().warm, manager.stats().cold) == (1 + TIMES, 0)
    async with managed() as manager:
        cold = await times(manager, None, session, TIMES)
    print(f"get_client, median of {TIMES}: warm {warm * 1000:.0f} ms, cold {cold * 1000:.0f} ms")
    assert warm < cold / 3


async def times(manager: SandboxManager, pool: Pool | None, session: str, count: int) -> float:
    """The median of get_client, in seconds, for sessions one after the other."""
    took = []
    for i in range(count):
        if pool is not None:
            await pool.filled(3)
        begun = time.monotonic()
        await manager.get_client(f"{session}-{i}")
        took.append(time.monotonic() - begun)
        await manager.on_session_closed(f"{session}-{i}")
    return statistics.median(took)


async def test_an_empty_pool_starts_cold(pods: Pods, pool: Pool, session: str) -> None:
    async with managed(warm_pool=pool.name) as manager:
        client = await manager.get_client(session)
        claim = manager.sandbox_name(session)
        assert await pool.bound(claim) == claim
        assert await output(client, HOST) == claim
        stats = manager.stats()
        assert (stats.created, stats.warm, stats.cold) == (1, 0, 1)
        await manager.on_session_closed(session)

        async def gone() -> bool:
            return await pods.sandbox(claim) is None

        await until(gone, "the Sandbox to go with its claim")


async def test_a_pool_that_is_made_while_a_session_waits_for_it(pods: Pods, session: str) -> None:
    pool = Pool(pods, f"pool-{secrets.token_hex(4)}")
    async with managed(warm_pool=pool.name) as manager:
        starting = asyncio.create_task(manager.get_client(session))

        async def refused() -> bool:
            conditions = [
                c for claim in await pool.claims() for c in claim.get("status", {}).get("conditions", ())
            ]
            return "WarmPoolNotFound" in [condition["reason"] for condition in conditions]

        await until(refused, "the claim to miss its pool", READY)
        await pool.create()
        assert await output(await starting, HOST) == await pool.bound(manager.sandbox_name(session))
    await pool.delete()


async def test_members_that_do_not_serve_yet(pool: Pool, session: str) -> None:
    """Without the probe a pod is ready before its server listens, and a claim may get it even earlier."""
    await pool.use(pod_template()["spec"])
    await pool.scale(2)
    async with managed(warm_pool=pool.name) as manager:
        hosts = [await output(await manager.get_client(each), HOST) for each in (session, f"{session}-other")]
        assert len(set(hosts)) == 2
        stats = manager.stats()
        assert (stats.created, stats.lost, stats.failed) == (2, 0, 0)


async def test_30_sessions_at_once_on_a_pool_of_10(pool: Pool, session: str) -> None:
    await pool.use(pod_template(resources=limits(memory="256Mi"), readinessProbe=PROBE)["spec"])
    await pool.scale(10)
    await pool.filled(10)
    async with managed(warm_pool=pool.name, max_sessions=30, ready_timeout=150.0) as manager:
        ids = [f"{session}-{i}" for i in range(30)]

        async def host(session_id: str) -> str:
            return await output(await manager.get_client(session_id), HOST)

        hosts = await asyncio.gather(*map(host, ids))
        assert len(set(hosts)) == 30
        assert hosts == [await pool.bound(manager.sandbox_name(each)) for each in ids]
        stats = manager.stats()
        assert (stats.created, stats.lost, stats.failed) == (30, 0, 0)
        assert stats.warm + stats.cold == 30
        assert stats.warm >= 10
        await pool.scale(0)


async def test_a_pool_that_is_scaled_to_nothing_while_sessions_start(
    pods: Pods, pool: Pool, session: str
) -> None:
    """The pool may delete a member that a claim has just taken; the claim then gets another one."""
    await pool.scale(2)
    await pool.filled(2)
    async with managed(warm_pool=pool.name) as manager:
        first = await manager.get_client(session)
        kept = first.sandbox
        await output(first, "open('kept', 'w').write('42')")
        ids = [f"{session}-{i}" for i in range(4)]
        starting = asyncio.gather(*map(manager.get_client, ids))
        await pool.scale(0)
        await starting
        await pool.filled(0)

        async def settled() -> bool:
            bound = [await pods.sandbox(await pool.bound(manager.sandbox_name(each))) for each in ids]
            return all(sandbox is not None and not is_deleting(sandbox) for sandbox in bound)

        await until(settled, "every claim to have a Sandbox that stays", READY)
        hosts = [await output(await manager.get_client(each), HOST) for each in ids]
        assert len(set(hosts)) == len(ids)
        assert hosts == [await pool.bound(manager.sandbox_name(each)) for each in ids]
        assert await output(await manager.get_client(session), "print(open('kept').read())") == "42"
        assert first.sandbox == kept
        stats = manager.stats()
        assert (stats.created, stats.failed) == (5, 0)
        assert stats.warm + stats.cold == 5
        assert stats.warm >= 1


async def test_a_sandbox_deleted_under_a_live_claim(pods: Pods, pool: Pool, session: str) -> None:
    """The controller binds another and says nothing, but for the name in the claim's status."""
    await pool.scale(2)
    await pool.filled(2)
    async with managed(warm_pool=pool.name) as manager:
        client, old = await started(manager, pool, session)
        uid = (await pool.claim(manager.sandbox_name(session)))["metadata"]["uid"]
        await pods.delete_sandbox(old, propagation="Background")
        await another(manager, pool, session, client.sandbox, old)
        assert (await pool.claim(manager.sandbox_name(session)))["metadata"]["uid"] == uid
        assert manager.stats().created == 1


async def test_a_pod_drained_under_a_claim(pool: Pool, session: str) -> None:
    await pool.scale(1)
    await pool.filled(1)
    async with managed(warm_pool=pool.name) as manager:
        client, pod = await started(manager, pool, session)
        await pool.delete_pod(pod)
        await another(manager, pool, session, client.sandbox)


async def test_a_pod_killed_under_a_claim(pods: Pods, pool: Pool, session: str) -> None:
    """Nobody replaces a pod that has Failed: the session's claim is."""
    await pool.scale(1)
    await pool.filled(1)
    async with managed(warm_pool=pool.name) as manager:
        client, pod = await started(manager, pool, session)
        await pods.end(pod)
        await until(lambda: manager.stats().lost == 1, "the death to be noticed", READY)
        await another(manager, pool, session, client.sandbox, pod)


async def test_a_killed_managers_claims_are_adopted_or_lapse(
    pods: Pods, pool: Pool, session: str, tmp_path: Path
) -> None:
    await pool.scale(2)
    await pool.filled(2)
    instance, again, never = secrets.token_hex(8), f"{session}-again", f"{session}-never"
    await run_and_kill(tmp_path, instance, again, never, warm_pool=pool.name)
    settings = {"instance_id": instance, "lease_duration": LEASE, "warm_pool": pool.name}
    async with managed(**settings) as manager:
        lapsing = manager.sandbox_name(never)
        left = await pool.bound(lapsing)
        ends = (await pool.claim(lapsing))["spec"]["lifecycle"]["shutdownTime"]
        client = await manager.get_client(again)
        assert await output(client, HOST) == await pool.bound(manager.sandbox_name(again)) != left
        assert await output(client, "print(open('kept').read())") == "42"
        stats = manager.stats()
        assert (stats.created, stats.warm, stats.cold) == (0, 0, 0)

        async def lapsed() -> bool:
            names = [claim["metadata"]["name"] for claim in await pool.claims()]
            return lapsing not in names and await pods.sandbox(left) is None

        await until(lapsed, "the end of the other one's lease", LEASE + 30)
        ended = dt.datetime.fromisoformat(ends).timestamp()
        assert time.time() >= ended
        await until(lambda: time.time() > ended + 2, "the first manager's last lease to be over")
        assert await output(client, "print(open('kept').read())") == "42"
        assert manager.stats().lost == 0


async def test_tls_from_the_pools_template(pods: Pods, pool: Pool, session: str, tmp_path: Path) -> None:
    async with tls_secret(pods, tmp_path, mutual=True) as tls:
        await pool.use(pod_template(tls, readinessProbe=PROBE)["spec"])
        await pool.scale(1)
        await pool.filled(1)
        async with managed(warm_pool=pool.name, tls=replace(tls, secret_name=None)) as manager:
            client, _ = await started(manager, pool, session)
            assert await output(client, "print(open('kept').read())") == "42"


async def started(manager: SandboxManager, pool: Pool, session: str) -> tuple[Any, str]:
    """The client of a session that has a file, and the pod of its warm sandbox."""
    client = await manager.get_client(session)
    await output(client, "open('kept', 'w').write('42')")
    assert manager.stats().warm == 1
    return client, await pool.bound(manager.sandbox_name(session))


async def another(
    manager: SandboxManager, pool: Pool, session: str, first: object, pod: str | None = None
) -> None:
    """Waits until the session has another machine, which has none of the old one's files."""
    await until(lambda: manager.stats().lost == 1, "the loss to be noticed", READY)
    client = await manager.get_client(session)
    assert client.sandbox != first
    host = await output(client, HOST)
    assert host == await pool.bound(manager.sandbox_name(session))
    assert pod is None or host != pod
    assert await output(client, "import os; print(os.path.exists('kept'))") == "False"
    stats = manager.stats()
    assert (stats.recreated, stats.lost, stats.failed) == (1, 1, 0)
