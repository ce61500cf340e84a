"""More callers than slots, an API server that has enough, and servers that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import pytest

from prodisco_sandbox import SandboxCapacityError, SandboxClient, SandboxError, SandboxUnavailableError
from prodisco_sandbox.proto import sandbox_pb2 as pb
from prodisco_sandbox.results import ExecutionChunk
from prodisco_sandbox.testing import NEVER, FakeSandboxServer, api_error
from tests.support.counts import count, full
from tests.support.managers import LoopTimeApi, alive, managed, now, settle
from tests.support.patience import PATIENCE, put_forward, until

SLOTS = 50
CALLERS = pytest.mark.parametrize(
    "callers", [full(500, quick=200), pytest.param(2_000, marks=pytest.mark.slow)]
)
HOLD = 2.0


@CALLERS
@pytest.mark.looptime
@pytest.mark.unmeasured
async def test_many_callers_share_fifty_slots(callers: int) -> None:
    """First come, first served: each session is used for two seconds, and then makes room."""
    served: list[int] = []
    waits: list[float] = []

    async with (
        LoopTimeApi(auto_ready=True, history=100) as api,
        managed(api, max_sessions=SLOTS, capacity_timeout=300.0) as manager,
    ):

        async def use(number: int) -> None:
            begun = now()
            async with manager.session(f"session-{number}"):
                served.append(number)
                waits.append(now() - begun)
                await asyncio.sleep(HOLD)
            await manager.on_session_closed(f"session-{number}")

        async def look() -> None:
            while len(served) < callers:
                stats = manager.stats()
                taken.add(stats.creating + stats.ready + stats.closing)
                taken.add(len(alive(api)))
                await asyncio.sleep(0.25)

        begun, taken = now(), set[int]()
        await asyncio.gather(look(), *(use(number) for number in range(callers)))
        # Who came together is served together; nobody overtakes a whole round of others.
        assert all(abs(place - number) < SLOTS for place, number in enumerate(served))
        assert len(served) == callers
        assert max(taken) == SLOTS
        rounds = callers // SLOTS
        assert now() - begun == pytest.approx(rounds * HOLD, abs=1)
        assert max(waits) == pytest.approx((rounds - 1) * HOLD, abs=1)
        assert manager.stats().created == callers
        assert (api.count("create"), api.count("delete")) == (callers, callers), "one each, nothing in vain"
    assert api.objects == []
    count("callers in overload", callers)


@CALLERS
@pytest.mark.looptime
@pytest.mark.unmeasured
async def test_who_is_refused_is_refused_at_once_or_in_time_and_leaves_nothing_in_memory(
    callers: int,
) -> None:
    async with LoopTimeApi(auto_ready=True, history=100) as api:

        async def storm(manager: Any, first: int) -> None:
            begun = now()
            asking = (manager.get_client(f"refused-{first + n}") for n in range(callers))
            for outcome in await asyncio.gather(*asking, return_exceptions=True):
                assert isinstance(outcome, SandboxCapacityError)
            assert now() - begun == pytest.approx(manager.config.capacity_timeout, abs=0.01)
            stats = manager.stats()
            assert (stats.queued, stats.waiting, stats.ready) == (0, 0, SLOTS)
            assert stats.events["session_refused"] == first + callers

        for patience in (0.0, 10.0):
            async with managed(api, max_sessions=SLOTS, capacity_timeout=patience) as manager:
                for number in range(SLOTS):
                    await manager.get_client(f"held-{number}")
                requests = len(api.requests)
                await storm(manager, 0)
                if patience == 0.0:
                    tracemalloc.start()
                    try:
                        await storm(manager, callers)
                        await asyncio.sleep(0)  # The loop lets go of what it has run.
                        gc.collect()
                        # asyncio's own set of all tasks grows by leaps.
                        kept = tracemalloc.Filter(False, "*/_weakrefset.py")
                        traces = tracemalloc.take_snapshot().filter_traces([kept]).traces
                        left = sum(trace.size for trace in traces)
                    finally:
                        tracemalloc.stop()
                    assert left < 200 * callers, "less than a session itself would take"
                assert len(api.requests) == requests, "the API server hears nothing of it"
    count("refusals in overload", 3 * callers)


@pytest.mark.looptime
async def test_nobody_starves_behind_one_that_comes_again_and_again() -> None:
    async with (
        LoopTimeApi(auto_ready=True) as api,
        managed(api, max_sessions=1, capacity_timeout=60.0) as manager,
    ):
        await manager.get_client("greedy")
        patient = asyncio.create_task(manager.get_client("patient"))
        await asyncio.sleep(1)
        for _ in range(3):
            again = asyncio.create_task(manager.get_client("greedy"))
            await manager.on_session_closed("greedy")
            await asyncio.wait({patient, again}, return_when=asyncio.FIRST_COMPLETED)
            if not patient.done():
                assert again.done(), "nobody got the slot"
        assert (await patient).sandbox is not None
        await manager.on_session_closed("patient")
        await asyncio.wait({again}, timeout=61)
        with contextlib.suppress(SandboxError):
            await again


@pytest.mark.looptime
async def test_deletes_that_hang_leave_others_their_turns() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api, max_sessions=200) as manager:
        await asyncio.gather(*(manager.get_client(f"session-{number}") for number in range(100)))
        with api.faults.add("delete", hold=True):
            closing = [
                asyncio.create_task(manager.on_session_closed(f"session-{number}")) for number in range(100)
            ]
            await settle()
            begun = now()
            await manager.get_client("another")
            assert now() == pytest.approx(begun, abs=1e-3)
        await asyncio.gather(*closing)
        assert len(api.objects) == 1


@pytest.mark.looptime
async def test_an_api_server_that_has_enough_is_left_alone_until_it_says() -> None:
    """429 with Retry-After for thirty seconds: everybody gets a sandbox, and nobody presses."""
    async with (
        LoopTimeApi(auto_ready=True) as api,
        managed(api, max_sessions=SLOTS, ready_timeout=120.0) as manager,
    ):
        busy_until = now() + 30.0
        api.faults.add("*", error=api_error(429, retry_after=10), when=lambda _: now() < busy_until)
        clients = await asyncio.gather(*(manager.get_client(f"s{number}") for number in range(SLOTS)))
        assert len(set(clients)) == SLOTS
        assert 30 <= now() - (busy_until - 30) < 60
        early = [request for request in api.requests if request.time < busy_until]
        # One probe and one discovery for all, and the watch's list with its own backoff.
        assert len(early) < 40
        assert api.count("create") == SLOTS
        busy_until = now() + 30.0
        closing = [manager.on_session_closed(f"s{number}") for number in range(SLOTS)]
        await asyncio.gather(*closing)
        assert now() < busy_until, "a close does not wait for the background"
        assert manager.stats().closing == SLOTS, "and the slots are held"
        await asyncio.sleep(45)
        assert (api.objects, manager.stats().closing) == ([], 0)
        assert manager.stats().delete_retries <= 4 * SLOTS
        count("faults injected", sum(fault.hits for fault in api.faults))


# Servers that misbehave, in real time

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def raw_server(handle: Handler) -> AsyncIterator[str]:
    """A TCP server that speaks as it likes."""
    tasks: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def serve() -> None:
            try:
                with contextlib.suppress(ConnectionError):
                    await handle(reader, writer)
            finally:
                writer.transport.abort()

        tasks[asyncio.create_task(serve(), name="raw-server")] = writer

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        await settle()  # What has been accepted has become a connection.
        for task, writer in tasks.items():
            task.cancel()
            writer.transport.abort()
        await asyncio.gather(*tasks, return_exceptions=True)
        for writer in tasks.values():
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while await reader.read(4096):
        pass


async def http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    await silent(reader, writer)


async def noise(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(bytes(range(256)) * 64)
    await writer.drain()
    await silent(reader, writer)


async def half_a_greeting(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """An HTTP/2 SETTINGS frame, and then nonsense in its place."""
    writer.write(b"\0\0\0\4\0\0\0\0\0" + b"\xff" * 200)
    await writer.drain()
    await silent(reader, writer)


async def slams_the_door(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(10)


@pytest.mark.parametrize("handle", [silent, http, noise, half_a_greeting, slams_the_door])
async def test_what_is_no_grpc_server_is_unavailable_in_time(handle: Handler) -> None:
    async with raw_server(handle) as target, SandboxClient(target, deadline_margin=0.1) as client:
        async with asyncio.timeout(PATIENCE):
            assert await client.wait_for_healthy(0.2) is False
            assert client.health_error is not None
            with pytest.raises(SandboxError):
                await client.health_check(timeout=0.2)
        assert client.in_flight == 0
    count("hostile servers")


async def test_a_server_that_accepts_and_never_answers_does_not_hold_a_session(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    accepted: list[asyncio.StreamWriter] = []

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.append(writer)
        await silent(reader, writer)

    async with (
        raw_server(accept) as target,
        LoopTimeApi(auto_ready=True) as api,
        managed(api, SandboxClient, ready_timeout=200.0, endpoint=lambda _: target) as manager,
    ):
        getting = asyncio.create_task(manager.get_client("s"))
        await until(lambda: accepted)
        put_forward(monkeypatch, 200.0)
        with pytest.raises(SandboxError, match=r"not ready within ready_timeout \(200 s\).*not healthy"):
            await getting
        await manager.on_session_closed("s")
        assert api.objects == []
        assert manager.stats().failed == 1
    count("hostile servers")


async def test_garbage_in_place_of_an_answer_is_an_error() -> None:
    async with FakeSandboxServer() as server, SandboxClient(server.target) as client:
        server.script("Execute", b"\xff" * 100)
        server.script("ExecuteStream", b"\xff" * 100)
        with pytest.raises(SandboxError, match="cannot be decoded"):
            await client.execute(code="x")
        with pytest.raises(SandboxError, match="cannot be decoded"):
            async for _ in client.execute_stream(code="x"):
                pass
        assert client.in_flight == 0
        assert await client.wait_for_healthy(5)
    count("hostile servers")


@pytest.mark.slow
async def test_a_hundred_mebibytes_are_refused() -> None:
    async with raw_sender() as target, SandboxClient(target) as client:
        with pytest.raises(SandboxError, match="over the size limit of 64 MiB"):
            await client.execute(code="x", timeout=PATIENCE)
        with pytest.raises(SandboxError, match="over the size limit of 64 MiB"):
            async for _ in client.execute_stream(code="x", timeout=PATIENCE):
                pass
        assert client.in_flight == 0
    count("hostile servers")


@contextlib.asynccontextmanager
async def raw_sender() -> AsyncIterator[str]:
    """A server of this protocol without a bound on what it sends."""
    whole = pb.ExecuteResponse(success=True, output="x" * (100 << 20)).SerializeToString()

    async def unary(request: bytes, context: Any) -> bytes:
        return whole

    async def stream(request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield whole

    methods = {
        "Execute": grpc.unary_unary_rpc_method_handler(unary),
        "ExecuteStream": grpc.unary_stream_rpc_method_handler(stream),
    }
    server = grpc.aio.server(options=[("grpc.max_send_message_length", -1)])
    handler = grpc.method_handlers_generic_handler("prodisco.sandbox.v1.SandboxService", methods)
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def test_a_connection_that_breaks_in_the_middle_of_a_stream_ends_it() -> None:
    async with FakeSandboxServer() as server, SandboxClient(server.target) as client:
        suspected: list[bool] = []
        client.on_suspect = lambda: suspected.append(True)
        server.script("ExecuteStream", [ExecutionChunk("e", "output", text="first"), NEVER])
        stream = client.execute_stream(code="x")
        assert (await anext(stream)).text == "first"
        await server.kill()
        with pytest.raises(SandboxUnavailableError):
            await anext(stream)
        assert (client.in_flight, suspected) == (0, [True])
    count("hostile servers")
