"""Suspended sessions, and what others do at the same moment."""

from __future__ import annotations

import asyncio

import pytest

from prodisco_sandbox import SandboxManager, SandboxManagerConfig
from prodisco_sandbox._cluster.metadata import LABEL_INSTANCE
from prodisco_sandbox.testing import FakeCustomObjectsApi, Request

from .support import Clients, managed
from .test_suspension import (
    NAME,
    SUSPENDS,
    suspended,
    suspending,
)

pytestmark = pytest.mark.looptime


def suspends(request: Request) -> bool:
    return "Suspended" in str(request.body)


async def claim(api: FakeCustomObjectsApi, name: str = NAME) -> None:
    """Another manager takes the object."""
    body = {"metadata": {"labels": {LABEL_INSTANCE: "another"}}}
    await api.patch_namespaced_custom_object(
        *("agents.x-k8s.io", "v1beta1", "prodisco", "sandboxes", name, body),
        _content_type="application/merge-patch+json",
    )


# Its end


@pytest.mark.parametrize("steps", range(12))
async def test_a_close_at_any_moment_of_the_resumption_deletes_it(steps: int) -> None:
    async with suspending() as (api, manager):
        await suspended(api, manager)
        waiting = asyncio.create_task(manager.get_client("s"))
        for _ in range(steps):
            await asyncio.sleep(0)
        await manager.on_session_closed("s")
        await asyncio.gather(waiting, return_exceptions=True)
        if manager.has_session("s"):
            await manager.on_session_closed("s")
        assert api.objects == []


async def test_a_close_after_the_shutdown_asks_for_nothing() -> None:
    async with suspending() as (api, manager):
        await suspended(api, manager)
        await manager.shutdown()
        before, tasks = len(api.requests), asyncio.all_tasks()
        await manager.on_session_closed("s")
        await manager.on_session_closed("another")
        assert len(api.requests) == before
        assert asyncio.all_tasks() == tasks
    async with FakeCustomObjectsApi(auto_ready=1.0) as api, managed(api, **SUSPENDS) as manager:
        await manager.shutdown()
        await manager.on_session_closed("s")
        assert api.requests == []


async def test_a_close_of_a_manager_that_was_never_used_asks_for_nothing() -> None:
    async with FakeCustomObjectsApi(auto_ready=1.0) as api:
        config = SandboxManagerConfig(mode="multi", instance_id="me", **SUSPENDS)
        manager = SandboxManager(config, custom_objects_api=api, client_factory=Clients())
        await manager.shutdown()
        await manager.on_session_closed("s")
        assert api.requests == []
