"""Sessions that several managers serve: one object for each, kept as long as anybody uses it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from prodisco_sandbox import (
    SandboxCapacityError,
    SandboxClient,
    SandboxManager,
    SandboxManagerConfig,
    SandboxPermissionError,
    SandboxReplacedError,
    SandboxUnavailableError,
)
from prodisco_sandbox._cluster.manifest import SANDBOX
from prodisco_sandbox._cluster.metadata import LABEL_INSTANCE, LABEL_OWNER, labels, lease_time, unix_time
from prodisco_sandbox._sessions.leases import PROBE
from prodisco_sandbox.testing import FakeCustomObjectsApi
from tests.support.managers import (
    Clients,
    LoopTimeApi,
    StubClient,
    alive,
    conditions,
    managed,
    now,
    settle,
    uids,
)

pytestmark = pytest.mark.looptime

T, SLACK, SKEW = 600.0, 300.0, 30.0
SHARED: dict[str, Any] = {"shared": True, "instance_id": "group"}


def cluster(**options: Any) -> FakeCustomObjectsApi:
    return LoopTimeApi(**{"auto_ready": True, **options})


def deadline(api: FakeCustomObjectsApi) -> float:
    """Of the only object."""
    [found] = api.objects
    until = unix_time(found["spec"]["shutdownTime"])
    assert until is not None
    return until


def writes(api: FakeCustomObjectsApi) -> list[float]:
    """When deadlines were moved."""
    return [round(r.time, 3) for r in api.requests if r.verb == "patch" and r.name != PROBE]


def verbs(api: FakeCustomObjectsApi, since: int = 0) -> list[str]:
    return [r.verb for r in api.requests[since:] if r.verb not in ("discovery", "watch", "list")]


async def use(client: SandboxClient, lasts: float) -> None:
    assert isinstance(client, StubClient)
    await client.begin(lasts)


# One session, two managers


async def test_another_manager_attaches_without_a_request() -> None:
    async with cluster() as api, managed(api, **SHARED) as one, managed(api, **SHARED) as two:
        first = await one.get_client("s")
        await settle()
        asked = len(api.requests)
        second = await two.get_client("s")
        assert verbs(api, asked) == []
        assert first.target == second.target
        assert first.sandbox is not None
        assert second.sandbox is not None
        assert first.sandbox.uid == second.sandbox.uid
        assert one.sandbox_name("s") == two.sandbox_name("s") == first.sandbox.name
        assert (one.stats().created, two.stats().created) == (1, 0)
        assert (one.stats().attached, two.stats().attached) == (0, 1)
        assert two.stats().known == 1


async def test_two_managers_that_create_at_once_make_one() -> None:
    async with cluster() as api, managed(api, **SHARED) as one, managed(api, **SHARED) as two:
        await asyncio.gather(one.get_client("s"), two.get_client("s"))
        assert len(api.objects) == 1
        assert one.stats().created + two.stats().created == 1


async def test_a_name_is_the_sessions_alone_and_no_other_groups() -> None:
    async with (
        cluster() as api,
        managed(api, **SHARED) as one,
        managed(api, shared=True, instance_id="other") as other,
        managed(api, instance_id="alone") as alone,
    ):
        for manager in (one, other, alone):
            await manager.get_client("s")
        assert len(api.objects) == 3
        groups = [labels(found)[LABEL_INSTANCE] for found in api.objects]
        assert sum(group.startswith("shared-") for group in groups) == 2
        await one.on_session_closed("s")
        before = one.sandbox_name("s")
        await one.get_client("s")
        assert one.sandbox_name("s") == before
        assert before in alive(api)


async def test_an_owner_is_a_hashed_label_and_is_counted_by_all() -> None:
    async with cluster() as api, managed(api, **SHARED) as one, managed(api, **SHARED) as two:
        await one.get_client("a", owner="alice")
        await one.get_client("b", owner="alice")
        await two.get_client("c", owner="bob")
        await settle()
        for manager in (one, two):
            assert [manager.count_sessions(owner) for owner in ("alice", "bob", "carol")] == [2, 1, 0]
        assert all("alice" not in str(found) and LABEL_OWNER in labels(found) for found in api.objects)


# Deadlines


async def test_a_deadline_is_there_from_birth() -> None:
    async with cluster() as api, managed(api, **SHARED) as manager:
        await manager.get_client("s")
        [body] = [r.body for r in api.requests if r.verb == "create"]
        assert body["spec"]["shutdownTime"] == lease_time(T + SLACK, 0)
        assert body["spec"]["shutdownPolicy"] == "Delete"


async def test_uses_write_once_in_each_slack() -> None:
    async with cluster() as api, managed(api, **SHARED) as manager:
        for _ in range(60):
            await manager.get_client("s")
            await asyncio.sleep(60)
        assert 3600 / SLACK - 3 <= len(writes(api)) <= 3600 / SLACK
        assert deadline(api) >= now() - 60 + T


async def test_what_another_manager_wrote_is_not_written_again() -> None:
    async with cluster() as api, managed(api, **SHARED) as one, managed(api, **SHARED) as two:
        await one.get_client("s")
        await two.get_client("s")
        await asyncio.sleep(SLACK + 1)
        await one.get_client("s")
        await settle()
        assert len(writes(api)) == 1
        await two.get_client("s")
        await use(await two.get_client("s"), 120.0)
        assert len(writes(api)) == 1


async def test_a_use_in_the_second_half_of_the_slack_is_covered_to_its_end() -> None:
    async with cluster() as api, managed(api, **SHARED) as manager:
        client = await manager.get_client("s")
        await asyncio.sleep(SLACK - 50)
        await use(client, 40.0)
        assert writes(api) == []
        await use(client, 120.0)
        assert len(writes(api)) == 1
        assert deadline(api) >= now() + 120 + T


async def test_a_session_that_nobody_uses_is_ended_by_the_cluster() -> None:
    async with cluster() as api, managed(api, **SHARED) as one, managed(api, **SHARED) as two:
        await one.get_client("s")
        await two.get_client("s")
        await asyncio.sleep(T + SLACK - 1)
        assert len(api.objects) == 1
        await asyncio.sleep(10)
        assert api.objects == []
        assert "delete" not in verbs(api)
        assert (one.stats().ready, two.stats().ready) == (0, 0)


async def test_an_idle_client_is_dropped_and_the_object_kept() -> None:
    clients = Clients()
    async with cluster() as api, managed(api, **SHARED) as one, managed(api, clients, **SHARED) as two:
        await two.get_client("s")
        for _ in range(15):
            await asyncio.sleep(60)
            await one.get_client("s")
        assert clients.made[0].closed
        assert (two.stats().ready, two.stats().reaped) == (0, 0)
        assert len(api.objects) == 1


async def test_an_entered_session_lives_on() -> None:
    async with cluster() as api, managed(api, **SHARED) as manager:
        async with manager.session("s"):
            await asyncio.sleep(7200)
            assert len(api.objects) == 1
            assert deadline(api) >= now() + T
        assert len(writes(api)) <= 7200 / SLACK + 1
        await asyncio.sleep(T + 2 * SLACK)
        assert api.objects == []


async def test_an_execution_is_covered_though_its_manager_dies() -> None:
    async with cluster() as api:
        manager = SandboxManager(
            SandboxManagerConfig(mode="multi", **SHARED),
            custom_objects_api=api,
            client_factory=Clients(),
            wall_clock=now,
        )
        client = await manager.get_client("s")
        await asyncio.sleep(SLACK - 1)
        await use(client, 120.0)
        await manager.shutdown()
        await asyncio.sleep(120 + T - 2)
        assert len(api.objects) == 1
        await asyncio.sleep(SLACK + 10)
        assert api.objects == []


# What ends, and what does not


async def test_shutdown_keeps_what_others_use() -> None:
    async with cluster() as api, managed(api, **SHARED) as one:
        async with managed(api, **SHARED) as two:
            client = await one.get_client("s")
            await two.get_client("s")
        assert len(api.objects) == 1
        assert (await one.get_client("s")) is client


async def test_a_close_deletes_from_anywhere() -> None:
    async with cluster() as api, managed(api, **SHARED) as one, managed(api, **SHARED) as two:
        await one.get_client("s")
        await settle()
        await two.on_session_closed("s")
        assert api.objects == []
        await settle()
        assert one.stats().ready == 0
        again = await one.get_client("s")
        assert again.sandbox is not None
        assert uids(api) == {again.sandbox.uid}


async def test_a_close_of_what_is_not_known_asks_once() -> None:
    async with cluster() as api, managed(api, **SHARED) as one:
        await one.get_client("s")
        other = SandboxManager(
            SandboxManagerConfig(mode="multi", **SHARED), custom_objects_api=api, wall_clock=now
        )
        api.faults.add("list", error=503, times=None)
        await other.on_session_closed("s")
        assert api.objects == []
        await other.on_session_closed("never seen")
        api.faults.clear()
        await other.shutdown()


async def test_a_client_of_what_another_has_closed_runs_nothing() -> None:
    async with cluster() as api, managed(api, **SHARED) as one, managed(api, **SHARED) as two:
        client = await one.get_client("s")
        await settle()
        await asyncio.sleep(SLACK + 1)
        api.silence_watches()
        await two.on_session_closed("s")
        with pytest.raises(SandboxReplacedError, match="nothing was run"):
            await use(client, 30.0)
        assert one.stats().ready == 0


async def test_a_dead_pod_is_replaced_by_one_of_two() -> None:
    async with cluster() as api, managed(api, **SHARED) as one, managed(api, **SHARED) as two:
        first = await one.get_client("s")
        await two.get_client("s")
        assert first.sandbox is not None
        api.set_condition(first.sandbox.name, "Finished", "True", "PodFailed")
        await settle()
        a, b = await asyncio.gather(one.get_client("s"), two.get_client("s"))
        assert a.sandbox is not None
        assert b.sandbox is not None
        assert a.sandbox.uid == b.sandbox.uid != first.sandbox.uid
        assert a.sandbox.name == first.sandbox.name
        assert uids(api) == {a.sandbox.uid}


async def test_an_unreachable_sandbox_is_kept_and_not_extended() -> None:
    clients = Clients()
    async with cluster() as api, managed(api, **SHARED) as one, managed(api, clients, **SHARED) as two:
        await one.get_client("s")
        await two.get_client("s")
        [mine] = clients.made
        mine.healthy = False
        clients.make = lambda target: type(mine)(target, healthy=False)
        mine.fail()
        before = deadline(api)
        await asyncio.sleep(SLACK + 1)
        with pytest.raises(Exception, match="not ready within"):
            await two.get_client("s")
        assert len(api.objects) == 1
        assert deadline(api) == before
        assert "delete" not in verbs(api)


async def test_one_that_is_being_deleted_is_waited_for() -> None:
    async with cluster() as api, managed(api, **SHARED) as one, managed(api, **SHARED) as two:
        first = await one.get_client("s")
        api.linger_deletes = True
        closing = asyncio.create_task(one.on_session_closed("s"))
        await asyncio.sleep(5)
        asking = asyncio.create_task(two.get_client("s"))
        await asyncio.sleep(20)
        assert not asking.done()
        api.finish_deletes()
        await closing
        second = await asking
        assert first.sandbox is not None
        assert second.sandbox is not None
        assert second.sandbox.name == first.sandbox.name
        assert second.sandbox.uid != first.sandbox.uid


async def test_gone_while_it_starts_it_is_made_again() -> None:
    async with cluster(auto_ready=3.0) as api, managed(api, **SHARED) as manager:
        asking = asyncio.create_task(manager.get_client("s"))
        await asyncio.sleep(1)
        [name] = alive(api)
        api.delete_now(name)
        client = await asking
        assert client.sandbox is not None
        assert uids(api) == {client.sandbox.uid}


async def test_a_lost_create_answer_is_no_second_object() -> None:
    async with cluster() as api, managed(api, **SHARED) as manager:
        api.faults.add("create", lost=True, times=1)
        await manager.get_client("s")
        assert len([r for r in api.requests if r.verb == "create"]) == 1


async def test_a_create_that_lands_late_is_not_deleted_by_its_manager() -> None:
    # Another manager's user may be on it by then.
    async with cluster() as api, managed(api, **SHARED) as one, managed(api, **SHARED) as two:
        api.faults.add("create", lost=True, times=1)
        api.faults.add("get", error=503, times=3)
        asking = asyncio.create_task(one.get_client("s"))
        await asyncio.sleep(0.1)
        asking.cancel()
        await one.on_session_closed("s")
        await two.get_client("s")
        await asyncio.sleep(120)
        assert len(api.objects) == 1


# Late extensions


async def test_an_extension_near_the_deadline_is_read_again() -> None:
    async with cluster() as api, managed(api, **SHARED) as manager:
        client = await manager.get_client("s")
        await asyncio.sleep(T + SLACK - SKEW + 1)
        begun, asked = now(), len(api.requests)
        client = await manager.get_client("s")
        assert now() - begun == pytest.approx(2.0)
        [patch] = [r for r in api.requests[asked:] if r.verb == "patch"]
        assert patch.body["metadata"]["resourceVersion"]
        assert [r.verb for r in api.requests[asked:]][-1] == "get"
        assert client.sandbox is not None


async def test_a_controller_that_deletes_by_a_stale_cache_costs_no_call() -> None:
    async with cluster() as api, managed(api, **SHARED) as manager:
        client = await manager.get_client("s")
        assert client.sandbox is not None
        await asyncio.sleep(T - 1)
        await use(client, 0.0)  # Keeps the client.
        await asyncio.sleep(T + SLACK - SKEW + 1)
        [name] = alive(api)
        using = asyncio.create_task(use(client, 30.0))
        await asyncio.sleep(1)
        api.delete_now(name)
        with pytest.raises(SandboxReplacedError):
            await using
        again = await manager.get_client("s")
        assert again.sandbox is not None
        assert again.sandbox.uid != client.sandbox.uid


async def test_a_late_extension_that_loses_to_a_delete_makes_another() -> None:
    async with cluster() as api, managed(api, **SHARED) as manager:
        first = await manager.get_client("s")
        await asyncio.sleep(T + SLACK - SKEW + 1)
        api.faults.add("patch", latency=1.0, times=1)
        asking = asyncio.create_task(manager.get_client("s"))
        await asyncio.sleep(0.5)
        api.delete_now(alive(api)[0])
        second = await asking
        assert first.sandbox is not None
        assert second.sandbox is not None
        assert second.sandbox.uid != first.sandbox.uid


# Silence and refusals


async def test_without_an_answer_a_use_runs_only_as_far_as_the_deadline_is_known() -> None:
    async with cluster() as api, managed(api, **SHARED) as manager:
        client = await manager.get_client("s")
        await asyncio.sleep(SLACK + 100)
        await manager.get_client("s")
        await asyncio.sleep(SLACK + 100)
        api.faults.add("*", error=503, times=None)
        await use(client, 100.0)
        left = deadline(api) - now()
        await use(client, left - SKEW - 25)
        with pytest.raises(SandboxUnavailableError):
            await use(client, left - SKEW + 1)
        api.faults.clear()


async def test_a_silent_watch_makes_a_use_read_first() -> None:
    async with cluster() as api, managed(api, **SHARED) as manager:
        client = await manager.get_client("s")
        await settle()
        api.silence_watches()
        await asyncio.sleep(80)
        await use(client, 0.0)
        assert verbs(api)[-1] == "create"
        await asyncio.sleep(20)
        await use(client, 0.0)
        await use(client, 0.0)
        assert verbs(api)[-2:] == ["create", "get"]


async def test_nothing_is_admitted_before_the_first_list() -> None:
    async with cluster() as api, managed(api, **SHARED) as manager:
        api.faults.add("list", latency=5.0, times=1)
        assert not manager.is_ready
        begun = now()
        await manager.get_client("s")
        assert now() - begun >= 5
        assert manager.is_ready


@pytest.mark.parametrize("verb", ["watch", "patch"])
async def test_what_shared_sessions_need_is_named(verb: Any) -> None:
    async with cluster() as api, managed(api, **SHARED) as manager:
        api.forbid(verb)
        with pytest.raises(SandboxPermissionError, match=f"{verb} sandboxes"):
            await manager.get_client("s")
        assert api.objects == []


async def test_an_api_server_that_starts_is_waited_for() -> None:
    async with cluster() as api, managed(api, **SHARED) as manager:
        api.faults.add("list", error=403, times=1)
        await manager.get_client("s")


# Slots


async def test_slots_are_counted_over_all_managers() -> None:
    three = {**SHARED, "max_sessions": 3}
    async with cluster() as api, managed(api, **three) as one, managed(api, **three) as two:
        await asyncio.gather(one.get_client("a"), one.get_client("b"), two.get_client("c"))
        await settle()
        for manager in (one, two):
            with pytest.raises(SandboxCapacityError):
                await manager.get_client("d")
        await two.get_client("a")  # It has a sandbox.
        await one.on_session_closed("a")
        await settle()
        await two.get_client("d")


async def test_a_slot_that_another_manager_frees_goes_to_who_waits() -> None:
    one_slot = {**SHARED, "max_sessions": 1, "capacity_timeout": 60.0}
    async with cluster() as api, managed(api, **one_slot) as one, managed(api, **one_slot) as two:
        await one.get_client("a")
        await settle()
        waiting = asyncio.create_task(two.get_client("b"))
        await asyncio.sleep(10)
        assert not waiting.done()
        await one.on_session_closed("a")
        await waiting
        assert now() < 11


async def test_an_exceeded_quota_queues_again_at_the_head() -> None:
    waits = {**SHARED, "capacity_timeout": 60.0}
    async with cluster() as api, managed(api, **waits) as one, managed(api, **waits) as two:
        await one.get_client("a")
        api.quota = 1
        first = asyncio.create_task(two.get_client("b"))
        await asyncio.sleep(5)
        assert two.stats().queued == 1
        await one.on_session_closed("a")
        await first
        later = asyncio.create_task(two.get_client("c"))
        with pytest.raises(SandboxCapacityError, match="exceeded quota"):
            await later


async def test_what_the_cluster_should_have_deleted_is_deleted_and_holds_no_slot() -> None:
    one_slot = {**SHARED, "max_sessions": 1}
    async with cluster(auto_ready=False) as api, managed(api, **one_slot) as manager:
        asking = asyncio.create_task(manager.get_client("a"))
        await settle()
        api.set_ready(alive(api)[0])  # No controller runs.
        await asking
        await asyncio.sleep(T + SLACK + SKEW + 1)
        late = asyncio.create_task(manager.get_client("b"))
        await settle()
        api.set_ready(manager.sandbox_name("b"))
        await late
        await asyncio.sleep(70)
        assert alive(api) == [manager.sandbox_name("b")]


# Beside managers of their own


async def test_an_exclusive_manager_neither_adopts_nor_cleans_up_shared_ones() -> None:
    async with cluster() as api, managed(api, **SHARED) as shared:
        await shared.get_client("s")
        [kept] = uids(api)
        await asyncio.sleep(T + SLACK - 10)
        async with managed(api, instance_id="shared-mine") as alone:
            assert await alone.cleanup_orphaned_sandboxes() == 0
            await alone.get_client("s")
            assert len(api.objects) == 2
        assert uids(api) == {kept}


async def test_a_clean_up_leaves_what_other_managers_use() -> None:
    async with cluster() as api, managed(api, **SHARED) as one, managed(api, **SHARED) as two:
        await one.get_client("s")
        assert await two.cleanup_orphaned_sandboxes() == 0
        assert len(api.objects) == 1


async def test_clocks_that_are_apart_are_told(caplog: pytest.LogCaptureFixture) -> None:
    async with cluster(now=lambda: now() + 20.0) as api, managed(api, **SHARED) as manager:
        await manager.get_client("s")
        told = [r.message for r in caplog.records if "clocks_apart" in r.message]
        assert len(told) == 1
        assert "-20" in told[0] or "-19" in told[0]


def test_the_name_of_a_session_of_a_group_is_its_own() -> None:
    assert SANDBOX.name("s") != SANDBOX.name("s", group="shared-x") != SANDBOX.name("s", group="shared-y")


async def test_suspended_by_somebody_else_it_is_started_again() -> None:
    async with cluster() as api, managed(api, **SHARED) as manager:
        client = await manager.get_client("s")
        assert client.sandbox is not None
        api.suspend(client.sandbox.name)
        await asyncio.sleep(1)
        again = await manager.get_client("s")
        assert again.sandbox is not None
        assert again.sandbox.uid == client.sandbox.uid
        assert conditions("")  # The object was not replaced.


# Claims on a warm pool


@asynccontextmanager
async def pooled() -> AsyncIterator[FakeCustomObjectsApi]:
    async with cluster() as api:
        api.add_warm_pool("python", 2)
        await asyncio.sleep(3)
        yield api


CLAIMS = {**SHARED, "warm_pool": "python"}


async def test_a_claim_is_shared_like_a_sandbox() -> None:
    async with pooled() as pool, managed(pool, **CLAIMS) as one, managed(pool, **CLAIMS) as two:
        await one.get_client("s")
        await settle()
        asked = len(pool.requests)
        await two.get_client("s")
        assert verbs(pool, asked) == []
        [claim] = pool.claims
        born = unix_time(claim["spec"]["lifecycle"]["shutdownTime"])
        assert born == pytest.approx(now() + T + SLACK, abs=5)
        await asyncio.sleep(SLACK + 10)
        await two.get_client("s")
        [claim] = pool.claims
        assert unix_time(claim["spec"]["lifecycle"]["shutdownTime"]) == pytest.approx(
            now() + T + SLACK, abs=1
        )
        await asyncio.sleep(T + SLACK + 10)
        assert pool.claims == []


async def test_a_claim_that_is_bound_anew_is_another_machine_to_all() -> None:
    async with pooled() as pool, managed(pool, **CLAIMS) as one, managed(pool, **CLAIMS) as two:
        before = [await one.get_client("s"), await two.get_client("s")]
        [claim] = pool.claims
        pool.delete_now(claim["status"]["sandbox"]["name"], kind="Sandbox")
        await asyncio.sleep(3)
        after = [await one.get_client("s"), await two.get_client("s")]
        assert not {client.sandbox for client in before} & {client.sandbox for client in after}
        assert len(pool.claims) == 1


async def test_a_dead_claim_is_replaced_by_one_of_two() -> None:
    async with pooled() as pool, managed(pool, **CLAIMS) as one, managed(pool, **CLAIMS) as two:
        await one.get_client("s")
        await two.get_client("s")
        [claim] = pool.claims
        pool.fail_pod(claim["metadata"]["name"])
        await asyncio.sleep(1)
        a, b = await asyncio.gather(one.get_client("s"), two.get_client("s"))
        [again] = pool.claims
        assert again["metadata"]["uid"] != claim["metadata"]["uid"]
        assert a.sandbox is not None
        assert b.sandbox is not None
        assert a.sandbox.uid == b.sandbox.uid == again["metadata"]["uid"]


# Eviction


EVICTS = {**SHARED, "max_sessions": 2, "when_full": "evict", "capacity_timeout": 20.0}


async def test_an_idle_session_of_another_manager_makes_room() -> None:
    async with cluster() as api, managed(api, **EVICTS) as one, managed(api, **EVICTS) as two:
        await one.get_client("a")
        await one.get_client("b")
        for _ in range(3):
            await asyncio.sleep(30)
            await one.get_client("b")
        begun = now()
        await two.get_client("c")
        assert now() - begun < 3
        assert set(alive(api)) == {two.sandbox_name("b"), two.sandbox_name("c")}
        assert (two.stats().evicted, one.stats().ready) == (1, 1)
        [delete] = [r for r in api.requests if r.verb == "delete"]
        assert set(delete.body["preconditions"]) == {"uid", "resourceVersion"}


async def test_a_use_wins_over_an_eviction_that_has_not_seen_it() -> None:
    async with cluster() as api, managed(api, **EVICTS) as one, managed(api, **EVICTS) as two:
        clients = [await one.get_client(each) for each in "ab"]
        await asyncio.sleep(100)
        api.silence_watches()  # Two goes by what it saw last.
        for client in clients:
            await use(client, 10.0)
        with pytest.raises(SandboxCapacityError):
            await two.get_client("c")
        assert len(alive(api)) == 2
        assert one.stats().ready == 2


async def test_nobody_is_evicted_who_was_used_a_moment_ago() -> None:
    async with cluster() as api, managed(api, **EVICTS) as one, managed(api, **EVICTS) as two:
        await one.get_client("a")
        await one.get_client("b")
        await asyncio.sleep(60)  # With clocks apart, 30 of these may not have passed.
        with pytest.raises(SandboxCapacityError):
            await two.get_client("c")
        assert len(api.objects) == 2


async def test_a_session_that_is_in_use_is_not_evicted() -> None:
    async with cluster() as api, managed(api, **EVICTS) as one, managed(api, **EVICTS) as two:
        async with one.session("a"), two.session("b"):
            await asyncio.sleep(1000)
            with pytest.raises(SandboxCapacityError):
                await two.get_client("c")
        assert len(api.objects) == 2


async def test_the_owner_with_most_makes_room_wherever_it_is_served() -> None:
    three = {**EVICTS, "max_sessions": 3}
    async with cluster() as api, managed(api, **three) as one, managed(api, **three) as two:
        await one.get_client("a1", owner="alice")
        await one.get_client("a2", owner="alice")
        await two.get_client("b1", owner="bob")
        await asyncio.sleep(200)
        await two.get_client("c1", owner="carol")
        assert [two.count_sessions(owner) for owner in ("alice", "bob", "carol")] == [1, 1, 1]
        assert len(api.objects) == 3


async def test_those_who_wait_hold_no_slots() -> None:
    three = {**EVICTS, "max_sessions": 3}
    async with cluster() as api, managed(api, **three) as one, managed(api, **three) as two:
        for _ in range(2):
            for each in ("a1", "a2"):
                await one.get_client(each, owner="alice")
            await one.get_client("b1", owner="bob")
            await asyncio.sleep(150)
        waiting = [asyncio.create_task(two.get_client(each, owner="carol")) for each in ("c1", "c2")]
        await waiting[0]
        with pytest.raises(SandboxCapacityError):
            await waiting[1]
        assert [two.count_sessions(owner) for owner in ("alice", "bob", "carol")] == [1, 1, 1]


async def test_an_owner_gives_up_a_session_wherever_it_is_served() -> None:
    async with cluster() as api, managed(api, **EVICTS) as one, managed(api, **EVICTS) as two:
        await one.get_client("a", owner="alice")
        await two.on_session_initialized("b", owner="bob")
        assert not two.make_room("alice")
        await asyncio.sleep(200)
        assert not two.make_room("carol")
        assert two.make_room("alice")
        await api.until(lambda: len(api.objects) == 1, timeout=5)
        await settle()
        assert [two.count_sessions(owner) for owner in ("alice", "bob")] == [0, 1]
        assert not one.has_session("a")


async def test_a_list_is_read_once() -> None:
    read: list[str] = []

    def endpoint(sandbox: dict[str, Any]) -> str:
        read.append(sandbox["metadata"]["name"])
        return "10.0.0.1:50051"

    async with cluster() as api, managed(api, **SHARED) as one:
        await asyncio.gather(*(one.get_client(each) for each in "abc"))
        async with managed(api, endpoint=endpoint, **SHARED) as two:
            await settle()
            assert two.stats().known == 3
            assert sorted(read) == sorted(alive(api))
