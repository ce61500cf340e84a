"""What goes wrong on the way to the API server and back, and what becomes of the Sandboxes."""

from __future__ import annotations

import asyncio
import contextlib
import math
from typing import Any

import aiohttp
import pytest

from prodisco_sandbox import (
    SandboxCapacityError,
    SandboxError,
    SandboxFailedError,
    SandboxManager,
    SandboxManagerConfig,
    SandboxPermissionError,
    SandboxTimeoutError,
    SandboxUnavailableError,
)
from prodisco_sandbox._cluster.manifest import GROUP, PLURAL, SANDBOX
from prodisco_sandbox.testing import FakeCustomObjectsApi, api_error
from tests.support.managers import (
    Clients,
    LoopTimeApi,
    PlainApi,
    StubClient,
    alive,
    left_behind,
    managed,
    now,
    settle,
)

pytestmark = pytest.mark.looptime


@pytest.fixture(autouse=True)
def _no_jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses of exactly 0.1, 0.2, 0.4 ... 5 seconds."""
    monkeypatch.setattr("random.random", lambda: 1.0)


# Create


async def test_a_create_whose_answer_was_lost_is_resolved_by_a_get() -> None:
    async with LoopTimeApi(auto_ready=True) as api:
        async with managed(api) as manager:
            api.faults.add("create", lost=True, times=1)
            client = await manager.get_client("s")
            assert (api.count("create"), api.count("get")) == (1, 1)
            [sandbox] = api.objects
            assert client.sandbox is not None
            assert client.sandbox.uid == sandbox["metadata"]["uid"]
            assert manager.stats().created == 1
        assert api.objects == []


async def test_a_create_that_lands_after_the_get_said_404_makes_no_second_sandbox() -> None:
    async with LoopTimeApi(auto_ready=True) as api:
        async with managed(api) as manager:
            # Given up at 10 s, read at 10 s, carried out at 10.05 s, repeated at 10.1 s.
            api.faults.add("create", latency=10.05, lands=True, times=1)
            await manager.get_client("s")
            assert now() == pytest.approx(10.1, abs=1e-3)
            assert api.count("create") == 2
            assert len(api.objects) == 1
        assert api.objects == []


async def close_before_it_lands(api: FakeCustomObjectsApi, manager: SandboxManager, seconds: float) -> None:
    """Asks for a session and closes it, long before its create lands, so many seconds after it was sent."""
    api.faults.add("create", latency=seconds, lands=True, times=1)
    waiting = asyncio.create_task(manager.get_client("s"))
    await asyncio.sleep(1)
    await manager.on_session_closed("s")
    with pytest.raises(SandboxError, match="closed"):
        await waiting


@pytest.mark.parametrize("idle_check_interval", [20.0, 300.0])
async def test_a_create_that_lands_after_its_session_was_closed_is_found_by_the_reaper(
    idle_check_interval: float,
) -> None:
    async with (
        LoopTimeApi(auto_ready=True) as api,
        managed(api, max_sessions=1, idle_check_interval=idle_check_interval) as manager,
    ):
        await close_before_it_lands(api, manager, 35.0)
        assert now() == pytest.approx(10.0, abs=1e-3), "the request is given up after 10 s"
        await manager.get_client("other")  # The slot is free: a get said that nothing is there.
        await asyncio.sleep(26)
        assert len(alive(api)) == 2, "it has landed"
        await asyncio.sleep(math.ceil(now() / idle_check_interval) * idle_check_interval - now() + 0.1)
        assert alive(api) == [manager.sandbox_name("other")]


async def test_a_create_that_lands_after_its_session_was_closed_is_found_by_shutdown() -> None:
    async with LoopTimeApi(auto_ready=True) as api:
        async with managed(api) as manager:
            await close_before_it_lands(api, manager, 15.0)
            await asyncio.sleep(10)
            assert alive(api)
        assert api.objects == []


async def test_a_create_that_lands_after_its_session_has_died_is_found() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        api.faults.add("create", latency=40.0, lands=True, times=1)
        await manager.get_client("s")
        assert api.count("create") == 2
        await asyncio.sleep(10)
        api.delete_now(manager.sandbox_name("s"))
        await asyncio.sleep(30)
        assert (len(alive(api)), manager.stats().lost) == (1, 1)
        await asyncio.sleep(20)
        assert api.objects == []


async def test_a_late_landing_that_changes_under_its_deletion_is_not_forgotten() -> None:
    async with LoopTimeApi() as api, managed(api, idle_check_interval=20.0) as manager:
        await close_before_it_lands(api, manager, 15.0)
        with api.faults.add("delete", hold=True) as gate:
            await gate.reached(timeout=30)
            api.set_condition(manager.sandbox_name("s"), "Ready", "False")
        await settle()
        assert alive(api)
        await asyncio.sleep(21)
        assert api.objects == []


async def test_a_late_landing_is_not_taken_from_the_session_that_came_back() -> None:
    async with (
        LoopTimeApi(auto_ready=True) as api,
        managed(api, idle_check_interval=20.0) as manager,
    ):
        await close_before_it_lands(api, manager, 15.0)
        client = await manager.get_client("s")
        await asyncio.sleep(100)
        assert await manager.get_client("s") is client
        assert len(alive(api)) == 1
        assert manager.stats().lost == 0


async def test_a_create_that_never_answers_is_bounded() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api, ready_timeout=25.0) as manager:
        api.faults.add("create", latency=math.inf)
        with pytest.raises(SandboxTimeoutError, match="its creation has not been answered"):
            await manager.get_client("s")
        assert now() == pytest.approx(25.0, abs=1e-3)
        async with asyncio.timeout(60):
            await manager.on_session_closed("s")
        assert now() == pytest.approx(30.2, abs=0.11), "the last request has 10 s too"
        assert manager.stats().closing == 0


async def test_retry_after_is_honoured_to_the_second() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        api.faults.add("create", error=api_error(429, retry_after=7), times=2)
        await manager.get_client("s")
        assert now() == pytest.approx(14.0, abs=1e-3)
        assert (api.count("create"), api.count("get")) == (3, 0), "a 429 has certainly made nothing"


async def test_retry_after_is_honoured_on_429_only() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        api.faults.add("create", error=api_error(503, retry_after=7), times=1)
        await manager.get_client("s")
        assert now() == pytest.approx(0.1, abs=1e-3)


async def test_a_retry_after_beyond_the_deadline_is_not_waited_for() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api, ready_timeout=5.0) as manager:
        api.faults.add("create", error=api_error(429, retry_after=5))
        with pytest.raises(SandboxUnavailableError, match="Too many requests"):
            await manager.get_client("s")
        assert now() == pytest.approx(0.0, abs=1e-3)
        assert api.count("create") == 1


@pytest.mark.parametrize(
    "error", [500, 502, 503, 504, aiohttp.ServerDisconnectedError, ConnectionResetError, TimeoutError]
)
async def test_what_may_pass_is_retried(error: Any) -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        api.faults.add("create", error=error, times=3)
        await manager.get_client("s")
        assert now() == pytest.approx(0.1 + 0.2 + 0.4, abs=1e-3)
        assert (api.count("create"), api.count("get")) == (4, 3)
        assert len(api.objects) == 1


@pytest.mark.parametrize("error", [400, 401, 403, 405, 410, 413, 422])
async def test_a_clear_refusal_is_not_retried_and_frees_the_slot_at_once(error: int) -> None:
    async with (
        LoopTimeApi(auto_ready=True) as api,
        managed(api, max_sessions=1, idle_check_interval=30.0) as manager,
    ):
        api.faults.add("create", error=error, times=1)
        with pytest.raises(SandboxError) as caught:
            await manager.get_client("s")
        assert caught.value.status == error
        assert caught.value.__cause__ is not None
        assert now() == pytest.approx(0.0, abs=1e-3)
        await settle()
        assert manager.stats().closing == 0
        await asyncio.sleep(70)
        assert (api.count("create"), api.count("get"), api.count("delete")) == (1, 0, 0)
        await manager.get_client("s")


async def test_nothing_is_retried_beyond_the_deadline() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api, ready_timeout=10.0) as manager:
        api.faults.add("create", error=503)
        with pytest.raises(SandboxUnavailableError, match="unable to handle the request"):
            await manager.get_client("s")
        assert 5.0 < now() <= 10.0
        made = api.count("create")
        await asyncio.sleep(100)
        assert api.count("create") == made
        assert manager.stats().closing == 0


async def test_a_connection_that_was_never_made_sent_no_create() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        key: Any = aiohttp.client_reqrep.ConnectionKey("h", 443, True, True, None, None, None)
        refused = aiohttp.ClientConnectorError(key, ConnectionRefusedError(111, "refused"))
        api.faults.add("create", error=refused, times=1)
        await manager.get_client("s")
        assert (api.count("create"), api.count("get")) == (2, 0)


# What the server says


async def test_a_quota_is_a_matter_of_capacity_in_the_servers_words() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        api.quota = 1
        await manager.get_client("a")
        with pytest.raises(SandboxCapacityError, match=r"exceeded quota.*requested: .*limited:") as caught:
            await manager.get_client("b")
        assert caught.value.status == 403
        await manager.on_session_closed("a")
        await manager.get_client("b")


async def test_a_quota_that_is_being_counted_is_asked_again() -> None:
    text = 'Operation cannot be fulfilled on resourcequotas "q": the object has been modified'
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        api.faults.add("create", error=api_error(409, text), times=1)
        await manager.get_client("s")
        assert (api.count("create"), api.count("get")) == (2, 0)


async def test_what_is_not_allowed_names_verb_resource_and_rule() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        api.forbid("create")
        rule = r'apiGroups \["agents.x-k8s.io"\], resources \["sandboxes"\], verbs \["create"\]'
        with pytest.raises(SandboxPermissionError, match=rf"refused to create a Sandbox.*{rule}"):
            await manager.get_client("s")
        assert now() == pytest.approx(0.0, abs=1e-3)


async def test_a_refusal_of_what_has_worked_passes_within_ten_seconds() -> None:
    # An API server that starts answers 403 to everybody.
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        await manager.get_client("a")
        api.forbid("create")
        waiting = asyncio.create_task(manager.get_client("b"))
        await asyncio.sleep(6)
        assert not waiting.done()
        api.allow()
        await waiting
        api.forbid("create")
        begun = now()
        with pytest.raises(SandboxPermissionError):
            await manager.get_client("c")
        assert 10 <= now() - begun <= 15.1


async def test_a_validation_error_comes_in_the_servers_words() -> None:
    async with LoopTimeApi(auto_ready=True) as api:
        template = {"spec": {"containers": "none"}}
        async with managed(api, pod_template_spec=template) as manager:
            with pytest.raises(SandboxFailedError, match=r"is invalid: .*containers") as caught:
                await manager.get_client("s")
            assert caught.value.status == 422


async def test_a_namespace_that_does_not_exist_is_named() -> None:
    async with LoopTimeApi(auto_ready=True, namespaces=["other"]) as api, managed(api) as manager:
        with pytest.raises(SandboxFailedError, match='namespaces "prodisco" not found'):
            await manager.get_client("s")
        assert now() == pytest.approx(0.0, abs=1e-3)
        assert api.count("create") == 1


# Delete


async def test_a_failing_delete_is_retried_holds_its_slot_and_never_makes_a_second_sandbox() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api, max_sessions=1) as manager:
        await manager.get_client("s")
        fault = api.faults.add("delete", error=500)
        await manager.on_session_closed("s")
        assert now() == pytest.approx(0.0, abs=1e-3), "the rest is left to the background"
        assert manager.stats().closing == 1
        with pytest.raises(SandboxCapacityError):
            await manager.get_client("t")
        again = asyncio.create_task(manager.get_client("s"))
        await asyncio.sleep(59)
        # At 0, then after 0.2, 0.4, 0.8, 1.6 and 3.2 s, then at the reaper's tick.
        assert [round(r.time, 1) for r in api.requests if r.verb == "delete"] == [0, 0.2, 0.6, 1.4, 3.0, 6.2]
        assert not again.done()
        fault.remove()
        assert len(api.objects) == 1
        await again
        assert now() == pytest.approx(60.0, abs=1e-3)
        assert manager.stats().delete_retries == 6
        assert len(api.objects) == 1
        assert api.count("create") == 2


async def test_a_delete_is_never_given_up() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        await manager.get_client("s")
        fault = api.faults.add("delete", error=503)
        await manager.on_session_closed("s")
        await asyncio.sleep(1800)
        assert manager.stats().closing == 1
        fault.remove()
        await asyncio.sleep(60)
        assert api.objects == []
        assert manager.stats().closing == 0


async def test_a_delete_that_failed_is_retried_at_shutdown_until_it_succeeds() -> None:
    async with LoopTimeApi(auto_ready=True) as api:
        async with managed(api, shutdown_timeout=30.0) as manager:
            await manager.get_client("s")
            fault = api.faults.add("delete", error=503)
            await manager.on_session_closed("s")
            await asyncio.sleep(30)
            asyncio.get_running_loop().call_later(12, fault.remove)
        assert api.objects == []
        assert 42 <= now() <= 47.1


async def test_retry_after_holds_for_a_delete_too() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        await manager.get_client("s")
        api.faults.add("delete", error=api_error(429, retry_after=9), times=2)
        await manager.on_session_closed("s")
        await api.until(lambda: not api.objects, timeout=30)
        assert now() == pytest.approx(18.0, abs=1e-3)


async def test_a_delete_answered_with_404_is_done() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        await manager.get_client("s")
        api.faults.add("delete", error=404, times=1)
        await manager.on_session_closed("s")
        assert (manager.stats().closing, manager.stats().delete_retries) == (0, 0)


async def test_a_sandbox_that_others_have_made_under_the_name_is_not_deleted() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        await manager.get_client("s")
        api.silence_watches()
        [sandbox] = api.objects
        api.delete_now(sandbox["metadata"]["name"])
        body = {**sandbox, "metadata": {k: sandbox["metadata"][k] for k in ("name", "namespace", "labels")}}
        await api.create_namespaced_custom_object("agents.x-k8s.io", "v1beta1", "prodisco", "sandboxes", body)
        await manager.on_session_closed("s")
        assert manager.stats().closing == 0
        [theirs] = api.objects
        assert theirs["metadata"]["uid"] != sandbox["metadata"]["uid"]


@pytest.mark.parametrize("error", [400, 401, 403, 422, 500, 503, ConnectionResetError, RuntimeError])
async def test_no_error_of_the_cluster_gets_out_of_a_close(error: Any) -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        await manager.get_client("s")
        with api.faults.add("*", error=error):
            await manager.on_session_closed("s")
        await asyncio.sleep(61)
        assert api.objects == []


async def test_a_delete_that_never_answers_does_not_hold_the_close_for_ever() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        await manager.get_client("s")
        api.faults.add("delete", latency=math.inf, times=1)
        await manager.on_session_closed("s")
        assert now() == pytest.approx(10.0, abs=1e-3)
        await asyncio.sleep(1)
        assert api.objects == []


# Reads


async def test_a_get_that_never_answers_does_not_hold_a_creation_beyond_its_deadline() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api, ready_timeout=25.0) as manager:
        api.forbid("watch", "list")
        api.faults.add("get", latency=math.inf)
        with pytest.raises(SandboxTimeoutError, match="last seen: no status yet"):
            await manager.get_client("s")
        assert now() == pytest.approx(25.0, abs=1e-3)
        api.faults.clear()
        await manager.on_session_closed("s")
        assert api.objects == []


async def test_a_get_that_never_answers_hides_nothing_that_the_watch_says() -> None:
    async with LoopTimeApi(auto_ready=20.0) as api, managed(api, ready_timeout=60.0) as manager:
        api.faults.add("get", latency=math.inf)  # From 15 s on, when nothing has been heard.
        await manager.get_client("s")
        assert now() == pytest.approx(20.0, abs=1e-3)
        assert api.count("get") == 1


async def test_what_the_watch_said_before_it_was_refused_counts_although_a_get_hangs() -> None:
    async with LoopTimeApi() as api, managed(api, ready_timeout=60.0) as manager:
        waiting = asyncio.create_task(manager.get_client("s"))
        await settle()
        api.faults.add("get", latency=math.inf)
        api.set_ready(manager.sandbox_name("s"))
        # No watch of the fake says it and ends in one pass of the loop.
        assert manager._engine is not None
        for sandbox in api.objects:
            manager._engine.changed(sandbox)
        manager._engine.down()
        await waiting
        assert now() == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("verb", ["create", "get", "list", "watch", "delete", "patch", "discovery"])
async def test_an_unexpected_exception_leaves_nothing_and_keeps_its_cause(verb: Any, after: bool) -> None:
    async with LoopTimeApi(auto_ready=3.0) as api:
        async with managed(api, ready_timeout=30.0) as manager:
            # The watch's survey asks for the API version first, and a look for what was left.
            times = 3 if verb == "discovery" else 1
            api.faults.add(verb, error=RuntimeError("boom"), after=after, times=times)
            if verb in ("create", "discovery") or (verb == "patch" and not after):
                with pytest.raises(SandboxError, match="boom") as caught:
                    await manager.get_client("s")
                assert isinstance(caught.value.__cause__, RuntimeError)
            else:
                await manager.get_client("s")
            await manager.on_session_closed("s")
            await asyncio.sleep(1)
            assert api.objects == []
            await manager.get_client("s")
        assert api.objects == []


async def test_an_unexpected_exception_at_shutdown_leaves_nothing() -> None:
    async with LoopTimeApi(auto_ready=True) as api:
        async with managed(api) as manager:
            await manager.get_client("s")
            api.faults.add("delete", error=RuntimeError("boom"), times=2)
        assert api.objects == []


# The client


async def test_a_client_that_hides_its_cancellation_does_not_undo_a_close() -> None:
    class Stubborn(Clients):
        def __call__(self, target: str) -> Any:
            client = super().__call__(target)

            async def wait_for_healthy(timeout: float) -> bool:
                try:
                    await asyncio.sleep(timeout)
                except asyncio.CancelledError:
                    return True
                return False

            client.wait_for_healthy = wait_for_healthy  # type: ignore[method-assign]
            return client

    async with LoopTimeApi(auto_ready=True) as api:
        async with managed(api, Stubborn(), max_sessions=1) as manager:
            waiting = asyncio.create_task(manager.get_client("s"))
            await asyncio.sleep(0.5)
            await manager.on_session_closed("s")
            with pytest.raises(SandboxError, match="closed"):
                await waiting
            assert manager.stats().closing == 0
        assert api.objects == []


async def test_a_client_that_never_heeds_a_cancellation_holds_no_slot() -> None:
    class Deaf(StubClient):
        async def wait_for_healthy(self, timeout: float) -> bool:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(timeout)
            return False

    async with LoopTimeApi(auto_ready=True) as api, managed(api, Clients(Deaf)) as manager:
        waiting = asyncio.create_task(manager.get_client("s"))
        await asyncio.sleep(0.5)
        await manager.on_session_closed("s")
        assert now() == pytest.approx(0.5, abs=1e-3)
        with pytest.raises(SandboxError, match="closed"):
            await waiting
        assert (manager.stats().closing, api.objects) == (0, [])


async def test_a_client_that_cancels_itself_ends_no_more_than_its_check() -> None:
    class Moody(StubClient):
        moody = True

        async def wait_for_healthy(self, timeout: float) -> bool:
            if self.moody:
                raise asyncio.CancelledError
            return await super().wait_for_healthy(timeout)

        async def close(self) -> None:
            await super().close()
            raise asyncio.CancelledError

    clients = Clients(Moody)
    async with LoopTimeApi(auto_ready=True) as api:
        async with managed(api, clients, max_sessions=1) as manager:
            with pytest.raises(SandboxError, match="has cancelled its own health check"):
                await manager.get_client("s")
            await settle()
            assert (manager.stats().failed, api.objects) == (1, [])
            Moody.moody = False
            client = await manager.get_client("s")
            assert isinstance(client, Moody)
            client.moody = True
            client.fail()
            with pytest.raises(SandboxError, match="has cancelled its own health check"):
                await manager.get_client("s")
            client.moody = False
            assert await manager.get_client("s") is client
        assert api.objects == []


async def test_a_client_that_fails_when_its_check_is_cut_short_is_not_lost() -> None:
    class Rude(StubClient):
        async def wait_for_healthy(self, timeout: float) -> bool:
            try:
                return await super().wait_for_healthy(timeout)
            except asyncio.CancelledError as e:
                raise TimeoutError from e

    async with LoopTimeApi(auto_ready=True) as api, managed(api, Clients(Rude)) as manager:
        client = await manager.get_client("s")
        assert isinstance(client, Rude)
        client.healthy = False
        client.fail()
        waiting = asyncio.create_task(manager.get_client("s"))
        await asyncio.sleep(0.5)
        await manager.on_session_closed("s")
        with pytest.raises(SandboxError, match="closed"):
            await waiting
        assert (manager.stats().lost, api.objects) == (0, [])


async def test_an_object_without_uid_that_is_deleted_while_it_starts_is_read_at_once() -> None:
    api = PlainApi(status={})
    async with managed(api, ready_poll_interval=20.0, ready_timeout=30.0) as manager:
        waiting = asyncio.create_task(manager.get_client("s"))
        await asyncio.sleep(1)
        [deleted] = api.objects.values()
        api.objects.clear()
        # The fakes that can be watched give their objects uids.
        assert manager._engine is not None
        manager._engine.deleted(deleted)
        with pytest.raises(SandboxError, match="has been deleted"):
            await waiting
        assert now() == pytest.approx(1.0, abs=1e-3)


async def test_shutdown_during_the_first_questions_leaves_no_task() -> None:
    for verb in ("patch", "discovery", "list", "watch", "create", "get"):
        async with LoopTimeApi(auto_ready=True) as api:
            api.faults.add(verb, latency=math.inf)
            config = SandboxManagerConfig(mode="multi", shutdown_timeout=2.0)
            manager = SandboxManager(config, custom_objects_api=api, client_factory=Clients())
            waiting = asyncio.create_task(manager.get_client("s"))
            await asyncio.sleep(0.1)
            await manager.shutdown()
            await asyncio.gather(waiting, return_exceptions=True)
            assert asyncio.all_tasks() == {asyncio.current_task()}, verb


# A create that lands late


async def test_a_late_create_is_remembered_over_a_session_that_came_and_went() -> None:
    async with (
        LoopTimeApi(auto_ready=True) as api,
        managed(api, idle_check_interval=1.0) as manager,
    ):
        await close_before_it_lands(api, manager, 25.0)
        api.quota = 0
        api.faults.add("create", latency=3.0, times=1)
        with pytest.raises(SandboxCapacityError):
            await manager.get_client("s")
        api.quota = None
        await asyncio.sleep(60)
        assert api.objects == []


async def test_both_creates_land_after_the_session_has_ended() -> None:
    async with (
        LoopTimeApi(auto_ready=True) as api,
        managed(api, idle_check_interval=5.0, ready_timeout=12.0) as manager,
    ):
        late = iter([25.0, 45.0])
        api.faults.add("create", latency=lambda _: next(late), lands=True, times=2)
        with pytest.raises(SandboxError):
            await manager.get_client("s")
        await asyncio.sleep(70)
        assert api.objects == []


async def test_a_create_that_lands_under_a_name_that_was_left_is_found() -> None:
    async with (
        LoopTimeApi(auto_ready=True) as api,
        managed(api, idle_check_interval=7.0) as manager,
    ):
        api.linger_deletes = True
        await left_behind(api, "s")
        await api.delete_namespaced_custom_object(GROUP, "v1beta1", "prodisco", PLURAL, SANDBOX.name("s"))
        api.linger_deletes = False
        api.faults.add("create", latency=25.0, lands=True, times=1)
        await manager.get_client("s")
        api.finish_deletes()
        await asyncio.sleep(15.5)
        assert len(alive(api)) == 2
        await asyncio.sleep(10)
        assert alive(api) == [manager.sandbox_name("s")]


async def test_the_last_look_at_shutdown_is_repeated() -> None:
    async with LoopTimeApi(auto_ready=True) as api:
        async with managed(api, ready_timeout=5.0) as manager:
            api.faults.add("create", latency=20.0, lands=True, times=1)
            with pytest.raises(SandboxError):
                await manager.get_client("s")
            await asyncio.sleep(20)
            assert len(api.objects) == 1
            api.faults.add("get", error=503, times=1)
        assert api.objects == []


async def test_a_create_that_lands_after_a_second_one_was_refused_is_found() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api, max_sessions=1) as manager:
        api.faults.add("create", latency=15.0, lands=True, times=1)
        api.faults.add("create", error=422, when=lambda r: now() > 5, times=1)
        with pytest.raises(SandboxFailedError):
            await manager.get_client("s")
        assert now() == pytest.approx(10.1, abs=1e-3)
        await asyncio.sleep(10)
        assert (len(alive(api)), manager.stats().closing) == (1, 0)
        await asyncio.sleep(40)
        assert api.objects == [], "the reaper looked again"


async def test_who_only_polls_does_not_delete_what_others_have_made_under_the_name_either() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        api.forbid("watch")
        await manager.get_client("s")
        [sandbox] = api.objects
        api.delete_now(sandbox["metadata"]["name"])
        body = {**sandbox, "metadata": {k: sandbox["metadata"][k] for k in ("name", "namespace", "labels")}}
        await api.create_namespaced_custom_object("agents.x-k8s.io", "v1beta1", "prodisco", "sandboxes", body)
        await manager.on_session_closed("s")
        assert manager.stats().closing == 0
        [theirs] = api.objects
        assert theirs["metadata"]["uid"] != sandbox["metadata"]["uid"]


async def test_a_session_that_is_closed_before_its_turn_to_be_created_was_never_asked_for() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api, max_sessions=17) as manager:
        with api.faults.add("create", hold=True):
            *creating, waiting = [asyncio.create_task(manager.get_client(f"s{i}")) for i in range(17)]
            await settle()
            await manager.on_session_closed("s16")
            with pytest.raises(SandboxError, match="closed"):
                await waiting
            assert now() == pytest.approx(0.0, abs=1e-3)
        await asyncio.gather(*creating)
        assert (api.count("create"), api.count("delete")) == (16, 0)


async def test_looking_for_a_late_create_spares_the_session_that_comes_back_meanwhile() -> None:
    async with (
        LoopTimeApi(auto_ready=True) as api,
        managed(api, idle_check_interval=20.0) as manager,
    ):
        await close_before_it_lands(api, manager, 15.0)
        with api.faults.add("get", hold=True, times=1) as gate:
            await gate.reached(timeout=60)
            client = await manager.get_client("s")
        await asyncio.sleep(5)
        assert await manager.get_client("s") is client
        assert manager.stats().lost == 0


async def test_who_got_no_turn_to_be_created_is_told_so() -> None:
    async with (
        LoopTimeApi() as api,
        managed(api, max_sessions=17, ready_timeout=9.0) as manager,
    ):
        api.faults.add("create", latency=9.5)
        asking = (manager.get_client(f"s{i}") for i in range(17))
        *sent, last = map(str, await asyncio.gather(*asking, return_exceptions=True))
        assert all("its creation has not been answered" in error for error in sent)
        assert "its creation has not been sent" in last
