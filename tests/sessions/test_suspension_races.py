"""Suspended sessions, and what others do at the same moment."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiohttp import ServerDisconnectedError

from prodisco_sandbox import (
    SandboxError,
    SandboxManager,
    SandboxManagerClosedError,
    SandboxManagerConfig,
    SandboxTimeoutError,
)
from prodisco_sandbox._cluster.manifest import SANDBOX
from prodisco_sandbox._cluster.metadata import LABEL_INSTANCE, lease_time
from prodisco_sandbox.testing import FakeCustomObjectsApi, Request
from tests.support.managers import Clients, LoopTimeApi, alive, left_behind, managed, now, settle

from .test_suspension import (
    KEPT,
    NAME,
    SUSPENDS,
    TICK,
    found,
    is_suspended,
    mode,
    suspended,
    suspending,
)

pytestmark = pytest.mark.looptime


def suspends(request: Request) -> bool:
    return "Suspended" in str(request.body)


async def claim(api: FakeCustomObjectsApi, name: str = NAME) -> None:
    """Another manager takes the object."""
    body = {"metadata": {"labels": {LABEL_INSTANCE: "another"}}}
    await api.patch_namespaced_custom_object(
        *("agents.x-k8s.io", "v1beta1", "prodisco", "sandboxes", name, body),
        _content_type="application/merge-patch+json",
    )


# Its end


@pytest.mark.parametrize("steps", range(12))
async def test_a_close_at_any_moment_of_the_resumption_deletes_it(steps: int) -> None:
    async with suspending() as (api, manager):
        await suspended(api, manager)
        waiting = asyncio.create_task(manager.get_client("s"))
        for _ in range(steps):
            await asyncio.sleep(0)
        await manager.on_session_closed("s")
        await asyncio.gather(waiting, return_exceptions=True)
        if manager.has_session("s"):
            await manager.on_session_closed("s")
        assert api.objects == []


async def test_a_close_deletes_all_that_the_session_has() -> None:
    async with suspending() as (api, manager):
        await manager.get_client("s")
        await left_behind(api, "s", incarnation=3)
        api.suspend(SANDBOX.name("s", 3))
        await asyncio.sleep(3)
        await manager.on_session_closed("s")
        assert api.objects == []


async def test_a_close_that_looks_for_an_object_leaves_it_to_a_session_that_came_meanwhile() -> None:
    async with LoopTimeApi(auto_ready=1.0) as api, managed(api, **SUSPENDS) as manager:
        await left_behind(api, "s", lease=500.0)
        with api.faults.add("list", hold=True, after=True, times=1) as gate:
            closing = asyncio.create_task(manager.on_session_closed("s"))
            await gate.reached()
            client = await manager.get_client("s")
            gate.release()
            await closing
        await asyncio.sleep(1)
        assert await manager.get_client("s") is client
        assert alive(api) == [SANDBOX.name("s")]


async def test_a_close_after_the_shutdown_asks_for_nothing() -> None:
    async with suspending() as (api, manager):
        await suspended(api, manager)
        await manager.shutdown()
        before, tasks = len(api.requests), asyncio.all_tasks()
        await manager.on_session_closed("s")
        await manager.on_session_closed("another")
        assert len(api.requests) == before
        assert asyncio.all_tasks() == tasks
    async with LoopTimeApi(auto_ready=1.0) as api, managed(api, **SUSPENDS) as manager:
        await manager.shutdown()
        await manager.on_session_closed("s")
        assert api.requests == []


async def test_a_close_of_a_manager_that_was_never_used_asks_for_nothing() -> None:
    async with LoopTimeApi(auto_ready=1.0) as api:
        config = SandboxManagerConfig(mode="multi", instance_id="me", **SUSPENDS)
        manager = SandboxManager(config, custom_objects_api=api, client_factory=Clients())
        await manager.shutdown()
        await manager.on_session_closed("s")
        assert api.requests == []


# Too many


async def test_one_that_is_resumed_while_it_is_one_too_many_is_no_longer_counted() -> None:
    async with suspending(max_suspended=1) as (api, manager):
        await suspended(api, manager, "a")
        with api.faults.add("delete", hold=True, times=1) as gate:
            await suspended(api, manager, "b")
            await gate.reached()
            await manager.get_client("a")
        async with manager.session("a"):
            await asyncio.sleep(5 * TICK)
            assert mode(api, SANDBOX.name("a")) == "Running"
            assert is_suspended(api, SANDBOX.name("b"))


async def test_one_too_many_that_another_manager_has_claimed_is_left_to_it() -> None:
    async with suspending(max_suspended=1) as (api, manager):
        await suspended(api, manager, "a")
        api.silence_watches()
        await claim(api, SANDBOX.name("a"))
        await suspended(api, manager, "b")
        await asyncio.sleep(3 * TICK)
        assert api.get(SANDBOX.name("a")) is not None


async def test_many_that_are_too_many_are_deleted_once_each() -> None:
    async with suspending(max_suspended=1, max_sessions=20) as (api, manager):
        await asyncio.gather(*(manager.get_client(str(i)) for i in range(20)))
        await api.until(lambda: manager.stats().suspended == 20)
        await asyncio.sleep(1)
        assert len(api.objects) == 1
        assert (api.count("delete"), api.count("get")) == (19, 0)


async def test_one_that_may_not_be_deleted_does_not_keep_the_others() -> None:
    async with suspending(max_suspended=1) as (api, manager):
        api.faults.add("delete", error=403, name=SANDBOX.name("a"))
        for session_id in ("a", "b", "c"):
            await suspended(api, manager, session_id)
        await asyncio.sleep(TICK)
        assert [o["metadata"]["name"] for o in api.objects] == sorted(map(SANDBOX.name, "ac"))


# Other managers, and people


async def test_a_session_that_was_at_another_manager_comes_back_with_its_object() -> None:
    async with suspending() as (api, manager):
        await manager.get_client("s")
        await manager.on_session_closed("s")
        await manager.get_client("s")
        name = manager.sandbox_name("s")
        assert name != NAME
        await api.until(lambda: is_suspended(api, name))
        uid = found(api, name)["metadata"]["uid"]
        await manager.get_client("busy")  # The watch goes on.
        async with managed(api, **SUSPENDS | {"instance_id": "another"}) as other:
            await other.get_client("s")
        await asyncio.sleep(20)
        assert is_suspended(api, name)
        client = await manager.get_client("s")
        assert client.sandbox is not None
        assert client.sandbox.uid == uid


async def test_one_that_is_claimed_unnoticed_is_claimed_back_before_it_is_used() -> None:
    async with suspending() as (api, manager):
        await suspended(api, manager)
        api.silence_watches()
        await claim(api)
        await manager.get_client("s")
        assert found(api)["metadata"]["labels"][LABEL_INSTANCE] == "me"
        assert manager.stats().created == 1


async def test_one_that_is_claimed_before_the_suspension_is_answered_is_not_recorded() -> None:
    async with suspending() as (api, manager):
        await manager.get_client("s")
        uid = found(api)["metadata"]["uid"]
        with api.faults.add("patch", hold=True, after=True, when=suspends) as gate:
            await gate.reached()
            await claim(api)
            await settle()
        await settle()
        client = await manager.get_client("s")
        assert client.sandbox is not None
        assert client.sandbox.uid == uid
        assert found(api)["metadata"]["labels"][LABEL_INSTANCE] == "me"


async def test_one_that_is_deleted_while_its_suspension_fails_holds_no_slot() -> None:
    async with suspending(max_sessions=1) as (api, manager):
        await manager.get_client("s")
        api.faults.add("patch", error=503, name=NAME)
        api.faults.add("get", error=503, name=NAME)
        await api.until(lambda: manager.stats().closing == 1)
        await settle()
        api.delete_now(NAME)
        await asyncio.sleep(2 * TICK)
        await manager.get_client("another")


# Deadlines


async def test_a_renewal_on_its_way_does_not_shorten_the_deadline() -> None:
    async with suspending(lease_duration=74.0) as (api, manager):
        await manager.get_client("s")
        hold = api.faults.add("patch", hold=True, name=NAME, times=1, when=lambda r: not suspends(r))
        await hold.reached()
        await api.until(lambda: manager.stats().closing == 1)
        await settle()
        hold.remove()
        await api.until(lambda: is_suspended(api))
        await asyncio.sleep(5)
        assert found(api)["spec"]["shutdownTime"] > lease_time(now(), KEPT - 60)


@pytest.mark.parametrize("when", ["before", "meanwhile"])
async def test_one_that_somebody_else_has_started_gets_a_lease(when: str) -> None:
    async with suspending(lease_duration=60.0, suspended_for=200.0) as (api, manager):
        if when == "before":
            await suspended(api, manager)
            api.resume(NAME)
            await asyncio.sleep(5)
            waiting = asyncio.create_task(manager.get_client("s"))
        else:
            api.pod_termination = 20.0
            await manager.get_client("s")
            await api.until(lambda: manager.stats().suspended == 1)
            await settle()
            waiting = asyncio.create_task(manager.get_client("s"))
            await asyncio.sleep(1)
            assert not waiting.done()
            api.resume(NAME)
        await waiting
        async with manager.session("s"):
            await asyncio.sleep(400)
            assert lease_time(now(), 0) < found(api)["spec"]["shutdownTime"] <= lease_time(now(), 60.0)


async def test_without_leases_only_what_is_suspended_has_a_deadline() -> None:
    async with suspending(lease_duration=None) as (api, manager):
        for _ in range(2):
            async with manager.session("s"):
                assert "shutdownTime" not in found(api)["spec"] or found(api)["spec"]["shutdownTime"] is None
                await asyncio.sleep(2 * KEPT)
            await api.until(lambda: is_suspended(api))
            assert found(api)["spec"]["shutdownTime"] > lease_time(now(), KEPT - 10)
        await asyncio.sleep(KEPT + 10)
        assert api.objects == []


async def test_one_that_was_resumed_for_nobody_is_suspended_again() -> None:
    async with suspending() as (api, manager):
        await suspended(api, manager)
        waiting = asyncio.create_task(manager.get_client("s"))
        await settle()
        waiting.cancel()
        await asyncio.sleep(5)
        assert mode(api) == "Running"
        await api.until(lambda: manager.stats().suspended == 2)
        assert found(api)["spec"]["shutdownTime"] == lease_time(now(), KEPT)


# Late news, and lost answers


async def test_late_news_after_it_was_taken_up_does_not_lead_to_the_old_pod() -> None:
    async with suspending() as (api, manager):
        api.pod_termination = 5.0
        first = await manager.get_client("s")
        old = found(api)
        await api.until(lambda: manager.stats().suspended == 1)
        await settle()
        waiting = asyncio.create_task(manager.get_client("s"))
        await settle()
        assert manager._engine is not None
        manager._engine.changed(old)  # The fake's watches tell everything in order.
        client = await waiting
        assert client.target != first.target


async def test_late_news_before_it_is_taken_up_does_not_lead_to_the_old_pod() -> None:
    async with suspending() as (api, manager):
        api.pod_termination = 5.0
        first = await manager.get_client("s")
        old = found(api)
        await api.until(lambda: manager.stats().suspended == 1)
        await settle()
        assert manager._engine is not None
        manager._engine.changed(old)  # The fake's watches tell everything in order.
        client = await manager.get_client("s")
        assert client.target != first.target


async def test_one_that_cannot_be_suspended_says_so_when_its_session_comes_back() -> None:
    async with suspending(ready_timeout=5.0) as (api, manager):
        await manager.get_client("s")
        with api.faults.add("patch", error=403, name=NAME):
            await api.until(lambda: manager.stats().closing == 1)
            with pytest.raises(SandboxTimeoutError, match=f"{NAME} could not be suspended in time"):
                await manager.get_client("s")


async def test_lost_answers_to_both_patches() -> None:
    async with suspending() as (api, manager):
        client = await manager.get_client("s")
        api.faults.add("patch", lost=True, times=1, when=suspends)
        await api.until(lambda: manager.stats().suspended == 1)
        await settle()
        api.faults.add("patch", lost=True, times=1)
        again = await manager.get_client("s")
        assert client.sandbox is not None
        assert again.sandbox is not None
        assert again.sandbox.uid == client.sandbox.uid
        assert (manager.stats().suspended, manager.stats().resumed, manager.stats().created) == (1, 1, 1)


# Shutdown


async def test_a_shutdown_deletes_what_is_being_suspended_where_nobody_comes_back() -> None:
    async with LoopTimeApi(auto_ready=1.0) as api:
        config = SandboxManagerConfig(mode="multi", **SUSPENDS)
        clock = asyncio.get_running_loop().time
        manager = SandboxManager(config, custom_objects_api=api, client_factory=Clients(), wall_clock=clock)
        await manager.get_client("s")
        with api.faults.add("patch", hold=True, when=suspends) as gate:
            await gate.reached()
            ending = asyncio.create_task(manager.shutdown())
            await settle()
        await ending
        assert api.objects == []


@pytest.mark.parametrize("steps", range(8))
async def test_a_shutdown_at_any_moment_of_the_suspension_leaves_nothing(
    steps: int,
) -> None:
    async with LoopTimeApi(auto_ready=1.0) as api:
        config = SandboxManagerConfig(mode="multi", **SUSPENDS)
        clock = asyncio.get_running_loop().time
        manager = SandboxManager(config, custom_objects_api=api, client_factory=Clients(), wall_clock=clock)
        await manager.get_client("s")
        await api.until(lambda: manager.stats().closing == 1)
        for _ in range(steps):
            await asyncio.sleep(0)
        await manager.shutdown()
        assert api.objects == []


@pytest.mark.parametrize("steps", range(0, 24, 3))
async def test_a_shutdown_at_any_moment_of_the_resumption_suspends_it_again(steps: int) -> None:
    async with suspending() as (api, manager):
        await suspended(api, manager)
        waiting = asyncio.create_task(manager.get_client("s"))
        for _ in range(steps):
            await asyncio.sleep(0)
        await manager.shutdown()
        with pytest.raises(SandboxManagerClosedError):
            await waiting
        await asyncio.sleep(2)
        assert is_suspended(api)
        assert found(api)["spec"]["shutdownTime"] >= lease_time(now(), KEPT - TICK)


@pytest.mark.parametrize(
    "answer", [{}, {"after": True, "lost": True, "times": 1}], ids=["on its way", "lost"]
)
async def test_a_shutdown_while_one_is_claimed_suspends_it_again(answer: dict[str, Any]) -> None:
    async with suspending() as (api, manager):
        await suspended(api, manager)
        async with managed(api, **SUSPENDS | {"instance_id": "another"}) as other:
            with api.faults.add("patch", hold=True, name=NAME, **answer) as gate:
                asking = asyncio.create_task(other.get_client("s"))
                await gate.reached()
                ending = asyncio.create_task(other.shutdown())
                await settle()
            await asyncio.gather(asking, return_exceptions=True)
            await ending
        await asyncio.sleep(2)
        assert is_suspended(api)
        assert found(api)["spec"]["shutdownTime"] > lease_time(now(), KEPT - 10)


async def test_one_whose_create_was_repeated_is_not_looked_for_once_it_is_suspended() -> None:
    async with suspending() as (api, manager):
        api.faults.add("create", error=ServerDisconnectedError, times=1)
        await manager.get_client("s")
        await manager.shutdown()
        await asyncio.sleep(1)
        assert is_suspended(api)


async def test_a_shutdown_at_its_deadline_names_what_is_being_suspended(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with suspending(shutdown_timeout=3.0) as (api, manager):
        await manager.get_client("s")
        with api.faults.add("patch", hold=True, when=suspends):
            begun = now()
            await manager.shutdown()
            assert now() - begun == pytest.approx(3.0, abs=0.1)
        told = [record.__dict__["sandbox"] for record in caplog.records]
        assert [event["sandboxes"] for event in told if event["event"] == "shutdown_incomplete"] == [[NAME]]


async def test_a_create_that_may_yet_land_is_not_mistaken_for_what_is_suspended() -> None:
    async with suspending() as (api, manager):
        with api.faults.add("create", error=ServerDisconnectedError):
            waiting = asyncio.create_task(manager.get_client("s"))
            await asyncio.sleep(1)
            await manager.on_session_closed("s")
            with pytest.raises(SandboxError, match="was closed"):
                await waiting
        await asyncio.sleep(15)  # Its name is free again.
        await manager.get_client("s")
        assert manager.sandbox_name("s") == NAME
        await manager.shutdown()
        await asyncio.sleep(1)
        assert is_suspended(api)


async def test_a_suspension_without_end_has_the_latest_deadline_there_is() -> None:
    async with suspending(suspended_for=1e300) as (api, manager):
        await suspended(api, manager)
        assert found(api)["spec"]["shutdownTime"] == "9999-12-31T23:59:59Z"
