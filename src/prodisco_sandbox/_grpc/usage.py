"""How much of a client is in use, and since when it is not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


class Usage:
    """The account of a client's calls and asynchronous executions, by the clock `now`."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._calls = 0
        self._deadlines: dict[str, float] = {}
        self._last_used = 0.0

    @property
    def in_flight(self) -> int:
        self._forget_expired()
        return self._calls + len(self._deadlines)

    @property
    def last_used(self) -> float:
        self._forget_expired()
        return self._last_used

    def begin(self) -> None:
        self._calls += 1

    def end(self) -> None:
        self._calls -= 1
        self._last_used = self._now()

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        self.begin()
        try:
            yield
        finally:
            self.end()

    def start_execution(self, execution_id: str, deadline: float) -> None:
        """Counts an asynchronous execution until it has ended, at most until its deadline."""
        self._deadlines[execution_id] = deadline

    def end_execution(self, execution_id: str) -> None:
        self._deadlines.pop(execution_id, None)

    def has_execution(self, execution_id: str) -> bool:
        return execution_id in self._deadlines

    def forget_executions(self) -> None:
        self._deadlines.clear()

    def _forget_expired(self) -> None:
        if not self._deadlines:
            return
        now = self._now()
        for execution_id, deadline in list(self._deadlines.items()):
            if deadline <= now:
                del self._deadlines[execution_id]
                self._last_used = max(self._last_used, deadline)
