"""Shared sessions where two things happen at once: between managers, and within one."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from prodisco_sandbox import (
    SandboxCapacityError,
    SandboxError,
    SandboxManager,
    SandboxManagerClosedError,
    SandboxManagerConfig,
    SandboxReplacedError,
    SandboxTimeoutError,
    SandboxUnavailableError,
)
from prodisco_sandbox._cluster.metadata import lease_time
from prodisco_sandbox._sessions.leases import PROBE
from prodisco_sandbox._sessions.shared import SharedSessions
from tests.support.managers import Clients, StubClient, alive, change_spec, managed, now, settle, uids

from .test_shared import SHARED, SKEW, SLACK, T, cluster, deadline, use, writes

pytestmark = pytest.mark.looptime

LATE = T + SLACK - SKEW + 1
"""How long after its creation the deadline of an unused session is too near to trust."""


# What holds files


async def test_a_dead_pod_with_a_volume_is_restarted_by_whoever_attaches() -> None:
    disks = {**SHARED, "workspace_storage": "1Gi"}
    async with cluster() as api, managed(api, **disks) as one, managed(api, **disks) as two:
        first = await one.get_client("s")
        assert first.sandbox is not None
        api.fail_pod(first.sandbox.name)
        await asyncio.sleep(1)
        second = await two.get_client("s")
        assert second.sandbox is not None
        assert second.sandbox.uid == first.sandbox.uid
        assert "delete" not in {r.verb for r in api.requests}


async def test_a_suspended_one_is_started_by_whoever_attaches_once_its_pod_is_gone() -> None:
    async with (
        cluster(pod_termination=3.0) as api,
        managed(api, **SHARED) as one,
        managed(api, **SHARED) as two,
    ):
        first = await one.get_client("s")
        assert first.sandbox is not None
        api.suspend(first.sandbox.name)
        await settle()
        asked, begun = len(api.requests), now()
        second = await two.get_client("s")
        assert second.sandbox is not None
        assert second.sandbox.uid == first.sandbox.uid
        [start] = [r for r in api.requests[asked:] if r.verb == "patch" and r.name != PROBE]
        assert start.body["spec"]["operatingMode"] == "Running"
        assert start.time >= begun + 3


# Writes


async def test_a_write_for_the_object_before_says_nothing_of_the_next() -> None:
    async with cluster() as api, managed(api, **SHARED) as manager:
        old = await manager.get_client("s")
        await asyncio.sleep(SLACK + 10)
        with api.faults.add("patch", hold=True, times=1) as gate:
            using = asyncio.create_task(use(old, 30.0))
            await gate.reached()
            api.delete_now(alive(api)[0])
            await settle()
            new = await manager.get_client("s")
            longer = asyncio.create_task(use(new, SLACK + 100))
            await settle()
        with pytest.raises(SandboxReplacedError):
            await using
        await longer
        assert deadline(api) >= now() + SLACK + 100 + T


@pytest.mark.parametrize("other", [False, True], ids=["here", "elsewhere"])
async def test_nobody_runs_before_a_late_extension_is_known_to_hold(other: bool) -> None:
    async with cluster() as api, managed(api, **SHARED) as one, managed(api, **SHARED) as two:
        clients = [await one.get_client("s"), await two.get_client("s")]
        await asyncio.sleep(T - 1)
        for client in clients:
            await use(client, 0.0)  # Keeps the client.
        await asyncio.sleep(LATE)
        [name] = alive(api)
        first = asyncio.create_task(use(clients[0], 30.0))
        await asyncio.sleep(1)
        second = asyncio.create_task(use(clients[other], 30.0))
        await asyncio.sleep(0.5)
        assert not second.done()
        api.delete_now(name)  # By what the controller saw before.
        for using in (first, second):
            with pytest.raises(SandboxReplacedError):
                await using


async def test_a_late_extension_that_holds_lets_all_run() -> None:
    async with cluster() as api, managed(api, **SHARED) as one, managed(api, **SHARED) as two:
        clients = [await one.get_client("s"), await two.get_client("s")]
        await asyncio.sleep(LATE)
        before, begun = len(writes(api)), now()
        await asyncio.gather(*(use(client, 30.0) for client in (*clients, *clients)))
        assert now() - begun == pytest.approx(2.0, abs=0.5)
        assert len(writes(api)) <= before + 2


async def test_a_deadline_that_another_has_moved_back_is_moved_again() -> None:
    async with cluster() as api, managed(api, **SHARED) as manager:
        client = await manager.get_client("s")
        ends = now() + 2000
        await use(client, 2000)
        await change_spec(api, alive(api)[0], shutdownTime=lease_time(now() + T + SLACK, 0))
        await asyncio.sleep(SLACK / 2 + 1)
        assert deadline(api) >= ends + T
        assert len(writes(api)) == 3


async def test_an_entered_session_is_covered_from_the_start() -> None:
    async with cluster() as api, managed(api, **SHARED) as manager:
        await manager.get_client("s")
        await asyncio.sleep(SLACK - 10)
        async with manager.session("s"):
            assert deadline(api) >= now() + SLACK + T


async def test_a_start_may_take_longer_than_an_idle_timeout() -> None:
    slow = {**SHARED, "session_idle_timeout": 120.0, "ready_timeout": 1000.0}
    async with cluster(auto_ready=False) as api, managed(api, **slow) as manager:
        asking = asyncio.create_task(manager.get_client("s"))
        await settle()
        assert deadline(api) >= 1000 + SKEW
        await manager.on_session_closed("s")
        await asyncio.gather(asking, return_exceptions=True)


def sharing(manager: SandboxManager) -> SharedSessions:
    """For news in an order in which the fake's watches do not tell them."""
    assert manager._engine is not None
    assert manager._engine.shared is not None
    return manager._engine.shared


