"""What a session's life is told while it works or waits."""

from __future__ import annotations

import asyncio
import enum


class News(enum.Enum):
    """Why a life that waits goes on."""

    SLOT = "it has a slot"
    SEEN = "its object has changed: what is known of it is new"
    LOOK = "read the object now, or check a suspect session"


class Inbox:
    """News for one life, each kind once; and the end of the session, which interrupts any step."""

    __slots__ = ("_life", "_news", "_waiter", "closed")

    def __init__(self) -> None:
        self.closed = False
        self._life: asyncio.Task[None] | None = None
        self._news: set[News] = set()
        self._waiter: asyncio.Future[None] | None = None

    def open(self) -> None:
        """The life begins: from now on `close` interrupts it."""
        self._life = asyncio.current_task()

    def post(self, news: News) -> None:
        self._news.add(news)
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
        self._news.discard(news)
        return found

    async def get(self) -> set[News]:
        """Waits for news, and takes all there are."""
        while not self._news:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        news, self._news = self._news, set()
        return news
