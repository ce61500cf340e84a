"""A machine that was replaced shows, and no call runs on another session's machine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from prodisco_sandbox import (
    SandboxClient,
    SandboxManager,
    SandboxManagerConfig,
    SandboxReplacedError,
    SandboxUnavailableError,
)
from prodisco_sandbox.testing import FakeCustomObjectsApi, FakeSandboxServer
from tests.support.fake_servers import broken, reached, restart
from tests.support.managers import LoopTimeApi, left_behind
from tests.support.patience import PATIENCE, put_forward, until

RUNS = ("Execute", "ExecuteStream", "ExecuteAsync")


class Pods:
    """A manager, its Sandboxes, and servers that stand for pods, wherever an address leads."""

    def __init__(self, api: FakeCustomObjectsApi) -> None:
        self.api = api
        self.leads_to: dict[str, FakeSandboxServer] = {}
        self.manager = SandboxManager(
            SandboxManagerConfig(
                mode="multi", endpoint=self._endpoint, ready_timeout=PATIENCE, ready_poll_interval=0.05
            ),
            custom_objects_api=api,
        )

    def _endpoint(self, sandbox: dict[str, Any]) -> str | None:
        [address, *_] = (sandbox.get("status") or {}).get("podIPs") or [None]
        return None if address is None else self.leads_to[address].target

    def name(self, session_id: str) -> str:
        return self.manager.sandbox_name(session_id)

    def suspected(self) -> int:
        return self.manager.stats().events.get("sandbox_suspect", 0)

    async def ready(self, session_id: str, address: str) -> None:
        """Waits for the session's Sandbox, and says that its pod is at this address."""
        await self.api.until(lambda: self.api.get(self.name(session_id)))
        self.api.set_ready(self.name(session_id), podIPs=[address])

    async def client(self, session_id: str, address: str) -> SandboxClient:
        client, _ = await asyncio.gather(self.manager.get_client(session_id), self.ready(session_id, address))
        return client


@asynccontextmanager
async def pods(*servers: FakeSandboxServer) -> AsyncIterator[Pods]:
    """The servers are at the addresses 10.0.0.1, 10.0.0.2 and so on."""
    async with AsyncExitStack() as stack:
        api = await stack.enter_async_context(LoopTimeApi())
        pods = Pods(api)
        for number, server in enumerate(servers, start=1):
            pods.leads_to[f"10.0.0.{number}"] = await stack.enter_async_context(server)
        await stack.enter_async_context(pods.manager)
        yield pods


def ran(server: FakeSandboxServer) -> list[str]:
    return [call.rpc for call in server.calls if call.rpc in RUNS]


async def run_stream(client: SandboxClient) -> None:
    async with client.execute_stream(code="1") as stream:
        async for _ in stream:
            pass


CALLS: dict[str, Callable[[SandboxClient], Awaitable[Any]]] = {
    "execute": lambda client: client.execute(code="1"),
    "stream": run_stream,
    "async": lambda client: client.execute_async(code="1"),
}


# Restarted in place: the same Sandbox, the same pod, the same address


@pytest.mark.parametrize("named", [True, False], ids=["pod named", "pod not named"])
@pytest.mark.parametrize("how", CALLS)
async def test_a_call_to_a_machine_that_was_restarted_in_place_is_refused_and_the_next_client_shows_it(
    how: str, named: bool
) -> None:
    server = FakeSandboxServer()
    async with pods(server) as at:
        server.pod_name = at.name("s") if named else None
        await restart(server)
        client = await at.client("s", "10.0.0.1")
        before = client.sandbox
        assert before is not None
        assert before.boot_id == server.boot_id
        await restart(server)

        with pytest.raises(SandboxReplacedError, match="nothing was run"):
            await reached(lambda: CALLS[how](client))
        assert ran(server) == []
        after = await at.manager.get_client("s")
        await CALLS[how](after)

        assert len(ran(server)) == 1
        assert after.sandbox is not None
        assert after.sandbox != before
        assert (after.sandbox.name, after.sandbox.uid) == (before.name, before.uid)
        assert after.sandbox.boot_id == server.boot_id
        assert at.manager.stats().recreated == 1
        assert at.manager.stats().events["sandbox_pod_replaced"] == 1
        assert len(at.api.objects) == 1