async def test_what_is_heard_late_changes_nothing() -> None:
    async with cluster() as api, managed(api, **SHARED) as manager:
        await manager.get_client("s")
        [another] = api.objects
        await asyncio.sleep(10)
        api.delete_now(alive(api)[0])
        await settle()
        client = await manager.get_client("s")
        [before] = api.objects
        await asyncio.sleep(SLACK + 10)
        await use(client, 30.0)
        asked = len(api.requests)
        for late in (another, before):
            sharing(manager).changed(late)
            await use(client, 30.0)
        sharing(manager).synced([], since=0.0)
        assert manager.stats().known == 1
        assert [r for r in api.requests[asked:] if r.verb != "list"] == []


async def test_a_stale_answer_ends_no_session() -> None:
    # A get that hangs shows an object that was deleted and made again meanwhile.
    async with cluster() as api, managed(api, **SHARED) as manager:
        old = await manager.get_client("s")
        await asyncio.sleep(10)
        stale = api.objects[0]
        api.delete_now(alive(api)[0])
        await settle()
        new = await manager.get_client("s")
        sharing(manager).found(stale)
        await use(new, 30.0)
        assert (await manager.get_client("s")) is new is not old


@pytest.mark.parametrize("said", [{"uid": "another"}, {"deletionTimestamp": "1970-01-01T00:00:00Z"}])
async def test_without_an_answer_nothing_runs_on_what_is_gone(said: dict[str, str]) -> None:
    async with cluster() as api, managed(api, **SHARED) as manager:
        client = await manager.get_client("s")
        await asyncio.sleep(SLACK + 10)
        [found] = api.objects
        sharing(manager).found({**found, "metadata": {**found["metadata"], **said}})
        api.faults.add("*", error=503, times=None)
        with pytest.raises(SandboxUnavailableError):
            await use(client, 30.0)
        api.faults.clear()


async def test_what_one_cannot_reach_is_kept_for_the_others() -> None:
    clients = Clients(lambda target: StubClient(target, healthy=False))
    async with cluster() as api, managed(api, **SHARED) as one, managed(api, clients, **SHARED) as two:
        client = await one.get_client("s")
        with pytest.raises(SandboxTimeoutError):
            await two.get_client("s")
        await settle()
        assert await one.get_client("s") is client
        assert "delete" not in {r.verb for r in api.requests}


