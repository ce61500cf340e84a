"""Idle sessions that are ended to make room for others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from prodisco_sandbox import SandboxCapacityError, SandboxClient, SandboxError, SandboxManager
from prodisco_sandbox._cluster.manifest import SANDBOX
from prodisco_sandbox.testing import FakeCustomObjectsApi
from tests.support.managers import LoopTimeApi, StubClient, managed, now, settle

pytestmark = pytest.mark.looptime

AFTER, IDLE, PATIENCE, READY = 30.0, 600.0, 5.0, 1.0
SUSPENSION: dict[str, Any] = {"on_idle": "suspend", "workspace_storage": "1Gi"}


@asynccontextmanager
async def evicting(
    slots: int = 2, **settings: Any
) -> AsyncIterator[tuple[FakeCustomObjectsApi, SandboxManager]]:
    async with LoopTimeApi(auto_ready=READY) as api:
        defaults: dict[str, Any] = {"max_sessions": slots, "when_full": "evict", "capacity_timeout": PATIENCE}
        async with managed(api, **defaults | settings) as manager:
            yield api, manager


async def use(manager: SandboxManager, *session_ids: str, **options: Any) -> list[SandboxClient]:
    return list(await asyncio.gather(*(manager.get_client(each, **options) for each in session_ids)))


def living(manager: SandboxManager, *session_ids: str) -> str:
    return "".join(each for each in session_ids if manager.has_session(each))


async def test_an_idle_session_makes_room_and_comes_back_to_another_sandbox() -> None:
    async with evicting() as (api, manager):
        [first, other] = await use(manager, "a", "b")
        assert first.sandbox is not None
        assert not first.sandbox.after_eviction
        await asyncio.sleep(AFTER)
        await use(manager, "b")
        [client] = await use(manager, "c")
        assert now() == pytest.approx(READY + AFTER + READY, abs=0.01)
        assert (living(manager, "a", "b", "c"), len(api.objects)) == ("bc", 2)
        assert isinstance(first, StubClient)
        assert first.closed
        assert client.sandbox is not None
        assert not client.sandbox.after_eviction
        stats = manager.stats()
        assert (stats.evicted, stats.reaped, stats.recreated) == (1, 0, 0)
        await manager.on_session_closed("b")
        [back] = await use(manager, "a")
        assert back.sandbox is not None
        assert back.sandbox.after_eviction
        api.set_ready(back.sandbox.name)  # Another pod.
        [replaced] = await use(manager, "a")
        assert replaced.sandbox is not None
        assert (replaced.sandbox == back.sandbox, replaced.sandbox.after_eviction) == (False, False)
        assert manager.stats().evicted == 1
        assert other is not back


async def test_who_was_used_lately_is_waited_for() -> None:
    async with evicting(1, capacity_timeout=AFTER + 2) as (_, manager):
        await use(manager, "a")
        await use(manager, "b")
        assert now() == pytest.approx(READY + AFTER + READY, abs=1.1)
        with pytest.raises(SandboxCapacityError):
            async with manager.session("b"):
                await use(manager, "c")
        assert living(manager, "b", "c") == "b"


async def test_without_patience_a_session_waits_for_nothing_but_an_eviction() -> None:
    async with evicting(1, capacity_timeout=0.0) as (api, manager):
        await use(manager, "a")
        begun = now()
        with pytest.raises(SandboxCapacityError, match="all 1 sandbox slots are taken"):
            await use(manager, "b")
        assert now() == begun
        await asyncio.sleep(AFTER)
        api.faults.add("delete", latency=8.0, times=1)
        results = await asyncio.gather(use(manager, "b"), use(manager, "c"), return_exceptions=True)
        assert [type(result) for result in results] == [list, SandboxCapacityError]
        assert now() == pytest.approx(begun + AFTER + 8 + READY, abs=0.01)


async def test_refusing_is_the_default() -> None:
    async with evicting(1, when_full="refuse") as (_, manager):
        await use(manager, "a")
        await asyncio.sleep(IDLE - 60)
        with pytest.raises(SandboxCapacityError):
            await use(manager, "b")
        assert (living(manager, "a"), manager.stats().evicted) == ("a", 0)


@pytest.mark.parametrize("how", ["held", "in flight", "waited for", "used in the same pass"])
async def test_a_session_in_use_is_never_ended(how: str) -> None:
    async with evicting(1) as (api, manager):
        [client] = await use(manager, "a")
        await asyncio.sleep(IDLE / 2)
        assert isinstance(client, StubClient)
        context, tasks = manager.session("a"), []
        if how == "held":
            await context.__aenter__()
        elif how == "in flight":
            client.calls = 1
        elif how == "waited for":
            api.faults.add("get", latency=PATIENCE + 1, times=1)
            client.fail()
            tasks.append(asyncio.create_task(use(manager, "a")))
        newcomer = asyncio.create_task(use(manager, "b"))
        if how == "used in the same pass":
            tasks.append(asyncio.create_task(use(manager, "a")))
            await settle()
            assert not newcomer.done()
        with pytest.raises(SandboxCapacityError):
            await newcomer
        await asyncio.gather(*tasks)
        assert (living(manager, "a"), client.closed) == ("a", False)
        if how == "held":
            await context.__aexit__(None, None, None)
        client.calls = 0


async def test_a_newcomer_does_not_pass_the_head_of_the_queue_by_its_own_victim() -> None:
    async with evicting(capacity_timeout=20.0) as (_, manager):
        for _ in range(2):
            await use(manager, "a", owner="A")
            await use(manager, "b", owner="B")
        await asyncio.sleep(AFTER)
        stranger = asyncio.create_task(use(manager, "x"))  # It may take neither.
        await settle()
        newcomer = asyncio.create_task(use(manager, "a2", owner="A"))
        await asyncio.sleep(15)
        assert living(manager, "a", "b", "x", "a2") == "abxa2"
        stranger.cancel()
        await newcomer
        assert now() == pytest.approx(2 * READY + AFTER + 15 + READY, abs=1.1)
        assert living(manager, "a", "b", "a2") == "ba2"


async def test_each_in_the_queue_has_a_victim_of_its_own() -> None:
    async with evicting(3) as (api, manager):
        await use(manager, "a", "b")
        await asyncio.sleep(1)
        await use(manager, "c")
        await asyncio.sleep(AFTER)
        api.faults.add("delete", latency=2.0, times=2)
        begun = now()
        newcomers = asyncio.create_task(use(manager, "d", "e"))
        await settle()
        assert manager.stats().evicted == 2
        await newcomers
        assert now() == pytest.approx(begun + 2 + READY, abs=0.01)
        assert living(manager, "a", "b", "c", "d", "e") == "cde"


async def test_two_that_wait_share_no_victim() -> None:
    async with evicting(1) as (_, manager):
        await use(manager, "a")
        await asyncio.sleep(AFTER)
        results = await asyncio.gather(use(manager, "b"), use(manager, "c"), return_exceptions=True)
        assert [type(result) for result in results] == [list, SandboxCapacityError]
        assert manager.stats().evicted == 1


async def test_who_leaves_after_an_eviction_leaves_the_slot_to_the_next() -> None:
    async with evicting(1, capacity_timeout=20.0) as (api, manager):
        await use(manager, "a")
        await asyncio.sleep(AFTER)
        api.faults.add("delete", latency=3.0, times=1)
        leaving = asyncio.create_task(use(manager, "b"))
        await settle()
        following = asyncio.create_task(use(manager, "c"))
        await settle()
        leaving.cancel()
        begun = now()
        await following
        assert now() == pytest.approx(begun + 3 + READY, abs=0.01)
        assert manager.stats().evicted == 1


async def test_the_slot_is_free_when_the_object_is_deleted_and_meanwhile_nobody_else_is_ended() -> None:
    async with evicting(2, capacity_timeout=3.0) as (api, manager):
        await use(manager, "a", "b")
        await asyncio.sleep(AFTER)
        api.faults.add("delete", error=500, times=5)
        begun = now()
        with pytest.raises(SandboxCapacityError):
            await use(manager, "c")
        assert now() == pytest.approx(begun + 3, abs=0.01)
        assert (living(manager, "a", "b"), manager.stats().evicted) == ("b", 1)
        assert manager.stats().closing == 1
        await api.until(lambda: len(api.objects) == 1, timeout=60)
        await use(manager, "c")
        assert manager.stats().evicted == 1
        await asyncio.sleep(AFTER)
        await use(manager, "d")
        assert manager.stats().evicted == 2


async def test_what_a_user_has_closed_and_cannot_be_deleted_is_not_waited_for() -> None:
    async with evicting(2) as (api, manager):
        await use(manager, "a", "b")
        await asyncio.sleep(AFTER)
        api.faults.add("delete", error=500, times=2)
        await manager.on_session_closed("a")
        begun = now()
        await use(manager, "c")
        assert now() - begun < READY + 2
        assert manager.stats().evicted <= 1


async def test_nobody_is_ended_after_a_failed_creation_until_one_has_succeeded() -> None:
    async with evicting(3) as (api, manager):
        await use(manager, "a", "b")
        await asyncio.sleep(AFTER)
        api.forbid("create")
        with pytest.raises(SandboxError):
            await use(manager, "bad")
        api.allow("create")
        holding = asyncio.create_task(use(manager, "slow"))
        await asyncio.sleep(READY / 2)
        waiting = asyncio.create_task(use(manager, "c"))
        await settle()
        assert manager.stats().evicted == 0, "creations fail, as far as is known"
        await holding
        await waiting
        assert manager.stats().evicted == 1


async def test_an_owner_makes_no_room_after_a_failed_creation_until_one_has_succeeded() -> None:
    async with evicting(3) as (api, manager):
        await manager.get_client("a", owner="A")
        await asyncio.sleep(AFTER)
        api.forbid("create")
        with pytest.raises(SandboxError):
            await use(manager, "bad")
        assert not manager.make_room("A")
        api.allow("create")
        await use(manager, "good")
        assert manager.make_room("A")


async def test_an_evicted_session_queues_like_others() -> None:
    async with evicting(1) as (api, manager):
        await use(manager, "a")
        await asyncio.sleep(AFTER)
        api.faults.add("delete", latency=1.0, times=1)
        newcomer = asyncio.create_task(use(manager, "b"))
        await settle()
        begun = now()
        with pytest.raises(SandboxCapacityError):
            await use(manager, "a")
        assert now() == pytest.approx(begun + PATIENCE, abs=0.01)
        await newcomer
        await asyncio.sleep(AFTER)
        await use(manager, "a")
        assert manager.stats().evicted == 2


@pytest.mark.parametrize(
    ("how", "returned"),
    [
        ("made ahead", False),
        ("asked for together", False),
        ("asked for again", True),
        ("held again", True),
        ("made again", True),
        ("resumed", True),
    ],
)
async def test_what_counts_as_coming_back(how: str, returned: bool) -> None:
    suspension = SUSPENSION if how == "resumed" else {}
    async with evicting(1, **suspension) as (api, manager):
        if how == "made ahead":
            await manager.on_session_initialized("a")
        first, *_ = await use(manager, *["a"] * (3 if how == "asked for together" else 1))
        if how == "asked for again":
            await use(manager, "a")
        elif how == "held again":
            async with manager.session("a"):
                pass
        elif how == "made again":
            api.delete_now(SANDBOX.name("a"))
            await api.until(lambda: not manager.has_session("a"), timeout=60)
            assert await use(manager, "a") != [first]
        elif how == "resumed":
            await api.until(lambda: not manager.has_session("a"), timeout=2 * IDLE)
            await use(manager, "a")
        await asyncio.sleep(AFTER)
        if returned:
            with pytest.raises(SandboxCapacityError):
                await use(manager, "b")
        else:
            await use(manager, "b")
        assert manager.has_session("a") == returned


async def test_it_may_be_suspended_and_come_back_to_its_object() -> None:
    async with evicting(1, **SUSPENSION) as (api, manager):
        api.pod_termination = 0.7
        [first] = await use(manager, "a")
        await asyncio.sleep(AFTER)
        await use(manager, "b")
        assert sorted(o["spec"]["operatingMode"] for o in api.objects) == ["Running", "Suspended"]
        await manager.on_session_closed("b")
        [back] = await use(manager, "a")
        assert first.sandbox is not None
        assert back.sandbox is not None
        assert (back.sandbox.uid, back.sandbox.after_eviction) == (first.sandbox.uid, True)
        stats = manager.stats()
        assert (stats.evicted, stats.suspended, stats.resumed, stats.created) == (1, 1, 1, 2)


async def test_a_close_ends_an_evicted_session_for_good() -> None:
    async with evicting(1, **SUSPENSION) as (api, manager):
        await use(manager, "a")
        await asyncio.sleep(AFTER)
        newcomer = asyncio.create_task(use(manager, "b"))
        await settle()
        await manager.on_session_closed("a")
        await newcomer
        assert [o["metadata"]["name"] for o in api.objects] == [SANDBOX.name("b")]


async def test_a_shutdown_ends_evictions_and_those_that_wait_for_them() -> None:
    async with evicting(1) as (api, manager):
        await use(manager, "a")
        await asyncio.sleep(AFTER)
        api.faults.add("delete", latency=2.0, times=1)
        newcomer = asyncio.create_task(use(manager, "b"))
        await settle()
        await manager.shutdown()
        with pytest.raises(SandboxError, match="shut down"):
            await newcomer
        assert api.objects == []


async def test_an_owner_may_be_made_to_give_up_a_session_of_its_own() -> None:
    async with evicting(4) as (_, manager):
        assert not manager.make_room("A")
        await use(manager, "a", "b", owner="A")
        await use(manager, "b", owner="A")
        await use(manager, "c", owner="B")
        assert not manager.make_room("A"), "they were used a moment ago"
        await asyncio.sleep(AFTER)
        async with manager.session("a"):
            assert manager.make_room("A")
            assert not manager.make_room("A"), "the other one is in use"
            assert living(manager, "a", "b", "c") == "ac"
        assert manager.stats().evicted == 1
        with pytest.raises(ValueError, match="owner is empty"):
            manager.make_room("")
    assert not manager.make_room("B"), "it is shut down"
    async with evicting(when_full="refuse") as (_, manager):
        await use(manager, "a", owner="A")
        await asyncio.sleep(AFTER)
        assert not manager.make_room("A")


@pytest.mark.parametrize("owned", [False, True])
async def test_eleven_active_users_on_ten_slots_do_not_evict_each_other_at_every_turn(owned: bool) -> None:
    turns, served = 20, [0] * 11

    async def user(number: int) -> None:
        name = f"user-{number}"
        await asyncio.sleep(number)
        for _ in range(turns):
            try:
                async with manager.session(name, owner=name if owned else None):
                    served[number] += 1
                    await asyncio.sleep(2)
            except SandboxCapacityError:
                pass
            await asyncio.sleep(AFTER * 2)

    async with evicting(10) as (_, manager):
        await asyncio.gather(*map(user, range(11)))
        assert manager.stats().evicted <= 11, "each at most once, before it has come back"
        assert sorted(served)[1:] == [turns] * 10


async def test_a_flood_takes_no_sandbox_that_somebody_has_come_back_to() -> None:
    refused = 0

    async def once(number: int) -> None:
        nonlocal refused
        try:
            await manager.get_client(f"flood-{number}")
        except SandboxCapacityError:
            refused += 1

    async with evicting(10) as (_, manager):
        names = [f"user-{i}" for i in range(9)]
        await use(manager, *names)
        clients = await use(manager, *names)
        once_used = await use(manager, "once")
        flood = []
        for second in range(int(IDLE / 2) - 10):
            flood.append(asyncio.create_task(once(second)))
            await asyncio.sleep(1)
        assert await use(manager, *names) == clients
        await asyncio.gather(*flood)
        assert isinstance(once_used[0], StubClient)
        assert once_used[0].closed, "only what nobody has come back to was taken"
        assert refused > 200
