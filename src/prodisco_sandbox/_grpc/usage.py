"""How much of a client is in use, and since when it is not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


class Usage:
    """The account of a client's calls and asynchronous executions, by the clock `now`.

    Attributes:
        executions: Deadlines of asynchronous executions, by id: each is in flight until it is
            taken out, or until then.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self.executions: dict[str, float] = {}
        self._now = now
        self._calls = 0
        self._last_used = 0.0

    @property
    def in_flight(self) -> int:
        self._forget_expired()
        return self._calls + len(self.executions)

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

    def _forget_expired(self) -> None:
        if self.executions:
            now = self._now()
            for execution_id, deadline in list(self.executions.items()):
                if deadline <= now:
                    del self.executions[execution_id]
                    self._last_used = max(self._last_used, deadline)
