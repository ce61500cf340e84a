"""A session's life under the real controller, and what others do to it meanwhile."""

from __future__ import annotations

import asyncio
import datetime as dt
import time

import pytest

from prodisco_sandbox import SandboxClient, SandboxManager
from prodisco_sandbox._cluster.manifest import SANDBOX
from prodisco_sandbox._cluster.metadata import is_deleting
from tests.support.controller import ControlledNamespace, condition
from tests.support.patience import PATIENCE, until

pytestmark = pytest.mark.controller


async def output(client: SandboxClient, code: str) -> str:
    result = await client.execute(code=code)
    assert result.success, result.error
    return result.output.strip()


async def test_a_session_has_a_pod_from_its_first_call_to_its_close(cluster: ControlledNamespace) -> None:
    async with cluster.managed() as manager:
        async with manager.session("session") as client:
            name = manager.sandbox_name("session")
            sandbox, pod = await cluster.get(name), await cluster.pod(name)
            assert client.sandbox is not None
            assert client.sandbox.uid == sandbox["metadata"]["uid"]
            assert client.target == f"{pod['status']['podIP']}:{cluster.server.sandbox_port}"
            assert condition(sandbox)["reason"] == "DependenciesReady"
            await output(client, "open('kept', 'w').write('42')")
            assert await output(client, "print(open('kept').read())") == "42"
            async with client.execute_stream(code="for i in range(3): print(i)") as stream:
                lines = [chunk.text or "" async for chunk in stream]
            assert "".join(lines).split() == ["0", "1", "2"]
        await manager.on_session_closed("session")
        assert await cluster.find(name) is None
        await until(lambda: _is_without_pods(cluster))
        stats = manager.stats()
        assert (stats.created, stats.recreated, stats.failed, stats.lost) == (1, 0, 0, 0)


async def test_a_pod_deleted_under_a_session_isanother_machine(cluster: ControlledNamespace) -> None:
    """As when its node is drained: on its way out the pod is Succeeded or Failed for a moment."""
    async with cluster.managed() as manager, cluster.watched() as events:
        client = await manager.get_client("session")
        first, name = client.sandbox, manager.sandbox_name("session")
        assert first is not None
        await output(client, "open('kept', 'w').write('42')")
        old = await cluster.pod(name)
        await cluster.delete_pod(name)
        await until(lambda: _has_another_pod(cluster, name, old["metadata"]["uid"]))
        client = await another_machine(manager, client)
        assert client.sandbox is not None
        assert (client.sandbox.name, client.sandbox.uid) == (first.name, first.uid)
        assert await output(client, "import os; print(os.path.exists('kept'))") == "False"
        # The moment that the session must survive did come.
        assert any(condition(seen, "Finished").get("status") == "True" for _, _, seen in events)
        assert not any(kind == "DELETED" for _, kind, _ in events)
        assert manager.stats().created == 1


async def test_a_session_that_somebody_suspends_is_resumed_on_its_next_use(
    cluster: ControlledNamespace,
) -> None:
    async with cluster.managed() as manager, cluster.watched() as events:
        client = await manager.get_client("session")
        first, name = client.sandbox, manager.sandbox_name("session")
        assert first is not None
        await cluster.suspend(name)
        client = await another_machine(manager, client)
        assert client.sandbox is not None
        assert (client.sandbox.name, client.sandbox.uid) == (first.name, first.uid)
        assert await output(client, "print(6 * 7)") == "42"
        assert (await cluster.get(name))["spec"]["operatingMode"] == "Running"
        assert not any(kind == "DELETED" for _, kind, _ in events)
        assert manager.stats().created == 1


async def test_a_killed_manager_s_lease_ends_its_sandbox(cluster: ControlledNamespace) -> None:
    name = SANDBOX.name("session")
    async with cluster.watched() as events:
        async with cluster.killed("session", lease_duration=2.0):
            pass
        left = await cluster.get(name)
        ends = dt.datetime.fromisoformat(left["spec"]["shutdownTime"]).timestamp()
        await until(lambda: any(kind == "DELETED" for _, kind, _ in events))
        assert time.time() >= ends
        await until(lambda: _is_without_pods(cluster))


async def test_a_lease_that_lapses_under_a_session_ends_it(cluster: ControlledNamespace) -> None:
    async with cluster.managed() as manager:
        client = await manager.get_client("session")
        first, name = client.sandbox, manager.sandbox_name("session")
        await cluster.patch(name, {"shutdownTime": "2001-01-01T00:00:00Z"})
        client = await another_machine(manager, client)
        assert client.sandbox is not None
        assert first is not None
        assert client.sandbox.uid != first.uid
        assert await output(client, "print(6 * 7)") == "42"
        assert (manager.stats().created, manager.stats().recreated) == (2, 1)


async def test_a_session_that_comes_back_at_once_has_a_new_machine(cluster: ControlledNamespace) -> None:
    async with cluster.managed() as manager:
        client = await manager.get_client("session")
        first = client.sandbox
        assert first is not None
        await output(client, "open('kept', 'w').write('42')")
        old = await cluster.pod(first.name)
        await manager.on_session_closed("session")
        client = await manager.get_client("session")
        assert client.sandbox is not None
        assert client.sandbox.uid != first.uid
        assert await output(client, "import os; print(os.path.exists('kept'))") == "False"
        pods = [pod for pod in await cluster.pods(client.sandbox.name) if not is_deleting(pod)]
        assert [pod["metadata"]["uid"] for pod in pods] != [old["metadata"]["uid"]]
        stats = manager.stats()
        assert (stats.created, stats.failed, stats.lost) == (2, 0, 0)


async def _is_without_pods(cluster: ControlledNamespace) -> bool:
    return not await cluster.pods()


async def _has_another_pod(cluster: ControlledNamespace, sandbox: str, than: str) -> bool:
    """Whether there is another pod, and the status no longer says how the last one ended."""
    finished = condition(await cluster.get(sandbox), "Finished").get("status") == "True"
    return not finished and any(pod["metadata"]["uid"] != than for pod in await cluster.pods(sandbox))


async def another_machine(manager: SandboxManager, client: SandboxClient) -> SandboxClient:
    """The session's client once it is not that one any more: until the death shows it stays as it is."""
    async with asyncio.timeout(PATIENCE):
        while (found := await manager.get_client("session")) is client:
            await asyncio.sleep(0.05)
    return found
