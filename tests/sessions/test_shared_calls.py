"""Calls of a client whose session is shared: real ones, with a wall clock that jumps."""

from __future__ import annotations

import time

import pytest

from prodisco_sandbox import SandboxError, SandboxManager, SandboxManagerConfig
from prodisco_sandbox._cluster.metadata import unix_time
from prodisco_sandbox._sessions.leases import PROBE
from prodisco_sandbox.testing import FakeCustomObjectsApi, FakeSandboxServer
from tests.support.managers import LoopTimeApi

T, SLACK = 600.0, 300.0


def moved_to(api: FakeCustomObjectsApi) -> list[float | None]:
    """The deadlines that were written after the first."""
    patches = [r.body for r in api.requests if r.verb == "patch" and r.name != PROBE]
    return [unix_time(body["spec"]["shutdownTime"]) for body in patches]


async def test_calls_of_a_client_move_the_deadline() -> None:
    ahead = 0.0
    async with FakeSandboxServer() as server, LoopTimeApi(auto_ready=True, now=time.time) as api:
        config = SandboxManagerConfig(
            mode="multi", endpoint=lambda _: server.target, shared=True, instance_id="group"
        )
        async with SandboxManager(
            config, custom_objects_api=api, wall_clock=lambda: time.time() + ahead
        ) as manager:
            client = await manager.get_client("s")
            ahead = SLACK - 60
            await client.list_cache()
            assert moved_to(api) == []
            ahead = SLACK - 10
            await client.health_check()
            assert moved_to(api) == []
            await client.execute("print(1)", timeout=20)
            assert len(moved_to(api)) == 1
            assert moved_to(api)[-1] == pytest.approx(time.time() + ahead + 25 + T + SLACK, abs=2)
            ahead += SLACK + 1
            async with client.execute_stream("print(1)", timeout=20) as stream:
                assert [chunk async for chunk in stream]
            assert len(moved_to(api)) == 2
            ahead += SLACK + 1
            started = await client.execute_async("print(1)", timeout=100)
            assert len(moved_to(api)) == 3
            assert moved_to(api)[-1] == pytest.approx(time.time() + ahead + 105 + T + SLACK, abs=2)
            await client.wait_for_execution(started.execution_id)
            await manager.on_session_closed("s")
            with pytest.raises(SandboxError, match="closed"):
                await client.execute("print(1)")
