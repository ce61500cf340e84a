"""Figures, and how they are taken: interleaved rounds, medians, and passes of the event loop."""

from __future__ import annotations

import asyncio
import gc
import selectors
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured value, what it is compared with, and what it should reach.

    Attributes:
        scenario: The number of its scenario in docs/benchmarks.md.
        what: What was measured.
        cluster: The API behind it, where there is one.
        reference: The value that it is compared with, and `against` what that is.
        ratio: Value to reference; a median of the rounds' ratios where rounds were paired.
        target: What the ratio (without a ratio: the value) should reach at most; at least
            if `at_least` is set. None: shown beside the others.
        contender: Whose it is, where several do the same.
        sessions: How many there were, where that varies.
        note: What else there is to say.
    """

    scenario: int
    what: str
    value: float
    unit: str
    cluster: str = ""
    reference: float | None = None
    against: str = ""
    ratio: float | None = None
    target: float | None = None
    at_least: bool = False
    contender: str = ""
    sessions: int | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        reached = self.value if self.ratio is None else self.ratio
        return reached >= self.target if self.at_least else reached <= self.target


def compared(
    scenario: int, what: str, values: list[float], reference: list[float], unit: str, **fields: Any
) -> Figure:
    """The figure of two lists of the same rounds: their medians, and the median of the ratios."""
    ratios = [value / other for value, other in zip(values, reference, strict=True)]
    return Figure(
        scenario=scenario,
        what=what,
        value=statistics.median(values),
        reference=statistics.median(reference),
        ratio=statistics.median(ratios),
        unit=unit,
        **fields,
    )


def percentile(values: Iterable[float], percent: float) -> float:
    """The value that so many percent of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


async def interleaved(
    count: int, contenders: Mapping[str, Callable[[], Awaitable[float]]]
) -> dict[str, list[float]]:
    """Runs all contenders `count` times, in turns, so that other work on the machine meets all.

    Each round begins with another contender, since what comes first may warm up for the
    rest. What each returns is collected.
    """
    found: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for turn in range(count):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            gc.collect()
            found[name].append(await contenders[name]())
    return found


@dataclass
class Passes:
    """How long the event loop was busy at a stretch, from one poll for events to the next.

    Attributes:
        longest: The most work in a pass so far, in seconds of the thread's processor time.
        by_the_clock: The longest pass so far, in seconds: a task that beats like a heart would
            be late by so much. Other processes, and gRPC's own thread, make it longer than the
            work in it, the more the fewer processors there are.
    """

    longest: float = 0.0
    by_the_clock: float = 0.0

    def reset(self) -> None:
        self.longest = self.by_the_clock = 0.0

    def add(self, work: float, clock: float) -> None:
        self.longest = max(self.longest, work)
        self.by_the_clock = max(self.by_the_clock, clock)


class TimedSelector(selectors.DefaultSelector):
    """The selector of an event loop, which thereby knows when the loop works and when it waits."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = Passes()
        self._began: tuple[float, float] | None = None

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if self._began is not None:
            work, clock = self._began
            self.passes.add(time.thread_time() - work, time.perf_counter() - clock)
        found = super().select(timeout)
        self._began = (time.thread_time(), time.perf_counter())
        return found


def new_loop() -> asyncio.AbstractEventLoop:
    """An event loop whose passes are timed."""
    return asyncio.SelectorEventLoop(TimedSelector())


def passes() -> Passes:
    """The passes of the running loop, which `new_loop` made."""
    selector: TimedSelector = asyncio.get_running_loop()._selector  # type: ignore[attr-defined]
    return selector.passes


@asynccontextmanager
async def busy() -> AsyncIterator[Passes]:
    """The passes of the loop during the block, without the garbage collector's pauses."""
    found = passes()
    gc.collect()
    gc.disable()
    await asyncio.sleep(0.05)  # What was begun before is over.
    found.reset()
    try:
        yield found
    finally:
        gc.enable()
