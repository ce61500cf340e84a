"""A session's whole life on a real API server, its code run by real servers."""

from __future__ import annotations

import asyncio

import pytest

from prodisco_sandbox import SandboxUnavailableError
from prodisco_sandbox.local import LocalCluster
from tests.support.envtest import VERSIONS, Definitions, Namespace, connected, until
from tests.support.sandbox_crd import sandbox_crd

from .life import live

pytestmark = pytest.mark.envtest


@pytest.mark.parametrize("version", ["v1beta1", "v1alpha1"])
async def test_a_session_lives_on_either_version(namespace: Namespace, version: str) -> None:
    await live(namespace, api_version=version, stored=version == VERSIONS[0])


@pytest.fixture
def bare(definitions: Definitions, namespace: Namespace) -> Namespace:
    """A namespace of a cluster on which agent-sandbox is not installed."""
    definitions.remove()
    return namespace


async def test_a_cluster_without_agent_sandbox_says_what_to_install(bare: Namespace) -> None:
    async with bare.managed() as manager:
        with pytest.raises(SandboxUnavailableError, match="install agent-sandbox"):
            await manager.get_client("session")


@pytest.mark.parametrize(("definition", "version"), [(("v1alpha1",), "v1alpha1")])
async def test_a_version_that_is_taken_away_is_noticed(
    namespace: Namespace, definitions: Definitions
) -> None:
    """As when agent-sandbox is upgraded under a running manager."""
    async with (
        connected(namespace.server) as api,
        LocalCluster(custom_objects_api=api, namespace=namespace.name) as cluster,
        namespace.managed(None, endpoint=cluster.endpoint) as manager,
    ):
        before = await manager.get_client("before")
        upgraded = sandbox_crd("v1alpha1", "v1beta1")
        upgraded["spec"]["versions"][0]["served"] = False
        await asyncio.to_thread(definitions.change, upgraded)
        namespace.version = "v1beta1"
        after = await manager.get_client("after")
        assert await manager.get_client("before") is before
        assert len(await namespace.list()) == 2
        await namespace.delete(manager.sandbox_name("after"))
        await until(lambda: manager.stats().lost == 1, "the watch to go on with the new version")
        assert await manager.get_client("after") is not after
    assert not await namespace.list()
