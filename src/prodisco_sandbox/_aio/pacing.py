"""How much is done at a time, and how long to wait before the next try."""

from __future__ import annotations

import asyncio
import math
import random
from collections import deque


def backoff(attempt: int, *, first: float = 0.1, most: float = 5.0, jitter: float = 0.5) -> float:
    """Seconds to wait before the next try: doubling, with jitter, so that retries spread out.

    Args:
        attempt: How many tries have failed before the latest one.
        first: The pause after the first failure.
        most: The longest pause.
        jitter: The share of the pause that is random.
    """
    pause = min(most, first * 2.0 ** min(attempt, 30))
    return pause * (1 - jitter + jitter * random.random())


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
