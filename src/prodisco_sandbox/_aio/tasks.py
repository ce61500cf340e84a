"""Tasks with an owner: named, kept, and ended together."""

from __future__ import annotations

import asyncio
import contextvars
from collections import Counter
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
        """Cancels all tasks but the caller's; returns the names of those that would not end."""
        pending = self._tasks - {asyncio.current_task()}
        for task in pending:
            task.cancel()
        if pending:
            _, pending = await asyncio.wait(pending, timeout=END_TIMEOUT)
        return [task.get_name() for task in pending]
