"""Waiting for what must happen, on a machine that may be slow, busy, or away for a while."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest

PATIENCE = 60.0
"""Seconds in which whatever must happen does happen: only a hang takes longer, not a slow machine."""


async def until(
    condition: Callable[[], object], what: str = "", seconds: float = PATIENCE, *, pause: float = 0.01
) -> None:
    """Returns once the condition holds, or what it has to be awaited for.

    Raises:
        AssertionError: It does not in time.
    """
    end = time.monotonic() + seconds
    while True:
        answer = condition()
        if isinstance(answer, Awaitable):
            answer = await answer
        if answer:
            return
        assert time.monotonic() < end, f"waited {seconds} s for {what or condition}"
        await asyncio.sleep(pause)


def wait(condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    """The same for code without a loop."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.02)


def put_forward(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Makes it so much later for the event loop: what waits for a time until then has waited enough.

    Unlike a short wait this leaves everything the time that it needs before.
    """
    loop = asyncio.get_running_loop()
    clock = loop.time
    monkeypatch.setattr(loop, "time", lambda: clock() + seconds)
