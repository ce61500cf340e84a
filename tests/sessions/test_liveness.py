"""A sandbox that dies, or seems to: who notices, who deletes, and what the next caller gets."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest

from prodisco_sandbox import (
    SandboxError,
    SandboxFailedError,
    SandboxRef,
    SandboxTimeoutError,
    SandboxUnavailableError,
)
from prodisco_sandbox._cluster.manifest import GROUP, PLURAL, SANDBOX
from prodisco_sandbox._cluster.metadata import name
from prodisco_sandbox.testing import FakeCustomObjectsApi, Request
from tests.support.managers import (
    Clients,
    LoopTimeApi,
    PlainApi,
    StubClient,
    alive,
    conditions,
    managed,
    now,
    settle,
)

pytestmark = pytest.mark.looptime


async def stub(getting: Any) -> StubClient:
    client = await getting
    assert isinstance(client, StubClient)
    return client


async def delete_as_others(api: FakeCustomObjectsApi, taken: str) -> None:
    await api.delete_namespaced_custom_object(GROUP, "v1beta1", "prodisco", PLURAL, taken)


# Death, and who deletes


async def test_a_sandbox_that_others_have_deleted_is_noticed_and_made_again() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        old = await stub(manager.get_client("s"))
        api.delete_now(manager.sandbox_name("s"))
        await settle()
        assert (manager.stats().ready, manager.stats().lost) == (0, 1)
        assert old.closed
        assert api.count("delete") == 0, "there is nothing to delete"
        new = await manager.get_client("s")
        assert new is not old
        assert new.sandbox != old.sandbox
        assert (manager.stats().created, manager.stats().recreated) == (2, 1)


@pytest.mark.parametrize(
    "status", [conditions("PodFailed"), conditions("PodSucceeded", kind="Finished", status="True")]
)
async def test_a_sandbox_whose_pod_has_ended_is_replaced_by_its_next_use(status: Any) -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        old = await stub(manager.get_client("s"))
        api.set_status(manager.sandbox_name("s"), status)
        await settle()
        assert (manager.stats().lost, manager.stats().ready) == (1, 1)
        assert old.closed
        assert api.count("delete") == 0, "its pod's end says nothing of the Sandbox"
        new = await manager.get_client("s")
        assert new.sandbox != old.sandbox
        assert (api.count("delete"), len(api.objects)) == (1, 1)
        assert (manager.stats().lost, manager.stats().recreated) == (1, 1)


async def test_a_sandbox_that_others_are_deleting_is_left_to_them() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        api.linger_deletes = True
        old = await stub(manager.get_client("s"))
        await delete_as_others(api, manager.sandbox_name("s"))
        await settle()
        assert manager.stats().lost == 1
        assert old.closed
        new = await manager.get_client("s")
        assert new.sandbox is not None
        assert new.sandbox.incarnation == 1, "the old name is still taken"
        assert api.count("delete") == 1, "theirs"
        api.finish_deletes()


@pytest.mark.parametrize("watched", [True, False])
async def test_a_creation_whose_sandbox_others_are_deleting_is_left_to_them(watched: bool) -> None:
    async with LoopTimeApi() as api, managed(api) as manager:
        if not watched:
            api.forbid("watch")
        api.linger_deletes = True
        waiting = asyncio.create_task(manager.get_client("s"))
        await api.until(lambda: api.objects)
        await settle()
        await delete_as_others(api, manager.sandbox_name("s"))
        with pytest.raises(SandboxFailedError, match="being deleted"):
            await waiting
        await settle()
        assert api.count("delete") == 1, "theirs"
        assert manager.stats().closing == 0
        api.finish_deletes()


async def test_a_sandbox_that_fails_each_time_before_it_can_be_used_is_an_error() -> None:
    class Failing(StubClient):
        async def wait_for_healthy(self, timeout: float) -> bool:
            self.health_checks += 1
            asyncio.get_running_loop().call_soon(self.fail)  # Before whoever waits for it wakes up.
            return True

    clients = Clients(Failing)
    async with LoopTimeApi(auto_ready=True) as api, managed(api, clients) as manager:
        with pytest.raises(SandboxFailedError, match="died 3 times"):
            await manager.get_client("s")
        assert clients.made[0].health_checks == 3


# Doubt


async def test_a_blip_is_not_a_death() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        client = await stub(manager.get_client("s"))
        client.fail()
        assert await manager.get_client("s") is client
        assert (api.count("get"), client.health_checks) == (1, 2)
        assert await manager.get_client("s") is client
        assert (api.count("get"), client.health_checks) == (1, 2), "it is trusted again"
        assert (manager.stats().lost, manager.stats().created) == (0, 1)


async def test_however_many_ask_there_is_one_check() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        client = await stub(manager.get_client("s"))
        client.fail()
        api.faults.add("get", latency=2.0)
        got = await asyncio.gather(*(manager.get_client("s") for _ in range(10)))
        async with manager.session("s") as same:
            assert {id(c) for c in [*got, same]} == {id(client)}
        assert (api.count("get"), client.health_checks) == (1, 2)


async def test_a_client_is_never_handed_out_unchecked_after_a_failure() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        client = await stub(manager.get_client("s"))
        api.silence_watches()
        api.delete_now(manager.sandbox_name("s"))
        client.fail()
        new = await manager.get_client("s")
        assert new is not client
        assert client.closed
        assert client.health_checks == 1, "the Sandbox is asked first, and it is gone"
        assert (manager.stats().lost, manager.stats().recreated) == (1, 1)
        assert api.count("delete") == 0


async def test_a_sandbox_found_to_be_at_its_end_is_deleted_and_made_again() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        client = await stub(manager.get_client("s"))
        api.silence_watches()
        api.set_status(manager.sandbox_name("s"), conditions("PodFailed"))
        client.fail()
        assert await manager.get_client("s") is not client
        assert api.count("delete") == 1
        assert len(api.objects) == 1


@pytest.mark.parametrize("error", [503, ConnectionResetError, RuntimeError])
async def test_while_the_api_server_cannot_be_asked_the_session_is_kept(error: Any) -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        client = await stub(manager.get_client("s"))
        with api.faults.add("get", error=error):
            client.fail()
            results = await asyncio.gather(
                *(manager.get_client("s") for _ in range(3)), return_exceptions=True
            )
            kind = SandboxError if error is RuntimeError else SandboxUnavailableError
            assert all(isinstance(result, kind) for result in results)
            assert len({id(result) for result in results}) == 3, "an exception is not shared"
            assert now() <= 10.0
            with pytest.raises(SandboxError):
                await manager.get_client("s")
        assert manager.stats().ready == 1
        assert await manager.get_client("s") is client
        assert manager.stats().lost == 0


async def test_a_get_that_hangs_holds_a_check_for_ten_seconds() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        client = await stub(manager.get_client("s"))
        api.faults.add("get", latency=math.inf)
        client.fail()
        with pytest.raises(SandboxUnavailableError, match="did not answer a get within 10 s"):
            await manager.get_client("s")
        assert now() == pytest.approx(10.0, abs=1e-3)
        assert manager.stats().ready == 1


async def test_health_that_never_comes_back_ends_the_session_at_the_deadline() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api, ready_timeout=40.0) as manager:
        client = await stub(manager.get_client("s"))
        client.healthy = False
        client.fail()
        with pytest.raises(SandboxTimeoutError, match="not healthy"):
            await manager.get_client("s")
        assert now() == pytest.approx(40.0, abs=0.01)
        await settle()
        assert client.closed
        assert api.objects == []
        assert manager.stats().lost == 1
        assert await manager.get_client("s") is not client


async def test_health_that_comes_back_keeps_the_client() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        client = await stub(manager.get_client("s"))
        client.healthy = False
        client.fail()
        asyncio.get_running_loop().call_later(30, setattr, client, "healthy", True)
        assert await manager.get_client("s") is client
        assert 30 <= now() <= 31.2
        assert manager.stats().lost == 0


async def test_a_death_during_the_check_is_noticed_at_once() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        client = await stub(manager.get_client("s"))
        client.healthy = False
        client.fail()
        asyncio.get_running_loop().call_later(7, api.delete_now, manager.sandbox_name("s"))
        assert await manager.get_client("s") is not client
        assert now() == pytest.approx(7.0, abs=1e-3)
        assert manager.stats().recreated == 1


async def test_a_session_that_is_being_checked_for_somebody_is_not_idle() -> None:
    async with (
        LoopTimeApi(auto_ready=True) as api,
        managed(api, session_idle_timeout=5.0, idle_check_interval=1.0) as manager,
    ):
        client = await stub(manager.get_client("s"))
        client.healthy = False
        client.fail()
        asyncio.get_running_loop().call_later(60, setattr, client, "healthy", True)
        assert await manager.get_client("s") is client
        assert manager.stats().reaped == 0


async def test_a_doubted_session_that_nobody_asks_for_is_reaped_like_any_other() -> None:
    async with (
        LoopTimeApi(auto_ready=True) as api,
        managed(api, session_idle_timeout=5.0, idle_check_interval=1.0) as manager,
    ):
        client = await stub(manager.get_client("s"))
        client.fail()
        await asyncio.sleep(10)
        assert manager.stats().reaped == 1
        assert (api.objects, api.count("get")) == ([], 0)


async def test_a_check_goes_on_when_its_caller_is_cancelled() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        client = await stub(manager.get_client("s"))
        client.fail()
        with api.faults.add("get", hold=True) as gate:
            first = asyncio.create_task(manager.get_client("s"))
            await gate.reached()
            second = asyncio.create_task(manager.get_client("s"))
            await settle()
            first.cancel()
            await settle()
        assert await second is client
        assert api.count("get") == 1


async def test_closing_ends_a_check() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        client = await stub(manager.get_client("s"))
        client.healthy = False
        client.fail()
        waiting = asyncio.create_task(manager.get_client("s"))
        await asyncio.sleep(3)
        await manager.on_session_closed("s")
        with pytest.raises(SandboxError, match="closed"):
            await waiting
        assert now() == pytest.approx(3.0, abs=1e-3)
        assert (api.objects, manager.stats().lost) == ([], 0)


# Readiness that goes and comes, and pods that are replaced


async def test_readiness_that_goes_and_comes_back_keeps_the_client() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        client = await manager.get_client("s")
        taken = manager.sandbox_name("s")
        api.set_condition(taken, "Ready", "False", "DependenciesNotReady")
        await settle()
        waiting = asyncio.create_task(manager.get_client("s"))
        await asyncio.sleep(20)
        assert not waiting.done()
        api.set_condition(taken, "Ready", "True")
        assert await waiting is client
        assert now() == pytest.approx(20.0, abs=1e-3)
        assert (manager.stats().lost, manager.stats().recreated) == (0, 0)


async def test_readiness_that_was_gone_for_a_moment_is_checked() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        client = await stub(manager.get_client("s"))
        for status in ("False", "True"):
            api.set_condition(manager.sandbox_name("s"), "Ready", status)
        await settle()
        assert await manager.get_client("s") is client
        assert client.health_checks == 2


async def test_a_replaced_pod_is_a_new_machine() -> None:
    clients = Clients()
    async with LoopTimeApi(auto_ready=True) as api, managed(api, clients) as manager:
        old = await stub(manager.get_client("s"))
        [sandbox] = api.objects
        taken, uid = name(sandbox), sandbox["metadata"]["uid"]
        api.set_ready(taken, podIPs=["10.9.9.9"])
        await settle()
        new = await manager.get_client("s")
        assert clients.made == [old, new]
        assert old.closed
        assert new.target == "10.9.9.9:50051"
        assert (old.sandbox, new.sandbox) == (SandboxRef(taken, uid, 0), SandboxRef(taken, uid, 1))
        stats = manager.stats()
        assert (stats.created, stats.recreated, stats.lost, api.count("create")) == (1, 1, 0, 1)


async def test_a_pod_replaced_behind_a_service_is_a_new_machine_too() -> None:
    clients = Clients()
    async with (
        LoopTimeApi(auto_ready=True) as api,
        managed(api, clients, endpoint="service") as manager,
    ):
        old = await manager.get_client("s")
        api.set_ready(manager.sandbox_name("s"), podIPs=["10.9.9.9"])
        await settle()
        new = await manager.get_client("s")
        assert (new is old, new.target == old.target) == (False, True)


async def test_a_pod_replaced_while_the_first_is_waited_for_gets_the_client() -> None:
    clients = Clients(lambda target: StubClient(target, healthy=target.startswith("10.9.")))
    async with LoopTimeApi(auto_ready=True) as api, managed(api, clients) as manager:
        waiting = asyncio.create_task(manager.get_client("s"))
        await asyncio.sleep(5)
        api.set_ready(manager.sandbox_name("s"), podIPs=["10.9.9.9"])
        client = await waiting
        assert clients.made[-1] is client
        assert clients.made[0].closed
        assert 5.0 <= now() <= 6.2


async def test_what_a_client_of_the_past_says_counts_no_more() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        old = await stub(manager.get_client("s"))
        api.set_ready(manager.sandbox_name("s"), podIPs=["10.9.9.9"])
        await settle()
        new = await stub(manager.get_client("s"))
        reads = api.count("get")
        old.fail()
        assert await manager.get_client("s") is new
        assert api.count("get") == reads


async def test_an_endpoint_function_that_fails_harms_nobody_else() -> None:
    def endpoint(sandbox: dict[str, Any]) -> str:
        return f"{sandbox['status']['podIPs'][0]}:50051"

    async with LoopTimeApi(auto_ready=True) as api, managed(api, endpoint=endpoint) as manager:
        clients = {s: await manager.get_client(s) for s in "ab"}
        api.set_status(SANDBOX.name("a"), {"podIPs": []})
        await settle()
        with pytest.raises(SandboxError, match="IndexError"):
            await manager.get_client("a")
        assert manager.stats().ready == 2
        api.delete_now(SANDBOX.name("b"))
        await settle()
        assert manager.stats().lost == 1, "the watch goes on"
        api.set_ready(SANDBOX.name("a"))
        assert await manager.get_client("a") is not clients["a"], "another pod"


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"endpoint": lambda sandbox: 1 / 0}, "setting endpoint failed: ZeroDivisionError"),
        ({"endpoint": lambda sandbox: 5}, "setting endpoint returned 5: it must be a gRPC target or None"),
        ({"clients": lambda target: target}, "client_factory returned '10.*it must be a SandboxClient"),
    ],
)
async def test_what_a_function_of_the_users_gives_wrong_is_blamed_on_it(
    settings: dict[str, Any], text: str
) -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api, **settings) as manager:
        with pytest.raises(SandboxError, match=text):
            await manager.get_client("s")
        await settle()
        assert api.objects == []


# A client that one of its users closes


async def test_who_closes_a_client_leaves_the_others_their_sandbox() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        async with await manager.get_client("s") as closed:
            sandbox = closed.sandbox
        again, other = await asyncio.gather(manager.get_client("s"), manager.get_client("s"))
        assert again is other is not closed
        assert again.sandbox == sandbox, "its state is still there"
        stats = manager.stats()
        assert (stats.created, stats.lost, stats.ready) == (1, 0, 1)
        assert stats.events["sandbox_suspect"] == 1
        assert api.count("create") == 1


async def test_a_client_that_is_closed_while_it_is_doubted_is_replaced_too() -> None:
    clients = Clients()
    async with LoopTimeApi(auto_ready=True) as api, managed(api, clients) as manager:
        first = await stub(manager.get_client("s"))
        first.healthy = False
        first.fail()
        asking = asyncio.create_task(manager.get_client("s"))
        await settle()
        assert first.health_checks == 2, "it is being looked at"
        await first.close()
        again = await asking
        assert again is not first
        assert again.sandbox == first.sandbox


# Without a watch


async def test_who_only_polls_notices_a_death_at_the_reapers_tick() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        api.faults.add("watch", error=405)
        api.faults.add("list", error=403, when=lambda r: now() < 59)  # The watch's own lists.
        for session_id in "abc":
            await manager.get_client(session_id)
        await asyncio.sleep(59.5)
        api.delete_now(SANDBOX.name("a"))
        api.set_condition(SANDBOX.name("b"), "Ready", "False", "PodFailed")
        await asyncio.sleep(1)
        assert (manager.stats().ready, manager.stats().lost) == (2, 2)
        assert alive(api) == [SANDBOX.name("b"), SANDBOX.name("c")]


async def test_who_only_polls_notices_a_death_of_what_has_no_uid() -> None:
    api = PlainApi()
    async with managed(api) as manager:
        old = await manager.get_client("s")
        api.objects.clear()
        await asyncio.sleep(61)
        assert manager.stats().lost == 1
        assert await manager.get_client("s") is not old


@pytest.mark.unmeasured
async def test_an_api_server_that_does_not_answer_costs_no_session() -> None:
    """However many ask it at once: who gets no turn within ready_timeout has not been told of a death."""
    async with LoopTimeApi(auto_ready=True) as api:
        clients = Clients()
        async with managed(api, clients, ready_timeout=20.0, max_sessions=200) as manager:
            ids = [f"s{i}" for i in range(200)]
            await asyncio.gather(*map(manager.get_client, ids))
            with api.faults.add("get", latency=math.inf):
                for client in clients.made:
                    client.fail()
                results = await asyncio.gather(*map(manager.get_client, ids), return_exceptions=True)
            assert all(isinstance(result, SandboxUnavailableError) for result in results)
            assert (manager.stats().lost, manager.stats().ready) == (0, 200)


async def test_what_the_watch_said_is_not_overwritten_by_an_older_read() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        client = await stub(manager.get_client("s"))
        client.fail()
        api.faults.add("get", latency=3.0, after=True, times=1)
        asking = asyncio.create_task(manager.get_client("s"))
        await asyncio.sleep(1)
        api.set_status(manager.sandbox_name("s"), conditions("PodFailed"))
        assert await asking is not client


async def test_what_a_check_finds_at_its_end_is_deleted_although_nobody_comes_back() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        client = await stub(manager.get_client("s"))
        api.silence_watches()
        api.set_status(manager.sandbox_name("s"), conditions("PodFailed"))
        client.fail()
        with api.faults.add("get", hold=True) as gate:
            leaving = asyncio.create_task(manager.get_client("s"))
            await gate.reached()
            leaving.cancel()
        await settle()
        assert (manager.stats().lost, manager.stats().closing) == (1, 0)
        assert (api.objects, api.count("delete")) == ([], 1)


async def test_sweeps_do_not_overlap() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api, idle_check_interval=1.0) as manager:
        api.forbid("watch")
        await manager.get_client("s")
        await asyncio.sleep(0.5)
        with api.faults.add("list", latency=4.5) as slow:
            await asyncio.sleep(9)  # At 10 s the watch would list for itself.
            assert slow.hits == 2, "at 1 s, and at the first tick after its end"


async def test_a_pod_that_is_replaced_after_a_time_without_address_is_a_new_machine_too() -> None:
    clients = Clients()
    async with (
        LoopTimeApi(auto_ready=True) as api,
        managed(api, clients, endpoint="service") as manager,
    ):
        old = await stub(manager.get_client("s"))
        api.set_ready(manager.sandbox_name("s"), podIPs=[])
        old.fail()
        assert await manager.get_client("s") is old
        api.set_ready(manager.sandbox_name("s"), podIPs=["10.9.9.9"])
        await settle()
        assert await manager.get_client("s") is not old
        assert manager.stats().recreated == 1


async def test_the_error_of_an_earlier_check_is_not_told_again() -> None:
    class Stumbling(StubClient):
        stumbles = False

        async def wait_for_healthy(self, timeout: float) -> bool:
            if self.stumbles:
                self.stumbles = False
                asyncio.get_running_loop().call_soon(self.fail)  # Before whoever waits for it wakes up.
            return True

    clients = Clients(Stumbling)
    async with LoopTimeApi(auto_ready=True) as api, managed(api, clients) as manager:
        client = await stub(manager.get_client("s"))
        client.fail()
        with api.faults.add("get", error=503), pytest.raises(SandboxUnavailableError):
            await manager.get_client("s")
        client.stumbles = True  # type: ignore[attr-defined]
        assert await manager.get_client("s") is client


async def test_news_that_come_while_it_is_read_cut_only_that_one_reading_short() -> None:
    async with (
        LoopTimeApi() as api,
        managed(api, idle_check_interval=2.5, ready_poll_interval=1.0) as manager,
    ):
        api.forbid("watch")

        def bounded(_: Request) -> bool:
            assert api.count("get") < 100, "in no time"
            return True

        api.faults.add("get", latency=1.0, when=bounded)
        waiting = asyncio.create_task(manager.get_client("s"))
        await asyncio.sleep(2.4)
        api.delete_now(manager.sandbox_name("s"))
        # The reaper's list misses it at 2.5 s, while it is read; read anew it is gone.
        with pytest.raises(SandboxFailedError, match="has been deleted"):
            await waiting
        assert now() == pytest.approx(3.5, abs=1e-3)
        assert api.count("get") == 3
