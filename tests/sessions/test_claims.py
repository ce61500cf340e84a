"""Sessions whose objects are SandboxClaims on a warm pool."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from prodisco_sandbox import (
    SandboxCapacityError,
    SandboxFailedError,
    SandboxManager,
    SandboxManagerClosedError,
    SandboxPermissionError,
    SandboxTimeoutError,
    SandboxUnavailableError,
)
from prodisco_sandbox._cluster.claim import CLAIM
from prodisco_sandbox._cluster.manifest import SANDBOX
from prodisco_sandbox._cluster.metadata import LABEL_INSTANCE, is_deleting
from prodisco_sandbox.testing import FakeCustomObjectsApi, api_error
from tests.support.managers import (
    Clients,
    LoopTimeApi,
    StubClient,
    conditions,
    left_behind,
    managed,
    now,
    settle,
)

pytestmark = pytest.mark.looptime

POOL = "python"


@asynccontextmanager
async def claimed(
    replicas: int | None = 2, *, clients: Clients | None = None, ready: Any = 1.0, **settings: Any
) -> AsyncIterator[tuple[FakeCustomObjectsApi, SandboxManager]]:
    """A manager on a pool whose members are ready; None: there is no pool."""
    async with LoopTimeApi(auto_ready=ready) as api:
        if replicas is not None:
            api.add_warm_pool(POOL, replicas)
            await asyncio.sleep(3)
        async with managed(api, clients, warm_pool=POOL, **settings) as manager:
            yield api, manager
        assert api.claims == []
        await asyncio.sleep(3)
        assert [s for s in api.objects if s["metadata"]["name"].startswith("session-")] == []


def claim_of(api: FakeCustomObjectsApi, session_id: str = "s", incarnation: int = 0) -> dict[str, Any]:
    found = api.get(CLAIM.name(session_id, incarnation), kind="SandboxClaim")
    assert found is not None
    return found


def bound_to(api: FakeCustomObjectsApi, session_id: str = "s", incarnation: int = 0) -> str:
    return str(claim_of(api, session_id, incarnation)["status"]["sandbox"]["name"])


# From the pool, or cold


async def test_a_session_gets_a_sandbox_that_runs_already() -> None:
    async with claimed() as (api, manager):
        begun = now()
        client = await manager.get_client("s")
        assert now() - begun < 0.2
        claim = claim_of(api)
        assert manager.sandbox_name("s") == claim["metadata"]["name"] == CLAIM.name("s")
        assert claim["spec"]["warmPoolRef"] == {"name": POOL}
        assert set(claim["spec"]) <= {"warmPoolRef", "lifecycle", "additionalPodMetadata"}
        assert bound_to(api).startswith(f"{POOL}-")
        assert client.target == f"{claim['status']['sandbox']['podIPs'][0]}:50051"
        assert client.sandbox is not None
        assert (client.sandbox.name, client.sandbox.uid) == (CLAIM.name("s"), claim["metadata"]["uid"])
        stats = manager.stats()
        assert (stats.warm, stats.cold, stats.created) == (1, 0, 1)
        await manager.on_session_closed("s")
        assert api.claims == []


async def test_an_empty_pool_starts_cold() -> None:
    async with claimed(0) as (api, manager):
        await manager.get_client("s")
        assert bound_to(api) == CLAIM.name("s")
        assert (manager.stats().warm, manager.stats().cold) == (0, 1)


async def test_the_controller_is_told_when_the_session_was_asked_for() -> None:
    async with claimed() as (api, manager):
        api.faults.add("create", error=api_error(429, retry_after=1), times=2)
        begun = now()
        await manager.get_client("s")
        said = claim_of(api)["metadata"]["annotations"]["agents.x-k8s.io/client-first-requested-at"]
        assert said.startswith("1970-01-01T")
        seconds = float(said[17:-1]) + 60 * float(said[14:16])
        assert seconds == pytest.approx(begun, abs=0.01)


async def test_thirty_at_once_on_a_pool_of_ten() -> None:
    async with claimed(10, max_sessions=30) as (api, manager):
        before = len(api.requests)
        clients = await asyncio.gather(*(manager.get_client(str(i)) for i in range(30)))
        assert len({client.target for client in clients}) == 30
        stats = manager.stats()
        assert stats.ready == stats.warm + stats.cold == 30
        assert stats.warm >= 10
        await asyncio.gather(*(manager.on_session_closed(str(i)) for i in range(30)))
        # Create and delete; and for the manager two discoveries and lists, a probe and a watch.
        assert len(api.requests) - before <= 2 * 30 + 6


async def test_one_claim_however_many_ask() -> None:
    async with claimed() as (api, manager):
        clients = await asyncio.gather(*(manager.get_client("s") for _ in range(20)))
        assert len(set(clients)) == 1
        assert api.count("create") == 1


# What is missing


async def test_a_pool_that_comes_in_time_is_waited_for() -> None:
    async with claimed(None) as (api, manager):
        waiting = asyncio.create_task(manager.get_client("s"))
        await asyncio.sleep(5)
        assert not waiting.done()
        api.add_warm_pool(POOL, 1)
        await waiting


async def test_a_pool_that_does_not_come_is_named() -> None:
    async with claimed(None, ready_timeout=10.0) as (api, manager):
        begun = now()
        with pytest.raises(SandboxTimeoutError) as caught:
            await manager.get_client("s")
        assert now() - begun == 10.0
        assert 'reason WarmPoolNotFound: SandboxWarmPool "python" not found' in str(caught.value)
        assert "create it in this namespace, or correct warm_pool" in str(caught.value)
        await settle()
        assert api.claims == []


async def test_extensions_that_are_not_installed_are_named_at_once() -> None:
    api = LoopTimeApi(auto_ready=True, extensions=False)
    async with api, managed(api, warm_pool=POOL) as manager:
        begun = now()
        with pytest.raises(SandboxUnavailableError) as caught:
            await manager.get_client("s")
        assert now() == begun
        assert "sandboxclaims.extensions.agents.x-k8s.io" in str(caught.value)
        assert "sandbox-with-extensions.yaml" in str(caught.value)


async def test_a_role_without_claims_is_named() -> None:
    async with claimed() as (api, manager):
        api.forbid("create")
        with pytest.raises(SandboxPermissionError) as caught:
            await manager.get_client("s")
        rule = 'apiGroups ["extensions.agents.x-k8s.io"], resources ["sandboxclaims"], verbs ["create"]'
        assert rule in str(caught.value)


async def test_a_claim_that_cannot_work_fails_at_once() -> None:
    async with claimed(0, ready=False) as (api, manager):
        waiting = asyncio.create_task(manager.get_client("s"))
        await asyncio.sleep(1)
        api.set_condition(CLAIM.name("s"), "Ready", "False", "InvalidMetadata", "no such domain")
        begun = now()
        with pytest.raises(SandboxFailedError, match="InvalidMetadata: no such domain"):
            await waiting
        assert now() - begun < 0.1


async def test_a_quota_in_the_controllers_words_is_a_capacity_error() -> None:
    async with claimed(0, ready=False) as (api, manager):
        waiting = asyncio.create_task(manager.get_client("s"))
        await asyncio.sleep(1)
        text = 'Error seen: sandboxes.agents.x-k8s.io "a" is forbidden: exceeded quota: q, requested: 1'
        api.set_condition(CLAIM.name("s"), "Ready", "False", "ReconcilerError", text)
        with pytest.raises(SandboxCapacityError, match="exceeded quota"):
            await waiting


async def test_a_sandbox_left_under_the_claims_name_is_evaded() -> None:
    async with claimed(0, ready=False) as (api, manager):
        waiting = asyncio.create_task(manager.get_client("s"))
        await asyncio.sleep(1)
        name = CLAIM.name("s")
        text = f'Error seen: sandbox "{name}" is not controlled by claim "{name}". Please use another name'
        api.set_condition(name, "Ready", "False", "ReconcilerError", text)
        await asyncio.sleep(1)
        assert [c["metadata"]["name"] for c in api.claims] == [CLAIM.name("s", 1)]
        api.set_ready(CLAIM.name("s", 1))
        await waiting


# Another machine


async def test_a_claim_that_is_bound_anew_drops_its_client() -> None:
    async with claimed() as (api, manager):
        first = await manager.get_client("s")
        before = bound_to(api)
        api.delete_now(before)
        await api.until(lambda: bound_to(api) != before)
        await settle()
        assert first.closed  # type: ignore[attr-defined]
        second = await manager.get_client("s")
        assert second is not first
        assert second.target != first.target
        assert first.sandbox != second.sandbox
        assert first.sandbox is not None
        assert second.sandbox is not None
        assert first.sandbox.uid == second.sandbox.uid
        assert manager.stats().recreated == 1
        assert api.count("create") == 1


async def test_a_claim_that_is_bound_anew_at_the_same_address_is_another_machine() -> None:
    async with claimed(0, ready=False) as (api, manager):
        waiting = asyncio.create_task(manager.get_client("s"))
        await asyncio.sleep(1)

        def bind(member: str) -> None:
            bound = {"sandbox": {"name": member, "podIPs": ["10.0.0.7"]}}
            api.set_status(CLAIM.name("s"), conditions("DependenciesReady", status="True") | bound)

        bind("python-a")
        first = await waiting
        bind("python-b")
        await settle()
        assert first.closed  # type: ignore[attr-defined]
        second = await manager.get_client("s")
        assert (second.target, second.sandbox == first.sandbox) == (first.target, False)


async def test_a_claim_that_is_bound_anew_during_the_first_health_check() -> None:
    class Slow(StubClient):
        async def wait_for_healthy(self, timeout: float) -> bool:
            await asyncio.sleep(0.5)
            return await super().wait_for_healthy(timeout)

    async with claimed(clients=Clients(Slow)) as (api, manager):
        waiting = asyncio.create_task(manager.get_client("s"))
        await api.until(lambda: api.claims and "sandbox" in (api.claims[0].get("status") or {}))
        await asyncio.sleep(0.1)
        before = bound_to(api)
        api.delete_now(before)
        await api.until(lambda: bound_to(api) != before)
        client = await waiting
        assert client.target == f"{claim_of(api)['status']['sandbox']['podIPs'][0]}:50051"


async def test_a_dead_pod_is_replaced_on_the_next_use_and_not_before() -> None:
    async with claimed() as (api, manager):
        first = await manager.get_client("s")
        api.fail_pod(CLAIM.name("s"))
        await settle()
        assert first.closed  # type: ignore[attr-defined]
        await asyncio.sleep(30)
        assert (api.count("delete"), api.count("create")) == (0, 1)
        second = await manager.get_client("s")
        assert second.sandbox != first.sandbox
        assert (api.count("delete"), api.count("create")) == (1, 2)


async def test_a_drained_pod_leaves_the_claim_with_another_machine() -> None:
    async with claimed() as (api, manager):
        first = await manager.get_client("s")
        api.delete_pod(CLAIM.name("s"))
        await asyncio.sleep(5)
        second = await manager.get_client("s")
        assert second.sandbox != first.sandbox
        assert api.count("create") == 1


async def test_a_member_that_somebody_suspends_is_waited_for_and_kept() -> None:
    async with claimed(ready_timeout=10.0) as (api, manager):
        await manager.get_client("s")
        uid = claim_of(api)["metadata"]["uid"]
        api.suspend(bound_to(api))
        await asyncio.sleep(5)
        with pytest.raises(SandboxTimeoutError, match="SandboxSuspended"):
            await manager.get_client("s")
        assert claim_of(api)["metadata"]["uid"] == uid
        api.resume(bound_to(api))
        await manager.get_client("s")
        assert claim_of(api)["metadata"]["uid"] == uid


async def test_a_pool_that_is_scaled_to_nothing_keeps_what_is_claimed() -> None:
    async with claimed() as (api, manager):
        client = await manager.get_client("s")
        api.add_warm_pool(POOL, 0)
        await asyncio.sleep(30)
        assert await manager.get_client("s") is client
        await manager.get_client("t")
        assert manager.stats().cold == 1


# Leases, other managers, other times


async def test_a_claim_has_its_lease_from_birth_and_keeps_it() -> None:
    async with claimed(lease_duration=60.0, session_idle_timeout=1000.0) as (api, manager):
        client = await manager.get_client("s")
        lifecycle = claim_of(api)["spec"]["lifecycle"]
        assert lifecycle["shutdownPolicy"] == "Delete"
        for _ in range(10):
            await asyncio.sleep(30)
            assert await manager.get_client("s") is client
        await asyncio.sleep(1)
        assert claim_of(api)["spec"]["lifecycle"]["shutdownTime"] > lifecycle["shutdownTime"]
        assert api.count("patch", CLAIM.name("s")) == 10


async def test_a_claim_that_expires_ends_the_session() -> None:
    async with claimed() as (api, manager):
        first = await manager.get_client("s")
        api.expire(CLAIM.name("s"))
        await asyncio.sleep(5)
        assert api.claims == []
        assert await manager.get_client("s") is not first
        assert manager.stats().lost == 1


async def test_the_claim_of_an_earlier_process_is_adopted() -> None:
    async with claimed(session_idle_timeout=1000.0) as (api, manager):
        await manager.get_client("s")
        uid = claim_of(api)["metadata"]["uid"]
        async with managed(api, warm_pool=POOL, instance_id="next") as successor:
            client = await successor.get_client("s")
            assert client.sandbox is not None
            assert client.sandbox.uid == uid
            assert claim_of(api)["metadata"]["labels"][LABEL_INSTANCE] == "next"
            assert (successor.stats().warm, successor.stats().cold) == (0, 0)
            await settle()
            assert not manager.has_session("s")
        assert api.claims == []


async def test_one_whose_sandbox_goes_while_it_is_adopted_is_bound_anew() -> None:
    async with claimed(0, session_idle_timeout=1000.0) as (api, manager):
        await manager.get_client("s")
        async with managed(api, warm_pool=POOL, instance_id="next") as successor:
            with api.faults.add("patch", hold=True, when=lambda r: "next" in str(r.body)) as gate:
                waiting = asyncio.create_task(successor.get_client("s"))
                await gate.reached()
                api.delete_now(bound_to(api))
            client = await waiting
            assert client.target == f"{claim_of(api)['status']['sandbox']['podIPs'][0]}:50051"


async def test_one_that_is_adopted_and_replaced_counts_as_a_start() -> None:
    async with claimed(session_idle_timeout=1000.0) as (api, manager):
        await manager.get_client("s")
        async with managed(api, warm_pool=POOL, instance_id="next") as successor:
            with api.faults.add("patch", hold=True, when=lambda r: "next" in str(r.body)) as gate:
                waiting = asyncio.create_task(successor.get_client("s"))
                await gate.reached()
                api.fail_pod(CLAIM.name("s"))
            await waiting
            stats = successor.stats()
            assert stats.warm + stats.cold == stats.created == 1


async def test_orphans_are_claims() -> None:
    async with claimed() as (api, manager), managed(api, warm_pool=POOL, instance_id="other") as other:
        await other.get_client("s")
        assert await manager.cleanup_orphaned_sandboxes() == 0
        assert await manager.cleanup_orphaned_sandboxes(all_instances=True) == 1
        assert api.claims == []


async def test_a_claim_under_the_name_that_is_being_deleted_is_evaded() -> None:
    async with claimed() as (api, manager):
        await manager.get_client("s")
        api.linger_deletes = True
        async with managed(api, warm_pool=POOL, instance_id="other") as other:
            closing = asyncio.create_task(manager.on_session_closed("s"))
            await api.until(lambda: is_deleting(claim_of(api)))
            await other.get_client("s")
            assert other.sandbox_name("s") == CLAIM.name("s", 1)
            await closing
            api.finish_deletes()
            api.linger_deletes = False


async def test_sandboxes_from_before_the_pool_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    async with LoopTimeApi(auto_ready=1.0) as api:
        await left_behind(api, "old")
        api.add_warm_pool(POOL, 1)
        async with managed(api, warm_pool=POOL) as manager:
            await manager.get_client("new")
            await manager.get_client("newer")
            told = [record.__dict__["sandbox"] for record in caplog.records]
            [changed] = [event for event in told if event["event"] == "sandbox_kind_changed"]
            assert changed["sandboxes"] == [SANDBOX.name("old")]
            assert "use a new one" in changed["reason"]
        assert api.get(SANDBOX.name("old")) is not None


async def test_a_shutdown_ends_the_search_for_sandboxes_from_before_the_pool() -> None:
    async with LoopTimeApi(auto_ready=1.0) as api:
        api.add_warm_pool(POOL, 1)
        await asyncio.sleep(3)
        before = asyncio.all_tasks()
        async with managed(api, warm_pool=POOL) as manager:
            with api.faults.add("discovery", hold=True) as gate:
                asking = asyncio.create_task(manager.get_client("s"))
                await gate.reached(2)
                await manager.shutdown()
                with pytest.raises(SandboxManagerClosedError):
                    await asking
                assert asyncio.all_tasks() == before
