"""A limit in real time for what runs in virtual time: hours of it take milliseconds."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

from _patience import PATIENCE


class Spinning(KeyboardInterrupt):
    """Nothing less gets out of an event loop."""


def _spinning(_number: int, _frame: object) -> None:
    raise Spinning


def run_bounded(loop: asyncio.AbstractEventLoop, awaitable: Any) -> Any:
    """Runs a loop with virtual time until something is done; fails if no time passes any more."""
    signal.signal(signal.SIGALRM, _spinning)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        return loop.run_until_complete(awaitable)
    except Spinning as e:
        raise AssertionError("it is busy for ever, and no time passes") from e
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
