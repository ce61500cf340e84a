"""Shared sessions where two things happen at once: between managers, and within one."""

from __future__ import annotations

import asyncio

import pytest

from prodisco_sandbox._sessions.leases import PROBE

from .support import managed, now, settle
from .test_shared import SHARED, cluster

pytestmark = pytest.mark.looptime


# What holds files


async def test_a_dead_pod_with_a_volume_is_restarted_by_whoever_attaches() -> None:
    disks = {**SHARED, "workspace_storage": "1Gi"}
    async with cluster() as api, managed(api, **disks) as one, managed(api, **disks) as two:
        first = await one.get_client("s")
        assert first.sandbox is not None
        api.fail_pod(first.sandbox.name)
        await asyncio.sleep(1)
        second = await two.get_client("s")
        assert second.sandbox is not None
        assert second.sandbox.uid == first.sandbox.uid
        assert "delete" not in {r.verb for r in api.requests}


async def test_a_suspended_one_is_started_by_whoever_attaches_once_its_pod_is_gone() -> None:
    async with (
        cluster(pod_termination=3.0) as api,
        managed(api, **SHARED) as one,
        managed(api, **SHARED) as two,
    ):
        first = await one.get_client("s")
        assert first.sandbox is not None
        api.suspend(first.sandbox.name)
        await settle()
        asked, begun = len(api.requests), now()
        second = await two.get_client("s")
        assert second.sandbox is not None
        assert second.sandbox.uid == first.sandbox.uid
        [start] = [r for r in api.requests[asked:] if r.verb == "patch" and r.name != PROBE]
        assert start.body["spec"]["operatingMode"] == "Running"
        assert start.time >= begun + 3
