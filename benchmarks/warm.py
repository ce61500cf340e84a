"""Scenario 8: a session on a warm pool, beside the bare claim and beside a cold start."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

from kubernetes_asyncio.client import CoreV1Api, CustomObjectsApi

from prodisco_sandbox import SandboxManager, SandboxManagerConfig
from prodisco_sandbox._cluster.claim import CLAIM
from prodisco_sandbox._cluster.manifest import SANDBOX
from prodisco_sandbox.local import LocalCluster
from prodisco_sandbox.testing import FakeCustomObjectsApi

from .at_once import settled
from .clusters import Access, FakeCluster, RealCluster
from .contenders import Contender, Library, floor, library, ready_address
from .measure import Figure, interleaved, percentile
from .scale import Scale, Setting

POOL = "python"
TARGETS, IN_MEMORY = (1.2, 1.5), (1.5, 2.0)
"""Median and p95, times the bare claim. In memory that is client-side work alone."""
REQUESTS, LOCAL = 2.05, 5.0
SUMMARIES: dict[str, Callable[[list[float]], float]] = {
    "median": statistics.median,
    "p95": lambda values: percentile(values, 95),
}
COLD_AND_WARM = ("cold", 1), ("warm", 1)
NEEDED = ("KUBEBUILDER_ASSETS", "AGENT_SANDBOX_DIR", "AGENT_SANDBOX_PODS")
PATIENCE = 120.0
STEADY = {"idle_check_interval": 3_600.0}
"""A manager that has no session when it looks for idle ones ends its watch, and lists again later."""

Key = tuple[str, int]
Found = dict[Key, list[float]]
"""Milliseconds of each session, by contender and how many were asked for at once."""
IsFull = Callable[[], Awaitable[bool]]

_sessions = itertools.count()


class Pool(NamedTuple):
    """A contender's way in, and whether its pool is full, with nothing left of earlier sessions."""

    access: Access
    is_full: IsFull


MakePool = Callable[[int], contextlib.AbstractAsyncContextManager[Pool]]


def are_ready(sandboxes: list[dict[str, Any]], count: int) -> bool:
    return len(sandboxes) == count and all(map(ready_address, sandboxes))


async def has_ready(api: FakeCustomObjectsApi, count: int) -> bool:
    return are_ready(api.objects, count)


@asynccontextmanager
async def pool_in_memory(cluster: FakeCluster, members: int) -> AsyncIterator[Pool]:
    async with cluster.access(auto_ready=lambda _: None) as access:  # The controller of claims runs.
        access.api.add_warm_pool(POOL, members, namespace=access.namespace)
        yield Pool(access, functools.partial(has_ready, access.api, members))


@asynccontextmanager
async def real_pool(cluster: RealCluster, server: Any, members: int) -> AsyncIterator[Pool]:
    """One of the default pods, in a namespace of its own."""
    async with cluster.access() as access, server.api_client() as client:
        client.user_agent = "setup"  # Its requests do not count.
        core, custom, namespace = CoreV1Api(client), CustomObjectsApi(client), access.namespace
        at = (CLAIM.group, CLAIM.versions[0], namespace)
        config = SandboxManagerConfig(mode="multi", namespace=namespace, sandbox_port=access.sandbox_port)
        pod = SANDBOX.body(config, SANDBOX.versions[0], "any", "any")["spec"]["podTemplate"]["spec"]
        template = {"networkPolicyManagement": "Unmanaged", "podTemplate": {"spec": pod}}
        pool = {"replicas": members, "sandboxTemplateRef": {"name": POOL}}
        for kind, spec in (("SandboxTemplate", template), ("SandboxWarmPool", pool)):
            body = {"apiVersion": "/".join(at[:2]), "kind": kind, "metadata": {"name": POOL}, "spec": spec}
            await custom.create_namespaced_custom_object(*at, f"{kind.lower()}s", body)

        async def is_full() -> bool:
            sandboxes = (SANDBOX.group, SANDBOX.versions[0], namespace, SANDBOX.plural)
            found = await custom.list_namespaced_custom_object(*sandboxes)
            answer = await core.list_namespaced_pod(namespace, _preload_content=False)
            pods = json.loads(await answer.read())["items"]
            return are_ready(found["items"], members) and len(pods) == members

        yield Pool(access, is_full)


@asynccontextmanager
async def real_pools() -> AsyncIterator[MakePool]:
    """Pools under the real controller, with a program that plays the node: its pods are real servers."""
    from tests.support.controller import ControlPlane

    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        binaries, agent_sandbox, node = (Path(os.environ[name]) for name in NEEDED)
        plane = ControlPlane(binaries, agent_sandbox, node, directory)
        stack.callback(plane.stop)
        await asyncio.to_thread(plane.start)
        cluster = RealCluster(plane, None, directory / "audit.log", plane.sandbox_port)
        yield functools.partial(real_pool, cluster, plane)