async def test_a_dead_one_that_lives_again_is_not_replaced() -> None:
    async with cluster() as api, managed(api, **SHARED) as one, managed(api, **SHARED) as two:
        first = await one.get_client("s")
        assert first.sandbox is not None
        api.fail_pod(first.sandbox.name)
        await asyncio.sleep(1)
        with api.faults.add("delete", hold=True, times=1) as gate:
            asking = asyncio.create_task(two.get_client("s"))
            await gate.reached()
            api.delete_pod(first.sandbox.name, graceful=False)  # The controller makes another.
            await asyncio.sleep(1)
        await asking
        assert uids(api) == {first.sandbox.uid}


# What has lapsed


QUICK = {**SHARED, "idle_check_interval": 5.0}


async def test_what_has_lapsed_is_left_to_the_cluster_as_long_as_clocks_may_differ() -> None:
    async with cluster(auto_ready=False) as api, managed(api, **QUICK) as manager:
        asking = asyncio.create_task(manager.get_client("s"))
        await settle()
        api.set_ready(alive(api)[0])  # No controller runs.
        await asking
        await asyncio.sleep(T + SLACK + SKEW - 1)
        assert len(api.objects) == 1
        await asyncio.sleep(10)
        assert api.objects == []


async def test_what_has_lapsed_in_use_here_is_not_deleted_here() -> None:
    async with cluster(auto_ready=False) as api, managed(api, **QUICK) as manager:
        asking = asyncio.create_task(manager.get_client("s"))
        await settle()
        api.set_ready(alive(api)[0])
        await asking
        async with manager.session("s"):
            api.faults.add("patch", error=503, times=None)
            await asyncio.sleep(T + 2 * SLACK)
            assert deadline(api) < now() - SKEW
            assert "delete" not in {r.verb for r in api.requests}
            api.faults.clear()


async def test_what_another_has_extended_has_not_lapsed() -> None:
    async with cluster() as api, managed(api, **QUICK) as one, managed(api, **SHARED) as two:
        client = await two.get_client("s")
        await asyncio.sleep(T + SLACK - SKEW - 10)
        api.silence_watches()  # One goes by what it saw last.
        await use(client, 10.0)
        await asyncio.sleep(80)
        assert client.sandbox is not None
        assert uids(api) == {client.sandbox.uid}
        assert "delete" in {r.verb for r in api.requests}
        assert one.stats().known == 1


# Closing


async def test_a_close_while_it_attaches_deletes_what_another_has_made() -> None:
    async with cluster() as api, managed(api, **SHARED) as one, managed(api, **SHARED) as two:
        await one.get_client("s")
        await settle()
        api.silence_watches()
        await asyncio.sleep(95)
        with api.faults.add("get", hold=True, times=1) as gate:
            asking = asyncio.create_task(two.get_client("s"))
            await gate.reached()
            closing = asyncio.create_task(two.on_session_closed("s"))
            await settle()
        await closing
        await asyncio.gather(asking, return_exceptions=True)
        assert api.objects == []


async def test_a_close_asks_for_one_delete() -> None:
    async with cluster() as api, managed(api, **SHARED) as manager:
        await manager.get_client("s")
        await manager.on_session_closed("s")
        assert [r.verb for r in api.requests if r.verb in ("delete", "get")] == ["delete"]


async def test_a_delete_that_failed_does_not_end_who_came_after_the_close() -> None:
    async with cluster() as api, managed(api, **SHARED) as one, managed(api, **SHARED) as two:
        await one.get_client("s")
        await settle()
        api.faults.add("delete", error=503, times=None)
        await one.on_session_closed("s")
        client = await two.get_client("s")
        api.faults.clear()
        await asyncio.sleep(200)
        assert client.sandbox is not None
        assert uids(api) == {client.sandbox.uid}
        assert one.stats().closing == 0


async def test_a_delete_that_fails_for_a_moment_is_repeated() -> None:
    async with cluster() as api, managed(api, **SHARED) as one:
        await one.get_client("s")
        api.faults.add("delete", error=503, times=3)
        await one.on_session_closed("s")
        assert api.objects == []


# Shutdown


