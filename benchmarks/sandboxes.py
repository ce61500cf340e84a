"""A process that plays every sandbox: one gRPC server on all addresses of 127.0.0.0/8.

Thus each sandbox has an address of its own, and every client a connection of its own, as
in a cluster.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2

from prodisco_sandbox.proto import sandbox_pb2 as pb

OUTPUT = "42\n"


def chunks_in(code: str) -> int:
    """How many chunks the code asks for: it is their number."""
    return int(code)


class _Handlers(grpc.GenericRpcHandler):  # type: ignore[type-arg]
    """The three methods that are measured, with answers that were serialized beforehand."""

    def __init__(self) -> None:
        serving = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)
        executed = pb.ExecuteResponse(success=True, output=OUTPUT, execution_time_ms=1)
        self._methods = {
            "/grpc.health.v1.Health/Check": _unary(serving.SerializeToString()),
            "/prodisco.sandbox.v1.SandboxService/Execute": _unary(executed.SerializeToString()),
            "/prodisco.sandbox.v1.SandboxService/ExecuteStream": grpc.unary_stream_rpc_method_handler(
                _stream
            ),
        }

    def service(self, details: Any) -> Any:
        return self._methods.get(details.method)


def _unary(answer: bytes) -> Any:
    async def handle(_request: bytes, _context: Any) -> bytes:
        return answer

    return grpc.unary_unary_rpc_method_handler(handle)


async def _stream(request: bytes, context: Any) -> None:
    chunk = pb.ExecuteChunk(execution_id="e", output=OUTPUT, timestamp_ms=1).SerializeToString()
    for _ in range(chunks_in(pb.ExecuteRequest.FromString(request).code)):
        await context.write(chunk)
    result = pb.ExecuteResult(success=True, state=pb.EXECUTION_STATE_COMPLETED)
    await context.write(pb.ExecuteChunk(execution_id="e", result=result).SerializeToString())


async def _serve() -> None:
    server = grpc.aio.server(options=[("grpc.http2.min_ping_interval_without_data_ms", 5_000)])
    server.add_generic_rpc_handlers((_Handlers(),))
    port = server.add_insecure_port("0.0.0.0:0")
    await server.start()
    print(port, flush=True)
    await asyncio.to_thread(sys.stdin.read)  # The parent's end closes it.
    await server.stop(None)


@asynccontextmanager
async def sandboxes() -> AsyncIterator[int]:
    """Runs the process; gives its port."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, __file__),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield int(await process.stdout.readline())
    finally:
        process.stdin.close()
        await process.wait()


if __name__ == "__main__":
    asyncio.run(_serve())
