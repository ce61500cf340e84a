"""What OpenTelemetry's SDK gets of executions, and what servers get of it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import baggage, context
from opentelemetry.trace import SpanKind, StatusCode

from prodisco_sandbox import ExecutionResult, SandboxClient, SandboxError
from prodisco_sandbox.results import (
    ExecutionChunk,
    ExecutionOutcome,
    ExecutionState,
    ExecutionStatus,
    StartedExecution,
)
from prodisco_sandbox.testing import NEVER, FakeSandboxServer, FakeStatus
from tests.support.fake_servers import END, SOME
from tests.support.patience import PATIENCE, until
from tests.support.spans import Observed, ident, observed, parent

__all__ = ["observed"]

CODE = "print('alices-secret')"


class Listening(FakeSandboxServer):
    """Remembers the metadata of the calls that it got."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.metadata: list[dict[str, Any]] = []

    def _recorded(self, rpc: str, request: Any, context: Any) -> Any:
        self.metadata.append(dict(context.invocation_metadata()))
        return super()._recorded(rpc, request, context)


@pytest.fixture
async def server() -> AsyncIterator[Listening]:
    async with Listening() as server:
        yield server


@pytest.fixture
async def client(server: Listening) -> AsyncIterator[SandboxClient]:
    async with SandboxClient(server.target) as client:
        yield client


async def test_an_execution_is_a_span_whose_context_the_server_gets(
    observed: Observed, server: Listening, client: SandboxClient
) -> None:
    server.script("Execute", ExecutionResult(success=True, output="alices-other-secret"))
    with observed.tracer.start_as_current_span("request") as request:
        token = context.attach(baggage.set_baggage("user", "alice"))
        await client.execute(CODE)
        context.detach(token)
    span = observed.span("sandbox.execute")
    assert parent(span) == ident(request)
    assert span.kind is SpanKind.CLIENT
    assert dict(span.attributes or {}) == {"rpc.method": "Execute", "sandbox.outcome": "completed"}
    [metadata] = server.metadata
    assert metadata["traceparent"].split("-")[1:3] == [
        f"{span.context.trace_id:032x}",
        f"{span.context.span_id:016x}",
    ]
    assert "baggage" not in metadata, "code in the sandbox could read it"
    assert observed.values("executions") == {"completed": 1}
    assert "secret" not in observed.texts()


async def test_every_call_goes_with_the_callers_context(
    observed: Observed, server: Listening, client: SandboxClient
) -> None:
    with observed.tracer.start_as_current_span("request") as request:
        await client.list_cache()
    [metadata] = server.metadata
    assert metadata["traceparent"].split("-")[2] == f"{ident(request):016x}"
    await client.list_cache()
    assert "traceparent" not in server.metadata[-1]
    assert [span.name for span in observed.spans()] == ["request"]


async def test_scripts_that_fail_and_calls_that_fail_are_told_apart(
    observed: Observed, server: Listening, client: SandboxClient
) -> None:
    server.script("Execute", ExecutionResult(success=False, error="alices-secret"))
    await client.execute(CODE)
    server.script("Execute", FakeStatus("INTERNAL", "alices-secret"))
    with pytest.raises(SandboxError):
        await client.execute(CODE)
    failed, broken = observed.spans("sandbox.execute")
    assert failed.status.status_code is StatusCode.UNSET
    assert broken.status.status_code is StatusCode.ERROR
    assert (broken.attributes or {})["error.type"] == "SandboxError"
    assert observed.values("executions") == {"failed": 1, "error": 1}
    assert "alices-secret" not in observed.texts()


async def test_an_execution_that_cannot_be_sent_is_an_error(
    observed: Observed, client: SandboxClient
) -> None:
    await client.close()
    with pytest.raises(SandboxError):
        await client.execute(CODE)
    assert observed.span("sandbox.execute").status.status_code is StatusCode.ERROR
    assert observed.values("executions") == {"error": 1}


async def test_a_cancelled_call_is_no_error(
    observed: Observed, server: Listening, client: SandboxClient
) -> None:
    server.script("Execute", NEVER)
    call = asyncio.create_task(client.execute(CODE))
    await server.wait_for_call("Execute")
    call.cancel()
    await asyncio.wait([call])
    assert observed.span("sandbox.execute").status.status_code is StatusCode.UNSET
    assert observed.values("executions") == {"cancelled": 1}


@pytest.mark.parametrize("state", [s for s in ExecutionState if s.is_final])
async def test_the_outcome_of_a_stream_is_in_its_last_chunk(
    state: ExecutionState, observed: Observed, server: Listening, client: SandboxClient
) -> None:
    end = ExecutionChunk("e-1", "result", result=ExecutionOutcome(False, state))
    server.script("ExecuteStream", [SOME, end])
    async with client.execute_stream(CODE) as stream:
        async for _ in stream:
            assert observed.spans() == []
    span = observed.span("sandbox.execute")
    assert (span.attributes or {})["sandbox.outcome"] == state.name.lower()
    assert observed.values("executions") == {state.name.lower(): 1}


async def test_a_state_that_a_server_invents_adds_no_label(
    observed: Observed, server: Listening, client: SandboxClient
) -> None:
    end = ExecutionChunk("e-1", "result", result=ExecutionOutcome(False, ExecutionState(77)))
    server.script("ExecuteStream", [end])
    async for _ in client.execute_stream(CODE):
        pass
    assert observed.values("executions") == {"unknown": 1}


