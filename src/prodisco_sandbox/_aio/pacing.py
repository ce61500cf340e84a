"""How much is done at a time, and how long to wait before the next try."""

from __future__ import annotations

import asyncio
import random
from collections import deque


def backoff(attempt: int, *, first: float = 0.1, most: float = 5.0, jitter: float = 0.5) -> float:
    """Seconds to wait before the next try: doubling, with jitter, so that retries spread out.

    `attempt` counts the tries that have failed before the latest one; `jitter` is the share of the pause
    that is random.
    """
    pause = min(most, first * 2.0 ** min(attempt, 30))
    return pause * (1 - jitter + jitter * random.random())


class Pace:
    """Lets a few tasks go on in each pass of the event loop, first come first served.

    Hundreds of tasks that may go on at the same moment would do so in one pass, and hold up
    everything else in the process.
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
