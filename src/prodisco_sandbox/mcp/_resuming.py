"""Calls of the older protocols whose connection drops: resumed within some seconds, or ended."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import anyio
from mcp.server import MCPServer
from mcp.server.streamable_http import EventMessage, EventStore
from mcp_types import INVALID_REQUEST, ErrorData, JSONRPCError, JSONRPCResponse
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

RESUME_WITHIN = 5.0
"""Seconds in which a client may resume the stream of a call after its connection has dropped."""
KEPT_FOR = 60.0
"""Seconds for which a message can be sent again."""
MOST_EVENTS = 4096
"""Messages that are kept, of all sessions together; the oldest go."""
MOST_BYTES = 16 << 20
"""Their size together; the oldest go."""

_LINK = "prodisco_sandbox.link"
_SESSION, _LAST_EVENT = "mcp-session-id", "last-event-id"


class Link:
    """Whether a client is connected for a call: by the call's request, or by one that resumes its stream.

    Args:
        grace: Seconds without a connection after which the call ends.
    """

    def __init__(self, grace: float) -> None:
        self._grace = grace
        self._connections = 0
        self._end: Callable[[], object] | None = None
        self._timer: asyncio.TimerHandle | None = None

    @contextlib.contextmanager
    def connected(self) -> Iterator[None]:
        self._connections += 1
        self._look()
        try:
            yield
        finally:
            self._connections -= 1
            self._look()

    @contextlib.contextmanager
    def ends(self, end: Callable[[], object]) -> Iterator[None]:
        """Calls `end` within the block, once nobody has been connected for too long."""
        self._end = end
        self._look()
        try:
            yield
        finally:
            self._end = None
            self._look()

    def _look(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._end is not None and not self._connections:
            self._timer = asyncio.get_running_loop().call_later(self._grace, self._end)


class Links:
    """ASGI middleware that knows by which connections a client follows its calls.

    Args:
        grace: As for `Link`.
    """

    def __init__(self, app: ASGIApp, grace: float) -> None:
        self._app = app
        self._grace = grace
        self._calls: dict[tuple[str | None, str], Link] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        with contextlib.ExitStack() as stack:
            resumed = None
            if scope["method"] == "GET":
                resumed = self._calls.get((headers.get(_SESSION), _stream(headers.get(_LAST_EVENT))[0]))
            else:
                link = Link(self._grace)
                scope[_LINK] = self._calls, link
                stack.enter_context(link.connected())

            async def seen(message: Message) -> None:
                # Before, the SDK may still refuse it, for other credentials than the session's.
                if resumed is not None and message.get("status") == 200:
                    stack.enter_context(resumed.connected())
                await send(message)

            await self._app(scope, receive, seen)


@contextlib.asynccontextmanager
async def ends_with_connection(request: Any, request_id: object) -> AsyncIterator[None]:
    """Cancels the block once its client is gone, as the SDK does from 2026-07-28 on.

    Before, the SDK lets the call run on for a client that may resume the stream, however long that takes.
    """
    if not isinstance(request, Request) or _LINK not in request.scope:
        yield
        return
    calls, link = request.scope[_LINK]
    key = request.headers.get(_SESSION), str(request_id)
    calls[key] = link
    try:
        with anyio.CancelScope() as scope, link.ends(scope.cancel):
            yield
    finally:
        if calls.get(key) is link:
            del calls[key]


def let_resume(server: MCPServer[Any]) -> None:
    """Has each session of a server keep its messages for a while; after ``streamable_http_app()``."""
    sessions, kept = server.session_manager, Kept()
    admit = sessions._admit_session

    def admit_with_events(*args: Any) -> Any:
        # The SDK would give all sessions one store, though it names streams by the requests' ids.
        transport = admit(*args)
        if transport is not None:
            transport._event_store = SessionEvents(kept)
        return transport

    sessions._admit_session = admit_with_events  # type: ignore[assignment, method-assign]


@dataclass(frozen=True, slots=True)
class Event:
    """A message that was sent on a stream of a session."""

    session: SessionEvents
    stream: str
    number: int
    message: Any
    size: int
    at: float = field(default_factory=time.monotonic)


class Kept:
    """The last messages of all sessions, within bounds."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._bytes = 0

    def add(self, event: Event) -> None:
        self._events.append(event)
        self._bytes += event.size
        while self._events and (
            len(self._events) > MOST_EVENTS
            or self._bytes > MOST_BYTES
            or self._events[0].at < event.at - KEPT_FOR
        ):
            self._bytes -= self._events.popleft().size

    def after(self, session: SessionEvents, stream: str, number: int) -> list[Event]:
        oldest = time.monotonic() - KEPT_FOR
        return [
            event
            for event in self._events
            if event.session is session
            and event.stream == stream
            and event.number > number
            and event.at >= oldest
        ]


class SessionEvents(EventStore):
    """The messages of one session."""

    def __init__(self, kept: Kept) -> None:
        self._kept = kept
        self._numbers = itertools.count(1)
        self._unanswered: set[str] = set()

    async def store_event(self, stream_id: str, message: Any) -> str:
        number = next(self._numbers)
        if message is not None:
            size = len(message.model_dump_json(by_alias=True, exclude_unset=True))
            self._kept.add(Event(self, stream_id, number, message, size))
        if isinstance(message, JSONRPCResponse | JSONRPCError):
            self._unanswered.discard(stream_id)
        else:
            self._unanswered.add(stream_id)
        return _event_id(stream_id, number)

    async def replay_events_after(self, last_event_id: str, send_callback: Any) -> str | None:
        stream, number = _stream(last_event_id)
        events = self._kept.after(self, stream, number)
        for event in events:
            await send_callback(EventMessage(event.message, _event_id(stream, event.number)))
        if stream in self._unanswered:
            return stream
        if not events:  # Without an answer, clients would ask again and again.
            request_id = int(stream) if stream.isdecimal() else stream
            error = ErrorData(
                code=INVALID_REQUEST, message="The stream is not kept: it has ended, or is unknown"
            )
            gone = JSONRPCError(jsonrpc="2.0", id=request_id, error=error)
            await send_callback(EventMessage(gone))
        return None


def _event_id(stream: str, number: int) -> str:
    """Clients choose the ids of their requests, which may hold what no header can."""
    return f"{stream.encode('utf-8', 'surrogatepass').hex()}-{number}"


def _stream(event_id: str | None) -> tuple[str, int]:
    """Stream and number of an event, by its id; a wrong one is of no stream."""
    stream, _, number = (event_id or "").partition("-")
    try:
        return bytes.fromhex(stream).decode("utf-8", "surrogatepass"), int(number)
    except ValueError:
        return "", 0
