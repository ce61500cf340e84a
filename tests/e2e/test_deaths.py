"""Pods that never start, that die, and that take their time to go."""

from __future__ import annotations

import asyncio
import re
import time
from typing import Any

import pytest

from prodisco_sandbox import (
    SandboxFailedError,
    SandboxTimeoutError,
    SandboxUnavailableError,
)
from prodisco_sandbox._cluster.manifest import SANDBOX
from prodisco_sandbox._cluster.metadata import is_deleting
from tests.support.patience import until
from tests.support.pods import READY, Pods, limits, managed, output, pod_template

pytestmark = pytest.mark.cluster


async def test_an_image_that_cannot_be_pulled(pods: Pods, session: str) -> None:
    # .invalid never resolves (RFC 6761).
    async with managed(sandbox_image="registry.invalid/none:1", ready_timeout=12.0) as manager:
        begun = time.monotonic()
        with pytest.raises(SandboxTimeoutError) as caught:
            await manager.get_client(session)
        assert 12 <= time.monotonic() - begun < 20
        # agent-sandbox itself says no more than the pod's phase.
        assert re.search("ErrImagePull|ImagePullBackOff|phase: Pending", str(caught.value))
        await manager.on_session_closed(session)
        assert await pods.sandbox(manager.sandbox_name(session)) is None
        assert manager.stats().failed == 1


async def test_a_pod_that_exits_at_once(pods: Pods, session: str) -> None:
    template = pod_template(command=["/bin/false"])
    template["spec"]["restartPolicy"] = "Never"
    async with managed(pod_template_spec=template) as manager:
        begun = time.monotonic()
        with pytest.raises(SandboxFailedError, match="PodFailed"):
            await manager.get_client(session)
        assert time.monotonic() - begun < READY / 2
        await manager.on_session_closed(session)
        assert await pods.sandbox(manager.sandbox_name(session)) is None


async def test_code_that_fills_the_memory_does_not_end_its_session(pods: Pods, session: str) -> None:
    async with managed() as manager:
        client = await manager.get_client(session)
        try:
            result = await client.execute(code="held = b'x' * (1 << 30)")
            assert not result.success
        except SandboxUnavailableError:
            pass  # With cgroup v2 the kernel may kill the whole container, which is then restarted.
        assert await output(await manager.get_client(session), "print(6 * 7)") == "42"
        assert manager.stats().created == 1


async def test_a_pod_that_is_killed_for_its_memory_is_replaced(pods: Pods, session: str) -> None:
    # The server lets no execution take so much: it is its parent, the container's main process.
    hoard = """
import os, subprocess, time
subprocess.Popen(["python", "-m", "prodisco_sandbox.server"])
while not os.path.exists("/tmp/go"):
    time.sleep(0.05)
held = []
while True:
    held.append(bytearray(1 << 20))
"""
    template = pod_template(resources=limits(memory="128Mi"), command=["python", "-c", hoard])
    template["spec"]["restartPolicy"] = "Never"
    fill = "open('/tmp/go', 'w')"
    ends: set[str] = set()
    async with managed(pod_template_spec=template) as manager:
        client = await manager.get_client(session)
        first = client.sandbox

        async def lost() -> bool:
            ends.update(how for pod in await pods.list(manager.sandbox_name(session)) for how in ended(pod))
            return manager.stats().lost == 1

        async def use_up() -> None:
            while True:
                await client.execute(code=fill)

        with pytest.raises(SandboxUnavailableError):
            await asyncio.wait_for(use_up(), READY)
        await until(lost, "the death to be noticed", READY)
        assert ends == {"OOMKilled"}
        client = await manager.get_client(session)
        assert await output(client, "import os; print(os.listdir('/dev/shm'))") == "[]"
        assert client.sandbox != first
        assert manager.stats().recreated == 1


def ended(pod: dict[str, Any]) -> set[str]:
    """Why containers of the pod have ended."""
    states = [status["state"] for status in pod["status"].get("containerStatuses", [])]
    return {state["terminated"]["reason"] for state in states if "terminated" in state}


async def test_a_pod_deleted_under_a_session_is_another_machine(pods: Pods, session: str) -> None:
    """As when its node is drained: the Sandbox stays, and its controller makes a new pod."""
    async with managed() as manager:
        client = await manager.get_client(session)
        first, name = client.sandbox, manager.sandbox_name(session)
        assert first is not None
        await output(client, "open('kept', 'w').write('42')")
        old = await pods.one(name)
        await pods.delete(old)

        async def has_another() -> bool:
            conditions = ((await pods.sandbox(name) or {}).get("status") or {}).get("conditions") or ()
            finished = any(c["type"] == "Finished" and c["status"] == "True" for c in conditions)
            others = [p for p in await pods.list(name) if p["metadata"]["uid"] != old["metadata"]["uid"]]
            return bool(others) and not finished

        # A use before that may replace the Sandbox: it holds no volumes.
        await until(has_another, "the controller to make another pod", READY)
        async with asyncio.timeout(READY):
            while client.sandbox == first:
                await asyncio.sleep(0.1)
                client = await manager.get_client(session)
        assert client.sandbox is not None
        assert (client.sandbox.name, client.sandbox.uid) == (first.name, first.uid)
        new = await pods.one(name)
        assert new["metadata"]["uid"] != old["metadata"]["uid"]
        assert client.target == f"{new['status']['podIP']}:50051"
        assert await output(client, "import os; print(os.path.exists('kept'))") == "False"
        stats = manager.stats()
        assert (stats.created, stats.recreated, stats.lost) == (1, 1, 1)


async def test_a_name_whose_pod_is_still_going_is_not_waited_for(pods: Pods, session: str) -> None:
    async with managed(pod_template_spec=slow_to_go(4)) as manager:
        name = manager.sandbox_name(session)
        await manager.get_client(session)
        old = await pods.one(name)
        await manager.on_session_closed(session)
        assert await pods.sandbox(name) is None
        client = await manager.get_client(session)
        assert client.sandbox is not None
        assert client.sandbox.name == manager.sandbox_name(session) != name
        assert await pods.list(name), "the old pod is still there"
        new = await pods.one(client.sandbox.name)
        assert new["metadata"]["uid"] != old["metadata"]["uid"]
        assert await output(client, "print(1)") == "1"
        assert manager.stats().created == 2


async def test_a_name_that_is_still_being_deleted_is_left_alone(pods: Pods, session: str) -> None:
    """As with `kubectl delete --cascade=foreground`: the Sandbox stays until its pod is gone."""
    async with managed(pod_template_spec=slow_to_go(15)) as manager:
        name = manager.sandbox_name(session)
        await manager.get_client(session)
        await pods.delete_sandbox(name, propagation="Foreground")
        await until(lambda: manager.stats().lost == 1, "the deletion to be noticed")
        client = await manager.get_client(session)
        assert client.sandbox is not None
        assert client.sandbox.name == SANDBOX.name(session, 1) == manager.sandbox_name(session)
        lingering = await pods.sandbox(name)
        assert lingering is not None
        assert is_deleting(lingering)
        assert await output(client, "print(1)") == "1"
        assert manager.stats().recreated == 1


def slow_to_go(seconds: int) -> dict[str, Any]:
    """A pod that serves on for some seconds after it has been told to end."""
    hook = {"preStop": {"exec": {"command": ["/bin/sleep", str(seconds)]}}}
    return pod_template(lifecycle=hook)
