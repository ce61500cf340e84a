"""Many sessions at once: one watch, few connections, few requests."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from tests.support.envtest import Controller, Namespace, connections

pytestmark = pytest.mark.envtest


async def test_120_sessions_at_once_are_as_fast_as_the_watch(
    namespace: Namespace, controller: Controller
) -> None:
    # By polling nobody would be ready in time.
    async with namespace.managed(max_sessions=120, ready_poll_interval=150, ready_timeout=120) as manager:
        ids = [f"session-{i}" for i in range(120)]
        clients = await asyncio.gather(*map(manager.get_client, ids))
        assert len(set(clients)) == 120
        assert await namespace.names() == set(map(manager.sandbox_name, ids))
    assert not await namespace.list()
    assert namespace.requests() == {"create": 120, "delete": 120, "list": 1, "watch": 1, "patch": 1}


async def test_500_sessions_at_once_share_one_watch_and_the_pool(
    namespace: Namespace, controller: Controller
) -> None:
    async with namespace.managed(max_sessions=500) as manager:
        async with connections_counted(namespace.server.port) as counted:
            ids = [f"session-{i}" for i in range(500)]
            clients = await asyncio.gather(*map(manager.get_client, ids))
            assert len(set(clients)) == 500
            await asyncio.gather(*map(manager.on_session_closed, ids))
        # 50 for the manager's requests, its watch, and the controller's own eight and watch.
        assert 1 < max(counted) <= 60
    assert not await namespace.list()
    requests = namespace.requests()
    # A server ends the watch of a client that is too busy to read it.
    assert 1 <= requests.pop("watch") <= 10
    assert requests == {"create": 500, "delete": 500, "list": 1, "patch": 1}


@contextlib.asynccontextmanager
async def connections_counted(port: int) -> AsyncIterator[list[int]]:
    """How many connections this process has to a port of this machine, time and again."""
    counted: list[int] = []

    async def count() -> None:
        while True:
            counted.append(await asyncio.to_thread(connections, port))
            await asyncio.sleep(0.01)

    task = asyncio.create_task(count())
    try:
        yield counted
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
