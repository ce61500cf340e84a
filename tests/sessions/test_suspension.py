"""Sessions whose Sandboxes are suspended instead of deleted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from prodisco_sandbox import (
    SandboxError,
    SandboxManager,
    SandboxManagerConfig,
    SandboxTimeoutError,
    SandboxUnavailableError,
)
from prodisco_sandbox._cluster.manifest import SANDBOX
from prodisco_sandbox._cluster.metadata import LABEL_INSTANCE, lease_time
from prodisco_sandbox.testing import FakeCustomObjectsApi
from tests.support.managers import Clients, LoopTimeApi, change_spec, left_behind, managed, now, settle

pytestmark = pytest.mark.looptime

NAME = SANDBOX.name("s")
IDLE, TICK, KEPT = 30.0, 10.0, 1000.0
SUSPENDS: dict[str, Any] = {
    "on_idle": "suspend",
    "workspace_storage": "1Gi",
    "suspended_for": KEPT,
    "session_idle_timeout": IDLE,
    "idle_check_interval": TICK,
}


@asynccontextmanager
async def suspending(
    *, clients: Clients | None = None, ready: Any = 1.0, **settings: Any
) -> AsyncIterator[tuple[FakeCustomObjectsApi, SandboxManager]]:
    async with LoopTimeApi(auto_ready=ready) as api:
        api.pod_termination = 0.7
        async with managed(api, clients, **SUSPENDS | settings) as manager:
            yield api, manager


def found(api: FakeCustomObjectsApi, name: str = NAME) -> dict[str, Any]:
    sandbox = api.get(name)
    assert sandbox is not None
    return sandbox


def mode(api: FakeCustomObjectsApi, name: str = NAME) -> str:
    return str(found(api, name)["spec"]["operatingMode"])


def is_suspended(api: FakeCustomObjectsApi, name: str = NAME) -> bool:
    conditions = (found(api, name).get("status") or {}).get("conditions") or ()
    return any((c["type"], c["status"]) == ("Suspended", "True") for c in conditions)


async def suspended(api: FakeCustomObjectsApi, manager: SandboxManager, session_id: str = "s") -> Any:
    """A session that was used once and is suspended; returns its client of that time."""
    client = await manager.get_client(session_id)
    await api.until(lambda: is_suspended(api, SANDBOX.name(session_id)), timeout=KEPT)
    return client


async def test_an_idle_session_gives_its_slot_back_and_keeps_its_object() -> None:
    async with suspending(max_sessions=1) as (api, manager):
        client = await suspended(api, manager)
        assert now() == pytest.approx(1 + IDLE + TICK, abs=TICK)
        assert client.closed
        sandbox = found(api)
        assert sandbox["spec"]["volumeClaimTemplates"][0]["metadata"]["name"] == "workspace"
        assert sandbox["spec"]["shutdownTime"] == lease_time(now() - 0.7, KEPT)
        assert not manager.has_session("s")
        assert manager.sandbox_name("s") == NAME
        stats = manager.stats()
        assert (stats.ready, stats.closing, stats.suspended, stats.reaped) == (0, 0, 1, 1)
        await manager.get_client("another")  # in its slot
        assert api.count("delete") == 0


async def test_the_next_use_starts_it_with_one_patch() -> None:
    async with suspending() as (api, manager):
        first = await suspended(api, manager)
        before, uid = len(api.requests), found(api)["metadata"]["uid"]
        assert api.count("patch", NAME) == 1
        begun = now()
        client = await manager.get_client("s")
        assert now() - begun == pytest.approx(1.0, abs=0.1)
        assert [r.verb for r in api.requests[before:]] == ["patch"]
        assert (mode(api), found(api)["metadata"]["uid"]) == ("Running", uid)
        assert client is not first
        assert client.sandbox is not None
        assert (client.sandbox.uid, client.sandbox == first.sandbox) == (uid, False)
        assert found(api)["spec"]["shutdownTime"] == lease_time(begun, 1800.0)
        stats = manager.stats()
        assert (stats.created, stats.recreated, stats.resumed, stats.lost) == (1, 0, 1, 0)
        await api.until(lambda: is_suspended(api))  # and again
        await manager.get_client("s")
        assert (manager.stats().suspended, manager.stats().resumed) == (2, 2)


async def test_a_resumed_session_keeps_its_lease() -> None:
    async with suspending(lease_duration=60.0, session_idle_timeout=200.0) as (api, manager):
        await suspended(api, manager)
        async with manager.session("s"):
            await asyncio.sleep(300)
            assert manager.has_session("s")
        assert found(api)["metadata"].get("deletionTimestamp") is None


async def test_nobody_comes_back() -> None:
    async with suspending() as (api, manager):
        await suspended(api, manager)
        await asyncio.sleep(KEPT - 5)
        assert is_suspended(api)
        await asyncio.sleep(10)
        assert api.objects == []
        client = await manager.get_client("s")
        assert client.sandbox is not None
        assert (manager.stats().created, manager.stats().recreated) == (2, 1)


async def test_a_call_while_it_is_being_suspended_waits_until_it_is() -> None:
    async with suspending() as (api, manager):
        api.pod_termination = 5.0
        await manager.get_client("s")
        with api.faults.add("patch", hold=True, name=NAME) as gate:
            await api.until(lambda: manager.stats().closing == 1)
            waiting = asyncio.create_task(manager.get_client("s"))
            await settle()
            assert not waiting.done()
            del gate
        assert mode(api) in ("Running", "Suspended")
        client = await waiting
        assert client.sandbox is not None
        # Running is asked for only once the old pod is gone: it would be reported as ready before.
        patches = [r for r in api.requests if r.verb == "patch" and "operatingMode" in str(r.body)]
        assert [r.body["spec"]["operatingMode"] for r in patches] == ["Suspended", "Running"]
        assert patches[1].time - patches[0].time >= 5.0
        assert api.count("create") == 1


async def test_a_close_while_it_is_being_suspended_deletes_it() -> None:
    async with suspending() as (api, manager):
        await manager.get_client("s")
        with api.faults.add("patch", hold=True, name=NAME):
            await api.until(lambda: manager.stats().closing == 1)
            closing = asyncio.create_task(manager.on_session_closed("s"))
            await settle()
        await closing
        assert api.objects == []
        assert manager.stats().suspended == 0


@pytest.mark.parametrize("steps", range(12))
async def test_a_close_at_any_moment_of_the_suspension_deletes_it(steps: int) -> None:
    async with suspending() as (api, manager):
        await manager.get_client("s")
        await api.until(lambda: manager.stats().closing == 1)
        for _ in range(steps):
            await asyncio.sleep(0)
        await manager.on_session_closed("s")
        assert api.objects == []
        client = await manager.get_client("s")
        assert client.sandbox is not None
        assert client.sandbox.uid == found(api, client.sandbox.name)["metadata"]["uid"]
        assert manager.stats().resumed == 0


async def test_a_close_of_what_is_suspended_deletes_it() -> None:
    async with suspending() as (api, manager):
        await suspended(api, manager)
        api.faults.add("delete", error=503, times=2)
        await manager.on_session_closed("s")
        await asyncio.sleep(TICK)
        assert api.objects == []
        await manager.on_session_closed("s")
        assert api.count("delete") == 3


async def test_a_close_after_a_restart_finds_what_the_earlier_process_had_suspended() -> None:
    async with suspending() as (api, manager):
        await suspended(api, manager)
        await manager.shutdown()
        assert is_suspended(api)
        async with managed(api, **SUSPENDS) as successor:
            await successor.on_session_closed("s")
            assert api.objects == []


async def test_a_resume_that_fails_suspends_again_and_raises() -> None:
    async with suspending(ready_timeout=5.0) as (api, manager):
        await suspended(api, manager)
        uid = found(api)["metadata"]["uid"]
        api.pod_refusal = "pods are not made today"
        with pytest.raises(SandboxTimeoutError):
            await manager.get_client("s")
        await api.until(lambda: is_suspended(api))
        assert found(api)["metadata"]["uid"] == uid
        assert (manager.stats().failed, manager.stats().suspended) == (1, 2)
        api.pod_refusal = ""
        await manager.get_client("s")
        assert found(api)["metadata"]["uid"] == uid
        assert api.count("delete") == 0


async def test_one_that_is_deleted_while_it_is_resumed_is_made_anew() -> None:
    async with suspending() as (api, manager):
        await suspended(api, manager)
        with api.faults.add("patch", hold=True, name=NAME):
            waiting = asyncio.create_task(manager.get_client("s"))
            await settle()
            api.delete_now(NAME)
        client = await waiting
        assert client.sandbox is not None
        assert client.sandbox.name != NAME
        assert (manager.stats().created, manager.stats().recreated) == (2, 1)


async def test_one_that_another_manager_has_just_claimed_is_left_to_it() -> None:
    async with suspending() as (api, manager):
        await manager.get_client("s")
        claim = {"metadata": {"labels": {LABEL_INSTANCE: "another"}}}
        merge = {"_content_type": "application/merge-patch+json"}
        with api.faults.add("patch", hold=True, name=NAME, times=1):
            await api.until(lambda: manager.stats().closing == 1)
            await settle()
            await api.patch_namespaced_custom_object(
                *("agents.x-k8s.io", "v1beta1", "prodisco", "sandboxes", NAME, claim), **merge
            )
        await asyncio.sleep(1)
        assert mode(api) == "Running"
        assert (manager.stats().suspended, manager.stats().closing) == (0, 0)


async def test_one_that_changes_while_it_is_suspended_is_looked_at_again() -> None:
    async with suspending() as (api, manager):
        await manager.get_client("s")
        with api.faults.add("patch", hold=True, name=NAME, times=1):
            await api.until(lambda: manager.stats().closing == 1)
            await settle()
            await change_spec(api, NAME, service=False)
        await api.until(lambda: is_suspended(api))
        assert manager.stats().suspended == 1


async def test_the_first_suspended_goes_where_there_are_too_many() -> None:
    async with suspending(max_suspended=2) as (api, manager):
        for session_id in ("a", "b", "c"):
            await suspended(api, manager, session_id)
        await asyncio.sleep(1)
        assert [found["metadata"]["name"] for found in api.objects] == sorted(map(SANDBOX.name, "bc"))
        await manager.get_client("a")
        assert manager.stats().created == 4


async def test_a_session_busy_with_a_call_is_not_suspended() -> None:
    async with suspending() as (api, manager):
        async with manager.session("s"):
            await asyncio.sleep(10 * IDLE)
            assert mode(api) == "Running"
        await api.until(lambda: is_suspended(api))


async def test_somebody_elses_suspension_is_undone_on_the_next_use() -> None:
    async with suspending(session_idle_timeout=1000.0) as (api, manager):
        await manager.get_client("s")
        api.suspend(NAME)
        await asyncio.sleep(5)
        await manager.get_client("s")
        assert (mode(api), manager.stats().resumed, api.count("delete")) == ("Running", 1, 0)


async def test_somebody_else_starts_what_is_suspended() -> None:
    async with suspending() as (api, manager):
        await suspended(api, manager)
        uid = found(api)["metadata"]["uid"]
        api.resume(NAME)
        await asyncio.sleep(5)
        client = await manager.get_client("s")
        assert client.sandbox is not None
        assert client.sandbox.uid == uid


# The end of the manager, and the next one


async def test_a_shutdown_suspends_where_the_instance_will_come_back() -> None:
    async with suspending() as (api, manager):
        await suspended(api, manager, "a")
        await manager.get_client("b")
        await manager.shutdown()
        await asyncio.sleep(1)
        assert is_suspended(api, SANDBOX.name("a"))
        assert is_suspended(api, SANDBOX.name("b"))
        async with managed(api, **SUSPENDS) as successor:
            for session_id in ("a", "b"):
                uid = found(api, SANDBOX.name(session_id))["metadata"]["uid"]
                client = await successor.get_client(session_id)
                assert client.sandbox is not None
                assert client.sandbox.uid == uid
            assert (successor.stats().created, successor.stats().resumed) == (0, 2)
            await successor.on_session_closed("a")
            await successor.on_session_closed("b")
        assert api.objects == []


async def test_a_shutdown_deletes_where_it_will_not() -> None:
    async with LoopTimeApi(auto_ready=1.0) as api:
        config = SandboxManagerConfig(mode="multi", **SUSPENDS)
        clock = asyncio.get_running_loop().time
        async with SandboxManager(
            config, custom_objects_api=api, client_factory=Clients(), wall_clock=clock
        ) as manager:
            await suspended(api, manager, "a")
            await manager.get_client("b")
        assert api.objects == []


async def test_what_an_earlier_process_left_suspended_counts() -> None:
    async with LoopTimeApi(auto_ready=1.0) as api:
        for i, session_id in enumerate("abc"):
            await left_behind(api, session_id, lease=500.0 + i)
            api.suspend(SANDBOX.name(session_id))
        await asyncio.sleep(5)
        async with managed(api, **SUSPENDS | {"max_suspended": 2}) as manager:
            await manager.get_client("d")
            await asyncio.sleep(2 * TICK)
            names = {o["metadata"]["name"] for o in api.objects}
            assert names == {SANDBOX.name(x) for x in "bcd"}


async def test_a_clean_up_leaves_what_sessions_of_this_manager_have_suspended() -> None:
    async with suspending() as (api, manager):
        await suspended(api, manager)
        await left_behind(api, "old")
        assert await manager.cleanup_orphaned_sandboxes() == 1
        assert is_suspended(api)


async def test_without_a_watch() -> None:
    async with suspending() as (api, manager):
        api.forbid("watch")
        uid = None
        for _ in range(2):
            client = await manager.get_client("s")
            assert client.sandbox is not None
            assert client.sandbox.uid == (uid or client.sandbox.uid)
            uid = client.sandbox.uid
            await api.until(lambda: is_suspended(api))
        assert manager.stats().created == 1


async def test_a_patch_that_is_refused_is_tried_again_and_holds_the_slot() -> None:
    async with suspending(max_sessions=1) as (api, manager):
        await manager.get_client("s")
        api.faults.add("patch", error=503, name=NAME)
        await asyncio.sleep(IDLE + 2 * TICK)
        assert manager.stats().closing == 1
        with pytest.raises(SandboxError):
            await manager.get_client("another")
        api.faults.clear()
        await asyncio.sleep(2 * TICK)
        assert is_suspended(api)
        await manager.get_client("another")


async def test_an_api_server_that_is_away_ends_nothing() -> None:
    async with suspending(ready_timeout=5.0) as (api, manager):
        await suspended(api, manager)
        api.faults.add("patch", error=503)
        with pytest.raises(SandboxUnavailableError):
            await manager.get_client("s")
        api.faults.clear()
        await asyncio.sleep(2 * TICK)
        assert is_suspended(api)
        await manager.get_client("s")
        assert manager.stats().created == 1


async def test_one_that_somebody_else_started_has_a_lease_while_it_is_used() -> None:
    async with suspending() as (api, manager):
        first = await suspended(api, manager)
        api.resume(NAME)
        await asyncio.sleep(5)
        async with manager.session("s") as client:
            await asyncio.sleep(2 * KEPT)
            assert found(api)["metadata"].get("deletionTimestamp") is None
            assert client.sandbox is not None
            assert client.sandbox.uid == first.sandbox.uid
            assert manager.stats().lost == 0
