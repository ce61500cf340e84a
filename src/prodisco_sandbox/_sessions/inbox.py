"""What a session's life is told while it works or waits."""

from __future__ import annotations

import asyncio
import enum


class News(enum.Flag):
    """Why a life that waits goes on."""

    SLOT = enum.auto()
    """It has a slot."""
    SEEN = enum.auto()
    """Its object has changed: what is known of it is new."""
    LOOK = enum.auto()
    """Read the object now, or check a suspect session."""


class Inbox:
    """News for one life, each kind once; and the end of the session, which interrupts any step."""

    __slots__ = ("_life", "_news", "_waiter", "closed")

    def __init__(self) -> None:
        self.closed = False
        self._life: asyncio.Task[None] | None = None
        self._news = News(0)
        self._waiter: asyncio.Future[None] | None = None

    def open(self) -> None:
        """The life begins: from now on `close` interrupts it."""
        self._life = asyncio.current_task()

    def post(self, news: News) -> None:
        self._news |= news
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def close(self) -> None:
        """The session has ended: cancels the step that its life is in, unless the life itself says so."""
        self.closed = True
        # A task that is cancelled before its first step never runs: it finds the inbox closed.
        if self._life is not None and self._life is not asyncio.current_task():
            self._life.cancel()

    def take(self, news: News) -> bool:
        """Whether there is such news, which then counts as told."""
        found = news in self._news
        self._news &= ~news
        return found

    def arrival(self) -> asyncio.Future[None]:
        """Done as soon as there is news; no coroutine, since every ready session waits for it."""
        self._waiter = asyncio.get_running_loop().create_future()
        if self._news:
            self._waiter.set_result(None)
        return self._waiter

    async def get(self) -> News:
        await self.arrival()
        return self.take_all()

    def take_all(self) -> News:
        news, self._news, self._waiter = self._news, News(0), None
        return news
