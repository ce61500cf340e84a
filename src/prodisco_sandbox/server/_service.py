"""The RPCs."""

# ruff: noqa: N802 (the protocol names its methods)

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, NoReturn

import grpc

from prodisco_sandbox.proto import sandbox_pb2 as pb

from ._cache import CacheEntry, ScriptCache
from ._executions import (
    PREVIEW,
    DrainingError,
    Execution,
    Executions,
    QueueFullError,
    State,
    now_ms,
    shortened,
)
from ._options import DEFAULT_TIMEOUT_MS, MAX_TIMEOUT_MS, MIN_TIMEOUT_MS, Options
from ._unimplemented import NoLanguageServer

Context = grpc.aio.ServicerContext[Any, Any]

_OUTCOMES = ("passed", "failed", "skipped")
_GONE = "the client went away"
_NAMED = 100
"""Characters of a wrong id or name that an error repeats: clients refuse a long status message."""
_UNNAMED = 100
"""Lines of a report, other than tests, that are read: the runner writes one, code may have written more."""


class SandboxService(NoLanguageServer):
    """Prodisco's SandboxService over `Executions`."""

    def __init__(self, options: Options, executions: Executions, cache: ScriptCache) -> None:
        self._options = options
        self._executions = executions
        self._cache = cache
        self.healthy = True

    async def Execute(self, request: pb.ExecuteRequest, context: Context) -> pb.ExecuteResponse:
        source, problem = await self._source(request)
        if problem:
            return pb.ExecuteResponse(success=False, error=problem)
        execution = await self._submit(request, source, context, merge=True)
        try:
            await _begun(execution, context)
            await execution.finished()
        finally:
            # If it has not ended, its caller is gone, and nobody else knows its id.
            self._executions.cancel(execution, _GONE)
        result = _result(execution)
        return pb.ExecuteResponse(
            success=result.success,
            output=execution.output.since(),
            error=execution.error,
            execution_time_ms=result.execution_time_ms,
            cached=_entry(execution.cached_entry),
        )

    async def ExecuteStream(
        self, request: pb.ExecuteRequest, context: Context
    ) -> AsyncIterator[pb.ExecuteChunk]:
        source, problem = await self._source(request)
        if problem:
            result = pb.ExecuteResult(success=False, error=problem, state=pb.EXECUTION_STATE_FAILED)
            yield pb.ExecuteChunk(result=result, timestamp_ms=now_ms())
            return
        execution = await self._submit(request, source, context)
        try:
            await _begun(execution, context)
            async for text, errors in execution.follow():
                if text:
                    yield _chunk(execution, output=text)
                if errors:
                    yield _chunk(execution, error_output=errors)
            yield _chunk(execution, result=_result(execution))
        finally:
            self._executions.cancel(execution, _GONE)

    async def ExecuteAsync(self, request: pb.ExecuteRequest, context: Context) -> pb.ExecuteAsyncResponse:
        source, problem = await self._source(request)
        if problem:
            await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, problem)
        execution = await self._submit(request, source, context)
        return pb.ExecuteAsyncResponse(execution_id=execution.id, state=_state(execution))

    async def GetExecution(
        self, request: pb.GetExecutionRequest, context: Context
    ) -> pb.GetExecutionResponse:
        execution = await self._find(request.execution_id, context)
        offset = request.output_offset
        if offset < 0:
            problem = f"output_offset is {offset}: it must not be negative"
            await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, problem)
        if request.wait:
            await _begun(execution, context)
            await execution.finished()
        return pb.GetExecutionResponse(
            execution_id=execution.id,
            state=_state(execution),
            output=execution.output.since(offset),
            error_output=execution.error_output.since(offset),
            output_length=len(execution.output),
            error_output_length=len(execution.error_output),
            result=_result(execution) if execution.state.final else None,
        )

    async def CancelExecution(
        self, request: pb.CancelExecutionRequest, context: Context
    ) -> pb.CancelExecutionResponse:
        execution = await self._find(request.execution_id, context)
        self._executions.cancel(execution)
        # The answer comes when the code and all its processes are gone.
        await execution.finished()
        success = execution.state == State.CANCELLED
        message = None if success else f"it had already ended: {execution.state.name}"
        return pb.CancelExecutionResponse(success=success, state=_state(execution), message=message)

    async def ListExecutions(
        self, request: pb.ListExecutionsRequest, context: Context
    ) -> pb.ListExecutionsResponse:
        states, within = {int(state) for state in request.states}, request.include_completed_within_ms
        earliest = now_ms() - within if within > 0 else 0
        found = [
            execution
            for execution in self._executions.newest_first()
            if (not states or execution.state in states)
            and (execution.finished_at_ms is None or execution.finished_at_ms >= earliest)
        ]
        limit = request.limit if request.limit > 0 else len(found)
        return pb.ListExecutionsResponse(executions=[_info(execution) for execution in found[:limit]])

    async def HealthCheck(self, request: pb.HealthCheckRequest, context: Context) -> pb.HealthCheckResponse:
        return pb.HealthCheckResponse(healthy=self.healthy)

    async def ListCache(self, request: pb.ListCacheRequest, context: Context) -> pb.ListCacheResponse:
        entries = await asyncio.to_thread(self._cache.entries, request.filter)
        return pb.ListCacheResponse(entries=[e for e in map(_entry, entries) if e])

    async def ClearCache(self, request: pb.ClearCacheRequest, context: Context) -> pb.ClearCacheResponse:
        return pb.ClearCacheResponse(deleted_count=await asyncio.to_thread(self._cache.clear))

    async def ExecuteTest(self, request: pb.ExecuteTestRequest, context: Context) -> pb.ExecuteTestResponse:
        execution = await self._submit(request, request.code, context, merge=True, tests=request.tests)
        try:
            await _begun(execution, context)
            await execution.finished()
        finally:
            self._executions.cancel(execution, _GONE)
        return _test_response(execution)

    async def _find(self, execution_id: str, context: Context) -> Execution:
        execution = self._executions.get(execution_id)
        if execution is None:
            await _abort(
                context,
                grpc.StatusCode.NOT_FOUND,
                f"no execution has the id {execution_id[:_NAMED]!r}, or it ended too long ago",
            )
        return execution

    async def _source(self, request: pb.ExecuteRequest) -> tuple[str, str | None]:
        """The code to run, or what is wrong with the request."""
        if request.WhichOneof("source") == "code":
            return request.code, None
        if request.WhichOneof("source") is None:
            return "", "neither code nor the name of a cached script was given"
        source = await asyncio.to_thread(self._cache.source, request.cached)
        if source is None:
            return "", f"no cached script is named {request.cached[:_NAMED]!r}"
        return source, None

    async def _submit(
        self, request: pb.ExecuteRequest | pb.ExecuteTestRequest, source: str, context: Context, **kind: Any
    ) -> Execution:
        timeout_ms = request.timeout_ms if request.HasField("timeout_ms") else DEFAULT_TIMEOUT_MS
        timeout_ms = min(max(timeout_ms, MIN_TIMEOUT_MS), MAX_TIMEOUT_MS)
        if isinstance(request, pb.ExecuteRequest) and request.WhichOneof("source") == "cached":
            kind["cached_name"] = request.cached
        try:
            return self._executions.submit(source, timeout_ms, **kind)
        except QueueFullError:
            code = grpc.StatusCode.RESOURCE_EXHAUSTED
            text = (
                f"{self._options.max_concurrent} executions are running (--max-concurrent)"
                f" and as many as may are waiting (--max-queued: {self._options.max_queued})"
            )
        except DrainingError:
            code, text = grpc.StatusCode.UNAVAILABLE, "the server is shutting down"
        return await _abort(context, code, text)


