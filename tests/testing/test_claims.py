"""SandboxClaims and SandboxWarmPools of FakeCustomObjectsApi: how claims bind, start cold, fail and end."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from kubernetes_asyncio.client import ApiException

from prodisco_sandbox.testing import FakeCustomObjectsApi, Request
from tests.support.api import GROUP, PLURAL
from tests.support.fake_api import now, status_of

pytestmark = pytest.mark.looptime

START = dt.datetime(2026, 1, 1, tzinfo=dt.UTC).timestamp()
EXTENSIONS = "extensions.agents.x-k8s.io"
AT = (EXTENSIONS, "v1beta1", "prodisco", "sandboxclaims")
POOLS, TEMPLATES = (*AT[:3], "sandboxwarmpools"), (*AT[:3], "sandboxtemplates")
MERGE = {"_content_type": "application/merge-patch+json"}


@pytest.fixture
async def api() -> AsyncIterator[FakeCustomObjectsApi]:
    async with FakeCustomObjectsApi(auto_ready=1.0, now=lambda: START + now()) as api:
        yield api


def body(name: str = "a", pool: str = "python", **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": f"{EXTENSIONS}/v1beta1",
        "kind": "SandboxClaim",
        "metadata": {"name": name},
        "spec": {"warmPoolRef": {"name": pool}, **spec},
    }


async def claim(api: FakeCustomObjectsApi, name: str = "a", pool: str = "python", **spec: Any) -> Any:
    return await api.create_namespaced_custom_object(*AT, body(name, pool, **spec))


async def warm(api: FakeCustomObjectsApi, replicas: int = 2) -> None:
    """A pool whose members are ready, two seconds later."""
    api.add_warm_pool("python", replicas)
    await asyncio.sleep(2.5)


def found(api: FakeCustomObjectsApi, name: str = "a", kind: str | None = None) -> dict[str, Any]:
    obj = api.get(name, kind=kind)
    assert obj is not None
    return obj


def ready(api: FakeCustomObjectsApi, name: str = "a") -> dict[str, Any]:
    return next(c for c in found(api, name)["status"]["conditions"] if c["type"] == "Ready")


def bound(api: FakeCustomObjectsApi, name: str = "a") -> str | None:
    sandbox: dict[str, str] = (found(api, name).get("status") or {}).get("sandbox", {})
    return sandbox.get("name")


def members(api: FakeCustomObjectsApi) -> list[str]:
    label = "agents.x-k8s.io/warm-pool-sandbox"
    return [s["metadata"]["name"] for s in api.objects if label in s["metadata"]["labels"]]


class Seen:
    """What a watch of claims has seen, one line for each event."""

    def __init__(self, api: FakeCustomObjectsApi) -> None:
        self.steps: list[tuple[float, str]] = []
        api.subscribe(self._hear)

    def _hear(self, kind: str, obj: dict[str, Any]) -> None:
        if obj["kind"] == "SandboxClaim":
            self.steps.append((round(now(), 3), "DELETED" if kind == "DELETED" else shown(obj)))

    @property
    def texts(self) -> list[str]:
        return [text for _, text in self.steps]


def shown(obj: dict[str, Any]) -> str:
    metadata, status = obj["metadata"], obj.get("status") or {}
    noted = sorted(key.partition("/")[2] for key in metadata.get("annotations") or {})
    short = {"claim-first-ready-at": "first", "controller-first-observed-at": "seen", "sandbox-name": "taken"}
    parts = [short[key] for key in noted]
    parts += [f"{c['type']}={c['reason']}/{c['observedGeneration']}" for c in status.get("conditions", ())]
    return " ".join([*parts, *sorted(status.get("sandbox", ()))])


async def test_a_claim_takes_a_ready_member(api: FakeCustomObjectsApi) -> None:
    await warm(api)
    before = {s["metadata"]["name"]: s for s in api.objects}
    seen = Seen(api)
    created = await claim(api)
    await asyncio.sleep(0.1)
    # As claim-watch-events-warm of the real controller.
    assert seen.texts == [
        "",
        "seen",
        "seen taken",
        "seen taken Ready=DependenciesReady/1 name podIPs",
        "first seen taken Ready=DependenciesReady/1 name podIPs",
        "first seen taken Ready=DependenciesReady/2 name podIPs",
    ]
    assert {at for at, _ in seen.steps} == {2.5}
    name = bound(api)
    assert name in before
    assert found(api)["status"]["sandbox"]["podIPs"] == before[name]["status"]["podIPs"]
    assert found(api)["metadata"]["annotations"]["agents.x-k8s.io/sandbox-name"] == name
    assert found(api)["metadata"]["generation"] == 2
    assert ready(api)["lastTransitionTime"] == "2026-01-01T00:00:01Z"  # older than the claim
    sandbox = found(api, str(name))
    assert sandbox["metadata"]["uid"] == before[name]["metadata"]["uid"]
    (owner,) = sandbox["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["uid"]) == ("SandboxClaim", created["metadata"]["uid"])
    assert sandbox["metadata"]["labels"]["agents.x-k8s.io/launch-type"] == "warm"


async def test_a_pool_is_filled_up_again_and_counts_late(api: FakeCustomObjectsApi) -> None:
    await warm(api)
    assert len(members(api)) == 2
    await claim(api)
    await asyncio.sleep(0.1)
    assert len(members(api)) == 2
    assert bound(api) not in members(api)
    await asyncio.sleep(0.5)
    status = {"observedGeneration": 1, "selector": "agents.x-k8s.io/warm-pool-sandbox=57e1f551"}
    before = found(api, "python", "SandboxWarmPool")["status"]
    assert {**before, "selector": ""} == {**status, "replicas": 2, "readyReplicas": 2, "selector": ""}
    await asyncio.sleep(0.6)
    assert found(api, "python", "SandboxWarmPool")["status"].get("readyReplicas") == 1
    await asyncio.sleep(1)
    assert found(api, "python", "SandboxWarmPool")["status"]["readyReplicas"] == 2


async def test_an_empty_pool_starts_cold_under_the_claims_name(api: FakeCustomObjectsApi) -> None:
    api.add_warm_pool("python", 0)
    seen = Seen(api)
    await claim(api)
    await asyncio.sleep(2)
    assert seen.steps == [
        (0.0, ""),
        (0.0, "seen"),
        (0.0, "seen Ready=SandboxNotReady/1 name"),
        (0.0, "seen Ready=DependenciesNotReady/1 name"),
        (1.0, "seen Ready=DependenciesReady/1 name podIPs"),
        (1.0, "first seen Ready=DependenciesReady/1 name podIPs"),
    ]
    assert bound(api) == "a"
    sandbox = found(api, "a", "Sandbox")
    assert sandbox["spec"]["podTemplate"]["spec"]["automountServiceAccountToken"] is False
    assert sandbox["metadata"]["labels"]["agents.x-k8s.io/launch-type"] == "cold"


@pytest.mark.parametrize(("delay", "cold"), [(0.4, False), (60.0, True)])
async def test_a_claim_waits_for_a_filling_pool_for_two_seconds(delay: float, cold: bool) -> None:
    async with FakeCustomObjectsApi(auto_ready=delay, now=lambda: START + now()) as api:
        api.add_warm_pool("python", 1)
        await asyncio.sleep(0.1)
        await claim(api)
        await asyncio.sleep(1.8)
        assert bound(api) == (None if cold else bound(api))
        await asyncio.sleep(1)
        assert (bound(api) == "a") is cold
        assert cold == (ready(api)["status"] == "False")


async def test_a_pool_that_is_missing(api: FakeCustomObjectsApi) -> None:
    await claim(api)
    await asyncio.sleep(100)
    assert (ready(api)["reason"], ready(api)["message"]) == (
        "WarmPoolNotFound",
        'SandboxWarmPool "python" not found',
    )
    assert found(api)["status"]["sandbox"] == {}
    api.add_warm_pool("python", 1)
    await asyncio.sleep(2)
    assert bound(api) == "a"
    assert ready(api)["status"] == "True"


async def test_a_template_that_is_missing_is_looked_for_each_minute(api: FakeCustomObjectsApi) -> None:
    pool = {"sandboxTemplateRef": {"name": "late"}}
    made = {**body("python"), "kind": "SandboxWarmPool", "spec": pool}
    assert (await api.create_namespaced_custom_object(*POOLS, made))["spec"] == {**pool, "replicas": 1}
    await claim(api)
    await asyncio.sleep(1)
    assert ready(api)["message"] == 'SandboxTemplate "late" not found'
    template = {**body("late"), "kind": "SandboxTemplate"}
    template["spec"] = {"podTemplate": {"spec": {"containers": [{"name": "a"}]}}}
    await api.create_namespaced_custom_object(*TEMPLATES, template)
    await asyncio.sleep(50)
    assert members(api)
    assert ready(api)["reason"] == "TemplateNotFound"
    await asyncio.sleep(10)
    assert ready(api)["status"] == "True"


async def test_a_deleted_sandbox_is_replaced_without_a_word(api: FakeCustomObjectsApi) -> None:
    await warm(api)
    await claim(api)
    await asyncio.sleep(2)
    first, seen = str(bound(api)), Seen(api)
    api.delete_now(first)
    await asyncio.sleep(0.1)
    # As claim-watch-events-sandbox-deleted of the real controller.
    assert seen.texts == [
        "first seen Ready=DependenciesReady/2 name podIPs",
        "first seen taken Ready=DependenciesReady/2 name podIPs",
        "first seen taken Ready=DependenciesReady/1 name podIPs",
        "first seen taken Ready=DependenciesReady/2 name podIPs",
    ]
    assert bound(api) not in (None, first)
    assert ready(api)["status"] == "True"


async def test_a_sandbox_that_expires_by_itself_is_replaced_too(api: FakeCustomObjectsApi) -> None:
    await warm(api)
    await claim(api)
    await asyncio.sleep(2)
    first = str(bound(api))
    change = {"spec": {"shutdownPolicy": "Delete"}}
    await api.patch_namespaced_custom_object(GROUP, *AT[1:3], PLURAL, first, change, **MERGE)
    await asyncio.sleep(0.1)
    seen = Seen(api)
    api.expire(first)
    await asyncio.sleep(0.5)
    # As claim-watch-events-sandbox-own-shutdowntime of the real controller.
    assert seen.texts == [
        "first seen taken Ready=SandboxExpired/2 name podIPs",
        "first seen Ready=SandboxExpired/2 name podIPs",
        "first seen taken Ready=SandboxExpired/2 name podIPs",
        "first seen taken Ready=DependenciesReady/1 name podIPs",
        "first seen taken Ready=DependenciesReady/2 name podIPs",
    ]
    assert bound(api) != first


async def test_a_pod_that_is_deleted_under_a_claim(api: FakeCustomObjectsApi) -> None:
    await warm(api)
    await claim(api)
    await asyncio.sleep(1)
    name, seen = bound(api), Seen(api)
    api.delete_pod("a")
    await asyncio.sleep(3)
    # As claim-watch-events-pod-deleted of the real controller.
    assert seen.texts == [
        "first seen taken Finished=PodSucceeded/2 Ready=PodSucceeded/2 name podIPs",
        "first seen taken Ready=DependenciesNotReady/2 name",
        "first seen taken Ready=DependenciesReady/2 name podIPs",
    ]
    assert bound(api) == name
    api.fail_pod(str(name))
    await asyncio.sleep(100)
    assert ready(api)["reason"] == "PodFailed"


async def test_a_sandbox_that_is_suspended_under_a_claim(api: FakeCustomObjectsApi) -> None:
    await warm(api)
    await claim(api)
    await asyncio.sleep(1)
    api.suspend("a")
    await asyncio.sleep(2)
    assert (ready(api)["reason"], ready(api)["observedGeneration"]) == ("SandboxSuspended", 3)
    assert set(found(api)["status"]["sandbox"]) == {"name"}
    api.resume("a")
    await asyncio.sleep(2)
    assert ready(api)["status"] == "True"


@pytest.mark.parametrize("policy", ["Delete", "DeleteForeground", "Retain"])
async def test_a_claim_expires(api: FakeCustomObjectsApi, policy: str) -> None:
    await warm(api)
    end = "2026-01-01T00:00:10Z"
    await claim(api, lifecycle={"shutdownTime": end, "shutdownPolicy": policy})
    await asyncio.sleep(1)
    seen, name = Seen(api), str(bound(api))
    await asyncio.sleep(10)
    expired = "first seen taken Ready=ClaimExpired/2"
    last = {
        "Delete": [(10.0, "DELETED")],
        "DeleteForeground": [(10.0, f"{expired} name podIPs"), (10.7, "DELETED")],
        "Retain": [(10.0, expired)],
    }[policy]
    steps = [(round(at, 1), text) for at, text in seen.steps]
    assert steps == [(10.0, f"{expired} name podIPs"), *last]
    assert api.get(name) is None
    if policy == "Retain":
        assert ready(api)["message"] == "Claim expired. Sandbox cleanup initiated."
        assert found(api)["status"]["sandbox"] == {}


async def test_expire_ends_a_claim_at_once(api: FakeCustomObjectsApi) -> None:
    api.add_warm_pool("python", 0)
    await claim(api, lifecycle={"shutdownPolicy": "Delete"})
    await asyncio.sleep(1.5)
    api.expire("a")
    await asyncio.sleep(0.1)
    assert not api.claims
    assert not api.objects


async def test_a_deleted_claim_takes_its_sandbox_along(api: FakeCustomObjectsApi) -> None:
    await warm(api)
    await claim(api)
    await asyncio.sleep(0.1)
    name, order = str(bound(api)), []
    api.subscribe(lambda kind, obj: order.append((kind, obj["metadata"]["name"])))
    await api.delete_namespaced_custom_object(*AT, "a")
    await asyncio.sleep(0.1)
    assert order[:2] == [("DELETED", "a"), ("DELETED", name)]


async def test_a_deleted_claim_may_wait_for_its_sandbox(api: FakeCustomObjectsApi) -> None:
    await warm(api)
    await claim(api)
    await asyncio.sleep(0.1)
    options = {"propagationPolicy": "Foreground"}
    marked = await api.delete_namespaced_custom_object(*AT, "a", body=options)
    assert marked["metadata"]["finalizers"] == ["foregroundDeletion"]
    await asyncio.sleep(0.6)
    assert len(api.claims) == 1
    await asyncio.sleep(0.2)
    assert not api.claims


@pytest.mark.parametrize(
    ("spec", "reason", "message"),
    [
        (
            {"additionalPodMetadata": {"labels": {"example.com/a": "b"}}},
            "InvalidMetadata",
            'invalid additionalPodMetadata: failed to validate label "example.com/a":'
            ' label domain "example.com" is not in the allowlist',
        ),
        (
            {"additionalPodMetadata": {"labels": {"a": "b"}}},
            "InvalidMetadata",
            'invalid additionalPodMetadata: failed to validate label "a": label "a" must have a domain prefix'
            " (e.g. 'sandbox.users.io/my-label') to prevent opting into unintended policy domains",
        ),
        (
            {"additionalPodMetadata": {"annotations": {"x.k8s.io/a": "b"}}},
            "InvalidMetadata",
            'invalid additionalPodMetadata: failed to validate annotation "x.k8s.io/a":'
            ' restricted system domain: "x.k8s.io" is not allowed in AdditionalPodMetadata',
        ),
        (
            {"env": [{"name": "A", "value": "1"}]},
            "EnvVarsInjectionRejected",
            "environment variable injection rejected:"
            " environment variable injection is not allowed by the template policy",
        ),
        (
            {"volumeClaimTemplates": [{"metadata": {"name": "v"}, "spec": {}}]},
            "VolumeClaimTemplatesError",
            "failed to merge volume claim templates: volume claim templates are disallowed by the template",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
async def test_claims_that_never_get_a_sandbox(
    api: FakeCustomObjectsApi, spec: Any, reason: str, message: str
) -> None:
    await warm(api)
    await claim(api, **spec)
    await asyncio.sleep(100)
    assert (ready(api)["reason"], ready(api)["message"]) == (reason, message)
    assert found(api)["status"]["sandbox"] == {}


async def test_allowed_metadata_reaches_the_pod(api: FakeCustomObjectsApi) -> None:
    await warm(api)
    labels = {"sandbox.users.io/a": "b"}
    await claim(api, additionalPodMetadata={"labels": labels, "annotations": {"example.com/c": "d"}})
    await asyncio.sleep(0.1)
    pod = found(api, str(bound(api)))["spec"]["podTemplate"]["metadata"]
    assert pod["labels"].items() >= labels.items()
    assert pod["annotations"] == {"example.com/c": "d"}


async def test_a_name_that_another_sandbox_has(api: FakeCustomObjectsApi) -> None:
    api.add_warm_pool("python", 0)
    sandbox = {**body(), "apiVersion": f"{GROUP}/v1beta1", "kind": "Sandbox"}
    sandbox["spec"] = {"podTemplate": {"spec": {"containers": [{"name": "a"}]}}}
    await api.create_namespaced_custom_object(GROUP, "v1beta1", "prodisco", PLURAL, sandbox)
    await claim(api)
    await asyncio.sleep(3)
    assert ready(api)["message"] == (
        'Error seen: sandbox "a" is not controlled by claim "a".'
        " Please use a different claim name or delete the sandbox manually"
    )
    api.delete_now("a", kind="Sandbox")
    await asyncio.sleep(3)
    assert ready(api)["status"] == "True"


async def test_quotas(api: FakeCustomObjectsApi) -> None:
    api.add_warm_pool("python", 0)
    api.quota, api.claim_quota = 0, 1
    await claim(api)
    await asyncio.sleep(1)
    assert ready(api)["reason"] == "ReconcilerError"
    assert "exceeded quota" in ready(api)["message"]
    with pytest.raises(ApiException) as caught:
        await claim(api, "b")
    assert "count/sandboxclaims.extensions.agents.x-k8s.io=1" in caught.value.body
    api.quota = None
    await asyncio.sleep(3)
    assert ready(api)["status"] == "True"


async def test_a_pool_that_is_refused_its_members_tries_again(api: FakeCustomObjectsApi) -> None:
    api.quota = 1
    api.add_warm_pool("python", 2)
    await asyncio.sleep(5)
    assert len(members(api)) == 1
    api.quota = None
    await asyncio.sleep(2)
    assert len(members(api)) == 2


async def test_a_claim_may_bring_volumes_where_the_template_allows_them(api: FakeCustomObjectsApi) -> None:
    await warm(api)
    change = {"spec": {"volumeClaimTemplatesPolicy": "Allowed"}}
    await api.patch_namespaced_custom_object(*TEMPLATES, "python", change, **MERGE)
    volumes = [{"metadata": {"name": "v"}, "spec": {}}]
    await claim(api, volumeClaimTemplates=volumes)
    await asyncio.sleep(2)
    assert bound(api) == "a"
    assert found(api, "a", "Sandbox")["spec"]["volumeClaimTemplates"] == volumes


async def test_a_pool_is_scaled(api: FakeCustomObjectsApi) -> None:
    await warm(api)
    await claim(api)
    await asyncio.sleep(0.1)
    api.add_warm_pool("python", 0)
    await asyncio.sleep(2)
    assert not members(api)
    assert ready(api)["status"] == "True"
    await claim(api, "b")
    await asyncio.sleep(2)
    assert bound(api, "b") == "b"
    api.delete_now("python", kind="SandboxWarmPool")
    await asyncio.sleep(2)
    assert {bound(api), bound(api, "b")} == {s["metadata"]["name"] for s in api.objects}


async def test_a_member_that_fails_is_replaced_after_five_minutes(api: FakeCustomObjectsApi) -> None:
    await warm(api, 1)
    (name,) = members(api)
    api.fail_pod(name)
    await asyncio.sleep(290)
    assert members(api) == [name]
    api.add_warm_pool("python", 2)
    await asyncio.sleep(20)
    assert name not in members(api)
    assert len(members(api)) == 2


async def test_what_the_test_writes_stays(api: FakeCustomObjectsApi) -> None:
    await warm(api)
    await claim(api)
    await asyncio.sleep(0.1)
    api.set_condition("a", "Ready", "False", "SandboxMissing")
    api.delete_now(str(bound(api)))
    await asyncio.sleep(10)
    assert ready(api)["reason"] == "SandboxMissing"


async def test_without_a_controller_the_test_says_what_is_ready() -> None:
    async with FakeCustomObjectsApi() as api:
        await claim(api)
        api.set_ready("a", podIPs=["10.0.0.7"])
        assert found(api)["status"]["sandbox"] == {"name": "a", "podIPs": ["10.0.0.7"]}
        assert ready(api)["status"] == "True"
        with pytest.raises(KeyError, match="there is no Sandbox 'a'"):
            api.delete_pod("a")


async def test_kinds_do_not_mix(api: FakeCustomObjectsApi) -> None:
    await warm(api)
    watch = await api.list_namespaced_custom_object(*AT, watch=True, _preload_content=False)
    await claim(api, "a")
    listed = await api.list_namespaced_custom_object(*AT)
    assert listed["kind"] == "SandboxClaimList"
    assert [item["kind"] for item in listed["items"]] == ["SandboxClaim"]
    assert {s["kind"] for s in api.objects} == {"Sandbox"}
    event = json.loads(await watch.content.readline())
    assert (event["type"], event["object"]["kind"]) == ("ADDED", "SandboxClaim")
    watch.send_bookmark()
    while event["type"] != "BOOKMARK":
        event = json.loads(await watch.content.readline())
    assert event["object"]["kind"] == "SandboxClaim"
    watch.close()
    api.forbid("delete")
    with pytest.raises(ApiException, match='resource \\\\"sandboxclaims\\\\" in API group'):
        await api.delete_namespaced_custom_object(*AT, "a")
    request = api.requests[-1]
    assert isinstance(request, Request)
    assert (request.verb, request.plural) == ("delete", "sandboxclaims")


async def test_a_cluster_without_the_extensions() -> None:
    async with FakeCustomObjectsApi(extensions=False) as api:
        assert await status_of(claim(api)) == 404
        assert await status_of(api.get_api_resources(EXTENSIONS, "v1beta1")) == 404
        api.extensions = True
        served = {r.name for r in (await api.get_api_resources(EXTENSIONS, "v1beta1")).resources}
        assert {"sandboxclaims", "sandboxclaims/status", "sandboxwarmpools", "sandboxtemplates"} <= served
        await claim(api)
