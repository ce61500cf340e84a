"""Scenario 6: the reaper's tick, and the end of many sessions at once."""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import Any

from .clusters import FakeCluster
from .contenders import library
from .lookups import ready_manager
from .measure import Figure, busy
from .scale import Setting

TICK, AT_ONCE, PASS = 1.0, 50, 5.0
BOUND = 120.0
"""Seconds after which reaping is given up."""


async def run(setting: Setting) -> list[Figure]:
    count = setting.scale.idle
    names = [f"session-{i}" for i in range(count)]
    async with ready_manager(names) as manager:
        engine: Any = manager._engine
        usual, longest = [], []
        for _ in range(setting.scale.rounds):
            usual.append(await _tick(engine))
            for session in engine.table.current.values():
                # Used by calls of its client alone, so that the reaper has to ask each client.
                session.last_used -= 10_000
                session.client._connection.usage._last_used = asyncio.get_running_loop().time()
            longest.append(await _tick(engine))
        assert manager.stats().ready == count
    what = f"a reaper tick over {count:,} sessions"
    return [
        Figure(
            scenario=6,
            what=f"{what} that were asked for lately",
            value=statistics.median(usual),
            unit="ms",
            target=TICK,
        ),
        Figure(
            scenario=6,
            what=f"{what} that only their clients know to be in use",
            value=statistics.median(longest),
            unit="ms",
            note="then not again until session_idle_timeout has passed once more",
        ),
        *await _reaped(setting, names),
    ]


async def _tick(engine: Any) -> float:
    """The work of one, in ms."""
    begun = time.thread_time()
    await engine._tick()
    took = time.thread_time() - begun
    await asyncio.sleep(0.01)
    return took * 1000


class _Counting:
    """The API, with a count of the deletes that are under way."""

    def __init__(self, api: Any) -> None:
        self._api = api
        self.most = self._now = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._api, name)

    async def delete_namespaced_custom_object(self, *args: Any, **kwargs: Any) -> Any:
        self._now += 1
        self.most = max(self.most, self._now)
        try:
            return await self._api.delete_namespaced_custom_object(*args, **kwargs)
        finally:
            self._now -= 1


async def _reaped(setting: Setting, names: list[str]) -> list[Figure]:
    cluster = FakeCluster(setting.sandbox_port)
    async with cluster.access() as access:
        access.api.faults.add("delete", latency=0.005)
        counting: Any = _Counting(access.api)
        access.api = counting
        settings = {"session_idle_timeout": 1_000.0, "idle_check_interval": 0.2}
        async with asyncio.timeout(BOUND), library(access, **settings) as contender:
            await asyncio.gather(*map(contender.open, names))
            engine: Any = contender.manager._engine
            async with busy() as passes:
                for session in engine.table.current.values():
                    session.last_used -= 2_000
                    # "Never" is 0.0, which the clock of a machine just booted is not far from.
                    session.client._connection.usage._last_used -= 2_000
                begun = time.perf_counter()
                while contender.manager.stats().ready or contender.manager.stats().closing:
                    await asyncio.sleep(0.05)
                seconds = time.perf_counter() - begun
            assert contender.manager.stats().reaped == len(names)
    return [
        Figure(
            scenario=6,
            what=f"{len(names):,} sessions reaped at once, most deletes under way",
            value=counting.most,
            unit="",
            target=AT_ONCE,
            note=f"all closed and deleted in {seconds:.2f} s, at 5 ms a delete",
        ),
        Figure(
            scenario=6,
            what=f"{len(names):,} sessions reaped at once, longest pass of the loop",
            value=passes.longest * 1000,
            unit="ms",
            target=PASS,
        ),
    ]
