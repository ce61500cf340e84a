"""What becomes of a session's Sandbox under the real controller: volumes, refusals, other names."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from prodisco_sandbox import (
    SandboxCapacityError,
    SandboxClient,
    SandboxFailedError,
    SandboxManager,
    SandboxRef,
)
from prodisco_sandbox._cluster.manifest import SANDBOX
from prodisco_sandbox._cluster.metadata import session_hash, uid
from tests.support.controller import ControlledNamespace, condition
from tests.support.envtest import GROUP, MERGE_PATCH, PLURAL, Object
from tests.support.patience import until

pytestmark = pytest.mark.controller


def ref(client: SandboxClient) -> SandboxRef:
    assert client.sandbox is not None
    return client.sandbox


async def left_behind(cluster: ControlledNamespace, incarnation: int = 0, **spec: Any) -> Object:
    """A Sandbox as an earlier process would have left it."""
    config = cluster.config(instance_id="earlier")
    body = SANDBOX.body(
        config, cluster.version, SANDBOX.name("session", incarnation), session_hash("session")
    )
    body["spec"] |= spec
    found: Object = await cluster.api.create_namespaced_custom_object(
        GROUP, cluster.version, cluster.name, PLURAL, body
    )
    return found


async def fail_pod(cluster: ControlledNamespace, sandbox: str) -> None:
    """Kills its server, as when the container is out of memory: under restartPolicy Never that is its end."""
    await fail_pod_at(cluster, (await cluster.pod(sandbox))["status"]["podIP"])
    await until(lambda: _is_finished(cluster, sandbox))


async def fail_pod_at(cluster: ControlledNamespace, address: str) -> None:
    wanted = f"\0--host\0{address}\0--port\0{cluster.server.sandbox_port}\0"
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # It has ended meanwhile.
            if wanted in path.read_text():
                os.kill(int(path.parent.name), signal.SIGKILL)


async def _is_finished(cluster: ControlledNamespace, sandbox: str) -> bool:
    return condition(await cluster.get(sandbox), "Finished").get("status") == "True"


async def _has_dropped(manager: SandboxManager) -> bool:
    return manager.stats().lost == 1


async def test_a_failed_pod_is_replaced_on_the_next_use(cluster: ControlledNamespace) -> None:
    async with cluster.managed() as manager:
        first = ref(await manager.get_client("session"))
        await fail_pod(cluster, first.name)
        await until(lambda: _has_dropped(manager))
        assert (await cluster.get(first.name))["metadata"]["uid"] == first.uid, "nothing is deleted for it"
        client = await manager.get_client("session")
        assert ref(client).uid != first.uid
        assert (await client.execute(code="print(1)")).output == "1\n"


async def test_volumes_outlive_a_failed_pod(cluster: ControlledNamespace) -> None:
    claim = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    left = await left_behind(cluster, volumeClaimTemplates=[{"metadata": {"name": "kept"}, "spec": claim}])
    async with cluster.managed() as manager, cluster.watched() as events:
        first = ref(await manager.get_client("session"))
        assert first.uid == uid(left)
        volumes = await cluster.core.list_namespaced_persistent_volume_claim(cluster.name)
        await fail_pod(cluster, first.name)
        client = await manager.get_client("session")
        second = ref(client)
        assert (second.name, second.uid, second == first) == (first.name, first.uid, False)
        assert (await client.execute(code="print(1)")).output == "1\n"
        after = await cluster.core.list_namespaced_persistent_volume_claim(cluster.name)
        assert [v.metadata.uid for v in after.items] == [v.metadata.uid for v in volumes.items] != []
        modes = [seen["spec"].get("operatingMode") for _, _, seen in events]
        assert "Suspended" in modes
        assert modes[-1] == "Running"
        assert not any(kind == "DELETED" for _, kind, _ in events)


async def test_a_live_sandbox_of_a_later_incarnation_is_not_abandoned(cluster: ControlledNamespace) -> None:
    left = await left_behind(cluster, 1)
    async with cluster.managed() as manager:
        assert ref(await manager.get_client("session")).uid == uid(left)
        assert await cluster.find(SANDBOX.name("session")) is None


async def test_a_pod_that_the_namespace_forbids_is_said_soon(cluster: ControlledNamespace) -> None:
    labels = {"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "restricted"}}}
    await cluster.core.patch_namespace(cluster.name, labels, _content_type=MERGE_PATCH)
    async with cluster.managed() as manager:
        begun = time.monotonic()
        with pytest.raises(SandboxFailedError, match='violates PodSecurity "restricted:latest"'):
            await manager.get_client("session")
        assert time.monotonic() - begun < manager.config.ready_timeout / 2
        await manager.on_session_closed("session")
        assert await cluster.find(manager.sandbox_name("session")) is None


async def test_an_exceeded_quota_is_a_matter_of_capacity(cluster: ControlledNamespace) -> None:
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "rule"}}
    await cluster.kubectl("create", "-f", "-", text=json.dumps({**quota, "spec": {"hard": {"pods": "0"}}}))

    async def counted() -> bool:
        found = await cluster.core.read_namespaced_resource_quota("rule", cluster.name)
        return bool(found.status.used)

    await until(counted)
    async with cluster.managed() as manager:
        with pytest.raises(SandboxCapacityError, match="exceeded quota"):
            await manager.get_client("session")
