"""Scenario 1: what a request pays for the client of a session that is ready."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from prodisco_sandbox import SandboxClient, SandboxManager, SandboxManagerConfig
from prodisco_sandbox.testing import FakeCustomObjectsApi

from .measure import Figure, compared, interleaved
from .scale import Setting

GET_CLIENT, SESSION = 6.0, 20.0
SIZES = (1, 100, 1_000)
SPREAD = 1.2


class Unconnected(SandboxClient):
    """A client that takes its server for healthy: nothing here makes a call."""

    async def wait_for_healthy(self, timeout: float) -> bool:
        return True


@asynccontextmanager
async def ready_manager(
    sessions: list[str], *, history: int = 1_000, **settings: Any
) -> AsyncIterator[SandboxManager]:
    """A manager with these sessions, on an API in memory and without sockets."""
    config = SandboxManagerConfig(**{"mode": "multi", "max_sessions": len(sessions), **settings})
    async with (
        FakeCustomObjectsApi(auto_ready=True, history=history) as api,
        SandboxManager(config, custom_objects_api=api, client_factory=Unconnected) as manager,
    ):
        await asyncio.gather(*map(manager.get_client, sessions))
        yield manager


class Sessions:
    """The contenders, over the same sessions in the same order."""

    def __init__(self, manager: SandboxManager, clients: dict[str, SandboxClient], order: list[str]) -> None:
        self._manager = manager
        self._clients = clients
        self._order = order

    async def _bare(self, session: str) -> SandboxClient:
        return self._clients[session]

    async def bare(self) -> float:
        """A coroutine that returns an item of a dict."""
        return await self._timed(self._bare)

    async def get_client(self) -> float:
        return await self._timed(self._manager.get_client)

    async def session(self) -> float:
        session = self._manager.session
        begun = time.thread_time()
        for name in self._order:
            async with session(name):
                pass
        return (time.thread_time() - begun) / len(self._order)

    async def contextlib(self) -> float:
        """What `session` would be as a generator function."""

        @contextlib.asynccontextmanager
        async def session(name: str) -> AsyncIterator[SandboxClient]:
            yield self._clients[name]

        begun = time.thread_time()
        for name in self._order:
            async with session(name):
                pass
        return (time.thread_time() - begun) / len(self._order)

    async def _timed(self, call: Callable[[str], Awaitable[SandboxClient]]) -> float:
        begun = time.thread_time()
        for session in self._order:
            await call(session)
        return (time.thread_time() - begun) / len(self._order)


async def run(setting: Setting) -> list[Figure]:
    scale = setting.scale
    figures = []
    ratios = {}
    for size in SIZES:
        names = [f"session-{i}" for i in range(size)]
        order = list(itertools.islice(itertools.cycle(names), scale.lookups))
        async with ready_manager(names) as manager:
            clients = {name: await manager.get_client(name) for name in names}
            contenders = Sessions(manager, clients, order)
            found = await interleaved(
                scale.rounds,
                {
                    "bare": contenders.bare,
                    "get_client": contenders.get_client,
                    "session": contenders.session,
                    "contextlib": contenders.contextlib,
                },
            )
        in_us = {name: [value * 1e6 for value in values] for name, values in found.items()}
        bare: dict[str, Any] = {"reference": in_us["bare"], "unit": "µs", "against": "a bare coroutine"}
        count = f"{size} session{'s' if size > 1 else ''}"
        lookup = compared(1, f"get_client, {count}", in_us["get_client"], target=GET_CLIENT, **bare)
        figures += [lookup, compared(1, f"session(), {count}", in_us["session"], target=SESSION, **bare)]
        ratios[size] = lookup.ratio or 0.0
        if size == SIZES[-1]:
            figures.append(
                compared(1, f"an empty contextlib generator, {count}", in_us["contextlib"], **bare)
            )
    slowest, quickest = max(ratios.values()), min(ratios.values())
    figures.append(
        Figure(
            scenario=1,
            what=f"get_client, the same at {', '.join(map(str, SIZES))} sessions",
            value=slowest,
            unit="×",
            reference=quickest,
            against="the least of them",
            ratio=slowest / quickest,
            target=SPREAD,
            note="of the ratios: the bare coroutine slows down too, as the sessions outgrow the caches",
        )
    )
    return figures
