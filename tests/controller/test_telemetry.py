"""The real controller continues the traces of sessions."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections.abc import AsyncIterator, Iterator
from typing import Any, NamedTuple

import grpc
import pytest

from prodisco_sandbox._telemetry import ANNOTATION
from tests.support.controller import ControlledNamespace
from tests.support.patience import until
from tests.support.spans import Observed, ident, observed

__all__ = ["observed"]

pytestmark = pytest.mark.controller

# opentelemetry.proto.trace.v1.Span on the wire, from its first field to the name.
_SPAN = re.compile(
    rb"\x0a\x10(?P<trace>.{16})\x12\x08.{8}(?:\x22\x08(?P<parent>.{8}))?\x2a(?P<length>.)(?P<name>\w+)",
    re.DOTALL,
)


class Span(NamedTuple):
    name: str
    trace: int
    parent: int


class Collector:
    """Takes what the controller exports."""

    def __init__(self) -> None:
        self._exports: list[bytes] = []

    async def export(self, request: bytes, context: Any) -> bytes:
        self._exports.append(request)
        return b""

    def spans(self) -> Iterator[Span]:
        for found in itertools.chain.from_iterable(map(_SPAN.finditer, self._exports)):
            name = found["name"][: found["length"][0]].decode()
            yield Span(name, int.from_bytes(found["trace"]), int.from_bytes(found["parent"] or b""))

    def has(self, span: Span) -> bool:
        return span in self.spans()


@pytest.fixture
async def collector(cluster: ControlledNamespace) -> AsyncIterator[Collector]:
    """The controller exports its spans to this one, for one test."""
    collector, server = Collector(), grpc.aio.server()
    methods = {"Export": grpc.unary_unary_rpc_method_handler(collector.export)}
    service = "opentelemetry.proto.collector.trace.v1.TraceService"
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    cluster.server.kill_controller()
    await asyncio.to_thread(cluster.server.start_controller, collector=f"http://127.0.0.1:{port}")
    try:
        yield collector
    finally:
        cluster.server.kill_controller()
        await asyncio.to_thread(cluster.server.start_controller)
        await server.stop(None)


def annotation(found: dict[str, Any] | None) -> Any:
    assert found is not None
    return json.loads(found["metadata"]["annotations"][ANNOTATION])


async def test_the_controller_goes_on_with_a_session_s_trace(
    observed: Observed, cluster: ControlledNamespace, collector: Collector
) -> None:
    async with cluster.managed() as manager:
        with observed.tracer.start_as_current_span("request") as request:
            await manager.get_client("session")
        trace, create = request.get_span_context().trace_id, ident(observed.span("sandbox.create"))
        carried = annotation(await cluster.get(manager.sandbox_name("session")))
        assert carried["traceparent"].split("-")[1:3] == [f"{trace:032x}", f"{create:016x}"]
        await until(lambda: collector.has(Span("ReconcileSandbox", trace, create)))


async def test_a_claim_s_trace_goes_on_and_so_does_that_of_its_sandbox(
    observed: Observed, cluster: ControlledNamespace, collector: Collector
) -> None:
    await cluster.make_pool(1)
    async with cluster.managed(warm_pool="python") as manager:
        with observed.tracer.start_as_current_span("request") as request:
            await manager.get_client("session")
        trace, create = request.get_span_context().trace_id, ident(observed.span("sandbox.create"))
        claim = await cluster.claim(manager.sandbox_name("session"))
        assert claim is not None
        assert annotation(claim)["traceparent"].split("-")[1:3] == [f"{trace:032x}", f"{create:016x}"]
        bound = await cluster.get(claim["status"]["sandbox"]["name"])
        assert annotation(bound) == annotation(claim)
        await until(lambda: collector.has(Span("ReconcileSandboxClaim", trace, create)))
        await until(lambda: collector.has(Span("ReconcileSandbox", trace, create)))
        assert set(observed.points("start.duration")) == {"warm"}
