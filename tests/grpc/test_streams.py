"""Streams: cancelled however they are left, and never without a word cut short."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
from typing import Any

import pytest

from prodisco_sandbox import SandboxManager, SandboxManagerConfig
from prodisco_sandbox._grpc.execution_call import ExecutionCall
from prodisco_sandbox.client import ExecutionStream, SandboxClient
from prodisco_sandbox.errors import SandboxError, SandboxTimeoutError, SandboxUnavailableError
from prodisco_sandbox.results import ExecutionChunk
from prodisco_sandbox.testing import NEVER, FakeCustomObjectsApi, FakeSandboxServer
from tests.support.fake_servers import END, SOME, ended
from tests.support.patience import PATIENCE


async def idle(client: SandboxClient) -> None:
    """Waits until the client counts nothing as in flight."""
    async with asyncio.timeout(PATIENCE):
        while client.in_flight:
            await asyncio.sleep(0.01)


# Leaving one


async def test_cancelling_the_task_that_reads_a_stream_reaches_the_server(
    server: FakeSandboxServer, client: SandboxClient
) -> None:
    server.script("ExecuteStream", [SOME, NEVER])
    stream = client.execute_stream(code="x")
    first = asyncio.Event()

    async def read() -> None:
        async for _ in stream:
            first.set()

    task = asyncio.create_task(read())
    await first.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert client.in_flight == 0
    assert await ended(server, "ExecuteStream") == "cancelled"
    assert [chunk async for chunk in stream] == []


async def test_leaving_the_context_of_a_stream_cancels_it(
    server: FakeSandboxServer, client: SandboxClient
) -> None:
    server.script("ExecuteStream", [SOME, NEVER])
    async with client.execute_stream(code="x") as stream:
        async for chunk in stream:
            assert chunk == SOME
            break
        assert client.in_flight == 1
    assert client.in_flight == 0
    await stream.aclose()
    assert await ended(server, "ExecuteStream") == "cancelled"

    async with client.execute_stream(code="x"):
        await server.wait_for_call("ExecuteStream", count=2)
        assert client.in_flight == 1
    assert await ended(server, "ExecuteStream", 2) == "cancelled"


async def test_breaking_out_of_a_stream_that_nothing_holds_cancels_it(
    server: FakeSandboxServer, client: SandboxClient
) -> None:
    server.script("ExecuteStream", [SOME, NEVER])
    gc.disable()  # The collector must not be what does it.
    try:
        async for _ in client.execute_stream(code="x"):
            assert client.in_flight == 1
            break
        assert client.in_flight == 0
        assert await ended(server, "ExecuteStream") == "cancelled"
    finally:
        gc.enable()


async def test_a_stream_that_is_held_stays_open_until_it_is_dropped(
    server: FakeSandboxServer, client: SandboxClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.script("ExecuteStream", [SOME, NEVER])
    held = {1: client.execute_stream(code="x"), 2: client.execute_stream(code="x")}
    for stream in held.values():
        async for _ in stream:
            break
    cancelled_in: list[threading.Thread] = []
    # In which thread gRPC's call is cancelled shows at that call alone.
    assert isinstance(stream._call, ExecutionCall)
    kind = type(stream._call._call)
    cancel = kind.cancel

    def noted(call: Any) -> Any:
        cancelled_in.append(threading.current_thread())
        return cancel(call)

    monkeypatch.setattr(kind, "cancel", noted)
    del stream
    assert client.in_flight == 2
    del held[1]
    assert client.in_flight == 1
    assert await ended(server, "ExecuteStream", 1) == "cancelled"
    # The collector may run in any thread, but calls belong to the loop's.
    await asyncio.to_thread(held.clear)
    assert client.in_flight == 0
    assert client.last_used > 0
    assert await ended(server, "ExecuteStream", 2) == "cancelled"
    assert cancelled_in == [threading.main_thread()] * 2


async def test_a_stream_dropped_before_the_server_said_anything_is_cancelled(
    server: FakeSandboxServer, client: SandboxClient
) -> None:
    server.script("ExecuteStream", NEVER)
    stream = await client.execute_stream(code="x").__aenter__()
    await server.wait_for_call("ExecuteStream")
    assert client.in_flight == 1
    del stream
    assert client.in_flight == 0
    assert await ended(server, "ExecuteStream") == "cancelled"


def test_a_stream_may_be_dropped_after_its_loop_is_closed() -> None:
    async def main() -> ExecutionStream:
        async with FakeSandboxServer() as server:
            server.script("ExecuteStream", [SOME, NEVER])
            client = SandboxClient(server.target)
            stream = client.execute_stream(code="x")
            await anext(stream)
            return stream

    with asyncio.Runner() as runner:
        stream = runner.run(main())
    connection = stream._connection  # The client itself is gone.
    del stream
    assert connection.usage.in_flight == 0
    asyncio.run(connection.close())
    assert connection.channel.closed


# Keeping one


async def test_a_stream_that_is_kept_counts_until_the_server_has_ended_it(
    server: FakeSandboxServer, client: SandboxClient
) -> None:
    gate = asyncio.Event()
    server.script("ExecuteStream", [SOME, END, gate])
    kept = client.execute_stream(code="x")
    assert [await anext(kept), await anext(kept)] == [SOME, END]
    assert (client.in_flight, client.last_used) == (1, 0.0)
    gate.set()
    await idle(client)
    assert client.last_used > 0
    assert [chunk async for chunk in kept] == []


async def test_a_stream_that_is_kept_counts_until_its_deadline(
    server: FakeSandboxServer, client: SandboxClient
) -> None:
    server.script("ExecuteStream", [SOME, NEVER])
    counted: list[int] = []
    for timeout in (1, 4, 16):
        kept = client.execute_stream(code="x", timeout=timeout)
        with contextlib.suppress(SandboxTimeoutError):  # The machine may take so long even for that.
            assert await anext(kept) == SOME
            counted.append(client.in_flight)
            await idle(client)
            with pytest.raises(SandboxTimeoutError):
                await anext(kept)
            if counted[-1]:
                break
    assert counted[-1:] == [1]


async def test_a_session_whose_stream_is_kept_is_reaped_all_the_same(server: FakeSandboxServer) -> None:
    server.script("ExecuteStream", [SOME, END])
    config = SandboxManagerConfig(
        mode="multi", endpoint=lambda _: server.target, session_idle_timeout=0.2, idle_check_interval=0.05
    )
    async with (
        FakeCustomObjectsApi(auto_ready=True) as api,
        SandboxManager(config, custom_objects_api=api) as manager,
    ):
        kept = (await manager.get_client("s")).execute_stream(code="x")
        assert [await anext(kept), await anext(kept)] == [SOME, END]
        await api.until(lambda: not api.objects)


# What a stream may be asked for


async def test_a_stream_is_read_by_one_task_at_a_time(
    server: FakeSandboxServer, client: SandboxClient
) -> None:
    gate = asyncio.Event()
    server.script("ExecuteStream", [gate, SOME, END])
    stream = client.execute_stream(code="x")
    reader = asyncio.ensure_future(anext(stream))
    await server.wait_for_call("ExecuteStream")
    with pytest.raises(SandboxError, match="already being read by another task"):
        await anext(stream)
    with pytest.raises(SandboxError, match="already being read by another task"):
        await stream.__aenter__()
    gate.set()
    assert await reader == SOME
    assert await anext(stream) == END


async def test_closing_a_stream_ends_the_task_that_reads_it_with_an_error(
    server: FakeSandboxServer, client: SandboxClient
) -> None:
    server.script("ExecuteStream", NEVER)
    stream = client.execute_stream(code="x")
    reader = asyncio.ensure_future(anext(stream))
    await server.wait_for_call("ExecuteStream")
    await stream.aclose()
    with pytest.raises(SandboxError, match="the stream was closed while it was being read"):
        await reader
    async with stream:
        assert [chunk async for chunk in stream] == []


async def test_a_stream_without_a_result_is_an_error(
    server: FakeSandboxServer, client: SandboxClient
) -> None:
    server.script("ExecuteStream", [SOME])
    stream = client.execute_stream(code="x")
    assert await anext(stream) == SOME
    with pytest.raises(SandboxError, match=r"ExecuteStream on .*: ended without a result"):
        await anext(stream)
    assert client.in_flight == 0


async def test_a_server_that_dies_under_a_stream_makes_it_unavailable(
    server: FakeSandboxServer, client: SandboxClient
) -> None:
    server.script("ExecuteStream", [SOME, NEVER])
    stream = client.execute_stream(code="x")
    assert await anext(stream) == SOME
    await server.kill()
    with pytest.raises(SandboxUnavailableError):
        await anext(stream)
    assert client.in_flight == 0


async def test_a_slow_reader_loses_nothing(server: FakeSandboxServer, client: SandboxClient) -> None:
    chunks = [ExecutionChunk("e", "output", str(n) * 50_000) for n in range(9)] + [END]
    server.script("ExecuteStream", chunks)
    stream = client.execute_stream(code="x")
    assert await anext(stream) == chunks[0]
    await asyncio.sleep(0.1)  # Meanwhile the server may have ended the call.
    assert [chunk async for chunk in stream] == chunks[1:]


async def test_a_cancelled_task_stays_cancelled_although_its_stream_is_closed(
    server: FakeSandboxServer, client: SandboxClient
) -> None:
    server.script("ExecuteStream", NEVER)
    stream = client.execute_stream(code="x")
    reading = asyncio.ensure_future(anext(stream))
    await server.wait_for_call("ExecuteStream")
    await stream.aclose()
    reading.cancel()
    await asyncio.wait({reading})
    assert reading.cancelled()
