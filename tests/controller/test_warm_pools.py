"""Sessions on a warm pool, with the real controller."""

from __future__ import annotations

import asyncio

import pytest
from envtest.support import CLAIMS, EXTENSIONS, GROUP, PLURAL, until

from prodisco_sandbox import SandboxManager
from prodisco_sandbox._cluster.manifest import SANDBOX

from .support import ControlledNamespace, condition

pytestmark = pytest.mark.controller


async def bound(cluster: ControlledNamespace, claim: str) -> str:
    """The Sandbox that the claim has now."""
    at = (EXTENSIONS, cluster.version, cluster.name, CLAIMS, claim)
    return str((await cluster.api.get_namespaced_custom_object(*at))["status"]["sandbox"]["name"])


async def run(manager: SandboxManager, session: str, code: str) -> str:
    result = await (await manager.get_client(session)).execute(code)
    assert result.success, result.error
    return result.output.strip()


async def test_a_controller_that_is_started_again_binds_what_was_claimed(
    cluster: ControlledNamespace,
) -> None:
    await cluster.make_pool(2)
    async with cluster.managed(warm_pool="python") as manager:
        await asyncio.to_thread(cluster.server.kill_controller)
        try:
            starting = [asyncio.create_task(manager.get_client(each)) for each in ("one", "other")]

            async def claimed() -> bool:
                return len(await cluster.claims()) == 2

            await until(claimed, "the claims to be made")
            assert not any(task.done() for task in starting)
        finally:
            await asyncio.to_thread(cluster.server.start_controller)
        clients = await asyncio.gather(*starting)
        assert len({client.target for client in clients}) == 2
        assert (manager.stats().created, manager.stats().warm, manager.stats().failed) == (2, 2, 0)


async def test_the_last_manager_to_claim_a_session_has_its_machine(cluster: ControlledNamespace) -> None:
    await cluster.make_pool()
    async with cluster.managed(warm_pool="python") as one, cluster.managed(warm_pool="python") as other:
        await run(one, "session", "open('kept', 'w').write('42')")
        machine = await bound(cluster, one.sandbox_name("session"))
        assert await run(other, "session", "print(open('kept').read())") == "42"
        assert await bound(cluster, other.sandbox_name("session")) == machine
        await until(lambda: one.stats().ready == 0, "the first manager to let go")
        assert (one.stats().created, other.stats().created) == (1, 0)
        await one.on_session_closed("session")
        assert await run(other, "session", "print(open('kept').read())") == "42"
    assert not await cluster.claims()


async def test_a_cold_start_whose_name_a_foreign_sandbox_has(cluster: ControlledNamespace) -> None:
    """An empty pool makes a Sandbox under the claim's name, unless there is one already."""
    await cluster.make_pool(0)
    async with cluster.managed(warm_pool="python") as manager:
        name = manager.sandbox_name("session")
        foreign = SANDBOX.body(cluster.config(), cluster.version, name, "0" * 40)
        await cluster.api.create_namespaced_custom_object(
            GROUP, cluster.version, cluster.name, PLURAL, foreign
        )

        async def runs() -> bool:
            return condition(await cluster.get(name)).get("status") == "True"

        await until(runs, "the foreign Sandbox to run")
        assert await run(manager, "session", "print(6 * 7)") == "42"
        assert manager.sandbox_name("session") != name
        assert await bound(cluster, manager.sandbox_name("session")) == manager.sandbox_name("session")
    assert not await cluster.claims()
    assert await cluster.names() == {name}
