"""Serving the tool: on stdio or streamable HTTP, to a graceful end."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import signal
import socket
from importlib.metadata import version
from types import FrameType
from typing import Any

import uvicorn
from mcp.server import MCPServer
from mcp.server.transport_security import TransportSecuritySettings
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from ..manager import SandboxManager
from ._lifespan import sandbox_lifespan
from ._stdio import Stdio
from ._tool import SandboxTools, add_sandbox_tools

log = logging.getLogger("prodisco_sandbox.mcp")

SETTLE_TIME = 1.0
"""Seconds after the last call in which everything but a call is still answered: the SDK's
client fetches the tool's schema to check the first result that it gets, and loses the
result where it cannot."""
CLOSE_TIMEOUT = 3
"""Seconds that connections get to close after that."""

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def make_server(manager: SandboxManager, **options: Any) -> tuple[MCPServer[Any], SandboxTools]:
    """An MCP server with nothing but the tool; ``options`` are `add_sandbox_tools`'s."""
    server = MCPServer(
        "prodisco-sandbox", version=version("prodisco-sandbox"), lifespan=sandbox_lifespan(manager)
    )
    return server, add_sandbox_tools(server, manager, **options)


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
        leave_signals()  # The next one kills: a client that does not read holds up the SDK's writer.
        # Where Python's own handler raises, asyncio waits for that writer all the same.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def leave_signals() -> None:
        for number in SIGNALS:
            loop.remove_signal_handler(number)

    for number in SIGNALS:
        loop.add_signal_handler(number, on_signal)
    try:
        await server.run_stdio_async()
    except* BrokenPipeError:
        # The client went, killed perhaps, with something still to be said to it.
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
) -> None:
    """Serves streamable HTTP until a signal and the end of the calls."""
    add_probes(server, tools)
    host, port = listener.getsockname()[:2]
    name = f"[{host}]" if ":" in host else host
    if not allowed_hosts and ipaddress.ip_address(host).is_loopback:
        # The SDK's own list is for 127.0.0.1 and ::1 only, and refuses names without a port,
        # which is how clients write port 80.
        local = {name, "127.0.0.1", "localhost", "[::1]"}
        allowed_hosts = [pattern for each in sorted(local) for pattern in (each, f"{each}:*")]
    security = TransportSecuritySettings(
        # Elsewhere than on loopback any name will do, unless it was said which.
        enable_dns_rebinding_protection=bool(allowed_hosts),
        allowed_hosts=allowed_hosts,
        allowed_origins=[f"{scheme}://{each}" for each in allowed_hosts for scheme in ("https", "http")],
    )
    app = server.streamable_http_app(streamable_http_path=path, transport_security=security)
    config = uvicorn.Config(
        app,
        lifespan="on",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=CLOSE_TIMEOUT,
    )
    log.info("listening on http://%s:%d%s", name, port, path)
    await DrainingServer(config, tools, drain_timeout).serve(sockets=[listener])


def add_probes(server: MCPServer[Any], tools: SandboxTools) -> None:
    """Adds /healthz (it runs) and /readyz (it takes calls), which need no authentication."""

    async def healthz(request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(request: Request) -> Response:
        if tools.draining:
            return PlainTextResponse("shutting down\n", status_code=503)
        return PlainTextResponse("ok\n")

    server.custom_route("/healthz", ["GET"])(healthz)
    server.custom_route("/readyz", ["GET"])(readyz)


class DrainingServer(uvicorn.Server):
    """uvicorn, but it goes on serving after a signal until the calls have ended.

    By itself it would cut streaming answers at once. A second signal does not wait.
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
        # Not what uvicorn does: to die of the signal again once it has served.
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
    # Also where a call has outlasted it: others may have ended a moment ago.
    await asyncio.sleep(SETTLE_TIME)
