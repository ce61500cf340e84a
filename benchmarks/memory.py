"""Scenario 4: memory of a session that is ready, and of one that is over."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
import tracemalloc
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from .clusters import FakeCluster
from .contenders import library
from .lookups import ready_manager
from .measure import Figure
from .scale import Setting

PER_SESSION, RETAINED = 8.0, 0.016
"""KiB. Of what is over, nothing may stay; 16 bytes are what a dict may grow by."""
FIRST = 50
"""What is made once is made with the first so many, which do not count."""
BATCH = 50


async def run(setting: Setting) -> list[Figure]:
    scale, port = setting.scale, setting.sandbox_port
    first = min(FIRST, scale.held)
    held = {
        what: await _in_process("held", what, str(first), str(scale.held), str(port))
        for what in ("channel", "library")
    }
    beyond = {unit: held["library"][unit] - held["channel"][unit] for unit in ("python", "resident")}
    retained = await _in_process("finished", str(scale.before), str(scale.finished))
    return [
        Figure(
            scenario=4,
            what="a ready session beyond a bare channel, Python's memory",
            value=beyond["python"],
            unit="KiB",
            target=PER_SESSION,
            note=f"the channel itself: {held['channel']['python']:.1f} KiB",
        ),
        Figure(
            scenario=4,
            what="a ready session beyond a bare channel, resident memory",
            value=beyond["resident"],
            unit="KiB",
            note=f"the channel itself: {held['channel']['resident']:.1f} KiB",
        ),
        Figure(
            scenario=4,
            what=f"retained per finished session after {scale.finished}",
            value=retained["retained"],
            unit="KiB",
            target=RETAINED,
        ),
    ]


async def _in_process(*arguments: str) -> Any:
    """Runs this module in a process of its own, where nothing else takes or gives back memory."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.memory", *arguments),
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[1],
    )
    out, _ = await process.communicate()
    return json.loads(out)


async def _held(what: str, first: int, count: int, port: int) -> dict[str, float]:
    """KiB for each of `count` channels or sessions, once `first` are there."""
    if what == "channel":
        return await _growth(first, count, Channels(port).open)
    async with FakeCluster(port).access() as access, library(access) as contender:
        # The API in memory holds a Sandbox for each: what only it holds is not the manager's.
        return await _growth(first, count, contender.open, access.forget)


class Channels:
    def __init__(self, port: int) -> None:
        self._port = port
        self._channels: list[grpc.aio.Channel] = []

    async def open(self, session: str) -> None:
        number = len(self._channels)
        address = f"127.1.{number // 250}.{number % 250 + 1}"
        channel = grpc.aio.insecure_channel(f"{address}:{self._port}")
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        self._channels.append(channel)


async def _growth(
    first: int, count: int, make: Callable[[str], Awaitable[None]], tidy: Callable[[], None] = lambda: None
) -> dict[str, float]:
    async def taken() -> tuple[int, int]:
        await asyncio.sleep(0.1)
        tidy()
        gc.collect()
        return tracemalloc.get_traced_memory()[0], _resident()

    tracemalloc.start()
    for i in range(first):
        await make(f"session-{i}")
    python, resident = await taken()
    for i in range(first, first + count):
        await make(f"session-{i}")
    python_after, resident_after = await taken()
    tracemalloc.stop()
    return {
        "python": (python_after - python) / count / 1024,
        "resident": (resident_after - resident) / count / 1024,
    }


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


async def _finished(before: int, count: int) -> dict[str, float]:
    """KiB that each of `count` sessions leaves behind; every second is reaped, the others closed."""

    async def come_and_go(sessions: list[str]) -> None:
        await asyncio.gather(*map(manager.get_client, sessions))
        await asyncio.gather(*map(manager.on_session_closed, sessions[::2]))
        while manager.stats().ready or manager.stats().closing:
            await asyncio.sleep(0.002)

    settings = {"session_idle_timeout": 0.001, "idle_check_interval": 0.005, "max_sessions": BATCH}
    async with ready_manager([], history=100, **settings) as manager:
        tracemalloc.start()
        taken = []
        for sessions in (before, count):
            for start in range(0, sessions, BATCH):
                await come_and_go([f"{sessions}-{i}" for i in range(start, start + BATCH)])
            gc.collect()
            taken.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
    return {"retained": (taken[1] - taken[0]) / count / 1024}


def main(what: str, *arguments: str) -> None:
    if what == "held":
        found = asyncio.run(_held(arguments[0], *map(int, arguments[1:])))
    else:
        found = asyncio.run(_finished(*map(int, arguments)))
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
