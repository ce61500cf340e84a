"""FakeCustomObjectsApi and LocalCluster show a client's watch what the real controller shows it.

tests/controller plays the same script on that one.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from prodisco_sandbox import SandboxManagerConfig
from prodisco_sandbox.local import LocalCluster
from prodisco_sandbox.testing import FakeCustomObjectsApi
from tests.support.local import STUB, stub
from tests.support.patience import until
from tests.testing.conform_claims import ClaimWorld, is_ready, play_claims, play_local
from tests.testing.conform_controller import World, play


@pytest.mark.looptime
async def test_the_fake_api() -> None:
    async with FakeCustomObjectsApi(auto_ready=1.0) as api:

        async def delete_pod(name: str) -> None:
            api.delete_pod(name)

        async def fail_pod(name: str) -> None:
            api.fail_pod(name)

        await play(World(api, SandboxManagerConfig(mode="multi"), delete_pod, fail_pod))


@pytest.mark.looptime
async def test_claims_on_the_fake_api() -> None:
    async with FakeCustomObjectsApi(auto_ready=1.0) as api:

        async def delete_pod(name: str) -> None:
            api.delete_pod(name)

        await play_claims(ClaimWorld(api, SandboxManagerConfig(mode="multi"), delete_pod, delete_pod))


async def test_a_local_cluster(tmp_path: Path) -> None:
    script = STUB.replace("echo", "trap 'exit 0' TERM\necho", 1)
    async with LocalCluster(python=stub(tmp_path, script)) as cluster:

        async def delete_pod(name: str) -> None:
            cluster.delete_pod(name)

        async def fail_pod(name: str) -> None:
            cluster.kill(name)

        api = cluster.custom_objects_api
        await play(World(api, cluster.config(), delete_pod, fail_pod, tells_how=True))


class LocalClaims(ClaimWorld):
    async def scaled(self, replicas: int, *, scale: bool = False) -> None:
        await until(self.has_member)

    async def has_member(self) -> bool:
        return [is_ready(member) for member in await self.members()] == [True]


async def test_claims_on_a_local_cluster(tmp_path: Path) -> None:
    script = STUB.replace("echo", "trap 'exit 0' TERM\necho", 1)
    async with LocalCluster(python=stub(tmp_path, script), warm=1) as cluster:

        async def delete_pod(name: str) -> None:
            cluster.delete_pod(name)

        await play_local(LocalClaims(cluster.custom_objects_api, cluster.config(), delete_pod, delete_pod))
