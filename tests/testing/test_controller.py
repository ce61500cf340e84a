"""The controller of FakeCustomObjectsApi: what it shows of pods, suspension, expiry and reused names."""

from __future__ import annotations

import asyncio
import datetime as dt
import math
from collections.abc import AsyncIterator
from typing import Any

import pytest

from prodisco_sandbox.testing import FakeCustomObjectsApi
from tests.support.api import GROUP, PLURAL, body
from tests.support.fake_api import create, delete, now, patch

pytestmark = pytest.mark.looptime

START = dt.datetime(2026, 1, 1, tzinfo=dt.UTC).timestamp()

UP = "Suspended=False/NotSuspended"
RUNNING = f"{UP} PodScheduled=True/PodScheduled Ready=True/DependenciesReady +ip"


@pytest.fixture
async def api() -> AsyncIterator[FakeCustomObjectsApi]:
    async with FakeCustomObjectsApi(auto_ready=1.0, now=lambda: START + now()) as api:
        yield api


class Seen:
    """What has become of Sandboxes, by the time that it did."""

    def __init__(self, api: FakeCustomObjectsApi) -> None:
        self.steps: list[tuple[float, str]] = []
        api.subscribe(self._hear)

    def _hear(self, kind: str, sandbox: dict[str, Any]) -> None:
        text = "DELETED" if kind == "DELETED" else shown(sandbox)
        if not self.steps or self.steps[-1][1] != text:
            self.steps.append((round(now(), 3), text))

    def new(self) -> list[tuple[float, str]]:
        """What is new since it was last asked, with times since then."""
        steps, self.steps = self.steps, self.steps[-1:]
        return steps


def shown(sandbox: dict[str, Any]) -> str:
    status = sandbox.get("status") or {}
    parts = [f"{c['type']}={c['status']}/{c['reason']}" for c in status.get("conditions", ())]
    return " ".join(parts + ["+ip"] * ("podIPs" in status))


async def ready(api: FakeCustomObjectsApi, name: str = "a") -> dict[str, Any]:
    """A Sandbox that is ready, one second later."""
    await create(api, name)
    await asyncio.sleep(1.5)
    found = api.get(name)
    assert found is not None
    assert shown(found) == RUNNING
    return found


def condition(api: FakeCustomObjectsApi, kind: str, name: str = "a") -> dict[str, Any]:
    found = api.get(name)
    assert found is not None
    return next(c for c in found["status"]["conditions"] if c["type"] == kind)


async def test_a_new_sandbox_is_made_scheduled_and_ready(api: FakeCustomObjectsApi) -> None:
    seen = Seen(api)
    await create(api)
    await asyncio.sleep(2)
    assert seen.steps == [
        (0.0, ""),
        (
            0.0,
            f"{UP} PodScheduled=Unknown/PodSchedulingUnknown Ready=False/DependenciesNotReady",
        ),
        (0.0, f"{UP} PodScheduled=True/PodScheduled Ready=False/DependenciesNotReady"),
        (1.0, RUNNING),
    ]


async def test_the_status_of_a_ready_sandbox_is_whole(api: FakeCustomObjectsApi) -> None:
    given = body("sandbox-20a4fd8c486f34b044fef0130e71a55d")
    given["spec"]["service"] = True
    await api.create_namespaced_custom_object(GROUP, "v1beta1", "prodisco", PLURAL, given)
    await asyncio.sleep(2)
    (found,) = api.objects
    at, later = "2026-01-01T00:00:00Z", "2026-01-01T00:00:01Z"

    def written(kind: str, status: str, reason: str, message: str, since: str) -> dict[str, Any]:
        fields = {"type": kind, "status": status, "reason": reason, "message": message}
        return {**fields, "observedGeneration": 1, "lastTransitionTime": since}

    # As the real controller wrote it, but for times, node and address.
    assert found["status"] == {
        "conditions": [
            written("Suspended", "False", "NotSuspended", "Sandbox is not suspended", at),
            written("PodScheduled", "True", "PodScheduled", "", at),
            written("Ready", "True", "DependenciesReady", "Pod is Ready; Service Exists", later),
        ],
        "nodeName": "node-1",
        "podIPs": ["10.244.0.2"],
        "selector": "agents.x-k8s.io/sandbox-name-hash=7ca40bb1",
        "service": given["metadata"]["name"],
        "serviceFQDN": f"{given['metadata']['name']}.prodisco.svc.cluster.local",
    }
    assert found["metadata"]["annotations"] == {"agents.x-k8s.io/pod-name": given["metadata"]["name"]}


