"""Which version of agents.x-k8s.io is spoken, and how it is found out."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from prodisco_sandbox import (
    SandboxUnavailableError,
)
from prodisco_sandbox._cluster.api_errors import (
    RetryableError,
)
from prodisco_sandbox._cluster.metadata import name
from prodisco_sandbox._cluster.requests import SandboxResources
from prodisco_sandbox.testing import FakeCustomObjectsApi, plain_error
from tests.support.managers import PlainApi, now, settle
from tests.support.resources import body, cluster, settings

pytestmark = pytest.mark.looptime


async def test_the_newest_version_is_asked_for_once_however_many_need_it() -> None:
    async with cluster() as (api, resources):
        api.faults.add("discovery", latency=1.0)
        versions = await asyncio.gather(*(resources.api_version() for _ in range(20)))
        assert set(versions) == {"v1beta1"}
        assert api.count("discovery") == 1
        await asyncio.sleep(10_000)
        assert await resources.api_version() == "v1beta1"
        assert api.count("discovery") == 1


async def test_an_old_cluster_serves_the_old_version() -> None:
    async with cluster(versions=["v1alpha1"]) as (api, resources):
        assert await resources.api_version() == "v1alpha1"
        await resources.create(body(version="v1alpha1"))
        assert api.requests[-1].version == "v1alpha1"


@pytest.mark.parametrize("version", ["v1alpha1", "v1beta1"])
async def test_a_version_that_was_configured_is_not_asked_for(version: str) -> None:
    async with cluster(version) as (api, resources):
        assert await resources.api_version() == version
        await resources.get("x")
        assert api.count("discovery") == 0
        assert api.requests[-1].version == version


async def test_a_configured_version_that_is_not_served_is_named() -> None:
    async with cluster("v1beta1", versions=["v1alpha1"]) as (_, resources):
        with pytest.raises(SandboxUnavailableError, match=r"serve agents.x-k8s.io/v1beta1\? see api_version"):
            await resources.get("x")


async def test_that_neither_is_served_is_not_remembered() -> None:
    async with cluster(versions=[]) as (api, resources):
        for _ in range(2):
            with pytest.raises(SandboxUnavailableError, match="install agent-sandbox"):
                await resources.api_version(deadline=now() + 60)
        assert now() == 0, "nor waited for, where it never was"
        api.versions = ["v1beta1"]
        assert await resources.api_version() == "v1beta1"


async def test_a_version_that_was_served_is_waited_for() -> None:
    async with cluster() as (api, resources):
        await resources.get("x")
        versions, api.versions = api.versions, ()
        asyncio.get_running_loop().call_later(30, setattr, api, "versions", versions)
        assert await resources.get("x", deadline=now() + 60) is None
        assert 30 <= now() <= 35


async def test_a_group_without_sandboxes_does_not_count() -> None:
    async with cluster(versions=["v1alpha1"]) as (api, resources):
        resourceless = await FakeCustomObjectsApi().get_api_resources("agents.x-k8s.io", "v1beta1")
        resourceless.resources = []
        ask = api.get_api_resources

        async def get_api_resources(group: str, version: str, **kwargs: Any) -> Any:
            return resourceless if version == "v1beta1" else await ask(group, version, **kwargs)

        api.get_api_resources = get_api_resources  # type: ignore[method-assign]
        assert await resources.api_version() == "v1alpha1"


async def test_where_it_may_not_be_asked_the_old_version_is_assumed_for_a_while() -> None:
    # A server that starts refuses everybody, so this is not an answer to keep.
    async with cluster() as (api, resources):
        api.forbid("discovery")
        assert await resources.api_version() == "v1alpha1"
        assert await resources.api_version() == "v1alpha1"
        assert api.count("discovery") == 1
        api.allow()
        await asyncio.sleep(10.1)
        assert await resources.api_version() == "v1beta1"


async def test_where_it_cannot_be_asked_the_old_version_is_taken() -> None:
    assert await SandboxResources(settings(), PlainApi()).api_version() == "v1alpha1"

    class Silent(PlainApi):
        async def get_api_resources(self, group: str, version: str) -> object:
            return object()

    assert await SandboxResources(settings(), Silent()).api_version() == "v1alpha1"


async def test_a_failed_discovery_is_repeated_within_the_deadline_and_not_kept() -> None:
    async with cluster() as (api, resources):
        api.faults.add("discovery", error=503, times=3)
        with pytest.raises(SandboxUnavailableError):
            await resources.api_version()
        assert await resources.api_version(deadline=now() + 10) == "v1beta1"
        assert api.count("discovery") == 4


async def test_a_cancelled_caller_does_not_end_the_discovery_of_the_others() -> None:
    async with cluster() as (api, resources):
        with api.faults.add("discovery", hold=True) as gate:
            first = asyncio.create_task(resources.api_version())
            await gate.reached()
            second = asyncio.create_task(resources.api_version())
            await settle()
            first.cancel()
            await settle()
        assert await second == "v1beta1"
        assert api.count("discovery") == 1


async def test_a_failed_discovery_that_nobody_waited_for_is_not_kept() -> None:
    async with cluster() as (api, resources):
        with api.faults.add("discovery", error=422, hold=True) as gate:
            caller = asyncio.create_task(resources.api_version())
            await gate.reached()
            caller.cancel()
            await settle()
            gate.release()
            await settle()
        assert await resources.api_version() == "v1beta1"


async def test_a_plain_404_asks_for_the_version_again_and_repeats_the_request() -> None:
    async with cluster(versions=["v1alpha1"]) as (api, resources):
        left = await left_behind_v1alpha1(api, resources)
        api.versions = ["v1beta1"]
        assert (await resources.get(left) or {})["apiVersion"] == "agents.x-k8s.io/v1beta1"
        assert (api.count("get"), api.count("discovery")) == (2, 3)


async def left_behind_v1alpha1(api: FakeCustomObjectsApi, resources: SandboxResources) -> str:
    await resources.create(body(version="v1alpha1"))
    return name(api.objects[0])


async def test_a_create_is_not_repeated_under_another_version() -> None:
    # What it holds differs between the versions.
    async with cluster(versions=["v1alpha1"]) as (api, resources):
        assert await resources.api_version() == "v1alpha1"
        api.versions = ["v1beta1"]
        with pytest.raises(RetryableError, match=r"serve agents.x-k8s.io/v1beta1\?") as caught:
            await resources.create(body(version="v1alpha1"))
        assert not caught.value.ambiguous
        assert await resources.api_version() == "v1beta1"


async def test_a_plain_fakes_text_of_a_404_is_no_matter_of_versions() -> None:
    class Wordy(PlainApi):
        async def get_namespaced_custom_object(self, *_: Any) -> Any:
            raise plain_error(404, "no such thing")

    assert await SandboxResources(settings(), Wordy()).get("x") is None


async def test_an_assumption_that_has_run_out_is_made_up_for_once() -> None:
    async with cluster() as (api, resources):
        api.forbid("discovery")
        assert await resources.api_version() == "v1alpha1"
        api.allow()
        await asyncio.sleep(10.1)
        for _ in range(5):
            assert await resources.api_version() == "v1beta1"
            await asyncio.sleep(10.1)
        assert api.count("discovery") == 2, "one was refused"


async def test_however_many_meet_a_plain_404_there_is_one_discovery_at_a_time() -> None:
    async with cluster(versions=["v1alpha1"]) as (api, resources):
        assert await resources.api_version() == "v1alpha1"
        asked = api.count("discovery")
        api.versions = ["v1beta1"]
        api.faults.add("discovery", latency=1.0)
        api.faults.add("get", latency=lambda request: 0.1 * float(request.name or 0), times=5)
        found = await asyncio.gather(*(resources.get(str(i)) for i in range(5)))
        assert found == [None] * 5
        assert (api.count("get"), api.count("discovery") - asked) == (10, 1)
        assert now() == pytest.approx(1.0, abs=1e-3)
