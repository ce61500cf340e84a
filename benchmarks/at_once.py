"""Scenario 3: many sessions at once."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any

from .clusters import Access, Cluster
from .contenders import Contender, floor, library, polling, watch_per_session
from .measure import Figure, busy, interleaved
from .scale import Setting

WALL, REQUESTS, PASS = 1.5, 2.05, 5.0
CLOSING_AT_ONCE = 20
ARRIVALS_PER_PASS = 100
"""As many connections a server of asyncio's accepts in one pass of the event loop."""

Make = Callable[[Access], AbstractAsyncContextManager[Contender]]


@dataclass
class Found:
    """What was seen of one contender at one number of sessions; a value for each round."""

    seconds: list[float] = field(default_factory=list)
    longest: list[float] = field(default_factory=list)
    by_the_clock: list[float] = field(default_factory=list)
    ready: int = 0
    requests: Counter[str] = field(default_factory=Counter)
    connections: int | None = None


async def _storm(cluster: Cluster, make: Make, count: int, found: Found, patience: float) -> float:
    sessions = [f"session-{i}" for i in range(count)]
    async with cluster.access() as access:
        async with make(access) as contender:
            async with busy() as passes:
                begun = time.perf_counter()
                tasks = []
                for start in range(0, count, ARRIVALS_PER_PASS):
                    arriving = sessions[start : start + ARRIVALS_PER_PASS]
                    tasks += [asyncio.create_task(contender.open(session)) for session in arriving]
                    await asyncio.sleep(0)
                done, late = await asyncio.wait(tasks, timeout=patience)
                seconds = time.perf_counter() - begun
            found.longest.append(passes.longest * 1000)
            found.by_the_clock.append(passes.by_the_clock * 1000)
            found.connections = access.connections()
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)
            for task in done:
                task.result()
            found.ready = len(done)
            opened = [session for session, task in zip(sessions, tasks, strict=True) if task in done]
            await _close(contender, opened)
        found.requests = await settled(access)
    found.seconds.append(seconds)
    return seconds


async def settled(access: Access) -> Counter[str]:
    """How many requests there were; a watch may be noted only some time after its end."""
    requests: Counter[str] = Counter()
    while (now := await access.requests()) != requests:
        requests = now
        await asyncio.sleep(0.3)
    return requests


async def _close(contender: Contender, sessions: list[str]) -> None:
    remaining = iter(sessions)

    async def one_by_one() -> None:
        for session in remaining:
            await contender.close(session)

    await asyncio.gather(*(one_by_one() for _ in range(CLOSING_AT_ONCE)))


async def run(setting: Setting) -> list[Figure]:
    figures = []
    for cluster in setting.clusters:
        await cluster.delay(0.0, 0.0)
        for count in setting.scale.at_once:
            figures += await _measured(cluster, count, setting)
    return figures


async def _measured(cluster: Cluster, count: int, setting: Setting) -> list[Figure]:
    patience = setting.scale.patience
    makes: dict[str, Any] = {"floor": floor, "library": library}
    found = {name: Found() for name in ("floor", "library", "watch_per_session", "polling")}

    def contender(name: str, make: Make, limit: float) -> Any:
        return lambda: _storm(cluster, make, count, found[name], limit)

    rounds = {name: contender(name, make, 120.0) for name, make in makes.items()}
    await interleaved(setting.scale.at_once_rounds, rounds)
    for name, make in (("watch_per_session", watch_per_session), ("polling", polling)):
        await interleaved(1, {name: contender(name, make, patience)})
    return list(_figures(cluster, count, found))


def _figures(cluster: Cluster, count: int, found: dict[str, Found]) -> Any:
    lowest, ours = found["floor"], found["library"]
    fields: dict[str, Any] = {"scenario": 3, "cluster": cluster.name, "sessions": count, "unit": "s"}
    base = statistics.median(lowest.seconds)
    for name, seen in found.items():
        if name == "floor":
            continue
        seconds = statistics.median(seen.seconds)
        note = "" if seen.ready == count else f"{seen.ready} of {count} ready when it was stopped"
        yield Figure(
            what=f"{count} at once, {name}",
            contender=name,
            value=seconds,
            reference=base,
            against="the bare calls",
            ratio=seconds / base,
            target=WALL if name == "library" else None,
            note=note,
            **fields,
        )
    managed = sum(ours.requests.values()) / count
    verbs = ", ".join(f"{number} {verb}" for verb, number in sorted(ours.requests.items()) if number)
    yield Figure(
        what=f"{count} at once and closed, requests per session",
        value=managed,
        target=REQUESTS if count >= 100 else None,  # A list, a watch and a patch are for all.
        note=verbs,
        **{**fields, "unit": ""},
    )
    if ours.connections is not None and lowest.connections is not None:
        yield Figure(
            what=f"{count} at once, connections to the API server",
            value=ours.connections,
            reference=lowest.connections,
            against="the bare calls",
            ratio=ours.connections / lowest.connections,
            **{**fields, "unit": ""},
        )
    yield Figure(
        what=f"{count} at once, longest pass of the loop",
        value=statistics.median(ours.longest),
        reference=statistics.median(lowest.longest),
        against="the bare calls",
        target=PASS,
        note=_others(found, "longest"),
        **{**fields, "unit": "ms"},
    )
    yield Figure(
        what=f"{count} at once, longest pass by the clock",
        value=statistics.median(ours.by_the_clock),
        reference=statistics.median(lowest.by_the_clock),
        against="the bare calls",
        note=_others(found, "by_the_clock"),
        **{**fields, "unit": "ms"},
    )


def _others(found: dict[str, Found], which: str) -> str:
    names = ("floor", "watch_per_session")
    return ", ".join(f"{name} {statistics.median(getattr(found[name], which)):.1f}" for name in names)