async def open_at_once(contender: Contender, count: int, full: list[IsFull], found: list[float]) -> float:
    """Opens sessions together; adds the milliseconds that each of them took."""
    async with asyncio.timeout(PATIENCE):
        while not all([await is_full() for is_full in full]):
            await asyncio.sleep(0.05)
    sessions = [f"session-{next(_sessions)}" for _ in range(count)]
    begun = time.perf_counter()

    async def opened(session: str) -> float:
        await contender.open(session)
        return (time.perf_counter() - begun) * 1000

    taken = await asyncio.gather(*map(opened, sessions))
    found += taken
    await asyncio.gather(*map(contender.close, sessions))
    return max(taken)


async def measure(make: MakePool, cluster: str, scale: Scale) -> list[Figure]:
    is_real, at_once = cluster != FakeCluster.name, scale.warm_at_once
    members = {"floor": at_once, "warm": at_once} | ({"cold": 0} if is_real else {})
    found: Found = {}
    async with AsyncExitStack() as accesses, AsyncExitStack() as stack:
        pools = {name: await accesses.enter_async_context(make(n)) for name, n in members.items()}
        full = [pool.is_full for pool in pools.values()]
        ours = await stack.enter_async_context(library(pools["warm"].access, warm_pool=POOL, **STEADY))
        contenders: dict[str, Contender] = {
            "floor": await stack.enter_async_context(floor(pools["floor"].access, POOL)),
            "warm": ours,
        }
        if is_real:
            contenders["cold"] = await stack.enter_async_context(library(pools["cold"].access, **STEADY))
        await taking_turns(contenders, 1, 1, full, {})  # The first pays for what is made once.
        await taking_turns(contenders, 1, scale.warm, full, found)
        contenders.pop("cold", None)
        rounds = scale.at_once_rounds * (1 if is_real else 5)  # Nothing has to start in memory.
        await taking_turns(contenders, at_once, rounds, full, found)
        stats = ours.manager.stats()
        await stack.aclose()
        requests = await settled(pools["warm"].access)
    figures = []
    for count in (1, at_once):
        for summary, target in zip(SUMMARIES, TARGETS if is_real else IN_MEMORY, strict=True):
            which = ("warm", count), ("floor", count)
            figures.append(beside(cluster, found, summary, *which, target=target))
    sessions = stats.warm + stats.cold
    verbs = ", ".join(f"{number} {verb}" for verb, number in sorted(requests.items()) if number)
    figures.append(
        Figure(
            scenario=8,
            cluster=cluster,
            what="warm and closed, requests per session",
            value=sum(requests.values()) / sessions,
            unit="",
            target=REQUESTS if sessions >= 100 else None,  # Lists, a watch and a patch are for all.
            note=f"{verbs}; {stats.warm} started warm, {stats.cold} cold",
        )
    )
    return [*figures, beside(cluster, found, "median", *COLD_AND_WARM)] if is_real else figures


async def taking_turns(
    contenders: Mapping[str, Contender], count: int, turns: int, full: list[IsFull], found: Found
) -> None:
    runs = {}
    for name, contender in contenders.items():
        taken = found.setdefault((name, count), [])
        runs[name] = functools.partial(open_at_once, contender, count, full, taken)
    await interleaved(turns, runs)


def beside(cluster: str, found: Found, summary: str, ours: Key, theirs: Key, **target: Any) -> Figure:
    value, reference = SUMMARIES[summary](found[ours]), SUMMARIES[summary](found[theirs])
    name, count = ours
    return Figure(
        scenario=8,
        cluster=cluster,
        what=f"{name}, {count} at once, {summary}",
        sessions=count,
        value=value,
        unit="ms",
        reference=reference,
        against=theirs[0],
        ratio=value / reference,
        note=f"{theirs[0]} {reference:.1f}",
        **target,
    )


async def on_this_machine(turns: int) -> Figure:
    """LocalCluster, where a cold start is one of Python."""
    found: Found = {}
    full: list[IsFull] = []
    contenders = {}
    async with AsyncExitStack() as stack:
        for name, members in (("cold", 0), ("warm", 1)):
            cluster = await stack.enter_async_context(LocalCluster(warm=members))
            api = cluster.custom_objects_api
            manager = SandboxManager(cluster.config(), custom_objects_api=api)
            contenders[name] = Library(await stack.enter_async_context(manager))
            full.append(functools.partial(has_ready, api, members))
        await taking_turns(contenders, 1, 1, full, {})
        await taking_turns(contenders, 1, turns, full, found)
    return beside("LocalCluster", found, "median", *COLD_AND_WARM, target=LOCAL, at_least=True)


async def run(setting: Setting) -> list[Figure]:
    memory, scale = setting.clusters[0], setting.scale
    assert isinstance(memory, FakeCluster)
    await memory.delay(0.0, 0.0)
    figures = await measure(functools.partial(pool_in_memory, memory), memory.name, scale)
    figures.append(await on_this_machine(scale.warm))
    if missing := [name for name in NEEDED if not os.environ.get(name)]:
        print(f"  not on agent-sandbox's controller: {', '.join(missing)} not set", file=sys.stderr)
        return figures
    async with real_pools() as make:
        return figures + await measure(make, "agent-sandbox", scale)