@pytest.mark.parametrize("reason", ["PodSucceeded", "PodFailed"])
async def test_a_deleted_pod_is_finished_for_a_moment_and_another_one_comes(
    api: FakeCustomObjectsApi, reason: Any
) -> None:
    before, seen = await ready(api), Seen(api)
    api.delete_pod("a", reason=reason)
    await asyncio.sleep(5)
    assert seen.steps == [
        (1.85, f"{UP} PodScheduled=True/PodScheduled Ready=False/{reason} Finished=True/{reason} +ip"),
        (2.2, f"{UP} PodScheduled=Unknown/PodSchedulingUnknown Ready=False/DependenciesNotReady"),
        (2.2, f"{UP} PodScheduled=True/PodScheduled Ready=False/DependenciesNotReady"),
        (3.2, RUNNING),
    ]
    after = api.get("a")
    assert after is not None
    assert after["metadata"]["uid"] == before["metadata"]["uid"]
    assert after["status"]["podIPs"] != before["status"]["podIPs"]


async def test_a_pod_that_is_deleted_by_force_is_gone_at_once(api: FakeCustomObjectsApi) -> None:
    await ready(api)
    api.delete_pod("a", graceful=False)
    assert condition(api, "Ready")["message"] == "Pod exists with phase: Pending"
    assert "podIPs" not in api.objects[0]["status"]
    await asyncio.sleep(2)
    assert shown(api.objects[0]) == RUNNING


async def test_a_failed_pod_stays_until_it_is_deleted(api: FakeCustomObjectsApi) -> None:
    await ready(api)
    api.fail_pod("a")
    failed = f"{UP} PodScheduled=True/PodScheduled Ready=False/PodFailed Finished=True/PodFailed +ip"
    assert shown(api.objects[0]) == failed
    assert condition(api, "Finished")["message"] == "Pod failed"
    await asyncio.sleep(3600)
    assert shown(api.objects[0]) == failed
    seen = Seen(api)
    api.delete_pod("a")
    await asyncio.sleep(5)
    assert "PodSucceeded" not in str(seen.steps)
    assert shown(api.objects[0]) == RUNNING


@pytest.mark.parametrize("by", ["suspend", "patch", "replicas"])
async def test_suspended_in_two_steps_and_resumed(api: FakeCustomObjectsApi, by: str) -> None:
    async def mode(wanted: str) -> None:
        if by == "suspend":
            (api.suspend if wanted == "Suspended" else api.resume)("a")
        elif by == "patch":
            await patch(api, {"spec": {"operatingMode": wanted}})
        else:
            await patch(api, {"spec": {"replicas": int(wanted == "Running")}})

    before, seen = await ready(api), Seen(api)
    await mode("Suspended")
    await asyncio.sleep(1)
    on = "Suspended=False/PodTerminating PodScheduled=True/PodScheduled Ready=False/SandboxSuspended"
    suspended = "Suspended=True/PodTerminated Ready=False/SandboxSuspended"
    assert seen.new() == [
        (1.5, RUNNING),
        (1.5, f"{on} +ip"),
        (1.85, f"{on} Finished=True/PodSucceeded +ip"),
        (2.2, suspended),
    ]
    assert "annotations" not in api.objects[0]["metadata"]
    assert condition(api, "Suspended")["observedGeneration"] == 2
    await mode("Running")
    await asyncio.sleep(2)
    # The conditions keep their places: PodScheduled was away.
    up = "Suspended=False/NotSuspended Ready={} PodScheduled={}"
    assert seen.new() == [
        (2.2, suspended),
        (2.5, up.format("False/DependenciesNotReady", "Unknown/PodSchedulingUnknown")),
        (2.5, up.format("False/DependenciesNotReady", "True/PodScheduled")),
        (3.5, up.format("True/DependenciesReady", "True/PodScheduled") + " +ip"),
    ]
    after = api.get("a")
    assert after is not None
    assert after["metadata"]["uid"] == before["metadata"]["uid"]
    assert after["status"]["podIPs"] != before["status"]["podIPs"]


async def test_a_failed_pod_is_replaced_by_suspending_and_resuming(api: FakeCustomObjectsApi) -> None:
    await ready(api)
    api.fail_pod("a")
    api.suspend("a")
    await asyncio.sleep(1)
    assert shown(api.objects[0]) == "Suspended=True/PodTerminated Ready=False/SandboxSuspended"
    api.resume("a")
    await asyncio.sleep(2)
    assert condition(api, "Ready")["status"] == "True"


async def test_resumed_while_its_pod_ends_it_waits_for_that(api: FakeCustomObjectsApi) -> None:
    await ready(api)
    api.suspend("a")
    await asyncio.sleep(0.1)
    api.resume("a")
    await asyncio.sleep(0.1)
    # As 0.5.6: it does not look at the pod's deletionTimestamp.
    assert condition(api, "Ready")["status"] == "True"
    await asyncio.sleep(5)
    assert api.objects[0]["status"]["podIPs"] == ["10.244.0.3"]


@pytest.mark.parametrize("policy", ["Delete", "Retain"])
async def test_expired_first_and_gone_after(api: FakeCustomObjectsApi, policy: str) -> None:
    await ready(api)
    await patch(api, {"spec": {"shutdownPolicy": policy}})
    await asyncio.sleep(0)
    seen = Seen(api)
    end = dt.datetime.fromtimestamp(START + 100, dt.UTC).isoformat()
    await patch(api, {"spec": {"shutdownTime": end}})
    await asyncio.sleep(200)
    expired = "Suspended=False/NotSuspended Ready=False/SandboxExpired"
    last = "DELETED" if policy == "Delete" else expired
    assert [(round(at, 2), text) for at, text in seen.steps[1:]] == [
        (100.0, f"{expired} +ip"),
        (100.07, last),
    ]
    if policy == "Retain":
        assert set(api.objects[0]["status"]) == {"conditions"}