async def test_the_check_after_a_flap_of_ready_finds_the_restart() -> None:
    server = FakeSandboxServer()
    async with pods(server) as at:
        before = (await at.client("s", "10.0.0.1")).sandbox
        await restart(server)
        at.api.set_condition(at.name("s"), "Ready", "False", "DependenciesNotReady")
        await until(lambda: at.suspected())
        at.api.set_ready(at.name("s"), podIPs=["10.0.0.1"])
        after = await at.manager.get_client("s")
        assert after.sandbox != before
        assert (await after.execute(code="1")).success
        assert at.manager.stats().recreated == 1


async def test_a_pod_that_moved_is_counted_once_and_a_connection_that_broke_is_not() -> None:
    one, other = FakeSandboxServer(), FakeSandboxServer()
    async with pods(one, other) as at:
        first = await at.client("s", "10.0.0.1")
        first.on_suspect()  # type: ignore[misc]
        again = await at.manager.get_client("s")
        assert (again, again.sandbox) == (first, first.sandbox)
        await first.close()
        closed = await at.manager.get_client("s")
        assert closed is not first
        assert closed.sandbox == first.sandbox
        assert at.manager.stats().recreated == 0

        at.api.set_ready(at.name("s"), podIPs=["10.0.0.2"])
        await until(lambda: at.suspected() > 2)
        moved = await at.manager.get_client("s")
        assert moved.target == other.target
        assert moved.sandbox != first.sandbox
        assert at.manager.stats().recreated == 1


async def test_without_fences_a_restart_in_place_goes_unnoticed_as_before() -> None:
    server = FakeSandboxServer(fences=False, health="own")
    async with pods(server) as at:
        client = await at.client("s", "10.0.0.1")
        assert client.sandbox is not None
        assert client.sandbox.boot_id is None
        await restart(server)
        await reached(lambda: client.execute(code="1"))
        after = await at.manager.get_client("s")
        assert after.sandbox == client.sandbox
        assert (await after.execute(code="1")).success
        assert at.manager.stats().recreated == 0


async def test_a_machine_without_fences_in_the_place_of_one_with_is_another() -> None:
    server = FakeSandboxServer()
    async with pods(server) as at:
        client = await at.client("s", "10.0.0.1")
        await restart(server, fences=False)
        with pytest.raises(SandboxReplacedError) as caught:
            await reached(lambda: client.execute(code="1"))
        assert caught.value.ran
        after = await at.manager.get_client("s")
        assert after.sandbox != client.sandbox
        assert (await after.execute(code="1")).success
        assert at.manager.stats().recreated == 1


@pytest.mark.parametrize("how", CALLS)
async def test_without_fences_the_status_is_read_before_a_call_on_a_new_connection(how: str) -> None:
    server, elsewhere = FakeSandboxServer(fences=False), FakeSandboxServer(fences=False)
    async with pods(server, elsewhere) as at:
        client = await at.client("s", "10.0.0.1")
        await restart(server)  # Another session's pod, say.
        await broken(client)
        at.api.silence_watches()
        at.api.set_ready(at.name("s"), podIPs=["10.0.0.2"])
        with pytest.raises(SandboxReplacedError, match="nothing was run"):
            await CALLS[how](client)
        assert ran(server) == []
        after = await at.manager.get_client("s")
        await CALLS[how](after)
        assert after.target == elsewhere.target
        assert at.manager.stats().recreated == 1


async def test_without_fences_a_broken_connection_is_made_anew_where_the_status_says_the_same() -> None:
    server = FakeSandboxServer(fences=False)
    async with pods(server) as at:
        client = await at.client("s", "10.0.0.1")
        await restart(server)
        await broken(client)
        gets = at.api.count("get")
        for _ in range(2):
            assert (await client.execute(code="1")).success
        assert at.api.count("get") == gets + 1
        assert await at.manager.get_client("s") is client


# Another session's pod at the address


