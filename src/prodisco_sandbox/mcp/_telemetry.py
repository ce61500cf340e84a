"""The program's telemetry over HTTP: /metrics for Prometheus, and traces that requests continue."""

from __future__ import annotations

import importlib.util
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from mcp.server import MCPServer
from opentelemetry import context, trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send


def add_metrics(server: MCPServer[Any]) -> AbstractContextManager[None]:
    """Adds /metrics, which needs no authentication and holds no ids, where prometheus_client is installed.

    Returns:
        What is entered while the server serves: it counts what happens meanwhile.
    """
    if importlib.util.find_spec("prometheus_client") is None:
        return nullcontext()
    from prometheus_client import CONTENT_TYPE_LATEST

    from ._prometheus import Metrics

    metrics = Metrics()

    async def answer(request: Request) -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    server.custom_route("/metrics", ["GET"])(answer)
    return metrics.recording()


class ContinueTrace:
    """ASGI middleware: the trace of a request's headers goes on, unless other middleware did that.

    The SDK itself does so for the context in a message's ``_meta``, which beats the headers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._w3c = TraceContextTextMapPropagator()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or trace.get_current_span().get_span_context().is_valid:
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        token = context.attach(self._w3c.extract(headers))
        try:
            await self._app(scope, receive, send)
        finally:
            context.detach(token)
