"""FakeSandboxServer: it does what its script says, also to a client that is not ours."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from prodisco_sandbox.client import SandboxClient
from prodisco_sandbox.errors import SandboxError, SandboxUnavailableError
from prodisco_sandbox.proto import sandbox_pb2 as pb
from prodisco_sandbox.proto import sandbox_pb2_grpc as pb_grpc
from prodisco_sandbox.results import (
    CacheEntry,
    ExecutionChunk,
    ExecutionInfo,
    ExecutionOutcome,
    ExecutionResult,
    ExecutionState,
    HealthStatus,
    LspLocation,
    LspRange,
    StartedExecution,
)
from prodisco_sandbox.testing import NEVER, FakeSandboxServer, FakeStatus
from prodisco_sandbox.testing._server import to_message
from tests.support.patience import PATIENCE

SOME = ExecutionChunk("e", "output", "some")
END = ExecutionChunk("e", "result", result=ExecutionOutcome(True, ExecutionState.COMPLETED))


@pytest.fixture
async def server() -> AsyncIterator[FakeSandboxServer]:
    async with FakeSandboxServer() as server:
        yield server


@pytest.fixture
async def client(server: FakeSandboxServer) -> AsyncIterator[SandboxClient]:
    async with SandboxClient(server.target) as client:
        yield client


async def test_without_a_script_everything_succeeds(server: FakeSandboxServer, client: SandboxClient) -> None:
    assert (await client.health_check()).healthy
    assert (await client.execute(code="x")).success
    assert [chunk.kind async for chunk in client.execute_stream(code="x")] == ["result"]
    started = await client.execute_async(code="x")
    assert (await client.wait_for_execution(started.execution_id)).state is ExecutionState.COMPLETED
    assert (await client.cancel_execution(started.execution_id)).success
    assert (await client.execute_test(tests="x")).success
    assert await client.list_cache() == ()
    assert await client.clear_cache() == 0
    assert (await client.lsp_hover("a", 1, 0)).contents == ""
    assert [call.outcome for call in server.calls] == ["answered"] * len(server.calls)


async def test_an_ordinary_stub_can_talk_to_it(server: FakeSandboxServer) -> None:
    server.script("Execute", ExecutionResult(True, "42\n"))
    async with grpc.aio.insecure_channel(server.target) as channel:
        stub: Any = pb_grpc.SandboxServiceStub(channel)
        assert (await stub.Execute(pb.ExecuteRequest(code="x"))).output == "42\n"
    (call,) = server.calls
    assert (call.rpc, call.request.code, call.timeout) == ("Execute", "x", None)


async def test_answers_come_in_turn_and_the_last_one_stays(
    server: FakeSandboxServer, client: SandboxClient
) -> None:
    server.script("ClearCache", 1, FakeStatus("INTERNAL", "once"), 3)
    assert await client.clear_cache() == 1
    with pytest.raises(SandboxError, match="INTERNAL: once"):
        await client.clear_cache()
    assert [await client.clear_cache(), await client.clear_cache()] == [3, 3]
    assert [call.outcome for call in server.calls] == ["answered", "failed", "answered", "answered"]
    server.script("ClearCache", 9)
    assert await client.clear_cache() == 9


async def test_an_answer_may_be_computed(server: FakeSandboxServer, client: SandboxClient) -> None:
    gate = asyncio.Event()

    async def later(request: pb.ExecuteRequest) -> ExecutionResult:
        await gate.wait()
        return ExecutionResult(True, request.code.upper())

    server.script("Execute", lambda request: ExecutionResult(True, request.code * 2), later)
    assert (await client.execute(code="ab")).output == "abab"
    task = asyncio.create_task(client.execute(code="ab"))
    call = await server.wait_for_call("Execute", count=2)
    assert not call.ended.is_set()
    gate.set()
    assert (await task).output == "AB"
    assert call.outcome == "answered"


async def test_a_stream_may_be_a_generator_and_is_closed_when_the_client_leaves(
    server: FakeSandboxServer, client: SandboxClient
) -> None:
    closed = asyncio.Event()

    async def endless(request: pb.ExecuteRequest) -> AsyncIterator[Any]:
        try:
            while True:
                yield SOME
                await asyncio.sleep(0)
        finally:
            closed.set()

    server.script("ExecuteStream", endless)
    async with client.execute_stream(code="x") as stream:
        assert await anext(stream) == SOME
    await asyncio.wait_for(closed.wait(), PATIENCE)
    call = await server.wait_for_call("ExecuteStream")
    assert call.outcome == "cancelled"


async def test_a_stream_waits_for_its_events(server: FakeSandboxServer, client: SandboxClient) -> None:
    gate = asyncio.Event()
    server.script(
        "ExecuteStream", [SOME, gate, pb.ExecuteChunk(output="raw"), END], SOME, FakeStatus("INTERNAL")
    )
    stream = client.execute_stream(code="x")
    assert await anext(stream) == SOME
    end = asyncio.ensure_future(anext(stream))
    assert await asyncio.wait([end], timeout=0.05) == (set(), {end})
    gate.set()
    assert (await end).text == "raw"
    assert await anext(stream) == END
    assert await anext(client.execute_stream(code="x")) == SOME
    with pytest.raises(SandboxError, match="INTERNAL"):
        await anext(client.execute_stream(code="x"))


async def test_waiting_for_a_call_that_does_not_come_ends(server: FakeSandboxServer) -> None:
    with pytest.raises(TimeoutError):
        await server.wait_for_call("Execute", timeout=0.01)


async def test_it_can_be_killed_and_started_again_on_the_same_port(
    server: FakeSandboxServer, client: SandboxClient
) -> None:
    target = server.target
    server.script("Execute", NEVER, ExecutionResult(True))
    task = asyncio.create_task(client.execute(code="x"))
    call = await server.wait_for_call("Execute")
    await server.kill()
    await server.kill()
    with pytest.raises(SandboxUnavailableError):
        await task
    await asyncio.wait_for(call.ended.wait(), PATIENCE)
    assert call.outcome == "cancelled"
    await server.start()
    assert server.target == target
    assert await client.wait_for_healthy(PATIENCE)
    assert (await client.execute(code="x")).success
    with pytest.raises(RuntimeError, match="is running"):
        await server.start()


async def test_stopping_lets_calls_end(server: FakeSandboxServer, client: SandboxClient) -> None:
    gate = asyncio.Event()

    async def slow(request: Any) -> ExecutionResult:
        await gate.wait()
        return ExecutionResult(True)

    server.script("Execute", slow)
    task = asyncio.create_task(client.execute(code="x"))
    await server.wait_for_call("Execute")
    stopping = asyncio.create_task(server.stop(PATIENCE))
    await asyncio.sleep(0.01)
    gate.set()
    assert (await task).success
    await stopping


async def test_killing_waits_for_what_answers(server: FakeSandboxServer, client: SandboxClient) -> None:
    async def slow_to_leave(request: Any) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.05)

    server.script("Execute", slow_to_leave)
    task = asyncio.create_task(client.execute(code="x"))
    call = await server.wait_for_call("Execute")
    await server.kill()
    assert call.outcome == "cancelled"
    with pytest.raises(SandboxUnavailableError):
        await task


async def test_two_servers_do_not_share_a_port(server: FakeSandboxServer) -> None:
    port = int(server.target.rpartition(":")[2])
    with pytest.raises(RuntimeError, match=r"[Ff]ailed to bind"):
        await FakeSandboxServer(port=port).start()


async def test_health_is_what_it_is_told(server: FakeSandboxServer, client: SandboxClient) -> None:
    server.set_serving(False)
    assert not (await client.health_check()).healthy
    server.script("Check", HealthStatus(True))
    assert (await client.health_check()).healthy
    server.script("Check", NEVER)
    assert await client.wait_for_healthy(0.05) is False

    async with FakeSandboxServer(health="own") as own, SandboxClient(own.target) as client:
        assert (await client.health_check()).healthy
        own.set_serving(False)
        assert not (await client.health_check()).healthy
        assert {call.rpc for call in own.calls} == {"HealthCheck"}


def test_a_wrong_script_is_named() -> None:
    server = FakeSandboxServer()
    with pytest.raises(ValueError, match=r"^rpc is 'Run': it must be one of Execute, ExecuteStream"):
        server.script("Run", 1)
    with pytest.raises(ValueError, match=r"^no answers given for Execute"):
        server.script("Execute")
    with pytest.raises(ValueError, match=r"^code is 'OK': it must be one of CANCELLED"):
        FakeStatus("OK")
    with pytest.raises(ValueError, match=r"^code is 'not_found'"):
        FakeStatus("not_found")
    with pytest.raises(ValueError, match=r"^health is 'both'"):
        FakeSandboxServer(health="both")  # type: ignore[arg-type]
    for tls in ({"certificate": b"x"}, {"private_key": b"x"}, {"client_ca": b"x"}):
        with pytest.raises(ValueError, match=r"^TLS needs both certificate and private_key"):
            FakeSandboxServer(**tls)  # type: ignore[arg-type]


async def test_an_answer_of_the_wrong_kind_fails_the_call(
    server: FakeSandboxServer, client: SandboxClient
) -> None:
    server.script("Execute", StartedExecution("e", ExecutionState.PENDING))
    with pytest.raises(SandboxError, match=r"UNKNOWN.*is no answer for a ExecuteResponse"):
        await client.execute(code="x")
    server.script("Execute", 7)
    with pytest.raises(SandboxError, match=r"UNKNOWN.*7 is no answer"):
        await client.execute(code="x")
    assert [call.outcome for call in server.calls] == ["failed", "failed"]


def test_a_result_becomes_the_message_it_was_read_from() -> None:
    span = LspRange(1, 2, 3, 4)
    messages = {method.name: method.output_type for method in _methods()}
    for rpc, value, message in (
        (
            "ListCache",
            (CacheEntry("a", "b", 3, "d"),),
            pb.ListCacheResponse(
                entries=[pb.CacheEntry(name="a", description="b", created_at_ms=3, content_hash="d")]
            ),
        ),
        (
            "LspHover",
            pb.LspHoverResponse(contents="x"),
            pb.LspHoverResponse(contents="x"),
        ),
        (
            "LspGoToDefinition",
            [LspLocation("u", span)],
            pb.LspLocationsResponse(
                locations=[
                    pb.LspLocation(
                        uri="u",
                        range=pb.LspRange(start_line=1, start_character=2, end_line=3, end_character=4),
                    )
                ]
            ),
        ),
        (
            "ListExecutions",
            [ExecutionInfo("e", ExecutionState.RUNNING)],
            pb.ListExecutionsResponse(executions=[pb.ExecutionInfo(execution_id="e", state=2)]),  # type: ignore[arg-type]
        ),
    ):
        assert to_message(value, messages[rpc]) == message


def _methods() -> Any:
    return pb.DESCRIPTOR.services_by_name["SandboxService"].methods


async def test_a_socket_path_may_be_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    async with FakeSandboxServer(socket_path="s.sock") as server, SandboxClient(server.target) as client:
        assert server.target == "unix:s.sock"
        assert await client.wait_for_healthy(PATIENCE)
