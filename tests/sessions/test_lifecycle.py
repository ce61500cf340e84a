"""A session's life in multi mode, on the fake API and in virtual time."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest

from prodisco_sandbox import (
    SandboxCapacityError,
    SandboxClient,
    SandboxError,
    SandboxFailedError,
    SandboxManager,
    SandboxManagerClosedError,
    SandboxManagerConfig,
    SandboxRef,
    SandboxTimeoutError,
)
from prodisco_sandbox._cluster.metadata import session_hash
from tests.support.managers import Clients, LoopTimeApi, StubClient, alive, conditions, managed, settle
from tests.support.patience import PATIENCE

pytestmark = pytest.mark.looptime


def now() -> float:
    return asyncio.get_running_loop().time()


async def test_a_session_gets_a_ready_and_healthy_sandbox_of_its_own() -> None:
    async with LoopTimeApi(auto_ready=2.0) as api:
        clients = Clients()
        async with managed(api, clients) as manager:
            client = await manager.get_client("session")
            assert now() == pytest.approx(2.0, abs=1e-6)
            assert clients.made == [client]
            assert clients.made[0].health_checks == 1
            [sandbox] = api.objects
            name = manager.sandbox_name("session")
            assert sandbox["metadata"]["name"] == name
            assert sandbox["metadata"]["labels"]["prodisco.dev/session"] == session_hash("session")
            assert client.sandbox == SandboxRef(name, sandbox["metadata"]["uid"], 0)
            assert client.target == f"{sandbox['status']['podIPs'][0]}:50051"
            assert await manager.get_client("session") is client
            assert await manager.get_client("other") is not client
            assert len(api.objects) == 2
        assert api.objects == []
        assert all(client.closed for client in clients.made)


async def test_a_session_is_known_from_its_first_call_until_its_close() -> None:
    async with LoopTimeApi(auto_ready=1.0) as api, managed(api, max_sessions=1) as manager:
        assert manager.config.max_sessions == 1
        assert not manager.has_session("s")
        creation = asyncio.create_task(manager.get_client("s"))
        await asyncio.sleep(0.5)
        assert manager.has_session("s"), "while it is created"
        await creation
        assert manager.has_session("s")
        closing = asyncio.create_task(manager.on_session_closed("s"))
        await asyncio.sleep(0)
        assert not manager.has_session("s"), "while it is deleted"
        await closing
        assert not manager.has_session("s")
        with pytest.raises(ValueError, match="non-empty"):
            manager.has_session("")


async def test_the_requests_of_a_session_are_one_create_and_one_delete() -> None:
    async with LoopTimeApi(auto_ready=1.0) as api:
        async with managed(api, max_sessions=50) as manager:
            await asyncio.gather(*(manager.get_client(f"s{i}") for i in range(50)))
            for i in range(50):
                await manager.on_session_closed(f"s{i}")
        counts = {verb: api.count(verb) for verb in ("create", "delete", "get", "list", "watch", "patch")}
        assert counts == {"create": 50, "delete": 50, "get": 0, "list": 1, "watch": 1, "patch": 1}
        assert api.count("discovery") == 1


async def test_many_callers_make_one_sandbox() -> None:
    async with LoopTimeApi(auto_ready=1.0) as api, managed(api) as manager:
        asked: list[Any] = [manager.get_client("s") for _ in range(10)]
        asked += [manager.on_session_initialized("s") for _ in range(10)]
        results = await asyncio.gather(*asked)
        assert len({id(result) for result in results[:10]}) == 1
        assert results[10:] == [None] * 10
        assert api.count("create") == 1
        assert manager.stats().created == 1


async def test_cancelling_the_first_caller_does_not_reach_the_others() -> None:
    async with LoopTimeApi(auto_ready=1.0) as api, managed(api) as manager:
        first = asyncio.create_task(manager.get_client("s"))
        await settle()
        second = asyncio.create_task(manager.get_client("s"))
        await settle()
        first.cancel()
        client = await second
        assert first.cancelled()
        assert api.count("create") == 1
        assert await manager.get_client("s") is client


async def test_a_creation_goes_on_when_all_callers_have_left() -> None:
    async with LoopTimeApi(auto_ready=1.0) as api, managed(api) as manager:
        caller = asyncio.create_task(manager.get_client("s"))
        await settle()
        caller.cancel()
        await asyncio.sleep(1.5)
        assert manager.stats().ready == 1
        await manager.get_client("s")
        assert api.count("create") == 1


async def test_initialising_again_while_under_way_joins() -> None:
    # The original answered the second with a 409 and forgot the first.
    async with LoopTimeApi(auto_ready=1.0) as api, managed(api) as manager:
        first = asyncio.create_task(manager.on_session_initialized("s"))
        await settle()
        await manager.on_session_initialized("s")
        await first
        await manager.on_session_initialized("s")
        assert api.count("create") == 1
        assert manager.stats().ready == 1


async def test_the_cap_holds_however_many_initialise_at_once() -> None:
    # The original made 30 Sandboxes of 30 initialisations with a cap of 10.
    async with LoopTimeApi(auto_ready=1.0) as api, managed(api, max_sessions=10) as manager:
        most = 0

        def count(*_: object) -> None:
            nonlocal most
            most = max(most, len(api.objects))

        api.subscribe(count)
        results = await asyncio.gather(
            *(manager.on_session_initialized(f"s{i}") for i in range(30)), return_exceptions=True
        )
        refused = [result for result in results if isinstance(result, SandboxCapacityError)]
        assert len(refused) == 20
        assert "all 10 sandbox slots" in str(refused[0])
        assert most == 10
        assert now() == pytest.approx(1.0, abs=1e-6), "refusals are immediate"


async def test_a_new_session_queues_for_a_slot_first_come_first_served() -> None:
    async with (
        LoopTimeApi(auto_ready=True) as api,
        managed(api, max_sessions=1, capacity_timeout=10.0) as manager,
    ):
        await manager.get_client("a")
        order: list[str] = []

        async def queue(session_id: str) -> None:
            await manager.get_client(session_id)
            order.append(session_id)
            await manager.on_session_closed(session_id)

        waiting = [asyncio.create_task(queue(f"w{i}")) for i in range(5)]
        await settle()
        assert manager.stats().queued == 5
        assert manager.stats().waiting == 5
        await asyncio.sleep(3)
        await manager.on_session_closed("a")
        await asyncio.gather(*waiting)
        assert order == ["w0", "w1", "w2", "w3", "w4"]


async def test_queueing_ends_with_capacity_timeout() -> None:
    async with (
        LoopTimeApi(auto_ready=True) as api,
        managed(api, max_sessions=1, capacity_timeout=10.0) as manager,
    ):
        await manager.get_client("a")
        with pytest.raises(SandboxCapacityError, match="max_sessions"):
            await manager.get_client("b")
        assert now() == pytest.approx(10.0, abs=1e-6)
        assert manager.stats().queued == 0


async def test_a_queued_session_whose_callers_have_left_takes_no_slot() -> None:
    async with (
        LoopTimeApi(auto_ready=True) as api,
        managed(api, max_sessions=1, capacity_timeout=10.0) as manager,
    ):
        await manager.get_client("a")
        leaving = asyncio.create_task(manager.get_client("b"))
        await settle()
        staying = asyncio.create_task(manager.get_client("c"))
        await settle()
        leaving.cancel()
        await settle()
        assert manager.stats().queued == 1
        await manager.on_session_closed("a")
        await staying
        assert api.count("create") == 2


async def test_a_failed_creation_deletes_its_sandbox_and_gives_its_slot_back_once() -> None:
    def fails_at_first(sandbox: dict[str, Any]) -> dict[str, Any] | bool:
        if api.count("create") > 2:
            return True
        return conditions("PodFailed", "OOM")

    async with (
        LoopTimeApi(auto_ready=fails_at_first) as api,
        managed(api, max_sessions=1, capacity_timeout=5.0) as manager,
    ):
        first = asyncio.create_task(manager.get_client("a"))
        await asyncio.sleep(0)
        second = asyncio.create_task(manager.get_client("b"))
        with pytest.raises(SandboxFailedError, match=r"PodFailed: OOM"):
            await first
        await second
        assert alive(api) == [manager.sandbox_name("b")]
        assert manager.stats().failed == 1
        with pytest.raises(SandboxCapacityError):
            await manager.get_client("c")


async def test_every_waiter_gets_an_error_of_its_own_with_the_cause() -> None:
    async with LoopTimeApi() as api, managed(api) as manager:
        api.faults.add("create", error=422)
        results = await asyncio.gather(*(manager.get_client("s") for _ in range(3)), return_exceptions=True)
        assert all(isinstance(result, SandboxFailedError) for result in results)
        assert len({id(result) for result in results}) == 3
        causes = {id(result.__cause__) for result in results if isinstance(result, BaseException)}
        assert len(causes) == 1
        assert None not in causes


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (conditions("PodFailed"), "PodFailed"),
        (conditions("PodSucceeded"), "PodSucceeded"),
        (conditions("InvalidConfiguration"), "InvalidConfiguration"),
        (conditions("PodFailed", kind="Finished", status="True"), "Finished=True"),
    ],
)
async def test_what_will_never_be_ready_is_not_waited_for(status: dict[str, Any], text: str) -> None:
    async with LoopTimeApi(auto_ready=lambda _: status) as api, managed(api) as manager:
        with pytest.raises(SandboxFailedError, match=text):
            await manager.get_client("s")
        assert now() < 0.5
        await settle()
        assert api.objects == []


async def test_a_sandbox_deleted_by_others_while_it_is_made_is_not_waited_for() -> None:
    async with LoopTimeApi() as api, managed(api) as manager:
        waiting = asyncio.create_task(manager.get_client("s"))
        await api.until(lambda: api.objects)
        await asyncio.sleep(3)
        api.delete_now(manager.sandbox_name("s"))
        with pytest.raises(SandboxFailedError, match="deleted"):
            await waiting
        assert now() < 3.5
        assert api.count("delete") == 0, "there is nothing left to delete"


async def test_a_service_without_a_ready_pod_is_not_ready() -> None:
    def service_only(sandbox: dict[str, Any]) -> dict[str, Any]:
        return {"serviceFQDN": "x.svc.cluster.local", **conditions("DependenciesNotReady")}

    async with LoopTimeApi(auto_ready=service_only) as api, managed(api) as manager:
        waiting = asyncio.create_task(manager.get_client("s"))
        await asyncio.sleep(20)
        assert not waiting.done()
        api.set_ready(manager.sandbox_name("s"))
        await waiting
        assert now() == pytest.approx(20.0, abs=1e-6)


async def test_creation_readiness_and_health_share_one_deadline() -> None:
    async with LoopTimeApi(auto_ready=30.0) as api:
        api.faults.add("create", latency=5.0)
        clients = Clients(lambda target: StubClient(target, healthy=False))
        async with managed(api, clients, ready_timeout=60.0) as manager:
            with pytest.raises(SandboxTimeoutError, match=r"ready_timeout \(60 s\).*not healthy"):
                await manager.get_client("s")
            assert now() == pytest.approx(60.0, abs=0.01)
            await settle()
            assert api.objects == []
            assert clients.made[0].closed


async def test_a_timeout_says_the_last_state_seen() -> None:
    status = conditions("DependenciesNotReady", "Pod is Pending: no node has room")
    async with (
        LoopTimeApi(auto_ready=lambda _: status) as api,
        managed(api, ready_timeout=10.0) as manager,
    ):
        with pytest.raises(
            SandboxTimeoutError, match=r"DependenciesNotReady: Pod is Pending: no node has room"
        ):
            await manager.get_client("s")
        assert now() == pytest.approx(10.0, abs=0.01)


async def test_closing_twice_is_fine_and_frees_the_slot() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api, max_sessions=1) as manager:
        client = await manager.get_client("s")
        assert isinstance(client, StubClient)
        await manager.on_session_closed("s")
        assert client.closed
        assert api.objects == []
        await manager.on_session_closed("s")
        await manager.on_session_closed("never seen")
        assert api.count("delete") == 1
        await manager.get_client("t")


async def test_closing_beats_creating() -> None:
    # The original left the Sandbox, and the session, behind.
    async with LoopTimeApi(auto_ready=10.0) as api, managed(api) as manager:
        waiting = asyncio.create_task(manager.get_client("s"))
        await asyncio.sleep(1)
        assert alive(api)
        await manager.on_session_closed("s")
        assert api.objects == []
        with pytest.raises(SandboxError, match="closed"):
            await waiting
        assert now() == pytest.approx(1.0, abs=1e-6)


async def test_closing_while_the_create_request_is_on_its_way_deletes_what_it_makes() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        with api.faults.add("create", hold=True) as gate:
            waiting = asyncio.create_task(manager.get_client("s"))
            await gate.reached()
            closing = asyncio.create_task(manager.on_session_closed("s"))
            with pytest.raises(SandboxError):
                await waiting
            assert not closing.done()
            gate.release()
            await closing
        assert api.count("create") == 1
        assert api.objects == []


async def test_closing_while_the_answer_of_the_create_is_lost_deletes_what_it_made() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        with api.faults.add("create", lost=True, hold=True, times=1) as gate:
            waiting = asyncio.create_task(manager.get_client("s"))
            await gate.reached()
            assert alive(api), "it has been made, and nobody knows its uid"
            closing = asyncio.create_task(manager.on_session_closed("s"))
            await settle()
            gate.release()
            await closing
            with pytest.raises(SandboxError):
                await waiting
        assert api.objects == []


async def test_get_client_during_a_close_waits_for_it_and_reuses_the_slot() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api, max_sessions=1) as manager:
        old = await manager.get_client("s")
        with api.faults.add("delete", hold=True) as gate:
            closing = asyncio.create_task(manager.on_session_closed("s"))
            await gate.reached()
            again = asyncio.create_task(manager.get_client("s"))
            await settle()
            assert api.count("create") == 1
            with pytest.raises(SandboxCapacityError):
                await manager.get_client("t")
        new = await again
        await closing
        assert new is not old
        assert len(alive(api)) == 1


async def test_cancelling_a_close_does_not_undo_it() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        await manager.get_client("s")
        with api.faults.add("delete", hold=True) as gate:
            closing = asyncio.create_task(manager.on_session_closed("s"))
            await gate.reached()
            closing.cancel()
            await settle()
            assert closing.cancelled()
        await api.until(lambda: not api.objects)


async def test_the_idle_are_reaped_and_come_back() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        first = await manager.get_client("s")
        await asyncio.sleep(599)
        assert await manager.get_client("s") is first, "asking is using"
        await asyncio.sleep(599)
        assert alive(api)
        await asyncio.sleep(62)
        assert api.objects == []
        assert manager.stats().reaped == 1
        second = await manager.get_client("s")
        assert second is not first
        assert second.sandbox != first.sandbox
        assert manager.stats().recreated == 1
        assert manager.stats().created == 2


async def test_a_busy_session_is_not_reaped() -> None:
    # The original deleted a Sandbox with a call running in it.
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        client = await manager.get_client("s")
        assert isinstance(client, StubClient)
        client.calls = 1
        await asyncio.sleep(10_000)
        assert alive(api)
        client.calls, client.used_at = 0, now()
        await asyncio.sleep(599)
        assert alive(api)
        await asyncio.sleep(62)
        assert not alive(api)


async def test_a_pinned_session_is_not_reaped_and_its_idle_time_runs_from_the_end() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        async with manager.session("s") as client:
            assert client is await manager.get_client("s")
            await asyncio.sleep(10_000)
            assert alive(api)
            async with manager.session("s") as same:
                assert same is client
        await asyncio.sleep(599)
        assert alive(api)
        await asyncio.sleep(62)
        assert not alive(api)


async def test_a_caller_that_is_about_to_get_its_client_is_not_reaped_under() -> None:
    async with (
        LoopTimeApi(auto_ready=True) as api,
        managed(api, session_idle_timeout=0.001, idle_check_interval=0.0005) as manager,
    ):
        api.faults.add("create", latency=0.01)
        for i in range(20):
            client = await manager.get_client(f"s{i % 3}")
            assert client.sandbox is not None
            assert any(o["metadata"]["uid"] == client.sandbox.uid for o in api.objects)


async def test_a_context_is_entered_once() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        context = manager.session("s")
        async with context:
            with pytest.raises(RuntimeError, match="twice"):
                await context.__aenter__()
        async with context:
            pass


async def test_shutdown_closes_all_at_once_and_refuses_new_work() -> None:
    async with LoopTimeApi(auto_ready=True) as api:
        clients = Clients()
        config = SandboxManagerConfig(mode="multi", max_sessions=10)
        manager = SandboxManager(config, custom_objects_api=api, client_factory=clients)
        for i in range(5):
            await manager.get_client(f"s{i}")
        api.faults.add("delete", latency=3.0)
        begun = now()
        await asyncio.gather(manager.shutdown(), manager.shutdown())
        assert now() - begun == pytest.approx(3.0, abs=0.01)
        assert api.objects == []
        assert all(client.closed for client in clients.made)
        await manager.shutdown()
        for refused in (manager.get_client("s"), manager.on_session_initialized("s"), manager.start()):
            with pytest.raises(SandboxManagerClosedError):
                await refused
        with pytest.raises(SandboxManagerClosedError):
            async with manager.session("s0"):
                pass
        await manager.on_session_closed("s0")
        assert api.objects == [], "the original made a new one"


async def test_shutdown_during_creations_leaves_nothing() -> None:
    async with LoopTimeApi(auto_ready=10.0) as api:
        config = SandboxManagerConfig(mode="multi", max_sessions=2, capacity_timeout=5.0)
        manager = SandboxManager(config, custom_objects_api=api, client_factory=Clients())
        waiting = [asyncio.create_task(manager.get_client(f"s{i}")) for i in range(4)]
        await asyncio.sleep(1)
        await manager.shutdown()
        assert api.objects == []
        for task in waiting:
            with pytest.raises(SandboxManagerClosedError):
                await task
        assert manager.stats().queued == 0


async def test_a_manager_that_was_never_used_shuts_down() -> None:
    manager = SandboxManager(SandboxManagerConfig(mode="multi"), custom_objects_api=LoopTimeApi())
    await manager.shutdown()
    with pytest.raises(SandboxManagerClosedError):
        await manager.get_client("s")


async def test_leaving_the_context_waits_for_the_shutdown_even_if_cancelled_again_and_again() -> None:
    async with LoopTimeApi(auto_ready=True) as api:
        api.faults.add("delete", latency=2.0)

        async def serve() -> None:
            async with managed(api) as manager:
                await manager.get_client("s")
                await asyncio.sleep(3600)

        server = asyncio.create_task(serve())
        await asyncio.sleep(1)
        for _ in range(5):
            server.cancel()
            await asyncio.sleep(0.1)
        with pytest.raises(asyncio.CancelledError):
            await server
        assert api.objects == []


async def test_shutdown_is_bounded_and_names_what_it_leaves(caplog: pytest.LogCaptureFixture) -> None:
    async with LoopTimeApi(auto_ready=True) as api:
        config = SandboxManagerConfig(mode="multi", shutdown_timeout=7.0)
        manager = SandboxManager(config, custom_objects_api=api, client_factory=Clients())
        await manager.get_client("s")
        api.faults.add("delete", error=503)
        begun = now()
        await manager.shutdown()
        assert now() - begun == pytest.approx(7.0, abs=0.5)
        [record] = [r for r in caplog.records if "shutdown_incomplete" in r.message]
        assert manager.sandbox_name("s") in record.message


async def test_shutdown_does_not_wait_for_what_the_server_refuses_for_good() -> None:
    async with LoopTimeApi(auto_ready=True) as api:
        config = SandboxManagerConfig(mode="multi", shutdown_timeout=30.0)
        manager = SandboxManager(config, custom_objects_api=api, client_factory=Clients())
        await manager.get_client("s")
        api.forbid("delete")
        begun = now()
        await manager.shutdown()
        assert now() - begun < 1


@pytest.mark.parametrize("session_id", [None, "", 7, b"s", ["s"]])
async def test_multi_mode_needs_a_session_id(session_id: Any) -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        for call in (manager.get_client, manager.on_session_initialized, manager.on_session_closed):
            with pytest.raises(ValueError, match="session_id is"):
                await call(session_id)
        with pytest.raises(ValueError, match="session_id is"):
            async with manager.session(session_id):
                pass
        assert api.requests == []


async def test_single_mode_shares_one_client() -> None:
    client = StubClient("localhost:1")
    config = SandboxManagerConfig(mode="single", single_client=client)
    async with SandboxManager(config) as manager:
        assert await manager.get_client() is client
        ids: list[Any] = ["a", "", None, ["unhashable"]]
        for session_id in ids:
            assert await manager.get_client(session_id) is client
            async with manager.session(session_id) as same:
                assert same is client
            await manager.on_session_initialized(session_id)
            await manager.on_session_closed(session_id)
        assert await manager.cleanup_orphaned_sandboxes() == 0
        assert manager.stats().created == 0
    assert not client.closed, "it is the caller's"
    with pytest.raises(SandboxManagerClosedError):
        await manager.get_client()


async def test_single_mode_without_a_client_says_so() -> None:
    async with SandboxManager(SandboxManagerConfig(mode="single")) as manager:
        with pytest.raises(SandboxError, match="single_client"):
            await manager.get_client("s")


async def test_single_mode_closes_the_client_that_from_env_made() -> None:
    config = SandboxManagerConfig.from_env({"SANDBOX_TCP_PORT": "50099"})
    async with SandboxManager(config) as manager:
        client = await manager.get_client()
        assert isinstance(client, SandboxClient)
        assert client.target == "localhost:50099"
    with pytest.raises(SandboxError, match="closed"):
        await client.execute(code="")


def test_the_api_of_the_synchronous_client_is_refused() -> None:
    synchronous = type("CustomObjectsApi", (), {"__module__": "kubernetes.client.api.custom_objects_api"})
    with pytest.raises(TypeError, match="it must be that of kubernetes_asyncio"):
        SandboxManager(SandboxManagerConfig(mode="multi"), custom_objects_api=synchronous())


def test_another_event_loop_gets_an_error_and_no_hang() -> None:
    api = LoopTimeApi(auto_ready=True)
    manager = SandboxManager(
        SandboxManagerConfig(mode="multi"), custom_objects_api=api, client_factory=Clients()
    )
    first = asyncio.new_event_loop()
    first.run_until_complete(manager.get_client("s"))

    async def elsewhere() -> None:
        async with asyncio.timeout(PATIENCE):
            for call in (manager.get_client("t"), manager.on_session_closed("s"), manager.shutdown()):
                with pytest.raises(SandboxError, match="event loop"):
                    await call

    asyncio.run(elsewhere())
    first.run_until_complete(manager.shutdown())
    first.close()


async def test_the_constructor_checks_its_settings() -> None:
    settings: Any = {"mode": "multi"}
    with pytest.raises(TypeError, match="SandboxManagerConfig"):
        SandboxManager(settings)


async def test_a_queued_session_keeps_its_place_while_one_of_its_callers_stays() -> None:
    async with (
        LoopTimeApi(auto_ready=True) as api,
        managed(api, max_sessions=1, capacity_timeout=10.0) as manager,
    ):
        await manager.get_client("a")
        leaving = asyncio.create_task(manager.get_client("b"))
        staying = asyncio.create_task(manager.get_client("b"))
        await settle()
        later = asyncio.create_task(manager.get_client("c"))
        await settle()
        leaving.cancel()
        await settle()
        assert (manager.stats().queued, manager.stats().waiting) == (2, 2)
        await manager.on_session_closed("a")
        await staying
        assert not later.done()
        await manager.on_session_closed("b")
        await later


async def test_a_session_that_is_closed_as_it_becomes_ready_is_not_handed_out() -> None:
    healthy = asyncio.Event()

    class Telling(StubClient):
        async def wait_for_healthy(self, timeout: float) -> bool:
            healthy.set()  # Whoever waits for this wakes up before those who wait for the session.
            return True

    async with LoopTimeApi(auto_ready=True) as api, managed(api, Clients(Telling)) as manager:
        waiting = asyncio.create_task(manager.get_client("s"))
        await healthy.wait()
        await manager.on_session_closed("s")
        with pytest.raises(SandboxError, match="closed while it was waited for"):
            await waiting
        assert (api.objects, manager.stats().created) == ([], 1)


async def test_who_waited_for_a_check_and_left_has_used_the_session() -> None:
    async with (
        LoopTimeApi(auto_ready=True) as api,
        managed(api, session_idle_timeout=50.0, idle_check_interval=1.0) as manager,
    ):
        client = await manager.get_client("s")
        assert isinstance(client, StubClient)
        client.healthy = False
        client.fail()
        waiting = asyncio.create_task(manager.get_client("s"))
        await asyncio.sleep(60.5)
        waiting.cancel()
        await asyncio.sleep(10)
        client.healthy = True
        assert manager.stats().reaped == 0
        assert await manager.get_client("s") is client


async def test_who_may_queue_for_longer_than_a_creation_may_take_waits_for_a_close_as_long() -> None:
    async with (
        LoopTimeApi(auto_ready=True) as api,
        managed(api, ready_timeout=10.0, capacity_timeout=100.0) as manager,
    ):
        old = await manager.get_client("s")
        fault = api.faults.add("delete", error=503)
        await manager.on_session_closed("s")
        asyncio.get_running_loop().call_later(30, fault.remove)
        assert await manager.get_client("s") is not old
        assert now() == pytest.approx(60.0, abs=1e-3), "the reaper's tick"


async def test_a_session_that_has_got_its_slot_outlives_the_patience_of_its_queueing() -> None:
    async with (
        LoopTimeApi(auto_ready=5.0) as api,
        managed(api, max_sessions=1, capacity_timeout=10.0) as manager,
    ):
        await manager.get_client("a")
        waiting = asyncio.create_task(manager.get_client("b"))
        await asyncio.sleep(8)
        await manager.on_session_closed("a")
        client = await waiting
        assert now() == pytest.approx(18.0, abs=1e-3)
        await asyncio.sleep(20)
        assert await manager.get_client("b") is client
        assert "session_refused" not in manager.stats().events


async def test_a_recreation_is_counted_once() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        await manager.get_client("s")
        api.delete_now(manager.sandbox_name("s"))
        await settle()
        await manager.get_client("s")
        await manager.on_session_closed("s")
        await manager.get_client("s")
        stats = manager.stats()
        assert (stats.created, stats.recreated) == (3, 1), "who closes a session begins a new one"


async def test_the_time_in_the_queue_is_no_part_of_ready_timeout() -> None:
    async with (
        LoopTimeApi(auto_ready=5.0) as api,
        managed(api, max_sessions=1, capacity_timeout=10.0, ready_timeout=7.0) as manager,
    ):
        await manager.get_client("a")
        waiting = asyncio.create_task(manager.get_client("b"))
        await asyncio.sleep(8)
        await manager.on_session_closed("a")
        await waiting
        assert now() == pytest.approx(18.0, abs=1e-3)


async def test_errors_of_a_creation_keep_their_cause() -> None:
    def factory(target: str) -> StubClient:
        raise ZeroDivisionError

    async with LoopTimeApi(auto_ready=True) as api, managed(api, factory) as manager:
        with pytest.raises(SandboxError, match="ZeroDivisionError") as caught:
            await manager.get_client("s")
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
    async with LoopTimeApi() as api, managed(api, ready_timeout=5.0) as manager:
        with pytest.raises(SandboxTimeoutError) as late:
            await manager.get_client("s")
        assert isinstance(late.value.__cause__, TimeoutError)


async def test_a_close_that_shutdown_cuts_off_returns() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api, shutdown_timeout=5.0) as manager:
        await manager.get_client("s")
        api.faults.add("delete", latency=math.inf)
        closing = asyncio.create_task(manager.on_session_closed("s"))
        await asyncio.sleep(1)
        await manager.shutdown()
        async with asyncio.timeout(1):
            await closing
        assert now() == pytest.approx(6.0, abs=1e-3)


async def test_only_so_many_ended_sessions_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prodisco_sandbox._sessions.past.REMEMBERED", 2)
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        for session_id in "abc":
            await manager.get_client(session_id)
            api.delete_now(manager.sandbox_name(session_id))
            await settle()
        for session_id, recreated in (("a", 0), ("b", 1), ("c", 2)):
            await manager.get_client(session_id)
            assert manager.stats().recreated == recreated, "the oldest is forgotten"


async def test_a_ready_session_keeps_nothing_of_its_creation_in_memory() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        await manager.get_client("s")
        session = manager._ready["s"]  # What is kept in memory shows nowhere else.
        assert (session.known.object, session.request) == (None, None)


async def test_a_session_is_pinned_until_the_last_of_its_users_leaves() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        async with manager.session("s") as client:
            async with manager.session("s"):
                pass
            await asyncio.sleep(10_000)
            assert await manager.get_client("s") is client
        assert manager.stats().reaped == 0


def test_a_shutdown_that_is_over_may_be_asked_for_in_another_event_loop() -> None:
    config = SandboxManagerConfig(mode="multi")
    api = LoopTimeApi(auto_ready=True)
    manager = SandboxManager(config, custom_objects_api=api, client_factory=Clients())

    async def use() -> None:
        async with manager:
            await manager.get_client("s")

    asyncio.run(use())
    asyncio.run(manager.shutdown())
    assert api.objects == []


async def test_many_that_become_ready_at_once_share_the_event_loop() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api, max_sessions=2) as manager:
        clients = [await manager.get_client(session_id) for session_id in "ab"]
        # What it is for shows with hundreds of sessions alone: see benchmarks/at_once.py.
        assert manager._engine is not None
        assert [client._connection.pace for client in clients] == [manager._engine.parts.pace] * 2
