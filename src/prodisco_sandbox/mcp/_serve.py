"""Serving the tool: on stdio or streamable HTTP, to a graceful end."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import signal
import socket
from collections.abc import Mapping
from importlib.metadata import version
from types import FrameType
from typing import Any

import uvicorn
from mcp.server import MCPServer
from mcp.server.transport_security import TransportSecuritySettings
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from ..manager import SandboxManager
from . import _resuming
from ._auth import LogRefusals
from ._connections import BACKLOG, Complaints, SayLimit
from ._lifespan import sandbox_lifespan
from ._resuming import Links
from ._stdio import Stdio
from ._telemetry import ContinueTrace, add_metrics
from ._tool import SandboxTools, add_sandbox_tools

log = logging.getLogger("prodisco_sandbox.mcp")

SETTLE_TIME = 1.0
"""Seconds after the last call in which everything but calls is still answered: the SDK's
client fetches the tool's schema to check its first result, and loses the result if it
cannot."""
CLOSE_TIMEOUT = 3
"""Seconds that connections get to close after that."""

INSTRUCTIONS = """\
run_sandbox runs code in a sandbox of your own: use it to compute, to analyse data, and to check code before \
you rely on it. Print what you want to see. A result's `note` says what to do next."""

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def make_server(
    manager: SandboxManager, *, auth: Mapping[str, Any] | None = None, **options: Any
) -> tuple[MCPServer[Any], SandboxTools]:
    """An MCP server with nothing but the tool; ``auth`` is from `server_auth`, ``options`` for the tool."""
    server = MCPServer(
        "prodisco-sandbox",
        version=version("prodisco-sandbox"),
        instructions=INSTRUCTIONS,
        lifespan=sandbox_lifespan(manager),
        **(auth or {}),
    )
    tools = add_sandbox_tools(server, manager, **options)
    empty = ["prompts/list"]
    if not server._resource_manager.list_templates():
        empty.append("resources/list")
    for method in empty:  # Else the SDK advertises that there might be some.
        server._lowlevel_server._request_handlers.pop(method, None)
    return server, tools


async def serve_stdio(server: MCPServer[Any], tools: SandboxTools, *, drain_timeout: float) -> None:
    """Serves until standard input ends, or until a signal and the end of the calls."""
    stdio = Stdio()
    stdio.install()
    loop = asyncio.get_running_loop()
    drains: set[asyncio.Task[None]] = set()

    async def drain() -> None:
        await _drain(tools, drain_timeout)
        stdio.end()

    def on_signal() -> None:
        if not tools.draining:
            drains.add(asyncio.create_task(drain(), name="drain"))
            return
        stdio.end()
        leave_signals()  # The next signal kills: a client that does not read blocks the SDK's writer.
        # Python's own handler would raise, but asyncio would still wait for that writer.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def leave_signals() -> None:
        for number in SIGNALS:
            loop.remove_signal_handler(number)

    for number in SIGNALS:
        loop.add_signal_handler(number, on_signal)
    try:
        await server.run_stdio_async()
    except* BrokenPipeError:
        # The client is gone, perhaps killed, before its last answers were written.
        log.info("the client does not read any more")
    finally:
        for task in drains:
            task.cancel()
        leave_signals()


async def serve_http(
    server: MCPServer[Any],
    tools: SandboxTools,
    *,
    listener: socket.socket,
    path: str,
    allowed_hosts: list[str],
    drain_timeout: float,
    stateless: bool = False,
) -> None:
    """Serves streamable HTTP until a signal and the end of the calls.

    The session of a connection is known to one process alone. A ``stateless`` server opens none:
    clients of the older protocols get handles, too.
    """
    from ._protocol import BoundedProtocol

    add_probes(server, tools)
    metrics = add_metrics(server)
    host, port = listener.getsockname()[:2]
    name = f"[{host}]" if ":" in host else host
    if not allowed_hosts and ipaddress.ip_address(host).is_loopback:
        # The SDK's own list has 127.0.0.1 and ::1 only, and refuses names without a port,
        # which is how clients write port 80.
        local = {name, "127.0.0.1", "localhost", "[::1]"}
        allowed_hosts = [pattern for each in sorted(local) for pattern in (each, f"{each}:*")]
    security = TransportSecuritySettings(
        # Outside loopback every name is accepted, unless a list was given.
        enable_dns_rebinding_protection=bool(allowed_hosts),
        allowed_hosts=allowed_hosts,
        allowed_origins=[f"{scheme}://{each}" for each in allowed_hosts for scheme in ("https", "http")],
    )
    app = server.streamable_http_app(
        streamable_http_path=path,
        transport_security=security,
        stateless_http=stateless,
    )
    _resuming.let_resume(server)
    app.add_middleware(ContinueTrace)
    # Without sessions there is no stream to resume.
    app.add_middleware(Links, grace=0.0 if stateless else _resuming.RESUME_WITHIN)
    app.add_middleware(SayLimit)
    if server.settings.auth is not None:
        app.add_middleware(LogRefusals)
    config = uvicorn.Config(
        app,
        lifespan="on",
        log_config=None,
        access_log=False,
        http=BoundedProtocol,
        backlog=BACKLOG,
        timeout_graceful_shutdown=CLOSE_TIMEOUT,
    )
    asyncio.get_running_loop().set_exception_handler(Complaints())
    log.info("listening on http://%s:%d%s", name, port, path)
    with metrics:
        await DrainingServer(config, tools, drain_timeout).serve(sockets=[listener])


def add_probes(server: MCPServer[Any], tools: SandboxTools) -> None:
    """Adds /healthz (it runs) and /readyz (it takes calls), which need no authentication."""

    async def healthz(request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(request: Request) -> Response:
        if tools.is_ready:
            return PlainTextResponse("ok\n")
        return PlainTextResponse("shutting down\n" if tools.draining else "starting\n", status_code=503)

    server.custom_route("/healthz", ["GET"])(healthz)
    server.custom_route("/readyz", ["GET"])(readyz)


class DrainingServer(uvicorn.Server):
    """uvicorn, but after a signal it goes on serving until the calls have ended.

    uvicorn alone would cut streaming answers at once. A second signal ends it at once.
    """

    def __init__(self, config: uvicorn.Config, tools: SandboxTools, drain_timeout: float) -> None:
        super().__init__(config)
        self._tools = tools
        self._drain_timeout = drain_timeout
        self._drain: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        try:
            await super().serve(sockets)
        finally:
            if self._drain is not None:
                self._drain.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Unlike uvicorn's own, which raises the signal again after serving.
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        if self._drain is None:
            self._drain = asyncio.create_task(self._run_drain(), name="drain")
        else:
            self.should_exit = True

    async def _run_drain(self) -> None:
        await _drain(self._tools, self._drain_timeout)
        self.should_exit = True


async def _drain(tools: SandboxTools, timeout: float) -> None:
    await tools.drain(timeout)
    # Also after the drain timed out: other calls may have ended a moment ago.
    await asyncio.sleep(SETTLE_TIME)
