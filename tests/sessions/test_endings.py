"""Ends that do not go smoothly: clients that will not close, deletes that never succeed, crashes."""

from __future__ import annotations

import asyncio
import math
from typing import Any
from unittest import mock

import pytest

from prodisco_sandbox import (
    SandboxClient,
    SandboxError,
    SandboxManager,
    SandboxManagerConfig,
    SandboxTimeoutError,
)
from prodisco_sandbox._cluster.manifest import SANDBOX
from tests.support.managers import Clients, LoopTimeApi, PlainApi, StubClient, alive, managed, now, settle

pytestmark = pytest.mark.looptime


async def test_a_client_that_will_not_close_keeps_no_sandbox(caplog: pytest.LogCaptureFixture) -> None:
    class Stuck(StubClient):
        async def close(self) -> None:
            await asyncio.sleep(math.inf)

    class Broken(StubClient):
        async def close(self) -> None:
            raise RuntimeError("boom")

    for kind, seconds in ((Stuck, 5.0), (Broken, 0.0)):
        async with LoopTimeApi(auto_ready=True) as api, managed(api, Clients(kind)) as manager:
            await manager.get_client("s")
            begun = now()
            await manager.on_session_closed("s")
            assert now() - begun == pytest.approx(seconds, abs=1e-3)
            assert api.objects == []
    assert len([r for r in caplog.records if "client_close_failed" in r.message]) == 2


async def test_a_client_that_can_never_be_healthy_ends_the_creation_at_once() -> None:
    class Hopeless(StubClient):
        @property
        def health_error(self) -> SandboxError:
            return SandboxError("cannot read /tls/ca.crt")

    clients = Clients(lambda target: Hopeless(target, healthy=False))
    async with LoopTimeApi(auto_ready=True) as api, managed(api, clients) as manager:
        with pytest.raises(SandboxError, match=r"cannot read /tls/ca\.crt"):
            await manager.get_client("s")
        assert now() == pytest.approx(1.0, abs=1e-3)
        await settle()
        assert api.objects == []


async def test_a_status_that_a_proxy_gives_meanwhile_is_waited_out() -> None:
    class Behind(StubClient):
        @property
        def health_error(self) -> SandboxError:
            self.healthy = self.health_checks >= 3
            return SandboxError("the proxy does not know such a method", status="UNIMPLEMENTED")

    clients = Clients(lambda target: Behind(target, healthy=False))
    async with LoopTimeApi(auto_ready=True) as api, managed(api, clients) as manager:
        assert await manager.get_client("s") is clients.made[0]
        assert clients.made[0].health_checks == 4


async def test_a_pod_replaced_during_the_health_check_is_not_handed_out() -> None:
    class Moving(StubClient):
        async def wait_for_healthy(self, timeout: float) -> bool:
            if not self.target.startswith("10.9."):
                api.set_ready(SANDBOX.name("s"), podIPs=["10.9.9.9"])
            await settle()
            return True

    clients = Clients(Moving)
    async with LoopTimeApi(auto_ready=True) as api, managed(api, clients) as manager:
        client = await manager.get_client("s")
        assert client.target == "10.9.9.9:50051"
        await settle()
        assert [c.closed for c in clients.made] == [True, False]


async def test_who_waits_for_a_delete_that_never_succeeds_is_told_so() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api, ready_timeout=30.0) as manager:
        await manager.get_client("s")
        fault = api.faults.add("delete", error=503)
        await manager.on_session_closed("s")
        begun = now()
        with pytest.raises(SandboxTimeoutError, match=r"previous sandbox sandbox-.* could not be deleted"):
            await manager.get_client("s")
        assert now() - begun == pytest.approx(30.0, abs=1e-3)
        assert manager.stats().queued == 0
        fault.remove()
        await asyncio.sleep(60)
        await manager.get_client("s")
        assert len(api.objects) == 1


async def test_a_sweep_that_fails_is_repeated_at_the_next_tick() -> None:
    api = PlainApi()
    async with managed(api) as manager:
        await manager.get_client("s")
        lists = api.list_namespaced_custom_object

        async def fail(group: str, version: str, namespace: str, plural: str) -> Any:
            raise RuntimeError("boom")

        api.list_namespaced_custom_object = fail  # type: ignore[method-assign]
        api.objects.clear()
        await asyncio.sleep(61)
        assert manager.stats().lost == 0
        api.list_namespaced_custom_object = lists  # type: ignore[method-assign]
        await asyncio.sleep(60)
        assert manager.stats().lost == 1


async def test_shutdown_ends_though_late_creates_cannot_be_looked_for() -> None:
    async with LoopTimeApi(auto_ready=True) as api:
        config = SandboxManagerConfig(mode="multi", shutdown_timeout=7.0)
        manager = SandboxManager(config, custom_objects_api=api, client_factory=Clients())
        with api.faults.add("create", lost=True, hold=True, times=1) as gate:
            waiting = asyncio.create_task(manager.get_client("s"))
            await gate.reached()
            closing = asyncio.create_task(manager.on_session_closed("s"))
            await settle()
        await closing
        await asyncio.gather(waiting, return_exceptions=True)
        assert api.objects == []
        api.faults.add("get", latency=math.inf)
        begun = now()
        await manager.shutdown()
        assert now() - begun == pytest.approx(7.0, abs=1e-3)


