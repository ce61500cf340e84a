"""Tasks with an owner: named, kept, and ended together; and how much they do at a time."""

from __future__ import annotations

import asyncio
import contextvars
import math
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from .._log import get_logger

RESTART_PAUSE = 1.0
END_TIMEOUT = 1.0

T = TypeVar("T")


async def outlast(task: asyncio.Task[T]) -> T:
    """The result of a task that clean-up depends on, waited for even if the caller is cancelled.

    anyio repeats a cancellation at every await, so it is raised only when the task has
    ended; the task must be bounded.
    """
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as e:
            cancelled = e
    if cancelled is not None:
        raise cancelled
    return task.result()


class OwnedTasks:
    """The tasks of one owner.

    The loop itself holds only weak references, so the tasks are kept here until they
    end. They run in an empty context: a task serves all callers, so its log events and
    spans must not carry the context variables of the caller that happened to start it.
    Whoever waits for a task deals with its failure.
    """

    def __init__(self, events: Counter[str] | None = None) -> None:
        self._log = get_logger("manager", events)
        self._tasks: set[asyncio.Task[Any]] = set()

    def spawn(self, coroutine: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        context = contextvars.Context()
        task = asyncio.create_task(coroutine, name=name, context=context)
        self._tasks.add(task)
        task.add_done_callback(self._ended, context=context)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._log.debug("task_ended", task=task.get_name(), reason=repr(error))

    def supervise(self, run: Callable[[], Awaitable[None]], name: str) -> asyncio.Task[None]:
        """Runs something for ever: a failure is logged, and it is started again."""

        async def forever() -> None:
            while True:
                try:
                    return await run()
                except Exception:  # noqa: BLE001 - whatever it is, it is logged
                    self._log.exception("task_failed", task=name)
                    await asyncio.sleep(RESTART_PAUSE)

        return self.spawn(forever(), name)

    async def end(self) -> list[str]:
        """Cancels all tasks but the caller's, and waits a moment for their end.

        Returns:
            The names of tasks that would not end.
        """
        pending = self._tasks - {asyncio.current_task()}
        for task in pending:
            task.cancel()
        if pending:
            _, pending = await asyncio.wait(pending, timeout=END_TIMEOUT)
        return [task.get_name() for task in pending]


class Pace:
    """Lets a few tasks go on in each pass of the event loop, first come first served.

    What hundreds of tasks have to do at the same moment would else be done in one pass,
    and everything else in the process would stand still meanwhile.
    """

    def __init__(self, per_pass: int) -> None:
        self._per_pass = self._left = per_pass
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def __call__(self) -> None:
        loop = asyncio.get_running_loop()
        if self._left:
            if self._left == self._per_pass:
                loop.call_soon(self._next_pass)
            self._left -= 1
            return
        turn = loop.create_future()
        self._waiting.append(turn)
        await turn

    def _next_pass(self) -> None:
        self._left = self._per_pass
        while self._waiting and self._left:
            turn = self._waiting.popleft()
            if not turn.done():  # cancelled
                turn.set_result(None)
                self._left -= 1
        if self._left < self._per_pass:
            asyncio.get_running_loop().call_soon(self._next_pass)


class RequestTurns:
    """Lets so many requests go on at once, first come first served, and new connections one by one.

    Each of these has its TLS handshake, half a millisecond of the loop's time, and those of
    requests that begin together would be done in one pass.

    Args:
        most: How many at once.
        pause: Seconds between two that need a new connection, after the first few: there never
            were so many at once.
        kept: Seconds without any request after which connections are taken for closed.
    """

    FEW = 4

    def __init__(self, most: int, *, pause: float, kept: float) -> None:
        self._turns = asyncio.Semaphore(most)
        self._pause, self._kept = pause, kept
        self._running = self._connections = 0
        self._ended = self._next = -math.inf

    async def __aenter__(self) -> None:
        await self._turns.acquire()
        now = asyncio.get_running_loop().time()
        if not self._running and now - self._ended > self._kept:
            self._connections = 0
        self._running += 1
        if self._running <= self._connections:
            return
        self._connections = self._running
        self._next = max(self._next, now - self.FEW * self._pause) + self._pause
        if self._next > now:
            try:
                await asyncio.sleep(self._next - now)
            except BaseException:
                await self.__aexit__()
                raise

    async def __aexit__(self, *_: object) -> None:
        self._running -= 1
        self._ended = asyncio.get_running_loop().time()
        self._turns.release()