async def test_shutdown_ends_who_waits_for_the_first_list() -> None:
    async with cluster() as api:
        api.faults.add("list", latency=50.0)
        manager = SandboxManager(
            SandboxManagerConfig(mode="multi", **SHARED),
            custom_objects_api=api,
            client_factory=Clients(),
            wall_clock=now,
        )
        asking = asyncio.create_task(manager.get_client("s"))
        await asyncio.sleep(1)
        await manager.shutdown()
        with pytest.raises(SandboxManagerClosedError):
            await asking
        assert now() < 5
        assert api.objects == []


# Machines


class Booted(StubClient):
    """A client whose server says which life it is in."""

    life = "first"

    async def wait_for_healthy(self, timeout: float) -> bool:
        fence = self._connection.fence
        assert fence is not None
        fence.pinned, fence.boot_id = True, fence.boot_id or Booted.life
        return await super().wait_for_healthy(timeout)


async def test_all_managers_call_a_machine_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, others = Clients(Booted), Clients(Booted)
    async with cluster() as api, managed(api, mine, **SHARED) as one, managed(api, others, **SHARED) as two:
        first = await one.get_client("s")
        monkeypatch.setattr(Booted, "life", "second")
        await mine.made[0].close()  # Its container was restarted.
        again = await one.get_client("s")
        other = await two.get_client("s")
        assert first.sandbox != again.sandbox == other.sandbox


# Slots


@pytest.mark.parametrize("when_full", ["refuse", "evict"])
async def test_who_waits_for_a_slot_takes_what_another_has_made_for_the_session(when_full: Any) -> None:
    few = {**SHARED, "max_sessions": 1, "capacity_timeout": 60.0, "when_full": when_full}
    async with cluster() as api, managed(api, **few) as one, managed(api, **few) as two:
        await one.get_client("a")
        await settle()
        waiting = asyncio.create_task(two.get_client("b"))
        await asyncio.sleep(5)
        assert two.stats().queued == 1
        async with managed(api, **{**few, "max_sessions": 2}) as roomier:  # Or faster.
            made = await roomier.get_client("b")
        client = await waiting
        assert now() < 6
        assert client.sandbox is not None
        assert made.sandbox is not None
        assert client.sandbox.uid == made.sandbox.uid
        assert len(api.objects) == 2


async def test_gone_before_the_create_is_answered_it_is_made_again() -> None:
    async with cluster() as api, managed(api, **SHARED) as manager:
        with api.faults.add("create", hold=True, after=True, times=1) as gate:
            asking = asyncio.create_task(manager.get_client("s"))
            await gate.reached()
            await settle()
            api.delete_now(alive(api)[0])
            await settle()
        client = await asking
        assert client.sandbox is not None
        assert uids(api) == {client.sandbox.uid}


QUOTA = 'pods "x" is forbidden: exceeded quota: pods, requested: pods=1, used: pods=9, limited: pods=9'


async def test_an_exceeded_quota_of_pods_leaves_no_object_behind() -> None:
    async with cluster() as api, managed(api, **SHARED) as manager:
        api.pod_refusal = QUOTA
        with pytest.raises(SandboxCapacityError, match="exceeded quota"):
            await manager.get_client("s")
        await settle()
        assert api.objects == []


async def test_an_exceeded_quota_of_pods_queues_again() -> None:
    async with cluster() as api, managed(api, **{**SHARED, "capacity_timeout": 60.0}) as manager:
        await manager.get_client("a")
        api.pod_refusal = QUOTA
        asking = asyncio.create_task(manager.get_client("b"))
        await asyncio.sleep(8.5)  # Between two tries.
        assert manager.stats().queued == 1
        assert len(api.objects) == 1
        api.pod_refusal = ""
        await manager.on_session_closed("a")
        await asking
        assert now() < 15


async def test_a_newcomer_does_not_pass_one_that_was_queued_again() -> None:
    waits = {**SHARED, "capacity_timeout": 60.0}
    async with cluster() as api, managed(api, **waits) as manager:
        await manager.get_client("a")
        api.quota = 1
        early = asyncio.create_task(manager.get_client("early"))
        await settle()
        late = asyncio.create_task(manager.get_client("late"))
        await settle()
        assert manager.stats().queued == 2
        await manager.on_session_closed("a")
        await early
        assert not late.done()
        late.cancel()