async def test_a_shutdown_time_that_moves_in_the_last_moment_counts(api: FakeCustomObjectsApi) -> None:
    await ready(api)
    await patch(api, {"spec": {"shutdownPolicy": "Delete"}})
    api.expire("a")
    await asyncio.sleep(0.01)
    assert condition(api, "Ready")["reason"] == "SandboxExpired"
    await patch(api, {"spec": {"shutdownTime": None}})
    await asyncio.sleep(10)
    assert condition(api, "Ready")["reason"] == "DependenciesReady"


async def test_a_name_that_an_old_pod_holds_has_to_wait(api: FakeCustomObjectsApi) -> None:
    old = await ready(api)
    await delete(api)
    seen = Seen(api)
    await create(api)
    await asyncio.sleep(0.1)
    assert shown(api.objects[0]) == (
        "Suspended=False/NotSuspended PodScheduled=Unknown/PodSchedulingUnknown Ready=False/ReconcilerError"
    )
    uid = old["metadata"]["uid"]
    assert condition(api, "Ready")["message"] == (
        f'Error seen: pod "a" is owned by Sandbox/a (UID: {uid}), not by sandbox "a"'
    )
    await asyncio.sleep(5)
    assert shown(api.objects[0]) == RUNNING
    assert [at for at, _ in seen.steps] == [1.5, 1.5, 2.2, 2.2, 3.2]


async def test_a_pod_that_the_api_server_refuses(api: FakeCustomObjectsApi) -> None:
    api.pod_refusal = 'pods "a" is forbidden: violates PodSecurity "restricted:latest"'
    await create(api)
    await asyncio.sleep(100)
    found = condition(api, "Ready")
    assert (found["reason"], found["message"]) == ("ReconcilerError", f"Error seen: {api.pod_refusal}")
    api.pod_refusal = ""
    await asyncio.sleep(2)
    assert shown(api.objects[0]) == RUNNING


async def test_a_pod_may_never_get_ready() -> None:
    async with FakeCustomObjectsApi(auto_ready=math.inf) as api:
        await create(api)
        await asyncio.sleep(10_000)
        assert condition(api, "Ready")["message"] == "Pod exists with phase: Pending"


async def test_each_pod_of_a_sandbox_is_asked_about() -> None:
    fates: list[Any] = [True, 5.0, None, None]
    async with FakeCustomObjectsApi(auto_ready=lambda _: fates.pop(0)) as api:
        await create(api)
        for seconds, reason in (
            (0.1, "DependenciesReady"),
            (5.1, "DependenciesReady"),
            (99, "DependenciesNotReady"),
        ):
            await asyncio.sleep(seconds)
            assert condition(api, "Ready")["reason"] == reason
            api.delete_pod("a", graceful=False)


async def test_what_the_test_writes_stays(api: FakeCustomObjectsApi) -> None:
    await ready(api)
    api.set_condition("a", "Ready", "False", "MultiplePods")
    await patch(api, {"spec": {"operatingMode": "Suspended"}})
    await asyncio.sleep(10)
    assert condition(api, "Ready")["reason"] == "MultiplePods"
    api.set_ready("a")
    await asyncio.sleep(10)
    assert condition(api, "Suspended")["status"] == "True"


async def test_a_sandbox_without_a_pod_has_none_to_end(api: FakeCustomObjectsApi) -> None:
    await ready(api)
    api.suspend("a")
    await asyncio.sleep(2)
    for end in (api.delete_pod, api.fail_pod):
        with pytest.raises(KeyError, match="'a' has no pod: auto_ready or set_ready gives it one"):
            end("a")
        with pytest.raises(KeyError, match="there is no Sandbox 'b'"):
            end("b")


async def test_what_it_set_ready_can_be_ended_too() -> None:
    async with FakeCustomObjectsApi(pod_termination=0.2) as api:
        await create(api)
        api.set_ready("a", podIPs=["10.0.0.7"])
        api.delete_pod("a")
        await asyncio.sleep(1)
        assert condition(api, "Ready")["message"] == "Pod exists with phase: Pending"
        api.set_ready("a")
        assert api.objects[0]["status"]["podIPs"] != ["10.0.0.7"]


def test_things_change_while_no_loop_runs() -> None:
    with asyncio.Runner() as runner:
        api = FakeCustomObjectsApi(auto_ready=True, pod_termination=0.0)
        for _ in range(2):
            runner.run(create(api))
            runner.run(api.until(lambda: shown(api.objects[0]) == RUNNING))
            api.delete_now("a")
        runner.run(create(api))
    api.delete_now("a")
    assert not api.objects
