"""What the tests of the MCP server share: servers in this process, and real clients of them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx2
import pytest
import uvicorn
from mcp import Client
from mcp.client.streamable_http import streamable_http_client
from mcp.server import MCPServer
from mcp.server.auth.provider import AccessToken
from mcp.server.auth.settings import AuthSettings
from mcp_types import CallToolResult, TextContent
from pydantic import AnyHttpUrl

from prodisco_sandbox import SandboxManager, SandboxManagerConfig
from prodisco_sandbox.manager import SessionContext
from prodisco_sandbox.mcp import SandboxTools, add_sandbox_tools, sandbox_lifespan
from prodisco_sandbox.mcp._serve import serve_http
from prodisco_sandbox.testing import FakeCustomObjectsApi, FakeSandboxServer
from tests.support.patience import PATIENCE

T = TypeVar("T")

INITIALIZE = {
    "protocolVersion": "2025-11-25",
    "capabilities": {},
    "clientInfo": {"name": "test", "version": "0"},
}

META = {
    "io.modelcontextprotocol/protocolVersion": "2026-07-28",
    "io.modelcontextprotocol/clientInfo": {"name": "test", "version": "0"},
    "io.modelcontextprotocol/clientCapabilities": {},
}
"""What a request of that protocol says of itself."""

ERAS = ("legacy", "2026-07-28")
"""What `Client` takes as mode: the handshake of 2025-11-25 and before, and requests that stand alone."""


class Manager(SandboxManager):
    """Remembers the sessions that the tool has asked for."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._asked: dict[str, None] = {}

    def session(self, session_id: str | None = None, *, owner: str | None = None) -> SessionContext:
        self._asked[session_id or ""] = None
        return super().session(session_id, owner=owner)

    @property
    def sessions(self) -> list[str]:
        return [key for key in self._asked if self.has_session(key)]


@dataclass
class Rig:
    """A server with the tool, and what is behind it."""

    server: MCPServer[Any]
    tools: SandboxTools
    manager: Manager
    sandbox: FakeSandboxServer
    api: FakeCustomObjectsApi


@asynccontextmanager
async def rig(
    *,
    settings: Mapping[str, Any] | None = None,
    auth: bool = False,
    sandbox_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> AsyncIterator[Rig]:
    """A server on a cluster in memory, whose sandboxes are all one scripted server.

    Args:
        settings: Of the manager.
        auth: Callers are authenticated; the token is the caller's name.
        sandbox_options: Of the scripted server.
        options: Of `add_sandbox_tools`.
    """
    async with (
        FakeSandboxServer(**(sandbox_options or {})) as sandbox,
        FakeCustomObjectsApi(auto_ready=True) as api,
    ):
        config = SandboxManagerConfig(
            mode="multi", endpoint=lambda _: sandbox.target, **{"max_sessions": 4, **(settings or {})}
        )
        manager = Manager(config, custom_objects_api=api)
        server, tools = make_server(manager, auth=auth, **options)
        yield Rig(server, tools, manager, sandbox, api)
        await manager.shutdown()


def make_server(
    manager: SandboxManager, *, auth: bool = False, **options: Any
) -> tuple[MCPServer[Any], SandboxTools]:
    settings: dict[str, Any] = {}
    if auth:
        url = AnyHttpUrl("http://127.0.0.1/")
        settings["auth"] = AuthSettings(
            issuer_url=url, resource_server_url=url, required_scopes=[], validate_token_resource=False
        )
        settings["token_verifier"] = NamesAsTokens()
    server = MCPServer("test", lifespan=sandbox_lifespan(manager), **settings)
    return server, add_sandbox_tools(server, manager, **options)


class NamesAsTokens:
    """Takes every token for the name of its bearer."""

    async def verify_token(self, token: str) -> AccessToken | None:
        return AccessToken(token=token, client_id="app", scopes=[], subject=token)


@asynccontextmanager
async def over_http(server: MCPServer[Any], **options: Any) -> AsyncIterator[str]:
    """Serves on loopback with uvicorn; gives the URL."""
    app = server.streamable_http_app(**options)
    config = uvicorn.Config(
        app, port=0, lifespan="on", log_config=None, access_log=False, timeout_graceful_shutdown=1
    )
    uvicorn_server = uvicorn.Server(config)
    uvicorn_server.capture_signals = contextlib.nullcontext  # type: ignore[assignment, method-assign]
    task = asyncio.create_task(uvicorn_server.serve(), name="uvicorn")
    try:
        async with asyncio.timeout(PATIENCE):
            while not uvicorn_server.started:
                assert not task.done()
                await asyncio.sleep(0.01)
        port = uvicorn_server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}/mcp"
    finally:
        uvicorn_server.should_exit = True
        await served(task)


