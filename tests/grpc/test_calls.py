"""SandboxClient's calls over time: deadlines, cancellation, closing, and the account of use."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from prodisco_sandbox._grpc import channel as _channel
from prodisco_sandbox._grpc.usage import Usage
from prodisco_sandbox.client import SandboxClient
from prodisco_sandbox.config import TlsConfig
from prodisco_sandbox.errors import SandboxError, SandboxTimeoutError, SandboxUnavailableError
from prodisco_sandbox.results import (
    CancelResult,
    ExecutionInfo,
    ExecutionResult,
    ExecutionState,
    ExecutionStatus,
    StartedExecution,
)
from prodisco_sandbox.testing import NEVER, FakeSandboxServer, FakeStatus
from tests.support.fake_servers import END, SOME, ended
from tests.support.patience import PATIENCE, put_forward

# The channel


def test_the_settings_of_the_channel() -> None:
    # gRPC does not tell the options of a channel.
    assert dict(_channel._OPTIONS) == {
        "grpc.max_send_message_length": 67_108_864,
        "grpc.max_receive_message_length": 67_108_864,
        "grpc.dns_min_time_between_resolutions_ms": 250,
        "grpc.initial_reconnect_backoff_ms": 100,
        "grpc.min_reconnect_backoff_ms": 2_000,
        "grpc.max_reconnect_backoff_ms": 250,
        "grpc.use_local_subchannel_pool": 1,
        "grpc.keepalive_time_ms": 330_000,
        "grpc.keepalive_timeout_ms": 20_000,
        "grpc.enable_http_proxy": 0,
    }


# Deadlines


async def test_a_server_that_never_answers_is_given_up_at_the_deadline(
    server: FakeSandboxServer, client: SandboxClient
) -> None:
    for rpc in ("Execute", "ExecuteStream", "ExecuteTest", "GetExecution"):
        server.script(rpc, NEVER)
    await client.health_check()  # Connecting is no part of it.
    server.calls.clear()
    loop = asyncio.get_running_loop()
    started = loop.time()
    errors = await asyncio.gather(
        client.execute(code="x", timeout=0.3),  # A server may make it a second, hence the wait.
        anext(client.execute_stream(code="x", timeout=1)),
        client.execute_test(tests="x", timeout=1),
        client.get_execution("e", wait=True, timeout=0.2),
        client.wait_for_execution("e", timeout=0.2),
        return_exceptions=True,
    )
    assert loop.time() - started > 1.0
    assert [type(error) for error in errors] == [SandboxTimeoutError] * 5
    assert {error.status for error in errors if isinstance(error, SandboxError)} == {"DEADLINE_EXCEEDED"}
    for call in server.calls:  # What was too late for its deadline did not get there.
        if call.rpc == "Check":  # Whether the server is well, or only its answer late.
            continue
        assert call.timeout is not None
        assert call.timeout < 1.3
        await call.ended.wait()
        assert call.outcome == "cancelled"
    assert client.in_flight == 0


async def test_waiting_goes_on_where_a_server_cuts_the_long_poll_short(
    server: FakeSandboxServer, client: SandboxClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    begun = loop.time()
    running = ExecutionStatus("e", ExecutionState.RUNNING)
    done = ExecutionStatus("e", ExecutionState.COMPLETED, result=END.result)
    server.script("GetExecution", running, running, done)
    assert await client.wait_for_execution("e") == done
    assert len(server.calls) == 3
    assert loop.time() - begun > 0.19, "it does not ask in a busy loop"

    def late(request: object) -> ExecutionStatus:
        put_forward(monkeypatch, 50)
        return running

    server.script("GetExecution", running, late)
    with pytest.raises(SandboxTimeoutError, match=r"execution e is still RUNNING after 50 s"):
        await client.wait_for_execution("e", timeout=50)
    assert sum(call.rpc == "GetExecution" for call in server.calls) == 5


# Cancellation


async def test_cancelling_a_call_reaches_the_server(server: FakeSandboxServer, client: SandboxClient) -> None:
    server.script("Execute", NEVER)
    task = asyncio.create_task(client.execute(code="x"))
    await server.wait_for_call("Execute")
    assert client.in_flight == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert client.in_flight == 0
    assert await ended(server, "Execute") == "cancelled"


@pytest.mark.parametrize("rpc", ["Execute", "ExecuteStream", "Check"])
async def test_a_cancellation_comes_out_as_it_went_in(
    server: FakeSandboxServer, client: SandboxClient, rpc: str
) -> None:
    """anyio tells its cancel scopes by the message of the CancelledError."""
    server.script(rpc, NEVER)
    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "Execute": lambda: client.execute(code="x"),
        "ExecuteStream": lambda: anext(client.execute_stream(code="x")),
        "Check": lambda: client.wait_for_healthy(PATIENCE),
    }
    task = asyncio.ensure_future(calls[rpc]())
    await server.wait_for_call(rpc)
    task.cancel("by whom")
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    assert caught.value.args == ("by whom",)
    assert await ended(server, rpc) == "cancelled"


async def test_whenever_it_comes_a_cancellation_is_not_lost(client: SandboxClient) -> None:
    cancelled = 0
    for turns in range(100):
        task = asyncio.create_task(client.execute(code="x"))
        for _ in range(turns):
            await asyncio.sleep(0)
        if task.done():
            break
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        cancelled += 1
    assert cancelled > 5
    assert client.in_flight == 0


async def test_a_timeout_around_a_call_is_a_timeout(server: FakeSandboxServer, client: SandboxClient) -> None:
    async with asyncio.timeout(PATIENCE):
        scope = asyncio.timeout(None)

        def expire(request: object) -> object:
            scope.reschedule(0)
            return NEVER

        server.script("Execute", expire)
        with pytest.raises(TimeoutError):
            async with scope:
                await client.execute(code="x")
        assert await ended(server, "Execute") == "cancelled"


# Closing


async def test_closing_cancels_what_is_in_flight(server: FakeSandboxServer, client: SandboxClient) -> None:
    server.script("Execute", NEVER)
    server.script("ExecuteStream", [SOME, NEVER])
    server.script("Check", NEVER)
    suspected: list[bool] = []
    client.on_suspect = lambda: suspected.append(True)
    await client.execute_async(code="x")
    idle, read = client.execute_stream(code="x"), client.execute_stream(code="x")
    for stream in (idle, read):
        assert await anext(stream) == SOME
    calls = client.execute(code="x"), anext(read), client.health_check(), client.wait_for_healthy(PATIENCE)
    tasks = [asyncio.ensure_future(call) for call in calls]
    await server.wait_for_call("Execute")
    await server.wait_for_call("Check", count=2)
    assert client.in_flight == 4
    await asyncio.gather(client.close(), client.close())
    assert client.in_flight == 0
    *errors, healthy = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(error) for error in errors] == [SandboxUnavailableError] * 3
    assert "the client was closed meanwhile" in str(errors[0])
    assert healthy is False
    with pytest.raises(SandboxUnavailableError, match="the client was closed meanwhile"):
        await anext(idle)
    assert await ended(server, "Execute") == "cancelled"
    assert await ended(server, "ExecuteStream") == "cancelled"
    assert suspected == []
    await client.close()


async def test_a_cancelled_task_stays_cancelled_although_the_client_is_closed(
    server: FakeSandboxServer, client: SandboxClient
) -> None:
    server.script("Execute", NEVER)
    server.script("ExecuteStream", NEVER)
    calls = [client.execute(code="x"), anext(client.execute_stream(code="x"))]
    tasks = [asyncio.ensure_future(call) for call in calls]
    await server.wait_for_call("Execute")
    await server.wait_for_call("ExecuteStream")
    for task in tasks:
        task.cancel()
    await client.close()
    done = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(outcome) for outcome in done] == [asyncio.CancelledError] * 2


@pytest.mark.parametrize("rpc", ["CancelExecution", "ExecuteStream", "Check"])
async def test_closing_ends_also_the_calls_with_which_a_cancelled_task_cleans_up(
    server: FakeSandboxServer, client: SandboxClient, rpc: str
) -> None:
    server.script(rpc, NEVER)
    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "CancelExecution": lambda: client.cancel_execution("e"),
        "ExecuteStream": lambda: anext(client.execute_stream(code="x")),
        "Check": lambda: client.health_check(),
    }
    cleaned = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            with pytest.raises(SandboxUnavailableError, match="the client was closed meanwhile"):
                await calls[rpc]()
            cleaned.set()

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    await server.wait_for_call(rpc)
    await client.close()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cleaned.is_set()


async def test_closing_ends_a_wait_between_two_long_polls(
    server: FakeSandboxServer, client: SandboxClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.script("GetExecution", ExecutionStatus("e", ExecutionState.RUNNING))
    between, closed = asyncio.Event(), asyncio.Event()

    async def pause(seconds: float) -> None:
        between.set()
        await closed.wait()

    monkeypatch.setattr(asyncio, "sleep", pause)
    waiting = asyncio.create_task(client.wait_for_execution("e"))
    async with asyncio.timeout(PATIENCE):
        await between.wait()
    await client.close()
    closed.set()
    with pytest.raises(SandboxUnavailableError, match="the client was closed meanwhile"):
        await waiting
    assert len(server.calls) == 1


CLOSED: list[Callable[[SandboxClient], Awaitable[Any]]] = [
    lambda c: c.execute(code="x"),
    lambda c: anext(c.execute_stream(code="x")),
    lambda c: c.execute_stream(code="x").__aenter__(),
    lambda c: c.list_cache(),
    lambda c: c.health_check(),
]


@pytest.mark.parametrize("used", [False, True])
async def test_calls_after_closing_say_so(client: SandboxClient, used: bool) -> None:
    if used:
        await client.execute(code="x")
    await client.close()
    for call in CLOSED:
        with pytest.raises(SandboxError, match=r"the client of .* is closed") as caught:
            await call(client)
        assert type(caught.value) is SandboxError
    assert await client.wait_for_healthy(PATIENCE) is False
    assert "is closed" in str(client.health_error)


class Gate(threading.Event):
    """Reading the TLS files takes until this is set."""

    reads = 0


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    read = _channel.read_credentials

    def slow(tls: TlsConfig) -> Any:
        gate.reads += 1
        gate.wait(2 * PATIENCE)
        return read(tls)

    monkeypatch.setattr(_channel, "read_credentials", slow)
    yield gate
    gate.set()


async def test_closing_ends_the_calls_for_which_the_tls_files_are_read_once(gate: Gate) -> None:
    client = SandboxClient("localhost:1", tls=TlsConfig())
    calls = (
        client.execute(code="x"),
        anext(client.execute_stream(code="x")),
        client.wait_for_healthy(PATIENCE),
    )
    tasks = [asyncio.ensure_future(call) for call in calls]
    with pytest.raises(
        SandboxTimeoutError, match=r"TLS files for localhost:1 could not be read within 0\.05 s"
    ):
        await client.health_check(timeout=0.05)
    assert client.in_flight == 1
    async with asyncio.timeout(PATIENCE):
        await client.close()
        *errors, healthy = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(error) for error in errors] == [SandboxUnavailableError] * 2
    assert healthy is False
    assert gate.reads == 1


async def test_closing_a_stream_while_the_tls_files_are_read(gate: Gate) -> None:
    async with SandboxClient("localhost:1", tls=TlsConfig()) as client:
        stream = client.execute_stream(code="x")
        reader = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        await stream.aclose()
        gate.set()
        with pytest.raises(SandboxError, match="the stream was closed while it was being read"):
            await reader
        assert client.in_flight == 0


# Event loops and processes


async def test_a_call_from_another_event_loop_is_an_error(client: SandboxClient) -> None:
    await client.execute(code="x")
    stream = client.execute_stream(code="x")
    for call in (client.execute(code="x"), client.health_check(), stream.__aenter__(), client.close()):
        with pytest.raises(SandboxError, match="was first used in another event loop"):
            await asyncio.to_thread(asyncio.run, call)
    assert await asyncio.to_thread(asyncio.run, SandboxClient("localhost:1").close()) is None  # type: ignore[func-returns-value]
    assert client.in_flight == 0


async def test_a_call_after_a_fork_is_an_error(
    client: SandboxClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    await client.execute(code="x")
    with monkeypatch.context() as child:
        child.setattr(os, "getpid", lambda: -1)
        with pytest.raises(SandboxError, match=r"was first used in process \d+, before a fork"):
            await client.execute(code="x")
        await client.close()  # Must not touch the parent's channel.
    # The parent's channel lives on; nothing that a client does may tell, as it is closed.
    assert client._connection.channel.grpc_channel is not None
    assert str(client._connection.channel.grpc_channel.get_state()) != "ChannelConnectivity.SHUTDOWN"


def test_making_a_client_needs_no_loop_and_closing_an_unused_one_does_nothing() -> None:
    client = SandboxClient("localhost:1")
    assert (client.in_flight, client.last_used) == (0, 0.0)
    asyncio.run(client.close())
    assert (client.in_flight, client.last_used) == (0, 0.0)


# The account of use


async def test_the_end_of_every_use_is_noted(server: FakeSandboxServer, client: SandboxClient) -> None:
    loop = asyncio.get_running_loop()
    server.script("Execute", ExecutionResult(True), FakeStatus("INTERNAL"))
    gate = asyncio.Event()
    server.script("ExecuteStream", [END, gate])
    assert await client.wait_for_healthy(PATIENCE)
    await client.health_check()
    assert client.last_used == 0.0

    before = loop.time()
    await client.execute(code="x")
    used = client.last_used
    assert before < used <= loop.time()
    with pytest.raises(SandboxError):
        await client.execute(code="x")
    failed = client.last_used
    assert used < failed
    stream = client.execute_stream(code="x")
    assert client.last_used == failed
    await anext(stream)
    assert (client.last_used, client.in_flight) == (failed, 1)
    gate.set()
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    assert client.last_used > failed
    assert client.in_flight == 0


ENDINGS: list[tuple[str, Any, Callable[[SandboxClient], Awaitable[Any]]]] = [
    ("GetExecution", ExecutionStatus("e", ExecutionState.TIMEOUT), lambda c: c.get_execution("e")),
    ("GetExecution", ExecutionStatus("e", ExecutionState.FAILED), lambda c: c.wait_for_execution("e")),
    ("GetExecution", FakeStatus("NOT_FOUND"), lambda c: c.get_execution("e")),
    ("CancelExecution", CancelResult(True, ExecutionState.CANCELLED), lambda c: c.cancel_execution("e")),
    ("CancelExecution", FakeStatus("NOT_FOUND"), lambda c: c.cancel_execution("e")),
    ("ListExecutions", (ExecutionInfo("e", ExecutionState.COMPLETED),), lambda c: c.list_executions()),
]


@pytest.mark.parametrize("number", range(len(ENDINGS)))
async def test_an_asynchronous_execution_counts_until_it_is_seen_ended(
    server: FakeSandboxServer, client: SandboxClient, number: int
) -> None:
    running = ExecutionState.RUNNING
    server.script("ExecuteAsync", StartedExecution("e", ExecutionState.PENDING))
    await client.execute_async(code="x")
    server.script("GetExecution", ExecutionStatus("e", running), FakeStatus("INTERNAL"))
    server.script("ListExecutions", (ExecutionInfo("e", running), ExecutionInfo("f", ExecutionState.FAILED)))
    server.script("CancelExecution", CancelResult(False, running))
    await client.get_execution("e")
    with pytest.raises(SandboxError):
        await client.get_execution("e")
    await client.list_executions()
    await client.cancel_execution("e")
    assert client.in_flight == 1

    rpc, answer, call = ENDINGS[number]
    server.script(rpc, answer)
    await asyncio.gather(call(client), return_exceptions=True)
    assert client.in_flight == 0


async def test_an_asynchronous_execution_that_nobody_asks_about_counts_until_its_deadline(
    client: SandboxClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    begun = loop.time()
    await client.execute_async(code="x", timeout=10)
    started = loop.time()
    assert begun < client.last_used <= started
    assert client.in_flight == 1
    with monkeypatch.context() as later:
        later.setattr(loop, "time", lambda: begun + 10.04)
        assert client.in_flight == 1
        later.setattr(loop, "time", lambda: started + 50)
        assert begun + 10.05 <= client.last_used <= started + 10.05
        assert client.in_flight == 0


async def test_an_execution_that_has_ended_at_once_does_not_count(
    server: FakeSandboxServer, client: SandboxClient
) -> None:
    server.script("ExecuteAsync", StartedExecution("e", ExecutionState.FAILED))
    await client.execute_async(code="x")
    assert client.in_flight == 0


async def test_calls_that_fail_as_on_a_dead_sandbox_make_the_client_suspect(
    server: FakeSandboxServer, client: SandboxClient
) -> None:
    suspected: list[bool] = []
    client.on_suspect = lambda: suspected.append(True)
    assert client.on_suspect is not None
    for code, count in (("UNAVAILABLE", 2), ("DEADLINE_EXCEEDED", 4), ("INTERNAL", 4), ("NOT_FOUND", 4)):
        for rpc in ("Execute", "ExecuteStream", "Check"):
            server.script(rpc, FakeStatus(code))
        for call in (
            client.execute(code="x"),
            anext(client.execute_stream(code="x")),
            client.health_check(),
        ):
            with pytest.raises(SandboxError):
                await call
        assert len(suspected) == count
    client.on_suspect = None
    server.script("Execute", FakeStatus("UNAVAILABLE"))
    with pytest.raises(SandboxUnavailableError):
        await client.execute(code="x")


async def test_the_end_of_the_callers_own_patience_is_not_suspicious(
    server: FakeSandboxServer, client: SandboxClient
) -> None:
    suspected: list[bool] = []
    client.on_suspect = lambda: suspected.append(True)
    server.script("GetExecution", NEVER)
    with pytest.raises(SandboxTimeoutError, match=r"^execution e has not ended within 0\.1 s(\n|$)"):
        await client.wait_for_execution("e", timeout=0.1)
    with pytest.raises(SandboxTimeoutError):
        await client.get_execution("e", wait=True, timeout=0.1)
    assert suspected == []
    with pytest.raises(SandboxTimeoutError):
        await client.get_execution("e", timeout=0.1)
    server.script("GetExecution", FakeStatus("UNAVAILABLE"))
    with pytest.raises(SandboxUnavailableError):
        await client.wait_for_execution("e", timeout=PATIENCE)
    assert suspected == [True, True]


@pytest.mark.looptime
async def test_an_execution_that_expires_after_a_later_use_does_not_set_the_clock_back() -> None:
    usage = Usage(asyncio.get_running_loop().time)
    usage.executions["e"] = 5.0
    await asyncio.sleep(20)
    with usage.call():
        pass
    assert (usage.in_flight, usage.last_used) == (0, 20.0)


async def test_an_asynchronous_execution_counts_for_its_timeout_and_the_margin(
    server: FakeSandboxServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.script("ExecuteAsync", StartedExecution("e", ExecutionState.PENDING))
    async with SandboxClient(server.target, deadline_margin=7.0) as client:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        await client.execute_async(code="x", timeout=3.0)
        assert client.in_flight == 1
        put_forward(monkeypatch, 10.0)
        assert client.in_flight == 0
        assert begun + 10 <= client.last_used <= loop.time()
