"""An API server of a few lines over HTTP(S), for what only real connections show."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import Any, Self

from aiohttp import web

UNAUTHORIZED = {
    "kind": "Status",
    "apiVersion": "v1",
    "status": "Failure",
    "message": "Unauthorized",
    "reason": "Unauthorized",
    "code": 401,
}


class HttpApi:
    """Answers every verb as if it had worked, where `accepts` lets the request in.

    Attributes:
        requests: Method and path of each request, and whether it was let in.
        hosts: The Host header of each.
        answer: A response to give instead.
        held: A request waits for this before it is looked at.
    """

    def __init__(self, accepts: Callable[[web.Request], bool], tls: ssl.SSLContext | None = None) -> None:
        self.accepts = accepts
        self.requests: list[tuple[str, str, bool]] = []
        self.hosts: list[str] = []
        self.answer: Callable[[], web.Response] | None = None
        self.held: asyncio.Event | None = None
        self._tls = tls

    @property
    def let_in(self) -> list[bool]:
        return [accepted for _, _, accepted in self.requests]

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=self._tls)
        await site.start()
        self.port = self._runner.addresses[0][1]
        self.url = f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        accepted = self.accepts(request)
        self.hosts.append(request.host)
        self.requests.append((request.method, str(request.rel_url), accepted))
        if self.held is not None:
            await self.held.wait()
        if self.answer is not None:
            return self.answer()
        if not accepted:
            return web.json_response(UNAUTHORIZED, status=401)
        parts = request.path.strip("/").split("/")
        if "watch" in request.query:
            return web.Response(text="")
        if len(parts) == 3:
            resources = [
                {"name": "sandboxes", "singularName": "sandbox", "namespaced": True, "kind": "Sandbox"}
            ]
            kinds: dict[str, Any] = {"kind": "APIResourceList", "groupVersion": "/".join(parts[1:])}
            return web.json_response({**kinds, "resources": [{**r, "verbs": ["create"]} for r in resources]})
        found: dict[str, Any] = {"metadata": {"name": parts[-1], "uid": "1", "resourceVersion": "1"}}
        if request.method == "GET" and parts[-1] == "sandboxes":
            found["items"] = []
        return web.json_response(found, status=201 if request.method == "POST" else 200)
