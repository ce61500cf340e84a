"""The Role of deploy/overlays/warm-pool: all that it adds is needed, and it is all that is needed."""

from __future__ import annotations

import pytest

from tests.support.controller import ControlledNamespace
from tests.support.envtest import CLAIMS, EXTENSIONS, VERBS, lacks
from tests.support.managers import Clients
from tests.support.patience import until

pytestmark = pytest.mark.controller


async def test_a_whole_life_needs_every_verb_and_no_other(cluster: ControlledNamespace) -> None:
    await cluster.make_pool(1)
    clients = Clients()
    async with cluster.managed(clients, warm_pool="python") as manager:
        assert await manager.cleanup_orphaned_sandboxes() == 0
        client = await manager.get_client("session")
        clients.made[0].fail()
        assert await manager.get_client("session") is client
        await manager.on_session_closed("session")
    assert not await cluster.claims()
    await until(lambda: set(cluster.requests(CLAIMS)) == VERBS, "all requests to be written down")
    # Sandboxes that the manager left when it had no pool are looked for, and nothing else.
    assert set(cluster.requests()) <= {"list"}


@pytest.fixture
async def without(cluster: ControlledNamespace, request: pytest.FixtureRequest) -> ControlledNamespace:
    """The namespace with its pool, and one verb taken out of the Role."""
    await cluster.make_pool(1)
    await cluster.allow("claims", VERBS - {request.param}, CLAIMS, EXTENSIONS)
    return cluster


@pytest.mark.parametrize("without", ["create"], indirect=True)
async def test_without_create_there_is_no_session(without: ControlledNamespace) -> None:
    async with without.managed(Clients(), warm_pool="python") as manager:
        with lacks("create", CLAIMS, EXTENSIONS):
            await manager.get_client("session")
        assert (manager.stats().failed, manager.stats().creating) == (1, 0)


@pytest.mark.parametrize("without", ["delete"], indirect=True)
async def test_without_delete_the_slot_is_held_until_it_works(without: ControlledNamespace) -> None:
    async with without.managed(Clients(), warm_pool="python", idle_check_interval=0.2) as manager:
        await manager.get_client("session")
        await manager.on_session_closed("session")
        assert manager.stats().closing == 1
        await without.allow("claims", VERBS, CLAIMS, EXTENSIONS)
        await until(lambda: manager.stats().closing == 0, "the deletion at a tick of the reaper's")
    assert not await without.claims()


@pytest.mark.parametrize("without", ["get"], indirect=True)
async def test_without_get_a_suspect_session_cannot_be_checked(without: ControlledNamespace) -> None:
    clients = Clients()
    async with without.managed(clients, warm_pool="python") as manager:
        client = await manager.get_client("session")
        clients.made[0].fail()
        with lacks("get", CLAIMS, EXTENSIONS):
            await manager.get_client("session")
        assert manager.stats().ready == 1  # It may be well: it is kept.
        await without.allow("claims", VERBS, CLAIMS, EXTENSIONS)
        assert await manager.get_client("session") is client


@pytest.mark.parametrize("without", ["list", "watch"], indirect=True)
async def test_without_list_or_watch_it_polls(
    without: ControlledNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    async with without.managed(Clients(), warm_pool="python", ready_poll_interval=0.05) as manager:
        await manager.get_client("session")
        assert without.requests(CLAIMS)["get"] >= 1
        assert caplog.text.count("watch_refused") == 1
    assert not await without.claims()


@pytest.mark.parametrize("without", ["patch"], indirect=True)
async def test_without_patch_there_are_no_leases(
    without: ControlledNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    async with without.managed(Clients(), warm_pool="python") as manager:
        await manager.get_client("session")
        [claim] = await without.claims()
        assert "shutdownTime" not in claim["spec"].get("lifecycle", {})
        assert caplog.text.count("leases_off") == 1
    assert not await without.claims()
