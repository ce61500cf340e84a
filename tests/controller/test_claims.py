"""Sessions on a warm pool, under the real controller."""

from __future__ import annotations

import asyncio
import datetime as dt
import time
from typing import Any

import pytest

from prodisco_sandbox import SandboxError, SandboxManager
from prodisco_sandbox._cluster.claim import CLAIM
from tests.support.controller import VERSION, ControlledNamespace
from tests.support.envtest import GROUP, PLURAL, Object
from tests.support.patience import PATIENCE, until

from .test_fates import fail_pod_at, ref
from .test_life import another_machine, output

pytestmark = pytest.mark.controller

POOL = "python"
NAME = CLAIM.name("session")


async def bound_to(cluster: ControlledNamespace, name: str = NAME) -> str:
    claim = await cluster.claim(name)
    return str(((claim or {}).get("status") or {}).get("sandbox", {}).get("name", ""))


async def is_gone(cluster: ControlledNamespace, name: str) -> bool:
    pods = [pod["metadata"]["name"] for pod in await cluster.pods()]
    return await cluster.find(name) is None and name not in pods


async def test_a_session_gets_a_machine_that_runs_already(cluster: ControlledNamespace) -> None:
    await cluster.make_pool(1)
    async with cluster.managed(warm_pool=POOL) as manager:
        client = await manager.get_client("session")
        claim, bound = await cluster.claim(NAME), await bound_to(cluster)
        assert claim is not None
        assert bound.startswith(f"{POOL}-")
        assert (ref(client).name, ref(client).uid) == (NAME, claim["metadata"]["uid"])
        # The server says the name of its own pod, which is that of the Sandbox.
        assert await output(client, "open('kept', 'w').write('42'); print(6 * 7)") == "42"
        assert (manager.stats().warm, manager.stats().cold) == (1, 0)
        await manager.on_session_closed("session")
        assert await cluster.claim(NAME) is None
        await until(lambda: is_gone(cluster, bound))
        client = await manager.get_client("session")
        assert await output(client, "import os; print(os.path.exists('kept'))") == "False"


async def test_an_empty_pool_starts_cold_and_a_sandbox_of_that_name_is_evaded(
    cluster: ControlledNamespace,
) -> None:
    await cluster.make_pool(0)
    left: Object = {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "Sandbox",
        "metadata": {"name": NAME, "namespace": cluster.name},
        "spec": {"podTemplate": {"spec": {"containers": [{"name": "a", "image": "b"}]}}},
    }
    await cluster.api.create_namespaced_custom_object(GROUP, VERSION, cluster.name, PLURAL, left)
    async with cluster.managed(warm_pool=POOL) as manager:
        client = await manager.get_client("session")
        second = CLAIM.name("session", 1)
        assert manager.sandbox_name("session") == second == await bound_to(cluster, second)
        assert await output(client, "print(6 * 7)") == "42"
        assert (manager.stats().warm, manager.stats().cold) == (0, 1)
        assert await cluster.claim(NAME) is None


async def test_a_pool_that_comes_late_and_is_filling_when_it_is_claimed(cluster: ControlledNamespace) -> None:
    await cluster.make_pool(0)
    await cluster.kubectl("delete", "sandboxwarmpool", POOL, "-n", cluster.name)
    async with cluster.managed(warm_pool=POOL) as manager:
        waiting = asyncio.create_task(manager.get_client("session"))
        await until(lambda: _says(cluster, "WarmPoolNotFound"))
        pool: Object = {
            "apiVersion": f"{CLAIM.group}/{VERSION}",
            "kind": "SandboxWarmPool",
            "metadata": {"name": POOL, "namespace": cluster.name},
            "spec": {"replicas": 2, "sandboxTemplateRef": {"name": POOL}},
        }
        await cluster.api.create_namespaced_custom_object(
            CLAIM.group, VERSION, cluster.name, "sandboxwarmpools", pool
        )
        assert await output(await waiting, "print(6 * 7)") == "42"


async def test_a_sandbox_deleted_under_its_claim_is_another_machine(cluster: ControlledNamespace) -> None:
    await cluster.make_pool(2)
    async with cluster.managed(warm_pool=POOL) as manager:
        client = await manager.get_client("session")
        first, bound = ref(client), await bound_to(cluster)
        await output(client, "open('kept', 'w').write('42')")
        await cluster.delete(bound)
        client = await another_machine(manager, client)
        assert (ref(client).uid, ref(client) == first) == (first.uid, False)
        assert await output(client, "import os; print(os.path.exists('kept'))") == "False"
        assert (manager.stats().created, manager.stats().recreated) == (1, 1)


async def test_a_killed_server_is_replaced_on_the_next_use(cluster: ControlledNamespace) -> None:
    await cluster.make_pool(2)
    async with cluster.managed(warm_pool=POOL) as manager:
        client = await manager.get_client("session")
        first = ref(client)
        await fail_pod_at(cluster, client.target.partition(":")[0])
        client = await another_machine(manager, client)
        assert ref(client).uid != first.uid
        assert await output(client, "print(6 * 7)") == "42"


