"""An API server that was away lies for a while when it comes back: it forbids everything."""

from __future__ import annotations

import aiohttp
import pytest

from prodisco_sandbox import SandboxPermissionError
from prodisco_sandbox.testing import FakeCustomObjectsApi

from .support import managed, now

pytestmark = pytest.mark.looptime


async def test_what_nobody_asked_for_before_it_was_away_is_asked_again() -> None:
    async with FakeCustomObjectsApi(auto_ready=True) as api:
        async with managed(api) as manager:
            await manager.get_client("s")
            api.faults.add("delete", error=aiohttp.ClientConnectionError, times=1)
            api.faults.add("delete", error=403, times=3)
        assert api.objects == []
        assert api.count("delete") == 5


async def test_a_lost_create_is_looked_for_until_it_may_be_read() -> None:
    async with FakeCustomObjectsApi(auto_ready=True) as api, managed(api) as manager:
        api.faults.add("create", lost=True, times=1)
        api.faults.add("get", error=403, times=3)
        await manager.get_client("s")
        assert (api.count("create"), api.count("get")) == (1, 4)


async def test_a_refusal_counts_once_it_has_been_back_for_a_while() -> None:
    async with FakeCustomObjectsApi(auto_ready=True) as api, managed(api) as manager:
        api.faults.add("create", lost=True, times=1)
        with api.faults.add("get", error=403), pytest.raises(SandboxPermissionError):
            await manager.get_client("s")
        assert 9 < now() < 16


async def test_without_an_absence_a_refusal_counts_at_once() -> None:
    async with FakeCustomObjectsApi(auto_ready=True) as api, managed(api) as manager:
        api.faults.add("create", error=403)
        with pytest.raises(SandboxPermissionError):
            await manager.get_client("s")
        assert now() < 0.1