@asynccontextmanager
async def served_by_the_program(server: MCPServer[Any], tools: SandboxTools) -> AsyncIterator[str]:
    """Serves over HTTP as the program does; gives the URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    task = asyncio.create_task(
        serve_http(server, tools, listener=listener, path="/mcp", allowed_hosts=[], drain_timeout=0)
    )
    base = f"http://127.0.0.1:{listener.getsockname()[1]}"
    async with httpx2.AsyncClient(timeout=PATIENCE, verify=False) as http:
        assert (await http.get(f"{base}/healthz")).status_code == 200
    try:
        yield f"{base}/mcp"
    finally:
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
        await served(task)


async def served(serving: asyncio.Task[None]) -> None:
    """Waits for the end of a server on HTTP, and ends what it leaves."""
    async with asyncio.timeout(PATIENCE):
        await serving
    for task in asyncio.all_tasks():
        # sse_starlette's, which looks for a signal for ever.
        if getattr(task.get_coro(), "__name__", "") == "_shutdown_watcher":
            task.cancel()


@asynccontextmanager
async def connect(url: str, era: str, *, token: str | None = None, **headers: str) -> AsyncIterator[Client]:
    """A client over HTTP; ``headers`` go with every request, ``_`` standing for ``-``."""
    extra = {name.replace("_", "-"): value for name, value in headers.items()}
    if token is not None:
        extra["Authorization"] = f"Bearer {token}"
    async with (
        httpx2.AsyncClient(headers=extra, timeout=2 * PATIENCE, verify=False) as http,
        Client(streamable_http_client(url, http_client=http), mode=era) as client,
    ):
        yield client


@asynccontextmanager
async def in_one_task(context: AbstractAsyncContextManager[T]) -> AsyncIterator[T]:
    """Enters and leaves a context in one task, as anyio wants it; a fixture is in several."""
    entered: asyncio.Future[T] = asyncio.get_running_loop().create_future()
    leave = asyncio.Event()

    async def hold() -> None:
        async with context as value:
            entered.set_result(value)
            await leave.wait()

    task = asyncio.create_task(hold(), name="context of a fixture")
    task.add_done_callback(lambda _: entered.cancel())
    try:
        yield await entered
    finally:
        leave.set()
        await task


async def run(client: Client, code: str | None = None, **arguments: Any) -> dict[str, Any]:
    """Calls the tool; returns its structured content, and fails where it is an error."""
    result = await call(client, code, **arguments)
    assert not result.is_error, result
    content: dict[str, Any] = result.structured_content
    return content


async def call(client: Client, code: str | None = None, **arguments: Any) -> CallToolResult:
    if code is not None:
        arguments["code"] = code
    return await client.call_tool("run_sandbox", arguments)


async def refused(client: Client, code: str | None = None, **arguments: Any) -> str:
    """Calls the tool; returns the text of its error, and fails where there is none."""
    result = await call(client, code, **arguments)
    assert result.is_error, result
    return text_of(result)


def text_of(result: CallToolResult) -> str:
    block = result.content[0]
    assert isinstance(block, TextContent)
    if not result.is_error and result.structured_content is not None:
        assert json.loads(block.text) == result.structured_content
    return block.text


def events(caplog: pytest.LogCaptureFixture, event: str) -> list[dict[str, Any]]:
    """The pairs of each such event in the log."""
    found = [getattr(record, "sandbox", {}) for record in caplog.records]
    return [pairs for pairs in found if pairs.get("event") == event]


# Requests by hand, where a client would not make them


def headers(session_id: str | None, token: str | None) -> dict[str, str]:
    given = {"Accept": "application/json, text/event-stream", "MCP-Protocol-Version": "2025-11-25"}
    if session_id is not None:
        given["Mcp-Session-Id"] = session_id
    if token is not None:
        given["Authorization"] = f"Bearer {token}"
    return given


@asynccontextmanager
async def open_session(url: str, *, token: str | None = None) -> AsyncIterator[str]:
    """Initializes a session by hand; gives its id, and ends it."""
    body = {"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": INITIALIZE}
    async with httpx2.AsyncClient(timeout=PATIENCE, verify=False) as http:
        answer = await http.post(url, json=body, headers=headers(None, token))
        session_id = answer.headers["mcp-session-id"]
        try:
            yield session_id
        finally:
            await http.delete(url, headers=headers(session_id, token))


async def tool_call(url: str, session_id: str, *, token: str | None = None) -> httpx2.Response:
    params = {"name": "run_sandbox", "arguments": {"code": ""}}
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}
    async with httpx2.AsyncClient(timeout=PATIENCE, verify=False) as http:
        return await http.post(url, json=body, headers=headers(session_id, token))
