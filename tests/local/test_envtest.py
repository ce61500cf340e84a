"""LocalCluster on a real API server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Literal

import pytest
from kubernetes_asyncio.client import CoreV1Api, CustomObjectsApi

from prodisco_sandbox import SandboxManager
from prodisco_sandbox.local import LocalCluster
from tests.support.apiserver import ApiServer, assets, booted
from tests.support.local import condition, in_seconds, traces
from tests.support.patience import PATIENCE, until
from tests.support.sandbox_crd import sandbox_crd

pytestmark = [pytest.mark.envtest, pytest.mark.slow]


@pytest.fixture(scope="module")
def server() -> Iterator[ApiServer]:
    binaries = assets()
    assert binaries is not None
    with booted(ApiServer(binaries)) as server:
        server.install_crd(sandbox_crd("v1beta1", "v1alpha1"))
        yield server


@contextlib.asynccontextmanager
async def namespaced(server: ApiServer, namespace: str) -> AsyncIterator[CustomObjectsApi]:
    async with server.api_client() as client:
        await CoreV1Api(client).create_namespace({"metadata": {"name": namespace}})
        yield CustomObjectsApi(client)


@pytest.mark.parametrize("version", ["v1alpha1", "v1beta1"])
async def test_a_session_lives_dies_and_expires(
    server: ApiServer, version: Literal["v1alpha1", "v1beta1"], tmp_path: Path
) -> None:
    namespace = f"local-{version}"
    at = ("agents.x-k8s.io", version, namespace, "sandboxes")
    async with namespaced(server, namespace) as api:
        cluster = LocalCluster(
            custom_objects_api=api, namespace=namespace, api_version=version, directory=tmp_path
        )
        async with cluster, SandboxManager(cluster.config(), custom_objects_api=api) as manager:
            first = await manager.get_client("session")
            assert (await first.execute(code="print(6 * 7)")).output == "42\n"
            name = manager.sandbox_name("session")
            sandbox = await api.get_namespaced_custom_object(*at, name)
            assert condition(sandbox)["reason"] == "DependenciesReady"
            assert sandbox["status"]["serviceFQDN"] == f"{name}.{namespace}.svc.cluster.local"

            cluster.kill(name)
            async with asyncio.timeout(PATIENCE):
                while not manager.stats().lost:
                    await asyncio.sleep(0.02)
            second = await manager.get_client("session")
            assert second.sandbox != first.sandbox

            spec = {"spec": {"shutdownTime": in_seconds(0.5), "shutdownPolicy": "Delete"}}
            name = manager.sandbox_name("session")
            await api.patch_namespaced_custom_object(
                *at, name, spec, _content_type="application/merge-patch+json"
            )
            async with asyncio.timeout(PATIENCE):
                while manager.stats().lost < 2:
                    await asyncio.sleep(0.02)
            third = await manager.get_client("session")
            assert third.sandbox != second.sandbox
            assert (await third.execute(code="print('again')")).output == "again\n"
        assert (await api.list_namespaced_custom_object(*at))["items"] == []
    assert traces(tmp_path) == []


async def test_a_session_takes_a_server_that_was_started_ahead(server: ApiServer, tmp_path: Path) -> None:
    """No garbage collector runs here: the cluster itself deletes the Sandbox of a deleted claim."""
    if not server.install_extensions():
        pytest.skip("needs agent-sandbox's definitions, in AGENT_SANDBOX_DIR")
    at = ("agents.x-k8s.io", "v1beta1", "warm", "sandboxes")
    async with namespaced(server, "warm") as api:

        async def others(*names: str) -> list[str]:
            found = (await api.list_namespaced_custom_object(*at))["items"]
            ready = [s["metadata"]["name"] for s in found if condition(s).get("status") == "True"]
            return [name for name in ready if name not in names] if len(found) == 1 + len(names) else []

        cluster = LocalCluster(custom_objects_api=api, namespace="warm", directory=tmp_path, warm=1)
        async with cluster, SandboxManager(cluster.config(), custom_objects_api=api) as manager:
            await until(others)
            (name,) = await others()
            client = await manager.get_client("session")
            assert (await client.execute(code="print(6 * 7)")).output == "42\n"
            assert manager.stats().warm == 1
            claim = ("extensions.agents.x-k8s.io", *at[1:3], "sandboxclaims", manager.sandbox_name("session"))
            status = (await api.get_namespaced_custom_object(*claim))["status"]
            assert status["sandbox"]["name"] == name
            await until(lambda: others(name))
            await manager.on_session_closed("session")
            await until(others)
            assert await others() != [name]
    assert traces(tmp_path) == []
