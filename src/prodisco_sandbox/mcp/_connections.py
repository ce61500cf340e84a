"""What connections over HTTP may cost."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("prodisco_sandbox.mcp")

REQUEST_TIMEOUT = 15.0
"""Seconds that a client gets for its request, headers and body, and for the first one to begin."""
BACKLOG = 64
"""Connections that wait to be accepted. asyncio accepts as many at a time, and complains of each one that it
has no descriptor for."""
MOST_DESCRIPTORS = 65_536
COMPLAIN_EVERY = 10.0
"""Seconds between warnings that there are too few descriptors."""

TOO_LARGE = (
    b"The request is over the limit of 4 MiB. Pass less code and data in one call, or let the code make or"
    b" fetch the data.\n"
)


def raise_descriptors() -> None:
    """Raises the soft limit of descriptors, of which each connection takes one."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows has no such limit.
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def most_connections() -> int:
    """How many connections there may be: sandboxes need descriptors, too, and what is accepted meanwhile."""
    try:
        import resource
    except ModuleNotFoundError:
        return MOST_DESCRIPTORS
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_DESCRIPTORS if soft == resource.RLIM_INFINITY else max(soft // 4, soft - 1024)


class Complaints:
    """A loop's exception handler that says in one line now and then that descriptors are too few."""

    def __init__(self) -> None:
        self._next = 0.0

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if "out of system resource" not in context.get("message", ""):
            loop.default_exception_handler(context)
        elif loop.time() >= self._next:
            self._next = loop.time() + COMPLAIN_EVERY
            log.warning("too few descriptors for all connections: %s", context.get("exception"))


class Escaped(logging.Formatter):
    """Escapes control characters: a header may hold them, and forge a line of the log."""

    _CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(0x7F, 0xA0), 0x2028, 0x2029)}

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        record.message = record.message.translate(self._CONTROLS)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's name
        lines = super().formatException(ei).split("\n")
        return "\n".join(line.translate(self._CONTROLS) for line in lines)


class SayLimit:
    """ASGI middleware that says in a sentence what the SDK's answer to a body above its limit means."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        too_large = False

        async def said(message: Message) -> None:
            nonlocal too_large
            if message.get("status") == 413:
                too_large = True
                headers = [
                    (b"content-type", b"text/plain; charset=utf-8"),
                    (b"content-length", b"%d" % len(TOO_LARGE)),
                ]
                message = {**message, "headers": headers}
            elif too_large:
                message = {**message, "body": TOO_LARGE}
            await send(message)

        await self._app(scope, receive, said)
