"""What state machines in virtual time share: their loop, with a limit in real time, and how long they run."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

from hypothesis import HealthCheck, settings

from prodisco_sandbox.testing import FakeCustomObjectsApi
from tests.support.counts import full
from tests.support.patience import PATIENCE


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


def end(loop: asyncio.AbstractEventLoop, api: FakeCustomObjectsApi) -> None:
    """Ends a loop with whatever a test has left on it."""
    run_bounded(loop, api.aclose())
    for task in asyncio.all_tasks(loop):
        task.cancel()
    run_bounded(loop, asyncio.sleep(0))
    loop.close()


def tries(examples: int, *, quick: int, steps: int) -> settings:
    """How long a machine is tried: as MACHINE_EXAMPLES says, else in full in CI alone."""
    return settings(
        max_examples=int(os.environ.get("MACHINE_EXAMPLES") or full(examples, quick=quick)),
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
