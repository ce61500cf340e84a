"""The tool with the stock Node server behind it, which is not like the reference server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio
import pytest
from google.protobuf.message import Message
from mcp import Client

from prodisco_sandbox import (
    SandboxCapacityError,
    SandboxClient,
    SandboxError,
    SandboxManager,
    SandboxTimeoutError,
    SandboxUnavailableError,
)
from prodisco_sandbox._grpc.failures import about_size
from prodisco_sandbox.config import SandboxManagerConfig
from prodisco_sandbox.mcp import _texts
from prodisco_sandbox.mcp._language import Language, language_of
from prodisco_sandbox.proto import sandbox_pb2 as pb
from prodisco_sandbox.results import ExecutionState
from prodisco_sandbox.testing import FakeCustomObjectsApi
from tests.support.mcp_server import call, make_server, refused, run, text_of

BLOCKED = "Execution blocked: output contains sensitive environment variable values"
EXTRA = b"\xa2\x06\x03new" + b"\xa8\x06\x2a" + b"\xb5\x06\x00\x00\x80\x3f" + b"\xb9\x06" + bytes(8)
"""Fields 100, 101, 102 and 103 of a protocol that is newer: a string, a varint, 32 and 64 bits."""


def newer(message: Message) -> bytes:
    """A message as a newer server sends it: with fields that this version does not know, nested ones too."""
    copy = type(message)()
    copy.CopyFrom(message)
    for field, value in message.ListFields():
        if field.message_type is not None:
            target = getattr(copy, field.name)
            if isinstance(value, Message):
                target.MergeFromString(newer(value))
            else:
                del target[:]
                target.extend(type(item).FromString(newer(item)) for item in value)
    return copy.SerializeToString() + EXTRA


class StockServer:
    """The server, whose code is a word that says what happens: see `ExecuteStream`.

    It has no standard health service, takes messages of at most 4 MiB, keeps no output of
    streams, and its answers have fields and states that this version does not know.
    """

    def __init__(self) -> None:
        self.target = ""
        self.executed: list[str] = []

    async def __aenter__(self) -> Self:
        self._server = grpc.aio.server(options=[("grpc.max_send_message_length", -1)])
        methods = pb.DESCRIPTOR.services_by_name["SandboxService"].methods
        handlers: dict[str, Any] = {}
        for method in methods:
            function = getattr(self, method.name, None)
            if function is None:
                continue  # UNIMPLEMENTED
            kind = "unary_stream" if method.server_streaming else "unary_unary"
            handlers[method.name] = getattr(grpc, f"{kind}_rpc_method_handler")(
                function,
                request_deserializer=getattr(pb, method.input_type.name).FromString,
                response_serializer=newer,
            )
        service = "prodisco.sandbox.v1.SandboxService"
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        self.target = f"127.0.0.1:{port}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._server.stop(None)

    async def HealthCheck(self, request: Any, context: Any) -> pb.HealthCheckResponse:
        return pb.HealthCheckResponse(healthy=True, kubernetes_context="unknown")

    async def ExecuteStream(self, request: Any, context: Any) -> Any:
        self.executed.append(request.code)
        if request.code == "blocked call":
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, BLOCKED)
        if request.code.startswith("print "):
            yield pb.ExecuteChunk(execution_id="e1", output=request.code.removeprefix("print "))
        yield pb.ExecuteChunk(execution_id="e1")  # of a kind that this version does not know
        blocked = request.code == "blocked"
        state = pb.EXECUTION_STATE_FAILED if blocked else pb.EXECUTION_STATE_COMPLETED
        result = pb.ExecuteResult(success=not blocked, state=state)
        if blocked:
            result.error = BLOCKED
        yield pb.ExecuteChunk(execution_id="e1", result=result)

    async def GetExecution(self, request: Any, context: Any) -> pb.GetExecutionResponse:
        result = pb.ExecuteResult(success=True, state=pb.EXECUTION_STATE_COMPLETED)
        return pb.GetExecutionResponse(execution_id=request.execution_id, state=result.state, result=result)

    async def ListExecutions(self, request: Any, context: Any) -> pb.ListExecutionsResponse:
        answer = pb.ListExecutionsResponse()
        unknown: Any = 9
        answer.executions.add(execution_id="e1", state=unknown, started_at_ms=1)
        return answer

    async def ExecuteTest(self, request: Any, context: Any) -> pb.ExecuteTestResponse:
        answer = pb.ExecuteTestResponse(success=True, summary=pb.TestSummary(total=1, passed=1))
        answer.tests.add(name="adds", passed=True)
        return answer


@asynccontextmanager
async def stock(language: str = "TypeScript") -> AsyncIterator[tuple[StockServer, SandboxManager, Client]]:
    async with StockServer() as server, FakeCustomObjectsApi(auto_ready=True) as api:
        config = SandboxManagerConfig(mode="multi", endpoint=lambda _: server.target)
        manager = SandboxManager(config, custom_objects_api=api)
        async with Client(make_server(manager, language=language, max_output=10)[0], mode="legacy") as client:
            yield server, manager, client
        await manager.shutdown()


async def test_the_rest_of_a_cut_stream_is_said_to_be_lost_when_status_does_not_have_it() -> None:
    async with stock() as (_, _, client):
        cut = await run(client, "print 0123456789abcdef")
        assert (cut["output"], cut["truncated"], cut["output_offset"]) == ("0123456789", True, 10)
        assert "mode 'status'" in cut["note"]
        assert "file" not in cut["note"]
        status = await run(client, mode="status", execution_id="e1", output_offset=10)
        assert status["output"] == ""
        assert "rest of the output is lost" in status["note"]
        assert "print less" in status["note"]
        assert "truncated" not in status
        assert "note" not in await run(client, mode="status", execution_id="e1"), "nothing was promised"


async def test_a_request_over_the_servers_limit_is_no_broken_and_no_busy_sandbox() -> None:
    async with stock() as (server, manager, client):
        await run(client, "1")
        error = await refused(client, "#" * 5_000_000)
        assert "too large for the sandbox, which takes messages of at most 4 MiB" in error
        assert "Nothing was run" in error
        assert (await run(client, "2"))["success"]
        assert server.executed == ["1", "2"]
        assert manager.stats().created == 1
        async with SandboxClient(server.target) as direct:
            suspects = []
            direct.on_suspect = lambda: suspects.append(1)
            with pytest.raises(
                SandboxError, match=r"5,000,005 bytes is over the size limit of 4 MiB"
            ) as caught:
                await direct.execute_test(tests="#" * 5_000_000)
            assert not isinstance(caught.value, SandboxCapacityError)
            assert caught.value.status == "RESOURCE_EXHAUSTED"
            assert suspects == []


async def test_what_the_server_blocks_is_told_in_its_words() -> None:
    async with stock() as (_, _, client):
        result = await run(client, "blocked")
        assert (result["success"], result["state"], result["error"]) == (False, "FAILED", BLOCKED)
        answer = await call(client, "blocked call")
        assert answer.is_error
        assert BLOCKED in text_of(answer)


async def test_fields_and_states_of_a_newer_server_are_ignored() -> None:
    async with stock() as (server, _, client):
        assert (await run(client, "print hello"))["output"] == "hello"
        assert (await run(client, mode="list"))["executions"][0]["state"] == "UNKNOWN_9"
        report = await run(client, mode="test", tests='test("adds", () => assert.is(2, 1 + 1))')
        assert (report["summary"]["passed"], report["tests"][0]["name"]) == (1, "adds")
        async with SandboxClient(server.target) as direct:
            assert (await direct.health_check()).healthy
            (info,) = await direct.list_executions()
            assert (info.state, info.state.is_final) == (9, True)
            status = await direct.get_execution("e1")
            assert (status.state, status.result is not None) == (ExecutionState.COMPLETED, True)


async def described(language: str) -> str:
    async with stock(language) as (_, _, client):
        (tool, *_) = (await client.list_tools()).tools
        assert tool.description is not None
        return tool.description


async def test_the_description_is_true_of_the_language() -> None:
    python, typescript = await described("Python 3.12"), await described("TypeScript")
    for word in (
        "Python 3.12 code",
        "new process",
        "Files in the working directory",
        "test_*",
        "plain assert",
    ):
        assert word in python
    for word in (
        "TypeScript code",
        "one VM",
        "no files",
        'test("name", fn)',
        "global `assert`",
        "console.log",
    ):
        assert word in typescript
    for word in ("new process", "working directory", "files are gone"):
        assert word not in typescript
    other = await described("Ruby")
    assert "depends on the server" in other
    for word in ("new process", "working directory", "VM", "test_*"):
        assert word not in other


def test_no_text_speaks_of_files_where_there_are_none() -> None:
    typescript, python = language_of("TypeScript"), language_of("Python")
    errors = [
        SandboxError("x", status="DEADLINE_EXCEEDED"),
        SandboxTimeoutError("x"),
        SandboxUnavailableError("x"),
    ]

    def texts(language: Language) -> list[str]:
        return [
            _texts.description(language, 600),
            _texts.description(language, 600, 7200),
            _texts.unknown_handle(language),
            _texts.replaced(language),
            _texts.restarted(language),
            _texts.maybe_replaced(language),
            _texts.replaced(language, evicted=True),
            _texts.restarted(language, evicted=True),
            _texts.closed(language),
            _texts.timed_out(1000, 120_000, language),
            _texts.rest(1, "e1", 1, 1, language),
            _texts.lost(language),
            *(_texts.failed_call(error, "execute", language) for error in errors),
        ]

    for text in texts(typescript)[2:]:
        assert "file" not in text.lower()
        assert text.endswith(".")
    assert sum("file" in text.lower() for text in texts(python)) >= 14


@pytest.mark.parametrize(
    ("details", "text"),
    [
        (
            "Received message larger than max (5000005 vs 4194304)",
            "5,000,005 bytes is over the size limit of 4 MiB",
        ),
        ("SERVER: Received message larger than max (9 vs. 8388608)", "limit of 8 MiB of this server's"),
        ("grpc: received message larger than max (5000005 vs. 4194304)", "limit of 4 MiB of this server's"),
        ("gRPC message exceeds maximum size 4194304: 5000005", "5,000,005 bytes is over"),
        ("SERVER: Received message larger than max (66000005 vs. 67108864)", "64 MiB of this server's"),
        (
            "CLIENT: Received message larger than max (70000007 vs. 67108864)",
            "over the size limit of 64 MiB: CLIENT",
        ),
        ("Sent message larger than max (67108870 vs. 67108864)", "over the size limit of 64 MiB: Sent"),
    ],
)
def test_whose_limit_a_message_was_over_is_read_from_grpcs_words(details: str, text: str) -> None:
    assert text in str(about_size(details))


def test_a_busy_server_is_not_about_size() -> None:
    assert about_size("too many executions wait") is None
