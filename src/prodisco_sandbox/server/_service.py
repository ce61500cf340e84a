"""The RPCs."""

# ruff: noqa: N802 (the protocol names its methods)

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, NoReturn

import grpc

from prodisco_sandbox.proto import sandbox_pb2 as pb

from ._executions import PREVIEW, DrainingError, Execution, Executions, QueueFullError, State, now_ms
from ._options import DEFAULT_TIMEOUT_MS, MAX_TIMEOUT_MS, MIN_TIMEOUT_MS, Options
from ._unimplemented import NoLanguageServer

Context = grpc.aio.ServicerContext[Any, Any]


class SandboxService(NoLanguageServer):
    """Prodisco's SandboxService over `Executions`."""

    def __init__(self, options: Options, executions: Executions) -> None:
        self._options = options
        self._executions = executions
        self.healthy = True

    async def Execute(self, request: pb.ExecuteRequest, context: Context) -> pb.ExecuteResponse:
        source, problem = self._source(request)
        if problem:
            return pb.ExecuteResponse(success=False, error=problem)
        execution = await self._submit(request, source, context, merge=True)
        try:
            await execution.finished()
        finally:
            # Whoever asked has gone: nobody will ever see the result.
            self._executions.cancel(execution, "the client went away")
        return pb.ExecuteResponse(
            success=execution.state == State.COMPLETED,
            output=execution.output.since(),
            error=execution.error,
            execution_time_ms=execution.execution_time_ms,
        )

    async def ExecuteStream(
        self, request: pb.ExecuteRequest, context: Context
    ) -> AsyncIterator[pb.ExecuteChunk]:
        source, problem = self._source(request)
        if problem:
            result = pb.ExecuteResult(success=False, error=problem, state=pb.EXECUTION_STATE_FAILED)
            yield pb.ExecuteChunk(result=result, timestamp_ms=now_ms())
            return
        execution = await self._submit(request, source, context, merge=False)
        try:
            async for text, errors in execution.follow():
                if text:
                    yield pb.ExecuteChunk(execution_id=execution.id, output=text, timestamp_ms=now_ms())
                if errors:
                    yield pb.ExecuteChunk(
                        execution_id=execution.id, error_output=errors, timestamp_ms=now_ms()
                    )
            yield pb.ExecuteChunk(execution_id=execution.id, result=_result(execution), timestamp_ms=now_ms())
        finally:
            self._executions.cancel(execution, "the client went away")

    async def HealthCheck(self, request: pb.HealthCheckRequest, context: Context) -> pb.HealthCheckResponse:
        return pb.HealthCheckResponse(healthy=self.healthy)

    async def ExecuteAsync(self, request: pb.ExecuteRequest, context: Context) -> pb.ExecuteAsyncResponse:
        source, problem = self._source(request)
        if problem:
            await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, problem)
        execution = await self._submit(request, source, context, merge=False)
        return pb.ExecuteAsyncResponse(execution_id=execution.id, state=_state(execution))

    async def GetExecution(
        self, request: pb.GetExecutionRequest, context: Context
    ) -> pb.GetExecutionResponse:
        execution = await self._find(request.execution_id, context)
        if request.output_offset < 0:
            await _abort(
                context,
                grpc.StatusCode.INVALID_ARGUMENT,
                f"output_offset is {request.output_offset}: it must not be negative",
            )
        if request.wait:
            await execution.finished()
        return pb.GetExecutionResponse(
            execution_id=execution.id,
            state=_state(execution),
            output=execution.output.since(request.output_offset),
            error_output=execution.error_output.since(request.output_offset),
            output_length=len(execution.output),
            error_output_length=len(execution.error_output),
            result=_result(execution) if execution.state.final else None,
        )

    async def CancelExecution(
        self, request: pb.CancelExecutionRequest, context: Context
    ) -> pb.CancelExecutionResponse:
        execution = await self._find(request.execution_id, context)
        if self._executions.cancel(execution):
            # The answer comes when the code and all its processes are gone.
            await execution.finished()
            message = None
        else:
            message = f"it had already ended: {execution.state.name}"
        return pb.CancelExecutionResponse(
            success=execution.state == State.CANCELLED, state=_state(execution), message=message
        )

    async def ListExecutions(
        self, request: pb.ListExecutionsRequest, context: Context
    ) -> pb.ListExecutionsResponse:
        wanted = {int(state) for state in request.states}
        since = now_ms() - request.include_completed_within_ms
        found = []
        for execution in self._executions.newest_first():
            if wanted and execution.state not in wanted:
                continue
            ended = execution.finished_at_ms
            if request.include_completed_within_ms > 0 and ended is not None and ended < since:
                continue
            found.append(_info(execution))
        limit = request.limit if request.limit > 0 else len(found)
        return pb.ListExecutionsResponse(executions=found[:limit])

    async def ListCache(self, request: pb.ListCacheRequest, context: Context) -> pb.ListCacheResponse:
        return pb.ListCacheResponse()

    async def ClearCache(self, request: pb.ClearCacheRequest, context: Context) -> pb.ClearCacheResponse:
        return pb.ClearCacheResponse()

    async def ExecuteTest(self, request: pb.ExecuteTestRequest, context: Context) -> pb.ExecuteTestResponse:
        await _abort(context, grpc.StatusCode.UNIMPLEMENTED, "ExecuteTest is not there yet")

    async def _find(self, execution_id: str, context: Context) -> Execution:
        execution = self._executions.get(execution_id)
        if execution is None:
            await _abort(
                context,
                grpc.StatusCode.NOT_FOUND,
                f"no execution has the id {execution_id!r}, or it ended too long ago",
            )
        return execution

    def _source(self, request: pb.ExecuteRequest) -> tuple[str, str | None]:
        """The code to run, or what is wrong with the request."""
        if request.WhichOneof("source") == "code":
            return request.code, None
        if request.WhichOneof("source") == "cached":
            return "", f"no cached script is named {request.cached!r}"
        return "", "neither code nor the name of a cached script was given"

    async def _submit(
        self, request: pb.ExecuteRequest, source: str, context: Context, *, merge: bool
    ) -> Execution:
        timeout_ms = request.timeout_ms if request.HasField("timeout_ms") else DEFAULT_TIMEOUT_MS
        timeout_ms = min(max(timeout_ms, MIN_TIMEOUT_MS), MAX_TIMEOUT_MS)
        try:
            return self._executions.submit(source, timeout_ms, merge=merge)
        except QueueFullError:
            limits = self._options
            await _abort(
                context,
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{limits.max_concurrent} executions are running (--max-concurrent)"
                f" and {limits.max_queued} are waiting (--max-queued)",
            )
        except DrainingError:
            await _abort(context, grpc.StatusCode.UNAVAILABLE, "the server is shutting down")
        except OSError as error:
            await _abort(context, grpc.StatusCode.RESOURCE_EXHAUSTED, f"cannot start an interpreter: {error}")


async def _abort(context: Context, code: grpc.StatusCode, text: str) -> NoReturn:
    await context.abort(code, text)
    raise AssertionError("abort returned")


def _result(execution: Execution) -> pb.ExecuteResult:
    return pb.ExecuteResult(
        success=execution.state == State.COMPLETED,
        error=execution.error,
        execution_time_ms=execution.execution_time_ms,
        state=_state(execution),
    )


def _state(execution: Execution) -> pb.ExecutionState.ValueType:
    return pb.ExecutionState.ValueType(execution.state)


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
