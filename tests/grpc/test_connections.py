"""What connections a client makes: none once it is closed, and no pings that servers take for abuse."""

from __future__ import annotations

import asyncio
import gc
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import grpc.aio
import pytest

from prodisco_sandbox import SandboxManager, SandboxManagerConfig
from prodisco_sandbox._grpc import channel as _channel
from prodisco_sandbox.client import SandboxClient
from prodisco_sandbox.errors import SandboxError, SandboxUnavailableError
from prodisco_sandbox.proto import sandbox_pb2 as pb
from prodisco_sandbox.results import ExecutionChunk
from prodisco_sandbox.testing import FakeCustomObjectsApi, FakeSandboxServer
from tests.support.patience import PATIENCE, until

# Closed clients


class Door:
    """A port where everybody is let in and shown out again: gRPC knocks for as long as it may."""

    def __init__(self) -> None:
        self.visits = 0
        self._server: asyncio.Server | None = None
        self.target = ""

    async def open(self, port: int = 0) -> None:
        self._server = await asyncio.start_server(self._show_out, "127.0.0.1", port)
        self.target = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def _show_out(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.visits += 1
        writer.close()

    async def shut(self) -> None:
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()


@pytest.fixture
async def doors() -> AsyncIterator[Callable[[], Awaitable[Door]]]:
    opened: list[Door] = []

    async def door() -> Door:
        opened.append(Door())
        await opened[-1].open()
        return opened[-1]

    yield door
    for each in opened:
        await each.shut()


@pytest.fixture
def no_collector() -> Iterator[None]:
    """The collector must not be what does it."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


async def quiet(silent: list[Door], control: SandboxClient, door: Door) -> None:
    """Checks that nobody connects while an open client does so four times."""
    with pytest.raises(SandboxError):
        await control.health_check(timeout=PATIENCE)
    await until(lambda: door.visits >= 2)  # What was under way has arrived.
    before, visits = [each.visits for each in silent], door.visits
    await until(lambda: door.visits >= visits + 4)
    assert [each.visits for each in silent] == before
    await control.close()


async def _error(call: Awaitable[Any]) -> BaseException:
    with pytest.raises(SandboxError) as caught:
        await call
    return caught.value


async def _cancelled(call: Any) -> BaseException:
    task = asyncio.ensure_future(call)
    await asyncio.sleep(0.02)
    task.cancel()
    try:
        await task
    except (asyncio.CancelledError, SandboxError) as error:
        return error
    raise AssertionError("it has come to its end")


async def _entered(client: SandboxClient) -> Any:
    stream = client.execute_stream(code="x", timeout=60)
    await stream.__aenter__()
    return stream


async def _failed_stream(client: SandboxClient) -> Any:
    stream = client.execute_stream(code="x")
    return stream, await _error(anext(stream))


async def _pending(client: SandboxClient) -> Any:
    task = asyncio.ensure_future(client.execute(code="x"))
    await asyncio.sleep(0)
    return task


async def _not_in_time(client: SandboxClient) -> Any:
    try:
        async with asyncio.timeout(0.02):
            await client.wait_for_healthy(60)
    except TimeoutError as error:
        return error
    raise AssertionError("it is healthy")


KEPT: dict[str, Callable[[SandboxClient], Awaitable[Any]]] = {
    "nothing, after a wait": lambda c: c.wait_for_healthy(0.3),
    "an error of execute": lambda c: _error(c.execute(code="x", timeout=1)),
    "an error of execute_test": lambda c: _error(c.execute_test(tests="x", timeout=1)),
    "an error of execute_async": lambda c: _error(c.execute_async(code="x")),
    "an error of a wait": lambda c: _error(c.wait_for_execution("e")),
    "an error of list_cache": lambda c: _error(c.list_cache()),
    "an error of health_check": lambda c: _error(c.health_check()),
    "a failed stream": _failed_stream,
    "a stream that nobody reads": _entered,
    "a cancelled execute": lambda c: _cancelled(c.execute(code="x")),
    "a cancelled health_check": lambda c: _cancelled(c.health_check()),
    "a cancelled stream": lambda c: _cancelled(anext(c.execute_stream(code="x"))),
    "a timeout": _not_in_time,
    "a task": _pending,
}


async def test_a_closed_client_does_not_connect_whatever_of_it_is_kept(
    doors: Callable[[], Awaitable[Door]], no_collector: None
) -> None:
    kept: list[Any] = []
    visited: list[Door] = []
    for keep in KEPT.values():
        door = await doors()
        client = SandboxClient(door.target)
        kept += [client, await keep(client)]
        await client.close()
        visited.append(door)
    control = await doors()
    await quiet(visited, SandboxClient(control.target), control)
    results = await asyncio.gather(
        *(each for each in kept if isinstance(each, asyncio.Task)), return_exceptions=True
    )
    assert [type(result) for result in results] == [SandboxUnavailableError]
    assert len(kept) == 2 * len(KEPT)


async def test_no_frame_of_a_kept_error_refers_to_a_call(doors: Callable[[], Awaitable[Door]]) -> None:
    async with SandboxClient((await doors()).target) as client:
        errors = [
            await _error(client.execute(code="x")),
            await _error(client.health_check()),
            await _error(anext(client.execute_stream(code="x"))),
            await _cancelled(client.execute(code="x")),
        ]
        found: list[object] = []
        while errors:
            error = errors.pop()
            errors += [each for each in (error.__cause__, error.__context__) if each is not None]
            frames = _frames(error.__traceback__)
            found += [value for frame in frames for value in frame.f_locals.values()]
        assert found
        assert not [value for value in found if isinstance(value, grpc.aio.Call)]


def _frames(traceback: types.TracebackType | None) -> Iterator[types.FrameType]:
    while traceback is not None:
        yield traceback.tb_frame
        traceback = traceback.tb_next


async def test_a_renewed_client_has_left_its_old_channels(
    doors: Callable[[], Awaitable[Door]], no_collector: None
) -> None:
    """Each attempt of `wait_for_healthy` makes a channel; the errors of some are kept."""
    door, control = await doors(), await doors()
    client = SandboxClient(door.target)
    errors = []
    for _ in range(8):
        errors.append(await _error(client.health_check()))
        await client._connection.renew()  # As `wait_for_healthy` does, without its pauses.
    await quiet([door], SandboxClient(control.target), control)
    await client.close()
    assert len(errors) == 8


async def test_a_client_that_was_forgotten_does_not_connect(doors: Callable[[], Awaitable[Door]]) -> None:
    door, control = await doors(), await doors()
    client = SandboxClient(door.target)
    # Without the frames, which hold the client itself.
    errors = [
        (await _error(call)).with_traceback(None)
        for call in (client.execute(code="x"), client.health_check(), anext(client.execute_stream(code="x")))
    ]
    del client
    gc.collect()
    await quiet([door], SandboxClient(control.target), control)
    assert len(errors) == 3


async def test_a_client_that_a_manager_has_given_up_does_not_connect(
    doors: Callable[[], Awaitable[Door]], no_collector: None
) -> None:
    control = await doors()
    door = Door()
    server = FakeSandboxServer()
    await server.start()
    config = SandboxManagerConfig(mode="multi", endpoint=lambda _: server.target)
    async with (
        FakeCustomObjectsApi(auto_ready=True) as api,
        SandboxManager(config, custom_objects_api=api) as manager,
    ):
        client = await manager.get_client("s")
        await server.kill()
        await door.open(int(server.target.rpartition(":")[2]))
        try:
            error = await _error(client.execute(code="x"))
            await manager.on_session_closed("s")
            await quiet([door], SandboxClient(control.target), control)
        finally:
            await door.shut()
    assert error.__cause__ is not None


# Pings

FIVE_MINUTES = 300_000
"""In milliseconds: how often servers let themselves be pinged by default, C-core's and Go's."""
FASTER = 100
"""Not more: gRPC sends no two pings within a second."""


def _unasked(client: SandboxClient) -> SandboxClient:
    """A client that asks for no health meanwhile: answers would make up for pings."""
    client._connection.beat = PATIENCE  # A setting that no caller needs.
    return client


async def test_a_silent_stream_outlives_the_pings_that_a_server_allows_by_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All times are so much shorter, the server's as well as the client's."""
    keepalive = dict(_channel._OPTIONS)["grpc.keepalive_time_ms"]
    options = {**dict(_channel._OPTIONS), "grpc.keepalive_time_ms": keepalive // FASTER}
    options["grpc.http2.max_pings_without_data"] = 0  # Else the third comes after a minute.
    monkeypatch.setattr(_channel, "_OPTIONS", tuple(options.items()))

    async def silent(request: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await context.write(pb.ExecuteChunk(execution_id="e", output="some\n"))
        await asyncio.Event().wait()

    handler = grpc.unary_stream_rpc_method_handler(
        silent,
        request_deserializer=pb.ExecuteRequest.FromString,
        response_serializer=pb.ExecuteChunk.SerializeToString,
    )
    allowed = [("grpc.http2.min_ping_interval_without_data_ms", FIVE_MINUTES // FASTER)]
    server = grpc.aio.server(options=allowed)
    service = "prodisco.sandbox.v1.SandboxService"
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(service, {"ExecuteStream": handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with (
        _unasked(SandboxClient(f"127.0.0.1:{port}")) as client,
        client.execute_stream(code="x", timeout=PATIENCE) as stream,
    ):
        assert isinstance(await anext(stream), ExecutionChunk)
        silence = asyncio.ensure_future(anext(stream))
        # Two intervals, and long enough for three strikes, of which the third ends it.
        done, _ = await asyncio.wait({silence}, timeout=max(2.2 * keepalive / FASTER / 1000, 6))
        assert not done, done
        silence.cancel()
        await asyncio.wait({silence})
    await server.stop(None)
