"""The server's own spans, where the program that runs it has set up OpenTelemetry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from prodisco_sandbox.proto import sandbox_pb2 as pb
from tests.support.servers import running
from tests.support.spans import TracedServers

TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
CONTEXT = (("traceparent", f"00-{TRACE}-{CALLER}-01"), ("tracestate", "vendor=value"))
SERVICE = "prodisco.sandbox.v1.SandboxService"


async def test_calls_are_spans_that_continue_the_callers_trace(tmp_path: Path) -> None:
    servers = TracedServers(tmp_path)
    command = (str(servers.python), "-m", "prodisco_sandbox.server")
    with running(tmp_path / "server", command=command) as server:
        async with server.connect() as stub, server.channel() as channel:
            health: Any = health_pb2_grpc.HealthStub(channel)
            await health.Check(health_pb2.HealthCheckRequest(), metadata=CONTEXT)
            await stub.HealthCheck(pb.HealthCheckRequest())
            request = pb.ExecuteRequest(code="import os; print(*os.environ, 'output-secret')")
            answer = await stub.Execute(request, metadata=CONTEXT)
            assert answer.success
            assert "OTEL" not in answer.output
            assert "TRACE" not in answer.output.upper()
            chunks = [chunk async for chunk in stub.ExecuteStream(request, metadata=CONTEXT)]
            assert chunks[-1].result.success
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.GetExecution(pb.GetExecutionRequest(execution_id="id-secret"))
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.ListCache(pb.ListCacheRequest(), metadata=(("prodisco-expect-boot", "another"),))
    ran, streamed, failed, refused = servers.spans()
    for span, rpc in ((ran, "Execute"), (streamed, "ExecuteStream")):
        assert span["name"] == f"{SERVICE}/{rpc}"
        assert span["kind"] == "SpanKind.SERVER"
        assert (span["context"]["trace_id"], span["parent_id"]) == (f"0x{TRACE}", f"0x{CALLER}")
        assert "vendor" in span["context"]["trace_state"]
        assert span["attributes"] == {
            "rpc.system": "grpc",
            "rpc.service": SERVICE,
            "rpc.method": rpc,
            "rpc.grpc.status_code": 0,
        }
        assert span["status"] == {"status_code": "UNSET"}
    assert failed["name"] == f"{SERVICE}/GetExecution"
    assert failed["parent_id"] is None
    assert failed["attributes"]["rpc.grpc.status_code"] == grpc.StatusCode.NOT_FOUND.value[0]
    assert failed["status"] == {"status_code": "ERROR"}
    assert refused["attributes"]["rpc.grpc.status_code"] == grpc.StatusCode.FAILED_PRECONDITION.value[0]
    assert "secret" not in str(servers.spans())