async def test_an_attaching_manager_does_not_take_another_pod_for_its_own() -> None:
    bobs, alices = FakeSandboxServer(), FakeSandboxServer()
    async with pods(bobs, alices) as at:
        await restart(bobs, pod_name=at.name("bob"))
        await restart(alices, pod_name=at.name("alice"))
        await left_behind(at.api, "alice", ready=False)
        at.api.set_ready(at.name("alice"), podIPs=["10.0.0.1"])  # where bob's pod is by now

        getting = asyncio.create_task(at.manager.get_client("alice"))
        await until(lambda: at.manager.stats().creating)
        await asyncio.wait({getting}, timeout=0.5)
        assert not getting.done()
        assert bobs.calls == []
        at.api.set_ready(at.name("alice"), podIPs=["10.0.0.2"])
        client = await getting
        assert (await client.execute(code="1")).success
        assert ran(alices) == ["Execute"]
        assert bobs.calls == []


@pytest.mark.parametrize("named", [True, False], ids=["pods named", "pods not named"])
@pytest.mark.parametrize("how", CALLS)
async def test_no_call_of_one_session_runs_on_the_machine_that_has_its_address_now(
    how: str, named: bool
) -> None:
    server, elsewhere = FakeSandboxServer(), FakeSandboxServer()
    async with pods(server, elsewhere) as at:
        await restart(server, pod_name=at.name("alice") if named else None)
        await restart(elsewhere, pod_name=at.name("alice") if named else None)
        alice = await at.client("alice", "10.0.0.1")
        before = alice.sandbox
        await restart(server, pod_name=at.name("bob") if named else None)
        bob = await at.client("bob", "10.0.0.1")
        await bob.execute(code="bob's")
        server.calls.clear()

        # The status of her Sandbox still says that she is where bob is.
        with pytest.raises(SandboxReplacedError):
            await reached(lambda: CALLS[how](alice))
        getting = asyncio.create_task(at.manager.get_client("alice"))
        await asyncio.wait({getting}, timeout=0.3)
        assert not getting.done()
        assert ran(server) == []
        assert await at.manager.get_client("bob") is bob

        at.api.set_ready(at.name("alice"), podIPs=["10.0.0.2"])
        moved = await getting
        await CALLS[how](moved)
        assert moved.sandbox != before
        assert (ran(server), len(ran(elsewhere))) == ([], 1)


async def test_a_status_that_names_a_live_sessions_address_wrongly_takes_nothing_from_it() -> None:
    server, elsewhere = FakeSandboxServer(), FakeSandboxServer()
    async with pods(server, elsewhere) as at:
        alice = await at.client("alice", "10.0.0.1")
        getting = asyncio.create_task(at.client("bob", "10.0.0.1"))
        await until(lambda: at.suspected() >= 2)
        assert not getting.done()

        again = await at.manager.get_client("alice")
        assert again.sandbox == alice.sandbox
        await again.execute(code="alice's")
        at.api.set_ready(at.name("bob"), podIPs=["10.0.0.2"])
        bob = await getting
        await bob.execute(code="bob's")
        assert bob.target == elsewhere.target
        assert [call.request.code for call in server.calls if call.rpc == "Execute"] == ["alice's"]
        assert await at.manager.get_client("alice") is again
        assert at.manager.stats().recreated == 0


@pytest.mark.parametrize("fences", [True, False])
async def test_a_session_whose_address_is_anothers_is_kept_and_says_so(
    fences: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = FakeSandboxServer(fences=fences)
    async with pods(server) as at:
        alice = await at.client("alice", "10.0.0.1")
        await restart(server)
        await at.client("bob", "10.0.0.1")
        for _ in range(2):
            gets = at.api.count("get")
            getting = asyncio.create_task(at.manager.get_client("alice"))
            await until(lambda seen=gets: at.api.count("get") > seen)  # type: ignore[misc]
            put_forward(monkeypatch, PATIENCE)
            with pytest.raises(SandboxUnavailableError, match="leads to another machine"):
                await getting
        assert ran(server) == []
        assert at.api.get(at.name("alice")), "that it cannot be found says nothing of its state"
        assert at.manager.stats().lost == 0

        await at.manager.on_session_closed("bob")
        await server.kill()
        await server.start()
        back = await at.manager.get_client("alice")
        assert (back.sandbox != alice.sandbox) is fences
