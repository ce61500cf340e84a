"""Progress notifications with the output as it comes."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any, Self

from mcp.server.mcpserver import Context

from .._log import get_logger

log = get_logger("mcp")

INTERVAL = 0.1
"""Seconds between notifications: many small prints make one message."""
HEARTBEAT = 10.0
"""Seconds of silence after which a notification without output shows that the call still runs."""
FLUSH_TIMEOUT = 1.0
"""How long the last output may take to be sent, in seconds."""
MOST_TEXT = 4_000
"""Characters of output in one notification."""


class Progress:
    """Sends a call's output to the client while the call goes on.

    It has its own task, so that a client that does not read does not hold up reading from
    the sandbox. ``progress`` of a notification is the time since the call began, in
    seconds; ``message`` is the new output. The SDK sends nothing where the client has not
    asked for progress.
    """

    def __init__(self, ctx: Context[Any, Any]) -> None:
        self._ctx = ctx
        self._waiting: list[str] = []
        self._room = MOST_TEXT
        self._skipped = 0
        self._news = asyncio.Event()
        self._over = asyncio.Event()
        self._begun = asyncio.get_running_loop().time()
        self._progress = 0.0
        self._task: asyncio.Task[None] | None = None
        self.doing = "waiting for a sandbox"
        """The text of a notification without output."""

    def feed(self, text: str) -> None:
        kept = text[: self._room]
        self._room -= len(kept)
        self._skipped += len(text) - len(kept)
        if kept:
            self._waiting.append(kept)
        self._news.set()

    async def __aenter__(self) -> Self:
        # Without checking for a progress token: a client in the same process needs none.
        self._task = asyncio.create_task(self._run(), name="sandbox-progress")
        self._task.add_done_callback(_ended)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._task.cancel()

    async def flush(self) -> None:
        """Sends the last output, if the client takes it soon; nothing is sent after it."""
        self._over.set()
        self._news.set()
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=FLUSH_TIMEOUT)

    async def _run(self) -> None:
        while not self._over.is_set():
            if await _happens(self._news, HEARTBEAT):
                await self._send(self._take())
            else:
                await self._send(f"[{self.doing}]")
            await _happens(self._over, INTERVAL)
        await self._send(self._take())

    async def _send(self, text: str) -> None:
        if text:
            elapsed = asyncio.get_running_loop().time() - self._begun
            # Each value must be above the one before.
            self._progress = max(round(elapsed, 3), self._progress + 0.001)
            await self._ctx.report_progress(self._progress, message=text)

    def _take(self) -> str:
        text = "".join(self._waiting)
        if self._skipped:
            text += f"\n[... {self._skipped:,} characters left out ...]\n"
        self._waiting, self._room, self._skipped = [], MOST_TEXT, 0
        self._news.clear()
        return text


async def _happens(event: asyncio.Event, timeout: float) -> bool:
    """Whether an event is set within so many seconds."""
    try:
        async with asyncio.timeout(timeout):
            await event.wait()
    except TimeoutError:
        return False
    return True


def _ended(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.warning("progress_failed", error=repr(error))
