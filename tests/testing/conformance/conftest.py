"""The namespace that the same assertions are tried on: of FakeCustomObjectsApi, and of a real API server."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
from kubernetes_asyncio.client import ApiException, CoreV1Api, CustomObjectsApi

from prodisco_sandbox.testing import FakeCustomObjectsApi
from prodisco_sandbox.testing._faults import VERBS
from tests.support.api import MERGE, PLURAL, QUOTA, Cluster, body
from tests.support.apiserver import ApiServer, assets, booted
from tests.support.patience import PATIENCE
from tests.support.sandbox_crd import real_crd, sandbox_crd

_numbers = itertools.count()


@pytest.fixture(
    scope="session",
    params=[
        pytest.param("fake", marks=pytest.mark.looptime),
        pytest.param("real", marks=[pytest.mark.envtest, pytest.mark.slow]),
    ],
)
def api_server(request: pytest.FixtureRequest) -> Iterator[ApiServer | None]:
    """The real one; None for the fake."""
    if request.param == "fake":
        yield None
        return
    binaries = assets()
    assert binaries is not None
    with booted(ApiServer(binaries)) as server:
        _serve(server, ("v1beta1", "v1alpha1"))
        server.install_extensions()
        yield server


@pytest.fixture
async def cluster(api_server: ApiServer | None) -> AsyncIterator[Cluster]:
    async with _fake() if api_server is None else _real(api_server) as cluster:
        yield cluster


@asynccontextmanager
async def _fake() -> AsyncIterator[Cluster]:
    async with (
        FakeCustomObjectsApi(namespaces=["n"]) as api,
        FakeCustomObjectsApi(user="nobody") as nobody,
    ):
        nobody.forbid(*(verb for verb in VERBS if verb != "discovery"))

        async def compact() -> None:
            api.compact()

        async def limit(count: int) -> None:
            api.quota = count

        async def serve(versions: tuple[str, ...]) -> None:
            api.versions = versions

        yield Cluster(api, nobody, "n", compact, limit, serve, forget=compact)


@asynccontextmanager
async def _real(server: ApiServer) -> AsyncIterator[Cluster]:
    async with server.api_client() as admin, server.api_client("nobody") as nobody:
        core = CoreV1Api(admin)
        name = f"n{next(_numbers)}"
        await core.create_namespace({"metadata": {"name": name}})
        old = await asyncio.to_thread(server.minor) < 34

        async def compact() -> None:
            # What is compacted is only what is older than the newest revision.
            server.compact()
            await core.create_namespaced_config_map(name, {"metadata": {"generateName": "c-"}})
            server.compact()

        async def forget() -> None:
            await compact()
            if not old:
                await asyncio.to_thread(server.restart)

        async def limit(count: int) -> None:
            # In place of the controller that counts what a quota's namespace holds.
            hard = {QUOTA: str(count)}
            spec = {"metadata": {"name": PLURAL}, "spec": {"hard": hard}}
            await core.create_namespaced_resource_quota(name, spec)
            status = {"status": {"hard": hard, "used": hard}}
            await core.patch_namespaced_resource_quota_status(PLURAL, name, status, _content_type=MERGE)
            async with asyncio.timeout(PATIENCE):
                while await _is_accepted(made):  # until admission has heard of it
                    await asyncio.sleep(0.05)

        async def serve(versions: tuple[str, ...]) -> None:
            await asyncio.to_thread(_serve, server, versions)

        apis = CustomObjectsApi(admin), CustomObjectsApi(nobody)
        made = Cluster(
            *(*apis, name, compact, limit, serve, forget),
            current=not old,
            keeps_snapshots=not old,
            extensions="AGENT_SANDBOX_DIR" in os.environ,
        )
        yield made


async def _is_accepted(cluster: Cluster) -> bool:
    try:
        await cluster.create(body("probe"), dry_run="All")
    except ApiException:
        return False
    return True


def _serve(server: ApiServer, versions: tuple[str, ...]) -> None:
    real = real_crd("sandboxes-v0.5.6.yaml" if len(versions) == 2 else "sandboxes-v1beta1-only.yaml")
    server.install_crd(real or sandbox_crd(*versions))
