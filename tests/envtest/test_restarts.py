"""The API server is killed and comes back: nothing is lost, nothing is left."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.support.envtest import Controller, Namespace
from tests.support.managers import Clients
from tests.support.patience import PATIENCE, until

pytestmark = pytest.mark.envtest


async def restart(namespace: Namespace) -> None:
    await asyncio.to_thread(namespace.server.restart)


def ids(count: int) -> list[str]:
    return [f"session-{i}" for i in range(count)]


async def test_a_restart_in_the_middle_of_creations(namespace: Namespace, controller: Controller) -> None:
    async with namespace.managed(max_sessions=100, ready_timeout=2 * PATIENCE) as manager:
        creations: list[asyncio.Task[Any]] = [
            asyncio.create_task(manager.get_client(session)) for session in ids(100)
        ]
        await asyncio.wait(creations, return_when=asyncio.FIRST_COMPLETED)
        namespace.server.kill_server()  # The loop stands still: nothing goes on meanwhile.
        unfinished = manager.stats().creating
        assert unfinished > 10
        await restart(namespace)
        clients = await asyncio.gather(*creations)
        assert len(set(clients)) == 100
        assert await namespace.names() == set(map(manager.sandbox_name, ids(100)))
        stats = manager.stats()
        assert (stats.created, stats.recreated, stats.lost, stats.failed) == (100, 0, 0, 0)
    assert not await namespace.list()
    assert len(controller.created) == 100


async def test_a_restart_while_sessions_are_idle(namespace: Namespace, controller: Controller) -> None:
    clients = Clients()
    async with namespace.managed(clients, max_sessions=20) as manager:
        before = await asyncio.gather(*map(manager.get_client, ids(20)))
        namespace.server.kill_server()
        assert await asyncio.gather(*map(manager.get_client, ids(20))) == before
        await restart(namespace)
        gone = manager.sandbox_name("session-0")
        await namespace.delete(gone)
        await until(lambda: manager.stats().lost == 1, "the watch to be back")
        assert await asyncio.gather(*map(manager.get_client, ids(20)[1:])) == before[1:]
        assert [client for client in clients.made if client.closed] == [before[0]]
        again = await manager.get_client("session-0")
        assert again is not before[0]
        assert (manager.stats().lost, manager.stats().created) == (1, 21)
    assert not await namespace.list()


async def test_a_restart_in_the_middle_of_deletions(namespace: Namespace, controller: Controller) -> None:
    async with namespace.managed(max_sessions=100, idle_check_interval=0.5) as manager:
        await asyncio.gather(*map(manager.get_client, ids(100)))
        closing = [asyncio.create_task(manager.on_session_closed(session)) for session in ids(100)]
        await asyncio.wait(closing, return_when=asyncio.FIRST_COMPLETED)
        namespace.server.kill_server()
        assert manager.stats().closing > 10
        await restart(namespace)
        await asyncio.gather(*closing)  # Handed to the background, or done.
        await until(lambda: manager.stats().closing == 0, "the deletions")
        assert not await namespace.list()


async def test_a_shutdown_while_the_server_is_away(namespace: Namespace, controller: Controller) -> None:
    async with namespace.managed(max_sessions=20, shutdown_timeout=60) as manager:
        await asyncio.gather(*map(manager.get_client, ids(20)))
        namespace.server.kill_server()
        shutdown = asyncio.create_task(manager.shutdown())
        await restart(namespace)
        await shutdown
    assert not await namespace.list()