async def test_a_drained_pod_leaves_the_claim_with_another_machine(cluster: ControlledNamespace) -> None:
    await cluster.make_pool(1)
    async with cluster.managed(warm_pool=POOL) as manager:
        client = await manager.get_client("session")
        first, bound = ref(client), await bound_to(cluster)
        old = await cluster.core.read_namespaced_pod(bound, cluster.name)
        await cluster.core.delete_namespaced_pod(bound, cluster.name)
        await until(lambda: _has_another_pod(cluster, bound, old.metadata.uid))
        client = await another_machine(manager, client)
        assert (ref(client).uid, ref(client) == first) == (first.uid, False)
        assert await output(client, "print(6 * 7)") == "42"


async def test_a_claim_whose_time_is_over_ends_the_session(cluster: ControlledNamespace) -> None:
    await cluster.make_pool(2)
    async with cluster.managed(warm_pool=POOL) as manager:
        client = await manager.get_client("session")
        first = ref(client)
        await cluster.change(CLAIM.plural, NAME, {"lifecycle": {"shutdownTime": "2001-01-01T00:00:00Z"}})
        client = await another_machine(manager, client)
        assert ref(client).uid != first.uid
        assert await output(client, "print(6 * 7)") == "42"


async def test_a_killed_manager_s_lease_ends_its_claim(cluster: ControlledNamespace) -> None:
    await cluster.make_pool(1)
    async with cluster.killed("session", lease_duration=3.0, warm_pool=POOL):
        left = await cluster.claim(NAME)
    assert left is not None
    ends, bound = left["spec"]["lifecycle"]["shutdownTime"], left["status"]["sandbox"]["name"]
    await until(lambda: is_gone(cluster, bound))
    assert time.time() >= dt.datetime.fromisoformat(ends).timestamp()
    assert await cluster.claim(NAME) is None


async def test_a_controller_that_starts_again_binds_what_was_claimed_meanwhile(
    cluster: ControlledNamespace,
) -> None:
    await cluster.make_pool(2)
    async with cluster.managed(warm_pool=POOL) as manager:
        try:
            cluster.server.kill_controller()
            waiting = [asyncio.create_task(manager.get_client(name)) for name in ("session", "other")]
            await until(lambda: _is_claimed(cluster))
        finally:
            await asyncio.to_thread(cluster.server.start_controller)
        clients = await asyncio.gather(*waiting)
        assert [await output(client, "print(6 * 7)") for client in clients] == ["42", "42"]
        assert len({client.target for client in clients}) == 2


async def test_another_manager_goes_on_with_the_claim(cluster: ControlledNamespace) -> None:
    await cluster.make_pool(1)
    async with cluster.managed(warm_pool=POOL) as manager:
        client = await manager.get_client("session")
        await output(client, "open('kept', 'w').write('42')")
        async with cluster.managed(warm_pool=POOL) as successor:
            successors = await successor.get_client("session")
            assert ref(successors) == ref(client)
            assert await output(successors, "print(open('kept').read())") == "42"
            await until(lambda: _is_done_with(manager))
        assert await cluster.claim(NAME) is None


@pytest.mark.slow
async def test_thirty_at_once_on_a_pool_of_ten_that_is_scaled_down(cluster: ControlledNamespace) -> None:
    await cluster.make_pool(10)
    async with cluster.managed(warm_pool=POOL, max_sessions=30) as manager:
        names = [str(i) for i in range(30)]
        waiting = [asyncio.create_task(manager.get_client(name)) for name in names]
        await until(lambda: _is_claimed(cluster))
        await cluster.change("sandboxwarmpools", POOL, {"replicas": 0})
        await asyncio.gather(*waiting)
        # The scale-down may delete members that are bound already: their claims get others.
        said = await asyncio.gather(*(_run(manager, name) for name in names))
        assert [output for output, _ in said] == names
        assert len({target for _, target in said}) == 30
        stats = manager.stats()
        assert (stats.ready, stats.warm + stats.cold, stats.created, stats.failed) == (30, 30, 30, 0)
    await until(lambda: _is_empty(cluster))


async def _run(manager: SandboxManager, session: str) -> tuple[str, str]:
    """What a session's code prints, and where; again if its machine is lost meanwhile."""
    async with asyncio.timeout(PATIENCE):
        while True:
            client = await manager.get_client(session)
            try:
                return await output(client, f"print({session})"), client.target
            except SandboxError:
                await asyncio.sleep(0.05)


async def _says(cluster: ControlledNamespace, reason: str) -> bool:
    claim: Any = await cluster.claim(NAME) or {}
    return any(c["reason"] == reason for c in (claim.get("status") or {}).get("conditions", ()))


async def _is_claimed(cluster: ControlledNamespace) -> bool:
    return await cluster.claim(NAME) is not None or await cluster.claim(CLAIM.name("0")) is not None


async def _is_done_with(manager: SandboxManager) -> bool:
    return not manager.has_session("session")


async def _is_empty(cluster: ControlledNamespace) -> bool:
    return not await cluster.list() and not await cluster.pods()


async def _has_another_pod(cluster: ControlledNamespace, name: str, than: str) -> bool:
    """Whether there is another pod, and the claim no longer says how the last one ended."""
    if await _says(cluster, "PodSucceeded") or await _says(cluster, "PodFailed"):
        return False
    return any(p["metadata"]["name"] == name and p["metadata"]["uid"] != than for p in await cluster.pods())
