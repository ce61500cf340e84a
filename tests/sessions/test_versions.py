"""The API version changes, goes and comes back while a manager runs."""

from __future__ import annotations

import asyncio

import pytest

from prodisco_sandbox import (
    SandboxUnavailableError,
)
from tests.support.managers import LoopTimeApi, alive, managed, now, settle

pytestmark = pytest.mark.looptime


async def test_the_api_version_may_change_while_it_runs() -> None:
    async with LoopTimeApi(auto_ready=True, versions=["v1alpha1"]) as api:
        async with managed(api) as manager:
            await manager.get_client("a")
            assert api.objects[0]["spec"]["replicas"] == 1
            api.versions = ["v1beta1"]
            await manager.get_client("b")
            made = api.get(manager.sandbox_name("b"))
            assert made is not None
            assert made["spec"]["operatingMode"] == "Running"
            assert "replicas" not in made["spec"]
            await manager.on_session_closed("a")
            assert len(api.objects) == 1
            assert manager.stats().lost == 0
        assert api.objects == []


async def test_the_watch_finds_the_new_api_version_by_itself() -> None:
    async with (
        LoopTimeApi(auto_ready=True, versions=["v1alpha1"]) as api,
        managed(api) as manager,
    ):
        await manager.get_client("a")
        api.versions = ["v1beta1"]
        await asyncio.sleep(5)
        assert [watch.version for watch in api.watches] == ["v1beta1"]
        api.delete_now(manager.sandbox_name("a"))
        await settle()
        assert manager.stats().lost == 1


async def test_a_cluster_without_agent_sandbox_gets_an_error_that_says_what_to_install() -> None:
    async with LoopTimeApi(versions=[]) as api, managed(api) as manager:
        with pytest.raises(SandboxUnavailableError, match="install agent-sandbox"):
            await manager.get_client("s")
        assert now() == pytest.approx(0.0, abs=1e-3)
        await settle()
        assert manager.stats().closing == 0


async def test_a_version_that_was_served_comes_back() -> None:
    # An API server that starts says 404 in plain text to everything.
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        await manager.get_client("a")
        versions, api.versions = api.versions, ()
        waiting = asyncio.create_task(manager.get_client("b"))
        closing = asyncio.create_task(manager.on_session_closed("a"))
        await asyncio.sleep(20)
        assert not waiting.done()
        assert closing.done()
        api.versions = versions
        await waiting
        await asyncio.sleep(60)
        assert alive(api) == [manager.sandbox_name("b")]


async def test_a_create_that_met_no_such_version_leaves_nothing_to_look_for() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api, ready_timeout=10.0) as manager:
        await manager.get_client("a")
        api.versions = ()
        with pytest.raises(SandboxUnavailableError):
            await manager.get_client("b")
        await settle()
        assert manager.stats().closing == 0, "nothing was created, so there is nothing to delete"
        api.versions = ("v1beta1",)
