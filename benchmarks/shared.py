"""Scenario 10: sessions that several managers serve side by side."""

from __future__ import annotations

import asyncio
import gc
import json
import statistics
import sys
import time
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import looptime
from grpc_health.v1 import health_pb2, health_pb2_grpc

from prodisco_sandbox import SandboxManager, SandboxManagerConfig
from prodisco_sandbox._cluster.manifest import SANDBOX
from prodisco_sandbox._cluster.metadata import lease_time, session_hash
from prodisco_sandbox.testing import FakeCustomObjectsApi

from .clusters import FakeCluster
from .contenders import library
from .lookups import Unconnected
from .measure import Figure, compared
from .scale import Scale, Setting

SCENARIO = 10
SHARED: dict[str, Any] = {"shared": True, "instance_id": "benchmark"}
REPLICAS = (1, 3, 10)
EVERY = 20.0
"""Seconds from one use of a session to the next; each use lasts one second."""
PER_HOUR = 2 * 3600 / SandboxManagerConfig(mode="multi").session_idle_timeout
"""Patches of a session that is used all the time: one each half `session_idle_timeout`."""
PER_KNOWN = 1.0
"""KiB."""
PER_EVENT = 1.2
"""An event among all known sessions to one among a hundred."""
FEW = 100


async def run(setting: Setting) -> list[Figure]:
    scale = setting.scale
    return [
        *await _attached(setting),
        *[await asyncio.to_thread(_patches, count, scale.hours) for count in REPLICAS],
        await _memory(scale),
        *await _known_to_many(scale),
    ]


async def _attached(setting: Setting) -> list[Figure]:
    """`get_client` of a manager that has never had the session, beside a connection and a health check."""
    sessions = [f"session-{i}" for i in range(setting.scale.ready)]
    async with (
        FakeCluster(setting.sandbox_port).access() as access,
        library(access, **SHARED) as elsewhere,
        library(access, **SHARED) as here,
    ):
        for session in sessions:
            await elsewhere.open(session)
        while here.manager.stats().known < len(sessions):
            await asyncio.sleep(0.01)
        before = (await access.requests()).total()
        attached, bare = [], []
        for number, session in enumerate(sessions):
            client = await elsewhere.manager.get_client(session)
            for turn in (0, 1) if number % 2 else (1, 0):
                begun = time.perf_counter()
                if turn:
                    await here.open(session)
                    attached.append((time.perf_counter() - begun) * 1000)
                else:
                    await _check(client.target)
                    bare.append((time.perf_counter() - begun) * 1000)
        requests = (await access.requests()).total() - before
    what = "attaching to a session that was made elsewhere"
    return [
        compared(
            SCENARIO,
            what,
            attached,
            bare,
            "ms",
            cluster="in memory",
            against="a connection and a health check",
            note="ratio to a connection and a health check",
        ),
        Figure(
            scenario=SCENARIO, what=f"{what}, requests", value=requests / len(sessions), unit="", target=0
        ),
    ]


async def _check(target: str) -> None:
    async with grpc.aio.insecure_channel(target) as channel:
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())


def _patches(replicas: int, hours: int) -> Figure:
    """In virtual time: a session whose uses go to the replicas in turn."""
    with asyncio.Runner(loop_factory=looptime.new_event_loop) as runner:
        found = runner.run(_used(replicas, hours))
    return Figure(
        scenario=SCENARIO,
        what=f"patches per session-hour, {replicas} {'replicas' if replicas > 1 else 'replica'}",
        value=found,
        unit="",
        target=PER_HOUR,
        note=f"used every {EVERY:g} s for {hours} h, by one replica after another",
    )


async def _used(replicas: int, hours: int) -> float:
    async with FakeCustomObjectsApi(auto_ready=True, history=100, now=_now) as api, AsyncExitStack() as stack:
        managers = [await stack.enter_async_context(_manager(api)) for _ in range(replicas)]
        for manager in managers:  # Each asks once whether it may patch.
            await manager.get_client("session")
        before = api.count("patch")
        for use in range(int(hours * 3600 / EVERY)):
            async with managers[use % replicas].session("session"):
                await asyncio.sleep(1.0)
            await asyncio.sleep(EVERY - 1.0)
        return (api.count("patch") - before) / hours