async def test_a_watch_that_crashes_is_started_again(caplog: pytest.LogCaptureFixture) -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        await manager.get_client("s")
        await api.until(lambda: api.watches)
        api.watches[0].feed(b'{"type": "ADDED", "object": null}\n')
        await asyncio.sleep(2)
        assert any("task_failed" in r.message for r in caplog.records)
        assert (len(api.watches), api.count("list")) == (1, 2)
        api.delete_now(manager.sandbox_name("s"))
        await settle()
        assert manager.stats().lost == 1


async def test_a_fresh_list_without_a_sandbox_under_way_is_looked_into() -> None:
    async with LoopTimeApi() as api, managed(api) as manager:
        waiting = asyncio.create_task(manager.get_client("s"))
        await api.until(lambda: api.objects and api.watches)
        await asyncio.sleep(3)
        api.silence_watches()
        api.delete_now(manager.sandbox_name("s"))
        api.compact()
        api.cut_watches()
        with pytest.raises(SandboxError, match="deleted"):
            await waiting
        assert now() < 4
        assert alive(api) == []


async def test_shutdown_names_what_may_yet_appear(caplog: pytest.LogCaptureFixture) -> None:
    async with LoopTimeApi(auto_ready=True) as api:
        async with managed(api) as manager:
            api.faults.add("create", latency=60.0, lands=True)
            asking = asyncio.create_task(manager.get_client("s"))
            await asyncio.sleep(1.0)
        with pytest.raises(SandboxError):
            await asking
        assert api.objects == []
        [record] = [r for r in caplog.records if "shutdown_incomplete" in r.message]
        assert SANDBOX.name("s") in record.message
        await asyncio.sleep(60.0)
        assert alive(api) == [SANDBOX.name("s")], "it has landed, as the log said that it may"


async def test_a_sandbox_that_is_not_ready_any_more_after_its_health_check_is_waited_for() -> None:
    class Leaving(StubClient):
        async def wait_for_healthy(self, timeout: float) -> bool:
            self.health_checks += 1
            if self.health_checks == 1:
                api.set_condition(SANDBOX.name("s"), "Ready", "False", "DependenciesNotReady")
                await settle()
                asyncio.get_running_loop().call_later(
                    5, api.set_condition, SANDBOX.name("s"), "Ready", "True"
                )
            return True

    clients = Clients(Leaving)
    async with LoopTimeApi(auto_ready=True) as api, managed(api, clients) as manager:
        client = await manager.get_client("s")
        assert now() == pytest.approx(5.0, abs=1e-3)
        assert clients.made == [client]


async def test_a_client_that_is_unhealthy_at_once_is_not_asked_in_a_tight_loop() -> None:
    class Curt(StubClient):
        async def wait_for_healthy(self, timeout: float) -> bool:
            self.health_checks += 1
            assert self.health_checks <= 101, "ten a second"
            return False

    async with (
        LoopTimeApi(auto_ready=True) as api,
        managed(api, Clients(Curt), ready_timeout=10.0) as manager,
    ):
        with pytest.raises(SandboxTimeoutError, match="not healthy"):
            await manager.get_client("s")
        assert now() == pytest.approx(10.0, abs=1e-3)


@pytest.mark.parametrize("used_for", [5.0, 3600.0])
async def test_shutdown_says_nothing_of_a_lost_answer_that_was_made_up_for(
    used_for: float, caplog: pytest.LogCaptureFixture
) -> None:
    async with LoopTimeApi(auto_ready=True) as api:
        async with managed(api) as manager:
            api.faults.add("create", lost=True, times=1)
            async with manager.session("s"):
                await asyncio.sleep(used_for)
        assert api.objects == []
        assert "shutdown_incomplete" not in caplog.text


async def test_a_delete_that_is_repeated_needs_no_right_to_get() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        api.forbid("get")
        await manager.get_client("s")
        api.faults.add("delete", error=503, times=1)
        await manager.on_session_closed("s")
        await asyncio.sleep(60)
        assert (api.objects, manager.stats().closing) == ([], 0)


async def test_a_mock_made_after_the_client_will_do() -> None:
    def factory(target: str) -> Any:
        client = mock.create_autospec(SandboxClient, instance=True)
        client.wait_for_healthy.return_value = True
        client.in_flight, client.last_used = 0, 0.0
        return client

    async with LoopTimeApi(auto_ready=True) as api, managed(api, factory) as manager:
        client = await manager.get_client("s")
        await manager.on_session_closed("s")
        client.close.assert_awaited_once()  # type: ignore[attr-defined]
