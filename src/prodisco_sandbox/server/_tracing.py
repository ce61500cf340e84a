"""Spans of calls, where the program that runs the server has loaded OpenTelemetry."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from ._undecodable import Continuation, method_of, streamed

_TRACED = "/prodisco."
"""Methods of our own services; health checks and reflection come often, and tell nothing."""


def tracing() -> list[Any]:
    """The interceptor that continues the traces of calls; none where nobody takes spans."""
    return [Tracing()] if "opentelemetry.context" in sys.modules else []


class Tracing(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Makes each call a span, the child of the W3C context in its metadata.

    Attributes are the method and the status: neither code nor output.
    """

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        handler: Any = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith(_TRACED) or method.endswith("/HealthCheck"):
            return handler
        metadata = dict(handler_call_details.invocation_metadata or ())
        kind, run = method_of(handler)

        async def unary(request: Any, context: Any) -> Any:
            with _span(method, metadata, context):
                return await run(request, context)

        async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
            with _span(method, metadata, context):
                async for answer in streamed(run(request, context)):
                    yield answer

        return handler._replace(**{kind: stream if handler.response_streaming else unary})


@contextmanager
def _span(method: str, metadata: dict[str, Any], context: Any) -> Iterator[None]:
    """A span that is current nowhere: a stream's generator may end in another context."""
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    name = method.removeprefix("/")
    service, _, rpc = name.rpartition("/")
    span = trace.get_tracer("prodisco_sandbox.server").start_span(
        name,
        TraceContextTextMapPropagator().extract(metadata),
        trace.SpanKind.SERVER,
        {"rpc.system": "grpc", "rpc.service": service, "rpc.method": rpc},
    )
    status = grpc.StatusCode.OK
    try:
        yield
    except BaseException as error:
        status = context.code() or grpc.StatusCode.UNKNOWN
        span.set_attribute("error.type", type(error).__qualname__)
        if isinstance(error, Exception):  # A client that leaves is none.
            span.set_status(trace.StatusCode.ERROR)
        raise
    finally:
        span.set_attribute("rpc.grpc.status_code", status.value[0])
        span.end()