def _now() -> float:
    return asyncio.get_running_loop().time()


@asynccontextmanager
async def _manager(api: FakeCustomObjectsApi) -> AsyncIterator[SandboxManager]:
    config = SandboxManagerConfig(mode="multi", max_sessions=10_000, **SHARED)
    async with SandboxManager(
        config,
        custom_objects_api=api,
        client_factory=Unconnected,
        wall_clock=_now,
    ) as manager:
        yield manager


async def _memory(scale: Scale) -> Figure:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.shared", str(scale.known)),
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[1],
    )
    out, _ = await process.communicate()
    return Figure(
        scenario=SCENARIO,
        what=f"a session that is known and not in use here, of {scale.known}",
        value=json.loads(out),
        unit="KiB",
        target=PER_KNOWN,
    )


async def _known(count: int) -> float:
    """KiB that a manager keeps for each session that it has heard of."""
    objects = _objects(count + FEW)
    async with FakeCustomObjectsApi() as api, _manager(api) as manager:
        while not manager.is_ready:
            await asyncio.sleep(0)
        tracemalloc.start()
        taken = []
        for batch in (objects[:FEW], objects[FEW:]):
            for text in batch:
                manager._engine.changed(json.loads(text))  # type: ignore[union-attr]
            gc.collect()
            taken.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        assert manager.stats().known == count + FEW
    return (taken[1] - taken[0]) / count / 1024


async def _known_to_many(scale: Scale) -> list[Figure]:
    """Processor time of managers that know few and many sessions, in turns."""
    events: dict[int, list[float]] = {FEW: [], scale.known: []}
    counts: list[float] = []
    async with FakeCustomObjectsApi() as api, AsyncExitStack() as stack:
        engines = {}
        for known in events:
            manager = await stack.enter_async_context(_manager(api))
            while not manager.is_ready:
                await asyncio.sleep(0)
            assert manager._engine is not None
            engines[known] = manager._engine
            for text in _objects(known):
                manager._engine.changed(json.loads(text))
        told = [json.loads(text) for text in _objects(FEW)]
        for _ in range(scale.rounds):
            for known, engine in engines.items():
                gc.collect()
                begun = time.thread_time()
                for sandbox in told:
                    engine.changed(sandbox)
                events[known].append((time.thread_time() - begun) / len(told) * 1e6)
            begun = time.thread_time()
            assert not engines[scale.known].table.is_full
            counts.append((time.thread_time() - begun) * 1e6)
    return [
        compared(
            SCENARIO,
            f"an event of the watch, {scale.known} sessions known",
            events[scale.known],
            events[FEW],
            "µs",
            target=PER_EVENT,
            against=f"{FEW} known",
            note=f"ratio to {FEW} known",
        ),
        Figure(
            scenario=SCENARIO,
            what=f"counting the slots for a new session, {scale.known} sessions known",
            value=statistics.median(counts),
            unit="µs",
        ),
    ]


def _objects(count: int) -> list[str]:
    """What the API server says of sessions of the group that another manager has made."""
    config = SandboxManagerConfig(mode="multi", **SHARED)
    made = []
    for number in range(count):
        session = f"session-{number}"
        name = SANDBOX.name(session)
        body = SANDBOX.body(config, "v1beta1", name, session_hash(session), lease_time(4e9, 0))
        body["metadata"] |= {"uid": f"{number:032x}", "resourceVersion": str(number), "generation": 1}
        ready = {"type": "Ready", "status": "True", "reason": "DependenciesReady", "observedGeneration": 1}
        address = f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"
        body["status"] = {"conditions": [ready], "podIPs": [address]}
        made.append(json.dumps(body))
    return made


if __name__ == "__main__":
    print(json.dumps(asyncio.run(_known(int(sys.argv[1])))))
