"""SandboxClient: every method over every RPC, and what it refuses to send."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import pickle
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from google.protobuf import text_format

from prodisco_sandbox.client import SandboxClient
from prodisco_sandbox.errors import (
    SandboxCapacityError,
    SandboxError,
    SandboxPermissionError,
    SandboxTimeoutError,
    SandboxUnavailableError,
)
from prodisco_sandbox.proto import sandbox_pb2 as pb
from prodisco_sandbox.results import (
    CacheEntry,
    CancelResult,
    ExecutionChunk,
    ExecutionInfo,
    ExecutionOutcome,
    ExecutionResult,
    ExecutionState,
    ExecutionStatus,
    LspDocumentSymbol,
    LspHover,
    LspLocation,
    LspRange,
    LspSymbolInfo,
    LspSymbolKind,
    LspWorkspaceSymbols,
    SandboxRef,
    StartedExecution,
    TestReport,
    TestResult,
    TestSummary,
)
from prodisco_sandbox.testing import FakeSandboxServer, FakeStatus
from tests.support.patience import PATIENCE

ENTRY = CacheEntry("greet.ts", "says hello", 1_700_000_000_123, "sha256:abc")
OUTCOME = ExecutionOutcome(False, ExecutionState.TIMEOUT, "too slow", 1001, ENTRY)
SPAN = LspRange(1, 2, 3, 4)
PLACE = LspLocation("file:///a.ts", SPAN)
SYMBOL = LspDocumentSymbol("Outer", LspSymbolKind.CLASS, "class Outer", SPAN, LspRange(5, 6, 7, 8))
NESTED = dataclasses.replace(SYMBOL, name="Outermost", children=(SYMBOL, SYMBOL))
INFO = ExecutionInfo("e-1", ExecutionState.FAILED, 11, 12, "print(", True, "greet.ts")
TESTS = (TestResult("adds", True, None, 5), TestResult("divides", False, "by zero", 6))

CALLS: list[tuple[str, Callable[[SandboxClient], Awaitable[Any]], str, Any]] = [
    (
        "Execute",
        lambda c: c.execute("print(1)", timeout=1.5),
        'code: "print(1)" timeout_ms: 1500',
        ExecutionResult(True, "1\n", None, 17, ENTRY),
    ),
    ("Execute", lambda c: c.execute(code=""), 'code: ""', ExecutionResult(False, "", "boom", 1)),
    ("Execute", lambda c: c.execute(cached="greet"), 'cached: "greet"', ExecutionResult(True)),
    (
        "ExecuteAsync",
        lambda c: c.execute_async(cached="greet.ts", timeout=2),
        'cached: "greet.ts" timeout_ms: 2000',
        StartedExecution("e-1", ExecutionState.PENDING),
    ),
    (
        "GetExecution",
        lambda c: c.get_execution("e-1", wait=True, output_offset=2**40),
        f'execution_id: "e-1" wait: true output_offset: {2**40}',
        ExecutionStatus("e-1", ExecutionState.TIMEOUT, "out", "err", 2**41, 2**42, OUTCOME),
    ),
    (
        "GetExecution",
        lambda c: c.get_execution("e-1"),
        'execution_id: "e-1"',
        ExecutionStatus("e-1", ExecutionState.RUNNING),
    ),
    (
        "GetExecution",
        lambda c: c.wait_for_execution("e-1"),
        'execution_id: "e-1" wait: true',
        ExecutionStatus("e-1", ExecutionState.TIMEOUT, result=OUTCOME),
    ),
    (
        "CancelExecution",
        lambda c: c.cancel_execution("e-1"),
        'execution_id: "e-1"',
        CancelResult(True, ExecutionState.CANCELLED, "was running"),
    ),
    (
        "CancelExecution",
        lambda c: c.cancel_execution("e-2"),
        'execution_id: "e-2"',
        CancelResult(False, ExecutionState.COMPLETED),
    ),
    (
        "ListExecutions",
        lambda c: c.list_executions(
            states=[ExecutionState.RUNNING, ExecutionState.FAILED], limit=5, include_completed_within=0.25
        ),
        "states: [EXECUTION_STATE_RUNNING, EXECUTION_STATE_FAILED] limit: 5 include_completed_within_ms: 250",
        (INFO, ExecutionInfo("e-2", ExecutionState.RUNNING, 13)),
    ),
    ("ListExecutions", lambda c: c.list_executions(), "", ()),
    (
        "ExecuteTest",
        lambda c: c.execute_test(code="c", tests="t", timeout=0.25),
        'code: "c" tests: "t" timeout_ms: 250',
        TestReport(False, TestSummary(4, 1, 2, 3), TESTS, "out", 99, "broken"),
    ),
    ("ExecuteTest", lambda c: c.execute_test(tests="t"), 'tests: "t"', TestReport(True)),
    ("ListCache", lambda c: c.list_cache(filter="gr"), 'filter: "gr"', (ENTRY, ENTRY)),
    ("ListCache", lambda c: c.list_cache(), "", ()),
    ("ClearCache", lambda c: c.clear_cache(), "", 2**33),
    (
        "LspWorkspaceSymbol",
        lambda c: c.lsp_workspace_symbol("Pod", limit=3),
        'query: "Pod" limit: 3',
        LspWorkspaceSymbols(
            (LspSymbolInfo("V1Pod", LspSymbolKind.TYPE_PARAMETER, "k8s", "models", PLACE),), 41
        ),
    ),
    (
        "LspWorkspaceSymbol",
        lambda c: c.lsp_workspace_symbol(""),
        "",
        LspWorkspaceSymbols((), 0),
    ),
    (
        "LspHover",
        lambda c: c.lsp_hover(file_path="a.ts", line=1, character=0),
        'file_path: "a.ts" line: 1',
        LspHover("**docs**", SPAN),
    ),
    (
        "LspHover",
        lambda c: c.lsp_hover("a.ts", 2, 3),
        'file_path: "a.ts" line: 2 character: 3',
        LspHover(""),
    ),
    (
        "LspGoToDefinition",
        lambda c: c.lsp_go_to_definition("a.ts", 2, 3),
        'file_path: "a.ts" line: 2 character: 3',
        (PLACE, PLACE),
    ),
    (
        "LspFindReferences",
        lambda c: c.lsp_find_references("a.ts", 2, 3, include_declaration=True),
        'file_path: "a.ts" line: 2 character: 3 include_declaration: true',
        (PLACE,),
    ),
    (
        "LspDocumentSymbol",
        lambda c: c.lsp_document_symbol("a.ts"),
        'file_path: "a.ts"',
        (NESTED, SYMBOL),
    ),
]

WRONG: list[tuple[Callable[[Any], Any], str]] = [
    (lambda c: c.execute(), "neither of code and cached"),
    (lambda c: c.execute(code="", cached="a"), "both of code and cached"),
    (lambda c: c.execute(b"x"), r"code is b'x': it must be a string"),
    (lambda c: c.execute(code="\ud800"), "code cannot be encoded as UTF-8"),
    (lambda c: c.execute(cached=""), "cached is '': it must be a non-empty string"),
    (lambda c: c.execute(code="x", timeout=0), "timeout is 0: it must be a finite number of seconds above 0"),
    (lambda c: c.execute(code="x", timeout=-1.5), r"timeout is -1\.5"),
    (lambda c: c.execute(code="x", timeout=float("nan")), "timeout is nan"),
    (lambda c: c.execute(code="x", timeout=float("inf")), "timeout is inf"),
    (lambda c: c.execute(code="x", timeout=3e6), r"timeout is 3000000\.0"),
    (lambda c: c.execute(code="x", timeout="5"), "timeout is '5'"),
    (lambda c: c.execute(code="x", timeout=True), "timeout is True"),
    (lambda c: c.execute(code="x", timeout=10**400), "timeout is 1000"),
    (lambda c: c.execute_async(code="x", cached="y"), "both of code and cached"),
    (lambda c: c.get_execution(""), "execution_id is '': it must be a non-empty string"),
    (lambda c: c.get_execution("e", output_offset=-1), "output_offset is -1: it must be an integer from 0"),
    (lambda c: c.get_execution("e", timeout=0), "timeout is 0"),
    (lambda c: c.wait_for_execution("e", timeout=-1), "timeout is -1"),
    (lambda c: c.wait_for_execution(None), "execution_id is None"),
    (lambda c: c.cancel_execution(7), "execution_id is 7"),
    (
        lambda c: c.list_executions(limit=2**31),
        "limit is 2147483648: it must be an integer from 0 to 21474836",
    ),
    (lambda c: c.list_executions(states=["RUNNING"]), "states is 'RUNNING'"),
    (lambda c: c.list_executions(states=5), "states is 5: it must be an iterable of ExecutionState"),
    (lambda c: c.list_executions(include_completed_within=-1), "include_completed_within is -1"),
    (lambda c: c.execute_test(tests=None), "tests is None"),
    (lambda c: c.execute_test(tests="t", code=1), "code is 1"),
    (lambda c: c.execute_test(tests="t", timeout=0), "timeout is 0"),
    (lambda c: c.list_cache(filter=1), "filter is 1"),
    (lambda c: c.lsp_workspace_symbol(None), "query is None"),
    (lambda c: c.lsp_workspace_symbol("q", limit=0), "limit is 0: it must be an integer from 1"),
    (lambda c: c.lsp_hover("", 1, 0), "file_path is ''"),
    (lambda c: c.lsp_hover("a.ts", 0, 0), "line is 0: it must be an integer from 1"),
    (lambda c: c.lsp_go_to_definition("a.ts", 1, -1), "character is -1"),
    (lambda c: c.lsp_find_references("a.ts", 1.0, 0), r"line is 1\.0"),
    (lambda c: c.lsp_document_symbol(""), "file_path is ''"),
    (lambda c: c.health_check(timeout=0), "timeout is 0"),
    (lambda c: c.wait_for_healthy("5"), "timeout is '5': it must be a finite number of seconds"),
    (lambda c: c.wait_for_healthy(10**400), "timeout is 1000"),
]


@pytest.fixture
async def client(server: FakeSandboxServer) -> AsyncIterator[SandboxClient]:
    async with SandboxClient(server.target, deadline_margin=PATIENCE) as client:
        yield client


async def test_every_method_sends_its_request_and_reads_its_answer(
    server: FakeSandboxServer, client: SandboxClient
) -> None:
    for rpc, call, request, answer in CALLS:
        server.calls.clear()
        server.script(rpc, answer)
        assert await call(client) == answer
        (seen,) = server.calls
        assert seen.rpc == rpc
        assert seen.request == text_format.Parse(request, type(seen.request)()), rpc
    assert {rpc for rpc, *_ in CALLS} == {
        method.name
        for method in pb.DESCRIPTOR.services_by_name["SandboxService"].methods
        if method.name not in ("ExecuteStream", "HealthCheck")
    }


async def test_a_stream_gives_every_kind_of_chunk(server: FakeSandboxServer, client: SandboxClient) -> None:
    chunks = [
        ExecutionChunk("e-1", "output", "héllo\n", None, 1),
        ExecutionChunk("e-1", "error_output", "oops\n", None, 2),
        ExecutionChunk("e-1", "output", "", None, 3),
        ExecutionChunk("e-1", "result", "", OUTCOME, 4),
    ]
    server.script("ExecuteStream", chunks)
    async with client.execute_stream(code="x", timeout=3) as stream:
        assert [chunk async for chunk in stream] == chunks
        assert [chunk async for chunk in stream] == []
    assert server.calls[0].request == pb.ExecuteRequest(code="x", timeout_ms=3000)
    assert [chunk async for chunk in client.execute_stream(cached="x")] == chunks


@pytest.mark.parametrize("number", range(len(WRONG)))
async def test_a_wrong_argument_is_named_and_nothing_is_sent(number: int) -> None:
    call, message = WRONG[number]
    client = SandboxClient("localhost:1")
    with pytest.raises(ValueError, match=f"^{message}"):
        await call(client)
    assert client.in_flight == 0
    assert client.last_used == 0.0


async def test_only_code_may_be_given_without_its_name(
    server: FakeSandboxServer, client: SandboxClient
) -> None:
    untyped: Any = client
    for method in (untyped.execute, untyped.execute_async, untyped.execute_stream):
        with pytest.raises(TypeError):
            method("x", "a cached script")
    await client.execute("a")
    await client.execute_async("b")
    async with client.execute_stream("c"):
        await server.wait_for_call("ExecuteStream")
    assert [call.request.code for call in server.calls] == ["a", "b", "c"]


def test_a_stream_checks_its_arguments_at_once() -> None:
    client = SandboxClient("localhost:1")
    with pytest.raises(ValueError, match=r"^neither of code and cached"):
        client.execute_stream()
    with pytest.raises(ValueError, match=r"^timeout is 0"):
        client.execute_stream(code="x", timeout=0)


def test_a_client_checks_its_settings_when_it_is_made() -> None:
    with pytest.raises(ValueError, match=r"^call_timeout is 0"):
        SandboxClient("localhost:1", call_timeout=0)
    with pytest.raises(ValueError, match=r"^deadline_margin is -1"):
        SandboxClient("localhost:1", deadline_margin=-1)
    with pytest.raises(ValueError, match=r"^tls is True: it must be a TlsConfig or None"):
        SandboxClient("localhost:1", tls=True)  # type: ignore[arg-type]


async def test_every_call_carries_a_deadline(server: FakeSandboxServer) -> None:
    async def check(expected: float, call: Awaitable[object]) -> None:
        server.calls.clear()
        begun = loop.time()
        await call
        underway = loop.time() - begun
        assert server.calls[0].timeout is not None
        # gRPC rounds what it sends, and some of it is over when the call arrives.
        assert expected - underway - 1.1 < server.calls[0].timeout < expected + 1.1

    loop = asyncio.get_running_loop()
    async with SandboxClient(server.target, call_timeout=70, deadline_margin=20) as client:
        await client.health_check()  # Now it is known that the server does not say when code begins.
        await check(50, client.execute(code="x"))
        await check(80, client.execute(code="x", timeout=60))
        # The server may raise what is less than a second to one.
        await check(21, client.execute(code="x", timeout=0.1))
        stream = client.execute_stream(code="x", timeout=8)
        await check(28, anext(stream))
        await stream.aclose()
        await check(29, client.execute_test(tests="x", timeout=9))
        await check(70, client.execute_async(code="x", timeout=60))
        await check(70, client.get_execution("e"))
        await check(140, client.get_execution("e", wait=True))
        await check(30, client.get_execution("e", timeout=30))
        await check(140, client.wait_for_execution("e"))
        await check(40, client.wait_for_execution("e", timeout=40))
        for call in (client.list_cache(), client.lsp_document_symbol("a"), client.cancel_execution("e")):
            await check(70, call)
        await check(45, client.health_check(timeout=45))


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("UNAVAILABLE", SandboxUnavailableError),
        ("DEADLINE_EXCEEDED", SandboxTimeoutError),
        ("UNAUTHENTICATED", SandboxPermissionError),
        ("PERMISSION_DENIED", SandboxPermissionError),
        ("RESOURCE_EXHAUSTED", SandboxCapacityError),
        ("NOT_FOUND", SandboxError),
        ("INVALID_ARGUMENT", SandboxError),
        ("UNIMPLEMENTED", SandboxError),
        ("CANCELLED", SandboxError),
        ("INTERNAL", SandboxError),
    ],
)
async def test_a_status_becomes_an_error_of_the_tree(
    server: FakeSandboxServer, client: SandboxClient, code: str, kind: type[SandboxError]
) -> None:
    server.script("Execute", FakeStatus(code, "because"))
    with pytest.raises(SandboxError) as caught:
        await client.execute(code="x")
    assert type(caught.value) is kind
    assert caught.value.status == code
    assert str(caught.value) == f"Execute on {server.target}: {code}: because"
    assert type(caught.value.__cause__).__name__ == "AioRpcError"

    server.script("ExecuteStream", [ExecutionChunk("e", "output", "x"), FakeStatus(code)])
    stream = client.execute_stream(code="x")
    assert (await anext(stream)).text == "x"
    with pytest.raises(SandboxError, match=f"{code}: no details") as caught:
        await anext(stream)
    assert (type(caught.value), caught.value.status) == (kind, code)
    assert [chunk async for chunk in stream] == []
    assert client.in_flight == 0


async def test_an_answer_that_is_no_message_is_an_error(
    server: FakeSandboxServer, client: SandboxClient
) -> None:
    server.script("Execute", b"\xff\xff")
    server.script("ExecuteStream", [b"\xff\xff"])
    with pytest.raises(SandboxError, match=r"Execute on .*: the answer cannot be decoded"):
        await client.execute(code="x")
    with pytest.raises(SandboxError, match=r"ExecuteStream on .*: the answer cannot be decoded"):
        await anext(client.execute_stream(code="x"))


async def test_what_a_newer_server_says_is_kept_or_passed_over(
    server: FakeSandboxServer, client: SandboxClient
) -> None:
    server.script("CancelExecution", pb.CancelExecutionResponse(state=9))  # type: ignore[arg-type]
    state = (await client.cancel_execution("e")).state
    assert (state, state.name, state.is_final) == (9, "UNKNOWN_9", True)
    assert pickle.loads(pickle.dumps(state)) == 9
    with pytest.raises(ValueError, match="'RUNNING' is not a valid ExecutionState"):
        ExecutionState("RUNNING")  # type: ignore[arg-type]

    end = ExecutionChunk("e", "result", result=ExecutionOutcome(True))
    server.script("ExecuteStream", [pb.ExecuteChunk(execution_id="e", timestamp_ms=1), end])
    assert [chunk.kind async for chunk in client.execute_stream(code="x")] == ["result"]


@pytest.mark.unmeasured
async def test_messages_up_to_64_mib_go_both_ways(server: FakeSandboxServer, client: SandboxClient) -> None:
    server.script("Execute", lambda request: ExecutionResult(True, output=request.code))
    code = "x" * (60 << 20)
    assert (await client.execute(code=code, timeout=PATIENCE)).output == code

    with pytest.raises(SandboxError, match="over the size limit of 64 MiB") as caught:
        await client.execute(code="x" * (64 << 20), timeout=PATIENCE)
    assert (type(caught.value), caught.value.status) == (SandboxError, "RESOURCE_EXHAUSTED")
    with pytest.raises(SandboxError, match="code is over the size limit of 64 MiB of a message"):
        await client.execute(code="x" * (64 << 20) + "x")
    assert sum(call.rpc == "Execute" for call in server.calls) == 1

    server.script("Execute", pb.ExecuteResponse(error="x" * (65 << 20)).SerializeToString())
    with pytest.raises(SandboxError, match="over the size limit of 64 MiB"):
        await client.execute(code="x", timeout=PATIENCE)


def test_results_are_frozen_and_small() -> None:
    for value in (ENTRY, OUTCOME, SPAN, PLACE, SYMBOL, INFO, *TESTS, SandboxRef("sandbox-1", "uid", 0)):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, dataclasses.fields(value)[0].name, None)
        assert not hasattr(value, "__dict__")
        assert pickle.loads(pickle.dumps(value)) == value


async def test_it_says_what_it_is_and_whether_it_is_closed() -> None:
    client = SandboxClient("unix:/run/s.sock")
    assert client.target == "unix:/run/s.sock"
    assert client.sandbox is None
    assert repr(client) == "<SandboxClient unix:/run/s.sock open>"
    async with contextlib.aclosing(client):
        pass
    assert repr(client) == "<SandboxClient unix:/run/s.sock closed>"
