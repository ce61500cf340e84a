"""A session's whole life on a real API server, its code run by real servers."""

from __future__ import annotations

import asyncio
import datetime as dt
import time

import pytest

from prodisco_sandbox import SandboxUnavailableError
from prodisco_sandbox.local import LocalCluster
from tests.support.envtest import GROUP, VERSIONS, Definitions, Namespace, Object, connected
from tests.support.patience import PATIENCE, until
from tests.support.sandbox_crd import sandbox_crd


async def live(namespace: Namespace, api_version: str, *, stored: bool = True) -> None:
    """Make, use, reap, make again, close.

    Args:
        namespace: Where.
        api_version: As in the manager's settings.
        stored: Whether that version is the stored one; without agent-sandbox's conversion
            webhook another one's own fields are lost.
    """
    async with (
        connected(namespace.server) as api,
        LocalCluster(custom_objects_api=api, namespace=namespace.name) as cluster,
        namespace.managed(
            None,
            api_version=api_version,
            endpoint=cluster.endpoint,
            session_idle_timeout=0.2,
            idle_check_interval=0.1,
        ) as manager,
    ):
        async with manager.session("session") as client:
            (sandbox,) = await namespace.list()
            is_as_made(sandbox, namespace.version, manager.sandbox_name("session"), stored=stored)
            first = client.sandbox
            assert first is not None
            assert first.uid == sandbox["metadata"]["uid"]
            assert (await client.execute(code="open('kept', 'w').write('42')")).success
            assert (await client.execute(code="print(open('kept').read())")).output.strip() == "42"
            await asyncio.sleep(0.4)  # Past the idle timeout: who is inside is not idle.
            assert await manager.get_client("session") is client
        await until(lambda: manager.stats().reaped == 1, "the idle session to be reaped")

        async def is_empty() -> bool:
            return not await namespace.list()

        await until(is_empty, "its Sandbox to be gone")

        async with manager.session("session") as client:
            assert client.sandbox is not None
            assert client.sandbox.uid != first.uid
            assert not (await client.execute(code="print(open('kept').read())")).success
        await manager.on_session_closed("session")
        assert not await namespace.list()
        stats = manager.stats()
        assert (stats.created, stats.recreated, stats.failed, stats.lost) == (2, 1, 0, 0)


def is_as_made(sandbox: Object, version: str, name: str, *, stored: bool) -> None:
    assert sandbox["apiVersion"] == f"{GROUP}/{version}"
    assert sandbox["metadata"]["name"] == name
    spec = sandbox["spec"]
    if stored:
        assert spec["replicas"] == 1 if version == "v1alpha1" else spec["operatingMode"] == "Running"
    assert spec["shutdownPolicy"] == "Delete"
    ahead = dt.datetime.fromisoformat(spec["shutdownTime"]).timestamp() - time.time()
    assert 1800 - PATIENCE < ahead <= 1800


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
