"""Sessions that keep their files on a persistent volume, on real pods."""

from __future__ import annotations

import secrets
import statistics
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes_asyncio.client import CoreV1Api, StorageV1Api

from prodisco_sandbox import SandboxManager, SandboxRef
from tests.support.controller import condition
from tests.support.patience import until
from tests.support.pods import GONE, READY, Pods, managed, output

pytestmark = pytest.mark.cluster

TIMES = 3
DEFAULT = "storageclass.kubernetes.io/is-default-class"
WRITE = "open('kept', 'x').write('42'); print(42)"
READ = "print(open('kept').read())"


@pytest.fixture
async def storage(pods: Pods, tmp_path: Path) -> AsyncIterator[dict[str, Any]]:
    """Settings for volumes: the cluster's own or, where it has none, directories of this machine."""
    classes, core = StorageV1Api(pods.api), CoreV1Api(pods.api)
    found = (await classes.list_storage_class()).items
    suspends: dict[str, Any] = {"on_idle": "suspend", "workspace_storage": "1Gi"}
    if any((each.metadata.annotations or {}).get(DEFAULT) == "true" for each in found):
        yield suspends
        return
    name = f"local-{secrets.token_hex(4)}"
    await classes.create_storage_class(
        {
            "metadata": {"name": name},
            "provisioner": "kubernetes.io/no-provisioner",
            "volumeBindingMode": "WaitForFirstConsumer",
        }
    )
    any_node = {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "Exists"}]}
    volumes = [f"{name}-{i}" for i in range(1 + TIMES)]
    for volume in volumes:
        (tmp_path / volume).mkdir()
        spec = {
            "capacity": {"storage": "1Gi"},
            "accessModes": ["ReadWriteOnce"],
            "storageClassName": name,
            "persistentVolumeReclaimPolicy": "Retain",
            "local": {"path": str(tmp_path / volume)},
            "nodeAffinity": {"required": {"nodeSelectorTerms": [any_node]}},
        }
        await core.create_persistent_volume({"metadata": {"name": volume}, "spec": spec})
    yield suspends | {"workspace_storage_class": name}
    for volume in volumes:
        await core.delete_persistent_volume(volume)
    await classes.delete_storage_class(name)

    async def gone() -> bool:
        return not {v.metadata.name for v in (await core.list_persistent_volume()).items} & set(volumes)

    await until(gone, "the volumes to go", READY)


async def test_files_outlive_a_suspension(pods: Pods, storage: dict[str, Any], session: str) -> None:
    times: dict[str, list[float]] = {"suspend": [], "resume": [], "start": []}
    async with managed(**storage, session_idle_timeout=1.0, idle_check_interval=0.1) as manager:
        first, name = await use(manager, session, WRITE), manager.sandbox_name(session)
        for _ in range(TIMES):
            await until(lambda: not manager.has_session(session), "the suspension", pause=0.01)
            begun = time.monotonic()
            await until(lambda: is_suspended(pods, name), "the pod's end", GONE, pause=0.01)
            times["suspend"].append(time.monotonic() - begun)
            assert await pods.list(name) == []
            begun = time.monotonic()
            second = await use(manager, session, READ)
            times["resume"].append(time.monotonic() - begun)
            assert (second.name, second.uid, second == first) == (name, first.uid, False)
        stats = manager.stats()
        assert (stats.created, stats.resumed, stats.failed, stats.lost) == (1, TIMES, 0, 0)
        await manager.on_session_closed(session)
        for i in range(TIMES):
            begun = time.monotonic()
            await use(manager, f"{session}-{i}", WRITE)
            times["start"].append(time.monotonic() - begun)
            await manager.on_session_closed(f"{session}-{i}")
    for what, took in times.items():
        print(f"{what}: {statistics.median(took) * 1000:.0f} ms, median of {TIMES}")


async def test_files_outlive_a_killed_pod(pods: Pods, storage: dict[str, Any], session: str) -> None:
    async with managed(**storage) as manager:
        first, name = await use(manager, session, WRITE), manager.sandbox_name(session)
        await pods.end(name)
        await until(lambda: manager.stats().lost == 1, "the death to be noticed", READY)
        second = await use(manager, session, READ)
        assert (second.name, second.uid, second == first) == (name, first.uid, False)
        stats = manager.stats()
        assert (stats.created, stats.recreated, stats.failed) == (1, 1, 0)


async def use(manager: SandboxManager, session: str, code: str) -> SandboxRef:
    """Runs code that says 42 in the session, and tells on which machine."""
    async with manager.session(session) as client:
        assert await output(client, code) == "42"
        assert client.sandbox is not None
        return client.sandbox


async def is_suspended(pods: Pods, name: str) -> bool:
    sandbox = await pods.sandbox(name)
    return sandbox is not None and condition(sandbox, "Suspended").get("status") == "True"