async def test_a_stream_that_ends_without_a_result_is_an_error(
    observed: Observed, server: Listening, client: SandboxClient
) -> None:
    server.script("ExecuteStream", [SOME])
    with pytest.raises(SandboxError, match="ended without a result"):
        async for _ in client.execute_stream(CODE):
            pass
    assert observed.values("executions") == {"error": 1}


async def test_a_stream_that_is_left_is_cancelled(
    observed: Observed, server: Listening, client: SandboxClient
) -> None:
    server.script("ExecuteStream", [SOME, SOME, END])
    async with client.execute_stream(CODE) as stream:
        await anext(stream)
    assert observed.values("executions") == {"cancelled": 1}
    async for _ in client.execute_stream(CODE):
        break
    await until(lambda: len(observed.spans()) == 2)
    assert observed.values("executions") == {"cancelled": 2}


async def test_an_asynchronous_execution_counts_once_its_end_is_seen(
    observed: Observed, server: Listening, client: SandboxClient
) -> None:
    server.script("ExecuteAsync", StartedExecution("e-1", ExecutionState.RUNNING))
    await client.execute_async(CODE)
    assert observed.span("sandbox.execute").attributes == {"rpc.method": "ExecuteAsync"}
    assert observed.values("executions") == {}
    server.script("GetExecution", ExecutionStatus("e-1", ExecutionState.TIMEOUT))
    await client.get_execution("e-1")
    await client.get_execution("e-1")
    assert observed.values("executions") == {"timeout": 1}


async def test_every_call_on_files_is_a_span(observed: Observed, tmp_path: Path) -> None:
    async with Listening(workspace=tmp_path) as server, SandboxClient(server.target) as client:
        with observed.tracer.start_as_current_span("request") as request:
            await client.files.make_directory("alices-secret")
            await client.files.write("alices-secret/a", b"alices-secret")
            assert await client.files.read("alices-secret/a") == b"alices-secret"
            await client.files.list()
            await client.files.stat("alices-secret")
            await client.files.remove("alices-secret", recursive=True)
    spans = observed.spans("sandbox.files")
    rpcs = ["MakeDirectory", "Write", "Read", "List", "Stat", "Remove"]
    assert [dict(span.attributes or {}) for span in spans] == [{"rpc.method": rpc} for rpc in rpcs]
    sent = [metadata["traceparent"].split("-")[2] for metadata in server.metadata]
    assert sent == [f"{span.context.span_id:016x}" for span in spans]
    assert {parent(span) for span in spans} == {ident(request)}
    assert {span.kind for span in spans} == {SpanKind.CLIENT}
    assert "alices-secret" not in observed.texts()


async def test_calls_on_files_that_fail_are_marked(observed: Observed, tmp_path: Path) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"alices-secret"
        raise KeyError("alices-secret")

    async with Listening(workspace=tmp_path) as server, SandboxClient(server.target) as client:
        for call in (client.files.stat("alices-secret"), client.files.read("alices-secret")):
            with pytest.raises(SandboxError):
                await call
        with pytest.raises(KeyError):
            await client.files.write("a", broken())
        server.script("Read", NEVER)
        closed = asyncio.create_task(client.files.read("a"))
        await until(lambda: [call.rpc for call in server.calls].count("Read") == 2)
        await client.close()
        with pytest.raises(SandboxError, match="closed"):
            await closed
    found = [(span.status.status_code, (span.attributes or {})["error.type"]) for span in observed.spans()]
    names = ["SandboxError", "SandboxError", "KeyError", "SandboxUnavailableError"]
    assert found == [(StatusCode.ERROR, name) for name in names]
    assert "alices-secret" not in observed.texts()


async def test_the_span_of_a_read_ends_with_it(observed: Observed, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(3 << 20))
    async with Listening(workspace=tmp_path) as server, SandboxClient(server.target) as client:
        async with client.files.open_read("a") as stream:
            await anext(stream)
            assert observed.spans() == []
        assert observed.span("sandbox.files").status.status_code is StatusCode.UNSET
        async for _ in client.files.open_read("a"):
            break
        await until(lambda: len(observed.spans()) == 2)
        server.script("Read", NEVER)
        read = asyncio.create_task(client.files.read("a"))
        await until(lambda: [call.rpc for call in server.calls].count("Read") == 3)
        read.cancel()
        await asyncio.wait([read])
    left, dropped, cancelled = observed.spans()
    assert "error.type" not in {**(left.attributes or {}), **(dropped.attributes or {})}
    assert cancelled.status.status_code is StatusCode.UNSET
    assert (cancelled.attributes or {})["error.type"] == "CancelledError"


def test_the_library_does_not_import_opentelemetry() -> None:
    code = """
import asyncio, sys
from prodisco_sandbox import SandboxClient, SandboxManager, SandboxManagerConfig
from prodisco_sandbox.testing import FakeCustomObjectsApi, FakeSandboxServer

async def main():
    async with FakeSandboxServer() as server, FakeCustomObjectsApi(auto_ready=True) as api:
        config = SandboxManagerConfig(mode="multi", endpoint=lambda _: server.target)
        async with SandboxManager(config, custom_objects_api=api) as manager:
            assert (await (await manager.get_client("s")).execute("1")).success

asyncio.run(main())
print([name for name in sys.modules if name.split(".")[0] in ("opentelemetry", "prometheus_client")])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True, timeout=PATIENCE
    )
    assert done.stdout == "[]\n"
