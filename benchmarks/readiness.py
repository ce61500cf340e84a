"""Scenario 2: from the controller's word that a sandbox is ready to a client that is healthy."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

from .clusters import Cluster
from .contenders import Contender, floor, library, polling, watch_per_session
from .measure import Figure, percentile
from .scale import Setting

MEDIAN, P95 = 1.5, 2.0
SOON = (0.02, 0.04)
"""Seconds from creation to readiness: by then the answer to the create has been read."""
ANYTIME = (0.0, 1.0)
"""The same for polling, whose turn comes each second."""
POLLING_AT_ONCE = 10

_sessions = itertools.count()


async def _opened(contender: Contender, written: Callable[[], Awaitable[dict[str, float]]]) -> float:
    session = f"session-{next(_sessions)}"
    await contender.open(session)
    ready = time.perf_counter()
    seconds = ready - await _moment(contender.sandbox(session), written)
    await contender.close(session)
    return seconds


async def _moment(name: str, written: Callable[[], Awaitable[dict[str, float]]]) -> float:
    # The news of a write may overtake its acknowledgement.
    for _ in range(100):
        found = await written()
        if name in found:
            return found[name]
        await asyncio.sleep(0.01)
    raise RuntimeError(f"nobody has written the status of {name}")


async def _one_by_one(cluster: Cluster, count: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    await cluster.delay(*SOON)
    async with AsyncExitStack() as stack:
        contenders = []
        for make in (floor, library, watch_per_session):
            access = await stack.enter_async_context(cluster.access())
            contender: Contender = await stack.enter_async_context(make(access))
            contenders.append((make.__name__, contender, access.written))
            await _opened(contender, access.written)  # The first pays for what is made once.
        for turn in range(count):
            for name, contender, written in contenders[turn % 3 :] + contenders[: turn % 3]:
                found.setdefault(name, []).append(await _opened(contender, written))
    return found


async def _polled(cluster: Cluster, count: int) -> list[float]:
    """Ten at a time, since each takes a second; its own work is next to nothing."""
    found: list[float] = []
    await cluster.delay(*ANYTIME)
    async with cluster.access() as access, polling(access) as contender:
        written: dict[str, float] = {}

        async def known() -> dict[str, float]:
            written.update(await access.written())
            return written

        for _ in range(max(1, count // POLLING_AT_ONCE)):
            opened = (_opened(contender, known) for _ in range(POLLING_AT_ONCE))
            found += await asyncio.gather(*opened)
    return found


async def run(setting: Setting) -> list[Figure]:
    figures = []
    for cluster in setting.clusters:
        found = await _one_by_one(cluster, setting.scale.ready)
        found["polling"] = await _polled(cluster, max(POLLING_AT_ONCE, setting.scale.ready // 4))
        in_ms = {name: [value * 1000 for value in values] for name, values in found.items()}
        for summary, measure, target in (
            ("median", statistics.median, MEDIAN),
            ("p95", lambda values: percentile(values, 95), P95),
        ):
            lowest = measure(in_ms["floor"])
            for name in ("library", "watch_per_session", "polling"):
                figures.append(
                    Figure(
                        scenario=2,
                        what=f"ready to client, {name}, {summary}",
                        contender=name,
                        cluster=cluster.name,
                        value=measure(in_ms[name]),
                        unit="ms",
                        reference=lowest,
                        against="the bare calls",
                        ratio=measure(in_ms[name]) / lowest,
                        target=target if name == "library" else None,
                    )
                )
    return figures
