"""Callers inside anyio's cancel scopes, which cancel again at every await until they are left."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import anyio
import pytest

from prodisco_sandbox import SandboxManager, SandboxManagerConfig
from tests.support.managers import Clients, LoopTimeApi, managed
from tests.support.patience import PATIENCE

# In real time: anyio keeps the loop spinning while it cancels, and virtual time stands still.


async def hold(manager: SandboxManager) -> None:
    async with manager.session("s"):
        await anyio.sleep(3600)


async def get_under_a_held_create(manager: SandboxManager) -> None:
    await manager.get_client("s")


async def initialise(manager: SandboxManager) -> None:
    await manager.on_session_initialized("s")


@pytest.mark.parametrize("use", [get_under_a_held_create, initialise, hold])
@pytest.mark.parametrize("verb", ["create", "patch", "delete"])
async def test_a_caller_whose_scope_is_cancelled_leaves_a_sound_manager(
    use: Callable[[SandboxManager], Awaitable[None]], verb: str
) -> None:
    async with LoopTimeApi(auto_ready=True) as api:
        async with managed(api, max_sessions=1) as manager:
            api.faults.add(verb, latency=0.01)  # type: ignore[arg-type]
            with anyio.move_on_after(0.005):
                await use(manager)
            assert manager.stats().waiting == 0
            async with asyncio.timeout(PATIENCE):
                client = await manager.get_client("s")
            assert client.sandbox is not None
            assert api.count("create") == 1
        assert api.objects == []


async def test_a_close_whose_scope_is_cancelled_goes_on() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        await manager.get_client("s")
        api.faults.add("delete", latency=0.02)
        with anyio.CancelScope() as scope:
            scope.cancel()
            await manager.on_session_closed("s")
        assert scope.cancelled_caught
        await api.until(lambda: not api.objects)


async def test_a_scope_that_is_cancelled_around_the_manager_waits_for_its_shutdown() -> None:
    async with LoopTimeApi(auto_ready=True) as api:
        api.faults.add("delete", latency=0.02)
        with anyio.CancelScope() as scope:
            async with managed(api) as manager:
                await manager.get_client("s")
                scope.cancel()
                await anyio.sleep(1)
        assert scope.cancelled_caught
        assert api.objects == []
        assert manager.stats().closing == 0


async def test_a_shutdown_whose_scope_is_cancelled_goes_on() -> None:
    async with LoopTimeApi(auto_ready=True) as api:
        config = SandboxManagerConfig(mode="multi")
        manager = SandboxManager(config, custom_objects_api=api, client_factory=Clients())
        await manager.get_client("s")
        api.faults.add("delete", latency=0.02)
        with anyio.CancelScope() as scope:
            scope.cancel()
            await manager.shutdown()
        assert scope.cancelled_caught
        await manager.shutdown()
        assert api.objects == []