async def _begun(execution: Execution, context: Context) -> None:
    """Waits until the code begins, and sends the initial metadata then: clients count its time from there."""
    await execution.begun()
    await context.send_initial_metadata(())


async def _abort(context: Context, code: grpc.StatusCode, text: str) -> NoReturn:
    await context.abort(code, text)
    raise AssertionError("abort returned")


def _chunk(execution: Execution, **what: Any) -> pb.ExecuteChunk:
    return pb.ExecuteChunk(execution_id=execution.id, timestamp_ms=now_ms(), **what)


def _state(execution: Execution) -> pb.ExecutionState.ValueType:
    return pb.ExecutionState.ValueType(execution.state)


def _result(execution: Execution) -> pb.ExecuteResult:
    return pb.ExecuteResult(
        success=execution.state == State.COMPLETED,
        error=execution.error,
        execution_time_ms=execution.execution_time_ms,
        state=_state(execution),
        cached=_entry(execution.cached_entry),
    )


def _entry(entry: CacheEntry | None) -> pb.CacheEntry | None:
    if entry is None:
        return None
    return pb.CacheEntry(
        name=entry.name,
        description=entry.description,
        created_at_ms=entry.created_at_ms,
        content_hash=entry.content_hash,
    )


def _info(execution: Execution) -> pb.ExecutionInfo:
    return pb.ExecutionInfo(
        execution_id=execution.id,
        state=_state(execution),
        started_at_ms=execution.started_at_ms,
        finished_at_ms=execution.finished_at_ms,
        code_preview=execution.source[:PREVIEW],
        is_cached=execution.cached_name is not None,
        cached_name=execution.cached_name,
    )


def _test_response(execution: Execution) -> pb.ExecuteTestResponse:
    records = _records(execution.report)
    tests = [record for record in records if "name" in record]
    counts = {outcome: sum(test["outcome"] == outcome for test in tests) for outcome in _OUTCOMES}
    others = [record for record in records if "name" not in record]
    error = next((shortened(record["error"]) for record in others if record["error"]), None)
    done = any("done" in record for record in others)
    # A failed test is no error of the run; a crash or a timeout is.
    if error is None and execution.state != State.COMPLETED and not (done and counts["failed"]):
        error = execution.error
    if error is None and not done:
        error = "the process ended before all tests were run"
    if execution.state in (State.TIMEOUT, State.CANCELLED):
        error = execution.error
    return pb.ExecuteTestResponse(
        success=execution.state == State.COMPLETED and not counts["failed"] and error is None,
        summary=pb.TestSummary(total=len(tests), **counts),
        tests=[
            pb.TestResult(
                name=test["name"],
                passed=test["outcome"] == "passed",
                error=test["error"] and shortened(test["error"]),
                duration_ms=test["duration_ms"],
            )
            for test in tests
        ],
        output=execution.output.since(),
        execution_time_ms=execution.execution_time_ms,
        error=error,
    )


def _records(report: str) -> list[dict[str, Any]]:
    """What the test runner reported, line by line; the last may have been cut off."""
    records: list[dict[str, Any]] = []
    unnamed = 0
    for line in report.splitlines():
        if unnamed == _UNNAMED:
            break
        try:
            record = json.loads(line)
            # The code under test runs in the same process, and may have written here.
            pb.TestResult(
                name=record.get("name"), error=record["error"], duration_ms=record.get("duration_ms")
            )
            if "name" in record and (record["outcome"] not in _OUTCOMES or record["duration_ms"] is None):
                raise ValueError(record)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            record = {"error": f"the test runner was disturbed: {line[:200]!r}"}
        unnamed += "name" not in record
        records.append(record)
    return records
