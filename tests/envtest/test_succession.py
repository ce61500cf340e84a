"""Managers that die, follow one another, and work side by side in one namespace."""

from __future__ import annotations

import asyncio
import calendar
import time
from pathlib import Path
from typing import Any

import pytest

from prodisco_sandbox._cluster.manifest import SANDBOX
from prodisco_sandbox._cluster.metadata import lease_time
from tests.support.envtest import Controller, Namespace, Object
from tests.support.killed import killed
from tests.support.patience import until

pytestmark = pytest.mark.envtest


async def test_a_killed_manager_is_succeeded_or_its_lease_ends(
    namespace: Namespace, controller: Controller, tmp_path: Path
) -> None:
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text(namespace.server.kubeconfig())
    settings: dict[str, Any] = {
        "namespace": namespace.name,
        "instance_id": "server-0",
        "lease_duration": 20.0,
    }
    async with killed(kubeconfig, "again", "never", stubs=True, **settings):
        pass
    left = {sandbox["metadata"]["name"]: sandbox for sandbox in await namespace.list()}
    assert set(left) == {SANDBOX.name("again"), SANDBOX.name("never")}
    assert all(sandbox["spec"]["shutdownPolicy"] == "Delete" for sandbox in left.values())

    async with namespace.managed(instance_id="server-0", lease_duration=20.0) as manager:
        client = await manager.get_client("again")
        assert client.sandbox is not None
        assert client.sandbox.uid == left[SANDBOX.name("again")]["metadata"]["uid"]
        assert manager.stats().created == 0

        ends = max(lease_end(sandbox) for sandbox in left.values())
        await until(lambda: len(controller.seen) == 1, "the end of the other one's lease")
        assert await namespace.names() == {SANDBOX.name("again")}
        await until(lambda: time.time() > ends + 1, "the first manager's last lease to be over")
        assert await manager.get_client("again") is client
        assert lease_end(await namespace.get(SANDBOX.name("again"))) > ends
        assert manager.stats().lost == 0
    assert not await namespace.list()


def lease_end(sandbox: Object) -> float:
    end: Any = sandbox["spec"]["shutdownTime"]
    return calendar.timegm(time.strptime(end, "%Y-%m-%dT%H:%M:%SZ"))


async def test_the_last_claimer_wins_and_the_loser_deletes_nothing(
    namespace: Namespace, controller: Controller
) -> None:
    """As when a session is routed to another replica."""
    async with (
        namespace.managed(instance_id="server-0") as loser,
        namespace.managed(instance_id="server-1") as winner,
    ):
        lost = await loser.get_client("session")
        won = await winner.get_client("session")
        assert lost.sandbox is not None
        assert won.sandbox is not None
        assert won.sandbox.uid == lost.sandbox.uid
        await until(lambda: loser.stats().lost == 1, "the loser to notice")
        await loser.on_session_closed("session")
        await loser.shutdown()
        assert await namespace.names() == {winner.sandbox_name("session")}
        assert await winner.get_client("session") is won
    assert not await namespace.list()


async def test_two_managers_clean_up_one_namespace(namespace: Namespace, controller: Controller) -> None:
    now = time.time()
    mine = await namespace.orphan("server-0", lease_time(now, 600))
    lapsed = await namespace.orphan("gone", lease_time(now, -5))
    living = await namespace.orphan("elsewhere", lease_time(now, 600))
    unrelated = await namespace.orphan("server-0", None, managed=False)
    ids = [f"session-{i}" for i in range(3)]
    async with (
        namespace.managed(instance_id="server-0", max_sessions=4) as first,
        namespace.managed(instance_id="server-1", max_sessions=4) as second,
    ):
        # The clean-ups run while both are making sandboxes.
        *removed, _ = await asyncio.gather(
            first.cleanup_orphaned_sandboxes(),
            second.cleanup_orphaned_sandboxes(),
            asyncio.gather(
                *(first.get_client(f"first-{session}") for session in ids),
                *(second.get_client(f"second-{session}") for session in ids),
            ),
        )
        assert sum(removed) == 2
        own = {first.sandbox_name(f"first-{session}") for session in ids}
        others = {second.sandbox_name(f"second-{session}") for session in ids}
        assert await namespace.names() == own | others | {living, unrelated}
        assert mine not in await namespace.names()
        assert lapsed not in await namespace.names()
        assert (first.stats().lost, second.stats().lost) == (0, 0)

        assert await first.cleanup_orphaned_sandboxes(all_instances=True) == 4
        assert await namespace.names() == own | {unrelated}
        await until(lambda: second.stats().lost == 3, "the second to notice")
        assert first.stats().lost == 0
    assert await namespace.names() == {unrelated}
