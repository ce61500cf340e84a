"""LocalCluster keeps the workspace of a Sandbox with volumes, for its next server and for no other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from prodisco_sandbox import SandboxClient, SandboxManager, SandboxRef
from prodisco_sandbox._cluster.manifest import SANDBOX
from prodisco_sandbox.local import LocalCluster
from prodisco_sandbox.testing import FakeCustomObjectsApi
from tests.support.local import (
    AT,
    STUB,
    condition,
    create,
    in_seconds,
    make_keepers_patient,
    processes,
    reason,
    stub,
    traces,
    until_gone,
)
from tests.support.patience import PATIENCE, until

# Lists what its workspace has, and adds a file with its own number.
LISTS = STUB.replace("echo", 'ls "$8" >listed; n=${6%/socket}; touch "$8/${n##*/}"; echo', 1)
VOLUMES = [
    {
        "metadata": {"name": "workspace"},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}},
    }
]
LIST = "import os; print(sorted(os.listdir()))"


@asynccontextmanager
async def suspending(directory: Path, **settings: Any) -> AsyncIterator[tuple[LocalCluster, SandboxManager]]:
    settings = {"session_idle_timeout": 0.1, "idle_check_interval": 0.05, **settings}
    async with LocalCluster(directory=directory) as cluster:
        config = cluster.config(on_idle="suspend", ready_timeout=PATIENCE, **settings)
        async with SandboxManager(config, custom_objects_api=cluster.custom_objects_api) as manager:
            yield cluster, manager


def kept(cluster: LocalCluster) -> list[str]:
    return sorted(path.name for path in cluster.directory.glob("workspace-*"))


def listed(cluster: LocalCluster, server: int) -> str:
    return (cluster.directory / str(server) / "listed").read_text()


async def suspended(cluster: LocalCluster, count: int) -> None:
    """Waits until so many Sandboxes are, and nothing else is left of their servers."""

    def are_suspended() -> bool:
        found = [condition(sandbox, "Suspended").get("status") for sandbox in api.objects]
        return found.count("True") == count

    api = cluster.custom_objects_api
    await api.until(are_suspended, timeout=PATIENCE)
    assert sorted(path.name for path in cluster.directory.iterdir()) == kept(cluster)


async def output(client: SandboxClient, code: str) -> str:
    result = await client.execute(code)
    assert result.success, result.error
    return result.output.strip()


async def use(manager: SandboxManager, session_id: str, code: str) -> SandboxRef:
    """Runs code in a session, which is not idle before it has ended."""
    async with manager.session(session_id) as client:
        await output(client, code)
        assert client.sandbox is not None
        return client.sandbox


# On real servers, with a manager


async def test_files_survive_a_suspension_and_nothing_else_does(tmp_path: Path) -> None:
    async with suspending(tmp_path) as (cluster, manager):
        leave = """
import os, pathlib, subprocess, tempfile
pathlib.Path("diary").write_text("the owl")
pathlib.Path(tempfile.gettempdir(), "scratch").touch()
subprocess.Popen(["sleep", "60"], start_new_session=True)
"""
        before, _ = await asyncio.gather(use(manager, "one", leave), use(manager, "two", "open('mine', 'w')"))
        await suspended(cluster, 2)
        assert len(kept(cluster)) == 2
        assert "sleep 60" not in processes(cluster.directory).values()
        async with manager.session("one") as one_again, manager.session("two") as two_again:
            assert await one_again.list_cache() == ()
            assert await one_again.list_executions() == ()
            assert await output(one_again, LIST) == "['diary']"
            assert await output(one_again, "print(open('diary').read())") == "the owl"
            look = "import os, tempfile; print(os.listdir(tempfile.gettempdir()))"
            assert "scratch" not in await output(one_again, look)
            assert await output(two_again, LIST) == "['mine']"
            assert one_again.sandbox is not None
            assert (one_again.sandbox.uid, one_again.sandbox == before) == (before.uid, False)
        assert manager.stats().resumed == 2
    assert traces(tmp_path) == []


async def test_files_survive_a_killed_server(tmp_path: Path) -> None:
    async with suspending(tmp_path, session_idle_timeout=PATIENCE) as (cluster, manager):
        old = await use(manager, "s", "open('diary', 'w')")
        cluster.kill(manager.sandbox_name("s"))
        await until(lambda: manager.stats().lost == 1)
        new = await manager.get_client("s")
        assert await output(new, LIST) == "['diary']"
        assert new.sandbox is not None
        assert (new.sandbox.uid, new.sandbox == old) == (old.uid, False)


@pytest.mark.parametrize("how", ["closed", pytest.param("never used again", marks=pytest.mark.slow)])
async def test_the_end_of_a_suspended_session_takes_its_files(tmp_path: Path, how: str) -> None:
    suspended_for = 1.0 if how == "never used again" else PATIENCE
    async with suspending(tmp_path, suspended_for=suspended_for) as (cluster, manager):
        await use(manager, "s", "open('diary', 'w')")
        await until(lambda: manager.stats().suspended == 1)
        if how == "closed":
            await suspended(cluster, 1)
            assert len(kept(cluster)) == 1
            await manager.on_session_closed("s")
        await until_gone(cluster.directory)
        async with manager.session("s") as client:
            assert await output(client, LIST) == "[]"


async def test_what_code_has_locked_is_open_to_its_next_server_and_can_be_removed(tmp_path: Path) -> None:
    lock = """
