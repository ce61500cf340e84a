"""One run of something, shared by all who ask for it at the same time."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from ..errors import SandboxError, SandboxUnavailableError

T = TypeVar("T")


class SingleFlight(Generic[T]):
    """Shares one run of a coroutine function among all who call at the same time.

    A caller's cancellation does not reach the run, and neither do its context variables.
    A success is kept, a failure is not.
    """

    def __init__(self, name: str, run: Callable[[], Awaitable[T]]) -> None:
        self._name = name
        self._run = run
        self._task: asyncio.Task[T] | None = None

    async def __call__(self) -> T:
        task = self._task
        if task is None:
            task = self._task = asyncio.create_task(
                self._call(), name=self._name, context=contextvars.Context()
            )
            task.add_done_callback(self._ended)
        if not task.done():
            await asyncio.wait({task})
        if task.cancelled():
            raise SandboxUnavailableError(f"{self._name} was cut off: the connection was closed")
        error = task.exception()
        if error is None:
            return task.result()
        raise error.copy_for_waiter() if isinstance(error, SandboxError) else error

    async def _call(self) -> T:
        return await self._run()

    def _ended(self, task: asyncio.Task[T]) -> None:
        # Here, since those who waited may all have been cancelled.
        if (task.cancelled() or task.exception() is not None) and self._task is task:
            self._task = None

    def forget(self) -> None:
        """Drops a success, so that the next call runs again."""
        if self._task is not None and self._task.done():
            self._task = None

    async def aclose(self) -> T | None:
        """Ends a run under way. Returns what an earlier one gave."""
        task, self._task = self._task, None
        if task is None:
            return None
        task.cancel()
        await asyncio.wait({task})
        return None if task.cancelled() or task.exception() is not None else task.result()
