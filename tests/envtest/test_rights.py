"""The Role of deploy/base/rbac.yaml: all of it is needed, and it is all that is needed."""

from __future__ import annotations

import pytest

from prodisco_sandbox import SandboxManager
from prodisco_sandbox._cluster import watch as _watch
from tests.support.envtest import VERBS, Controller, Namespace, lacks, rights
from tests.support.managers import Clients
from tests.support.patience import until

pytestmark = pytest.mark.envtest


def test_the_role_is_for_sandboxes_alone() -> None:
    objects, account = rights("somewhere")
    (role,) = (found for found in objects if found["kind"] == "Role")
    assert role["rules"] == [
        {"apiGroups": ["agents.x-k8s.io"], "resources": ["sandboxes"], "verbs": sorted(VERBS)}
    ]
    assert account == "system:serviceaccount:somewhere:mcp-server"


async def test_a_whole_life_needs_every_verb_and_no_other(
    namespace: Namespace, controller: Controller
) -> None:
    clients = Clients()
    async with namespace.managed(clients) as manager:
        assert await manager.cleanup_orphaned_sandboxes() == 0
        client = await manager.get_client("session")
        clients.made[0].fail()
        assert await manager.get_client("session") is client
        await manager.on_session_closed("session")
    await until(lambda: set(namespace.requests()) == VERBS, "all requests to be written down")


@pytest.fixture
async def without(namespace: Namespace, request: pytest.FixtureRequest) -> Namespace:
    """The namespace, with one verb taken out of the Role."""
    await namespace.allow("sandbox-manager", VERBS - {request.param})
    return namespace


@pytest.mark.parametrize("without", ["create"], indirect=True)
async def test_without_create_there_is_no_session(without: Namespace, controller: Controller) -> None:
    async with without.managed() as manager:
        with lacks("create"):
            await manager.get_client("session")
        assert manager.stats().failed == 1
        assert manager.stats().creating == 0


@pytest.mark.parametrize("without", ["delete"], indirect=True)
async def test_without_delete_the_slot_is_held_until_it_works(
    without: Namespace, controller: Controller
) -> None:
    async with without.managed(idle_check_interval=0.2) as manager:
        await manager.get_client("session")
        await manager.on_session_closed("session")
        assert manager.stats().closing == 1
        assert len(await without.list()) == 1
        await without.orphan("gone", lease=None)
        with lacks("delete"):
            await manager.cleanup_orphaned_sandboxes(all_instances=True)
        await without.allow("sandbox-manager", VERBS)
        await until(lambda: manager.stats().closing == 0, "the deletion at a tick of the reaper's")
        assert await manager.cleanup_orphaned_sandboxes(all_instances=True) == 1
    assert not await without.list()


@pytest.mark.parametrize("without", ["get"], indirect=True)
async def test_without_get_a_doubted_session_cannot_be_checked(
    without: Namespace, controller: Controller
) -> None:
    clients = Clients()
    async with without.managed(clients) as manager:
        client = await manager.get_client("session")
        clients.made[0].fail()
        with lacks("get"):
            await manager.get_client("session")
        assert manager.stats().ready == 1  # It may be well: it is kept.
        await without.allow("sandbox-manager", VERBS)
        assert await manager.get_client("session") is client


@pytest.mark.parametrize("without", ["list"], indirect=True)
async def test_without_list_it_polls_and_cannot_clean_up(
    without: Namespace, controller: Controller, caplog: pytest.LogCaptureFixture
) -> None:
    async with without.managed(ready_poll_interval=0.05) as manager:
        await polls(without, manager, caplog)
        with lacks("list"):
            await manager.cleanup_orphaned_sandboxes()
    assert not await without.list()


@pytest.mark.parametrize("without", ["watch"], indirect=True)
async def test_without_watch_it_polls_until_it_may_watch(
    without: Namespace,
    controller: Controller,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_watch, "REFUSED_FIRST", 0.3)
    async with without.managed(ready_poll_interval=0.05, idle_check_interval=0.1) as manager:
        await polls(without, manager, caplog)
        await without.delete(manager.sandbox_name("session"))
        await until(lambda: manager.stats().lost == 1, "the list of each tick to tell")
        caplog.set_level("INFO", "prodisco_sandbox.watch")
        await without.allow("sandbox-manager", VERBS)
        await until(lambda: "watch_restored" in caplog.text, "the watch to be tried again")


async def polls(namespace: Namespace, manager: SandboxManager, caplog: pytest.LogCaptureFixture) -> None:
    await manager.get_client("session")
    assert namespace.requests()["get"] >= 1
    await manager.get_client("other")
    assert caplog.text.count("watch_refused") == 1


@pytest.mark.parametrize("without", ["patch"], indirect=True)
async def test_without_patch_there_are_no_leases(
    without: Namespace, controller: Controller, caplog: pytest.LogCaptureFixture
) -> None:
    async with without.managed(lease_duration=2.0) as manager:
        clients = [await manager.get_client(session) for session in ("session", "other")]
        assert ["shutdownTime" in sandbox["spec"] for sandbox in await without.list()] == [False, False]
        assert caplog.text.count("leases_off") == 1
        assert [await manager.get_client(session) for session in ("session", "other")] == clients
    assert not await without.list()
    assert without.requests()["patch"] == 1
