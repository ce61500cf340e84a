"""A double of the stock Node server, with what it does differently: real gRPC on loopback."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio
from google.protobuf.message import Message

from prodisco_sandbox.proto import sandbox_pb2 as pb

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