import os
os.makedirs("a/b")
os.chmod("a/b", 0)
os.chmod("a", 0)
os.chmod(".", 0)
"""
    async with suspending(tmp_path) as (cluster, manager):
        await use(manager, "s", lock)
        await suspended(cluster, 1)
        async with manager.session("s") as client:
            assert await output(client, LIST) == "['a']"
            await output(client, "import os; os.chmod('.', 0)")
        await suspended(cluster, 1)
        await manager.on_session_closed("s")
        await until_gone(cluster.directory)


async def test_a_cluster_that_ends_takes_what_is_suspended(tmp_path: Path) -> None:
    async with LocalCluster(directory=tmp_path) as cluster:
        config = cluster.config(on_idle="suspend", instance_id="me")
        async with SandboxManager(config, custom_objects_api=cluster.custom_objects_api) as manager:
            await use(manager, "s", "import os; os.mkdir('a', 0)")
        # Its manager will be back.
        await suspended(cluster, 1)
        assert kept(cluster) == ["workspace-1"]
    assert traces(tmp_path) == []


# The controller


async def test_every_server_of_a_sandbox_gets_its_workspace(tmp_path: Path) -> None:
    async with LocalCluster(python=stub(tmp_path, LISTS)) as cluster:
        api = cluster.custom_objects_api

        async def ready(server: int) -> str:
            target = f"unix:{cluster.directory}/{server}/socket"
            await until(lambda: cluster.endpoint(api.get("s")) == target)
            await api.until(lambda: reason(api.get("s")) == "DependenciesReady")
            return listed(cluster, server)

        await create(cluster, "s", volumeClaimTemplates=VOLUMES)
        assert await ready(1) == ""
        api.suspend("s")
        await suspended(cluster, 1)
        assert (cluster.directory / "workspace-1").stat().st_mode & 0o777 == 0o700
        api.resume("s")
        assert await ready(2) == "1\n"
        cluster.delete_pod("s")
        assert await ready(3) == "1\n2\n"
        cluster.kill("s")
        await api.until(lambda: reason(api.get("s")) == "PodFailed")
        cluster.delete_pod("s")
        assert await ready(4) == "1\n2\n3\n"
        assert kept(cluster) == ["workspace-1"]


@pytest.mark.parametrize("link", [True, False])
async def test_what_code_puts_in_place_of_its_workspace_leads_nowhere(tmp_path: Path, link: bool) -> None:
    (outside := tmp_path / "outside").mkdir()
    async with LocalCluster(python=stub(tmp_path, LISTS)) as cluster:
        api = cluster.custom_objects_api
        await create(cluster, "s", volumeClaimTemplates=VOLUMES)
        await api.until(lambda: reason(api.get("s")) == "DependenciesReady")
        place = cluster.directory / "workspace-1"
        place.rename(cluster.directory / "moved")
        place.symlink_to(outside) if link else place.touch()
        cluster.delete_pod("s")
        target = f"unix:{cluster.directory}/2/socket"
        await until(lambda: cluster.endpoint(api.get("s")) == target)
        assert (place.is_symlink(), [path.name for path in place.iterdir()]) == (False, ["2"])
    assert list(outside.iterdir()) == []


async def test_a_link_in_place_of_a_workspace_is_removed_and_not_what_it_leads_to(tmp_path: Path) -> None:
    (outside := tmp_path / "outside").mkdir()
    async with LocalCluster(python=stub(tmp_path)) as cluster:
        api = cluster.custom_objects_api
        await create(cluster, "s", volumeClaimTemplates=VOLUMES)
        await api.until(lambda: reason(api.get("s")) == "DependenciesReady")
        place = cluster.directory / "workspace-1"
        place.rmdir()
        place.symlink_to(outside)
        await api.delete_namespaced_custom_object(*AT, "s")
        await until(lambda: not place.is_symlink())
        assert outside.is_dir()


async def test_a_workspace_goes_after_its_last_server_and_no_successor_gets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_keepers_patient(monkeypatch)
    end = tmp_path / "end"
    waits = f"trap 'while [ ! -e {end} ]; do sleep 0.01; done; exit' TERM\necho"
    async with LocalCluster(python=stub(tmp_path, LISTS.replace("echo", waits, 1))) as cluster:
        api = cluster.custom_objects_api
        await create(cluster, "s", volumeClaimTemplates=VOLUMES)
        await api.until(lambda: reason(api.get("s")) == "DependenciesReady")
        await api.delete_namespaced_custom_object(*AT, "s")
        await create(cluster, "s", volumeClaimTemplates=VOLUMES)
        await api.until(lambda: reason(api.get("s")) == "ReconcilerError")
        assert kept(cluster) == ["workspace-1"]
        end.touch()
        await api.until(lambda: reason(api.get("s")) == "DependenciesReady")
        assert listed(cluster, 2) == ""
        await until(lambda: kept(cluster) == ["workspace-2"])


async def test_deleted_before_its_turn_to_start_it_leaves_no_workspace(tmp_path: Path) -> None:
    script = STUB.replace("echo", 'case "$6" in */1/socket) sleep 60;; esac\necho', 1)
    async with LocalCluster(python=stub(tmp_path, script), max_starting=1) as cluster:
        api = cluster.custom_objects_api
        await create(cluster, "first", volumeClaimTemplates=VOLUMES)
        await create(cluster, "s", volumeClaimTemplates=VOLUMES)
        await api.until(lambda: reason(api.get("s")))
        await api.delete_namespaced_custom_object(*AT, "s")
        await api.delete_namespaced_custom_object(*AT, "first")
        controller = cluster._controller
        assert controller is not None
        await until(lambda: not controller._workspaces)
        await until_gone(cluster.directory)


async def test_a_suspended_sandbox_expires_with_its_workspace(tmp_path: Path) -> None:
    async with LocalCluster(python=stub(tmp_path)) as cluster:
        api = cluster.custom_objects_api
        await create(cluster, "s", volumeClaimTemplates=VOLUMES, shutdownPolicy="Delete")
        await api.until(lambda: reason(api.get("s")) == "DependenciesReady")
        api.suspend("s")
        await suspended(cluster, 1)
        assert kept(cluster) == ["workspace-1"]
        change = {"spec": {"shutdownTime": in_seconds(0)}}
        merge = "application/merge-patch+json"
        await api.patch_namespaced_custom_object(*AT, "s", change, _content_type=merge)
        await until_gone(cluster.directory)
        assert api.get("s") is None


async def test_a_later_cluster_starts_a_suspended_sandbox_with_an_empty_workspace(tmp_path: Path) -> None:
    async with FakeCustomObjectsApi() as api:
        async with LocalCluster(custom_objects_api=api, python=stub(tmp_path, LISTS)) as cluster:
            await create(cluster, "s", volumeClaimTemplates=VOLUMES)
            await api.until(lambda: reason(api.get("s")) == "DependenciesReady")
            api.suspend("s")
            await suspended(cluster, 1)
        async with LocalCluster(custom_objects_api=api, python=stub(tmp_path, LISTS)) as cluster:
            api.resume("s")
            await api.until(lambda: reason(api.get("s")) == "DependenciesReady")
            assert listed(cluster, 1) == ""


def test_the_settings_ask_for_a_volume() -> None:
    cluster = LocalCluster()
    assert cluster.config().workspace_storage is None
    assert cluster.config(on_idle="suspend").workspace_storage == "1Gi"
    assert cluster.config(on_idle="suspend", workspace_storage="5Gi").workspace_storage == "5Gi"
    body = SANDBOX.body(cluster.config(workspace_storage="1Gi"), "v1beta1", "s", "session")
    assert body["spec"]["volumeClaimTemplates"] == VOLUMES
    with pytest.raises(ValueError, match="on_idle is 'suspend': it must be \"delete\" with warm_pool"):
        LocalCluster(warm=1).config(on_idle="suspend")
