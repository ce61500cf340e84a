"""Answers as aiohttp responses, and watches: responses that go on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, Self

from multidict import CIMultiDict, CIMultiDictProxy

from .._cluster.metadata import Object
from . import _status
from ._kinds import Kind
from ._libraries import aiohttp, api_exceptions
from ._selectors import Selector
from ._store import Change, shown

_encode = json.JSONEncoder(separators=(",", ":")).encode

TIMER_SLACK = 0.001
"""Seconds that a loop's timer may fire early."""
LAST_BOOKMARK = 2.0
"""Seconds before a watch's end at which the server sends a last bookmark."""


class Content:
    """The body of a response, as much of aiohttp's StreamReader as clients use."""

    def __init__(self, total: float | None, read: float | None) -> None:
        self._buffer = bytearray()
        self._ended = False
        self._error: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._deadline = None if total is None else asyncio.get_running_loop().time() + total
        self._read_timeout = read

    async def readline(self) -> bytes:
        """The next line with its newline, what is left at the end, or ``b""``."""
        while True:
            if self._error is not None:
                raise self._error
            end = self._buffer.find(b"\n") + 1
            if end or self._ended:
                return self._taken(end or len(self._buffer))
            await self._more("readline")

    async def read(self) -> bytes:
        """All that comes up to the end."""
        while not self._ended and self._error is None:
            await self._more("read")
        if self._error is not None:
            raise self._error
        return self._taken(len(self._buffer))

    def at_eof(self) -> bool:
        return self._ended and not self._buffer

    def feed(self, data: bytes) -> None:
        self._buffer += data
        self._wake()

    def end(self, error: BaseException | None = None) -> None:
        """Ends the body; with an error, what has not been read is lost, as in aiohttp."""
        self._ended = True
        if self._error is None:
            self._error = error
        self._wake()

    def _taken(self, size: int) -> bytes:
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        return data

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _more(self, method: str) -> None:
        if self._waiter is not None:
            raise RuntimeError(
                f"{method}() called while another coroutine is already waiting for incoming data"
            )
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        quiet = None if self._read_timeout is None else loop.time() + self._read_timeout
        limits = [limit for limit in (self._deadline, quiet) if limit is not None]
        try:
            async with asyncio.timeout_at(min(limits, default=None)):
                await self._waiter
        except TimeoutError:
            if quiet is not None and loop.time() >= quiet:
                raise aiohttp("ServerTimeoutError")("Timeout on reading data from socket") from None
            raise
        finally:
            self._waiter = None


class Response:
    """The API's answer with ``_preload_content=False``: as much of aiohttp's
    ClientResponse as clients use, and no exception for any status."""

    def __init__(
        self, status: int, headers: CIMultiDictProxy[str] | None = None, *, timeouts: Timeouts = (None, None)
    ) -> None:
        self.status = status
        self.reason = _status.phrase(status)
        self.headers = headers or CIMultiDictProxy(CIMultiDict({"Content-Type": "application/json"}))
        self.content = Content(*timeouts)
        self.closed = False

    @classmethod
    def of(cls, status: int, answer: Object) -> Self:
        response = cls(status)
        response.content.feed(json.dumps(answer).encode())
        response.content.end()
        return response

    @classmethod
    def of_refusal(cls, error: Any) -> Self:
        response = cls(error.status, error.headers)
        response.content.feed((error.body or "").encode())
        response.content.end()
        return response

    async def read(self) -> bytes:
        """The body, to its end."""
        return await self.content.read()

    async def text(self) -> str:
        """The body as text."""
        return (await self.read()).decode()

    async def json(self) -> Any:
        """The body, read as JSON."""
        return json.loads(await self.read())

    def close(self) -> None:
        """Ends the connection."""
        if not self.closed:
            self.closed = True
            self.content.end(aiohttp("ClientConnectionError")("Connection closed"))

    def release(self) -> None:
        """As `close`."""
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()


Timeouts = tuple[float | None, float | None]
"""Seconds for a whole request, and between two pieces of its answer."""


class Watch(Response):
    """An open watch: the response that the client reads, and handles to break it with.

    Attributes:
        kind: The kind that it watches.
        selector: Which of these.
        version: The API version that its objects are shown in.
    """

    def __init__(
        self,
        kind: Kind,
        selector: Selector,
        version: str,
        revision: Callable[[], int],
        *,
        since: int,
        seconds: float,
        bookmarks: float | None,
        timeouts: Timeouts,
        on_end: Callable[[Watch], None],
    ) -> None:
        super().__init__(200, timeouts=timeouts)
        self.kind = kind
        self.selector = selector
        self.version = version
        self._revision = revision
        self._since = since
        self._bookmarks = bookmarks
        self._silent = False
        self._on_end = on_end
        loop = asyncio.get_running_loop()
        self._until = loop.time() + seconds
        self._end_timer = loop.call_later(seconds, self._timed_out)
        self._bookmark_timer: asyncio.TimerHandle | None = None
        self._plan_bookmark()

    def offer(self, change: Change) -> None:
        """Sends the event of a change, if this watch selects it."""
        if change.revision > self._since and (event := change.seen_by(self.selector)):
            self.send(*event)

    def send(self, kind: str, item: Object) -> None:
        """Sends one event."""
        if item.get("kind") == self.kind.kind:
            item = shown(item, self.version)
        event = {"type": kind, "object": item}
        self.feed(_encode(event).encode() + b"\n")

    def send_bookmark(self) -> None:
        """Sends a BOOKMARK event with the newest resourceVersion, allowed or not."""
        bookmark = {"apiVersion": f"{self.kind.group}/{self.version}", "kind": self.kind.kind}
        self.send("BOOKMARK", {**bookmark, "metadata": {"resourceVersion": str(self._revision())}})

    def feed(self, data: bytes) -> None:
        """Sends raw bytes: a line that is no event, or the first half of one."""
        if not self._silent:
            self.content.feed(data)

    def cut(self, error: BaseException | None = None) -> None:
        """Ends it.

        Args:
            error: What the client's reading raises, with what it has not read yet lost;
                an `ApiException` is sent as an ERROR event instead. None: an orderly end.
        """
        if isinstance(error, api_exceptions()):
            self.send("ERROR", json.loads(error.body))
            error = None
        self._stop()
        self.content.end(error)

    def silence(self) -> None:
        """Makes it a half-open connection: nothing more arrives, not even its end."""
        self._silent = True
        self._stop_timers()

    def close(self) -> None:
        """Ends the watch."""
        self._stop()
        super().close()

    def _timed_out(self) -> None:
        self.cut()

    def _plan_bookmark(self) -> None:
        if self._bookmarks is None:
            return
        loop = asyncio.get_running_loop()
        last = self._until - LAST_BOOKMARK - loop.time()
        if last > TIMER_SLACK:
            self._bookmark_timer = loop.call_later(min(self._bookmarks, last), self._bookmark)

    def _bookmark(self) -> None:
        self.send_bookmark()
        self._plan_bookmark()

    def _stop(self) -> None:
        self._stop_timers()
        self._on_end(self)

    def _stop_timers(self) -> None:
        self._end_timer.cancel()
        if self._bookmark_timer is not None:
            self._bookmark_timer.cancel()