async def test_a_quota_that_was_raised_is_noticed_though_nothing_ends() -> None:
    waits = {**SHARED, "capacity_timeout": 60.0}
    async with cluster() as api, managed(api, **waits) as manager:
        await manager.get_client("a")
        api.quota = 1
        asking = [asyncio.create_task(manager.get_client(name)) for name in "bcd"]
        await asyncio.sleep(10.5)
        tries = sum(request.verb == "create" for request in api.requests)
        assert tries <= 4 + 11  # Only the first in the queue tries again, once a second.
        api.quota = None
        await asyncio.gather(*asking)
        assert now() < 15


EVICTS = {**SHARED, "when_full": "evict", "capacity_timeout": 60.0}


async def test_under_a_quota_an_idle_session_is_evicted() -> None:
    async with cluster() as api, managed(api, **EVICTS) as manager:
        await manager.get_client("a")
        await asyncio.sleep(100)
        await manager.get_client("b")
        api.quota = 2
        await manager.get_client("c")
        assert manager.stats().evicted == 1
        assert manager.sandbox_name("a") not in alive(api)
        assert now() < 105


async def test_nobody_else_is_evicted_where_another_takes_the_room() -> None:
    async with cluster() as api, managed(api, **{**EVICTS, "capacity_timeout": 20.0}) as manager:
        for name in "abc":
            await manager.get_client(name)
        await asyncio.sleep(100)
        api.quota = 0
        with pytest.raises(SandboxCapacityError, match="exceeded quota"):
            await manager.get_client("d")
        assert manager.stats().evicted == 1


async def test_nobody_queues_again_for_who_has_gone() -> None:
    async with cluster() as api, managed(api, **{**SHARED, "capacity_timeout": 60.0}) as manager:
        api.quota = 0
        with api.faults.add("create", hold=True, times=1) as gate:
            asking = asyncio.create_task(manager.get_client("s"))
            await gate.reached()
            asking.cancel()
            await settle()
        await settle()
        assert manager.stats().queued == 0


async def test_an_exceeded_quota_of_pods_costs_no_files() -> None:
    async with cluster() as api, managed(api, **SHARED, workspace_storage="1Gi") as manager:
        client = await manager.get_client("s")
        assert client.sandbox is not None
        api.pod_refusal = QUOTA
        api.delete_pod(client.sandbox.name, graceful=False)
        await asyncio.sleep(1)
        with pytest.raises(SandboxError):
            await manager.get_client("s")
        assert uids(api) == {client.sandbox.uid}
        api.pod_refusal = ""
        again = await manager.get_client("s")
        assert again.sandbox is not None
        assert again.sandbox.uid == client.sandbox.uid


# Holding


async def test_an_entered_session_lives_on_though_its_status_wavered() -> None:
    async with cluster() as api, managed(api, **SHARED) as manager, manager.session("s") as client:
        assert client.sandbox is not None
        for status in ("False", "True"):
            api.set_condition(client.sandbox.name, "Ready", status, "Test")
            await asyncio.sleep(1)
        await asyncio.sleep(T + 2 * SLACK)
        assert deadline(api) >= now() + T


async def test_an_entered_session_that_cannot_be_reached_is_not_extended() -> None:
    clients = Clients()
    async with cluster() as api, managed(api, clients, **SHARED) as manager, manager.session("s"):
        [client] = clients.made
        client.healthy = False
        client.fail()
        await asyncio.sleep(T)
        assert writes(api) == []


async def test_a_call_under_way_is_not_cut_by_looking_whether_its_machine_lives() -> None:
    clients = Clients()
    async with cluster() as api, managed(api, clients, **SHARED) as manager, manager.session("s"):
        [client] = clients.made
        client.healthy = False  # As while code keeps it busy.
        client.calls = 1
        client.fail()
        await asyncio.sleep(T + 2 * SLACK)
        assert not client.closed
        assert deadline(api) >= now() + T
        client.calls = 0
