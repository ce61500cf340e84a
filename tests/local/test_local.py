"""LocalCluster: what its controller does with Sandboxes, and whole lives on real servers."""

from __future__ import annotations

import asyncio
import contextlib
import stat
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from prodisco_sandbox import SandboxFailedError, SandboxManager
from prodisco_sandbox._cluster.grace import STARTING_SERVER
from prodisco_sandbox.errors import SandboxError
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
from tests.support.patience import PATIENCE, put_forward, until

Object = dict[str, Any]


@contextlib.asynccontextmanager
async def running(cluster: LocalCluster, **settings: Any) -> AsyncIterator[SandboxManager]:
    settings = {"ready_timeout": PATIENCE, **settings}
    async with (
        cluster,
        SandboxManager(cluster.config(**settings), custom_objects_api=cluster.custom_objects_api) as manager,
    ):
        yield manager


async def until_there(path: Path) -> None:
    async with asyncio.timeout(PATIENCE):
        while not path.exists():
            await asyncio.sleep(0.01)


@pytest.fixture
def patient_keeper(monkeypatch: pytest.MonkeyPatch) -> None:
    make_keepers_patient(monkeypatch)


# Whole lives, on real servers


async def test_two_sessions_from_their_first_calls_to_the_end(tmp_path: Path) -> None:
    cluster = LocalCluster(directory=tmp_path)
    async with running(cluster) as manager:
        one, two = await asyncio.gather(manager.get_client("one"), manager.get_client("two"))
        assert stat.S_IMODE(cluster.directory.stat().st_mode) == 0o700
        assert len({one.target, two.target}) == 2
        written = await one.execute(code="open('mine', 'w').write('x'); print(6 * 7)")
        assert (written.success, written.output) == (True, "42\n")
        listing = "import os; print(os.listdir())"
        results = await asyncio.gather(one.execute(code=listing), two.execute(code=listing))
        assert [result.output for result in results] == ["['mine']\n", "[]\n"]

        closed = Path(one.target.removeprefix("unix:")).parent
        await manager.on_session_closed("one")
        await until_gone(closed)
        assert (await two.execute(code="")).success
        assert processes(cluster.directory)
    assert traces(tmp_path) == []


async def test_a_killed_server_is_noticed_and_made_again(tmp_path: Path) -> None:
    cluster = LocalCluster(directory=tmp_path)
    seen: list[Object] = []
    cluster.custom_objects_api.subscribe(lambda _, sandbox: seen.append(sandbox))
    async with running(cluster) as manager:
        old = await manager.get_client("session")
        await old.execute(code="open('mine', 'w')")
        cluster.kill(manager.sandbox_name("session"))
        async with asyncio.timeout(PATIENCE):
            while not manager.stats().lost:
                await asyncio.sleep(0.01)
        new = await manager.get_client("session")
        assert old.sandbox is not None
        assert new.sandbox is not None
        assert new.sandbox.uid != old.sandbox.uid
        assert (await new.execute(code="import os; print(os.listdir())")).output == "[]\n"
    failed = next(sandbox for sandbox in seen if reason(sandbox) == "PodFailed")
    assert condition(failed)["message"] == "The server was killed with SIGKILL"
    assert condition(failed, "Finished")["status"] == "True"
    assert traces(tmp_path) == []


async def test_a_reaped_session_comes_back(tmp_path: Path) -> None:
    cluster = LocalCluster(directory=tmp_path)
    async with running(cluster, session_idle_timeout=0.1, idle_check_interval=0.05) as manager:
        old = await manager.get_client("session")
        await until_gone(Path(old.target.removeprefix("unix:")).parent)
        assert manager.stats().reaped == 1
        async with manager.session("session") as new:
            assert new.sandbox != old.sandbox
            assert (await new.execute(code="print('back')")).output == "back\n"
    assert traces(tmp_path) == []


async def test_a_server_that_does_not_start_fails_its_session_at_once(tmp_path: Path) -> None:
    cluster = LocalCluster(directory=tmp_path, server_args=["--memory-limit-mb", "lots"])
    async with running(cluster) as manager:
        with pytest.raises(SandboxFailedError, match=r"PodFailed.*--memory-limit-mb is 'lots'"):
            await manager.get_client("session")


async def test_a_manager_may_have_another_value_of_managed_by(tmp_path: Path) -> None:
    async with running(LocalCluster(directory=tmp_path), managed_by="another") as manager:
        client = await manager.get_client("session")
        assert (await client.execute(code="print(6 * 7)")).output == "42\n"


async def test_a_directory_whose_name_looks_percent_encoded(tmp_path: Path) -> None:
    (directory := tmp_path / "feature%2Fx").mkdir()
    async with running(LocalCluster(directory=directory)) as manager:
        client = await manager.get_client("session")
        assert (await client.execute(code="print(6 * 7)")).output == "42\n"
    assert traces(directory) == []


# The controller


async def test_the_status_is_what_agent_sandbox_writes(tmp_path: Path) -> None:
    seen: list[Object] = []
    async with LocalCluster(python=stub(tmp_path)) as cluster:
        api = cluster.custom_objects_api
        api.subscribe(lambda _, sandbox: seen.append(sandbox))
        sandbox = await create(cluster, "s")
        assert cluster.endpoint(sandbox) is None
        await api.until(lambda: reason(api.get("s")) == "DependenciesReady")
        assert cluster.endpoint(sandbox) == f"unix:{cluster.directory}/1/socket"
        assert cluster.endpoint({**sandbox, "metadata": {"uid": "another"}}) is None
        await api.delete_namespaced_custom_object(*AT, "s")
        await until_gone(cluster.directory / "1")
        assert cluster.endpoint(sandbox) is None
    # The annotation has an event of its own, and so has the pod's turn to start.
    reasons = [reason(sandbox) for sandbox in seen]
    assert reasons == [None, None, *2 * ["DependenciesNotReady"], "DependenciesReady", "DependenciesReady"]
    status = seen[4]["status"]
    assert status["serviceFQDN"] == "s.prodisco.svc.cluster.local"
    assert status["podIPs"] == ["100::1"]
    assert [c["type"] for c in status["conditions"]] == ["Suspended", "PodScheduled", "Ready"]
    assert condition(seen[2])["status"] == "False"
    assert condition(seen[4]) == {
        "type": "Ready",
        "status": "True",
        "reason": "DependenciesReady",
        "message": "Pod is Ready; Service Exists",
        "observedGeneration": 1,
        "lastTransitionTime": condition(seen[4])["lastTransitionTime"],
    }


async def test_the_shutdown_time_is_honoured_and_can_be_put_off(tmp_path: Path) -> None:
    async with LocalCluster(python=stub(tmp_path)) as cluster:
        api = cluster.custom_objects_api

        async def renew(name: str, seconds: float) -> None:
            patch = {"spec": {"shutdownTime": in_seconds(seconds)}}
            merge = "application/merge-patch+json"
            await api.patch_namespaced_custom_object(*AT, name, patch, _content_type=merge)

        def left(name: str) -> float:
            """Seconds until the controller ends it."""
            assert cluster._controller is not None
            (worker,) = (w for w in cluster._controller.workers.values() if w.name == name)
            return (worker.wakes_at or 0.0) - asyncio.get_running_loop().time()

        # In time that passes while they start, and in time that does not.
        await create(cluster, "deleted", shutdownTime=in_seconds(0.4), shutdownPolicy="Delete")
        await create(cluster, "over", shutdownTime=in_seconds(-60), shutdownPolicy="Delete")
        await create(cluster, "retained", shutdownTime=in_seconds(3600))
        await create(cluster, "renewed", shutdownTime=in_seconds(3600), shutdownPolicy="Delete")
        await api.until(lambda: api.get("over") is None)
        await api.until(lambda: api.get("deleted") is None)
        for name in ("retained", "renewed"):
            await api.until(lambda name=name: reason(api.get(name)) == "DependenciesReady")
        await renew("renewed", 7200)
        await until(lambda: left("renewed") > 3600)
        await renew("retained", 0)
        await api.until(lambda: reason(api.get("retained")) == "SandboxExpired")
        await api.until(lambda: "podIPs" not in api.get("retained")["status"])
        assert reason(api.get("renewed")) == "DependenciesReady"
        assert sorted(path.name for path in cluster.directory.iterdir()) != []
        with pytest.raises(KeyError):
            cluster.kill("retained")
        cluster.kill("renewed")
        await api.until(lambda: reason(api.get("renewed")) == "PodFailed")


async def test_a_suspended_sandbox_has_no_server_and_a_resumed_one_starts_afresh(tmp_path: Path) -> None:
    async with LocalCluster(python=stub(tmp_path)) as cluster:
        api = cluster.custom_objects_api
        sandbox = await create(cluster, "s")
        await api.until(lambda: reason(api.get("s")) == "DependenciesReady")
        first = cluster.endpoint(sandbox)
        api.suspend("s")
        await api.until(lambda: condition(api.get("s"), "Suspended")["status"] == "True")
        assert cluster.endpoint(sandbox) is None
        assert list(cluster.directory.iterdir()) == []
        assert "podIPs" not in api.get("s")["status"]
        for end in (cluster.kill, cluster.delete_pod):
            with pytest.raises(KeyError, match="no server runs for a Sandbox 's'"):
                end("s")
        api.resume("s")
        await api.until(lambda: reason(api.get("s")) == "DependenciesReady")
        assert cluster.endpoint(sandbox) not in (None, first)
        assert api.get("s")["status"]["podIPs"] == ["100::2"]


async def test_suspended_before_its_turn_to_start_it_leaves_its_place(tmp_path: Path) -> None:
    script = STUB.replace("echo", 'case "$6" in */1/socket) sleep 60;; esac\necho', 1)
    async with LocalCluster(python=stub(tmp_path, script), max_starting=1) as cluster:
        api = cluster.custom_objects_api
        await create(cluster, "first")
        await create(cluster, "s")
        await api.until(lambda: reason(api.get("s")))
        api.suspend("s")
        await api.until(lambda: condition(api.get("s"), "Suspended")["status"] == "True")
        await api.delete_namespaced_custom_object(*AT, "first")
        await until(lambda: list(cluster.directory.iterdir()) == [])


@pytest.mark.usefixtures("patient_keeper")
@pytest.mark.parametrize(("status", "how"), [(0, "PodSucceeded"), (1, "PodFailed")])
async def test_a_deleted_pod_is_finished_before_another_one_comes(
    tmp_path: Path, status: int, how: str
) -> None:
    seen: list[Object] = []
    script = STUB.replace("echo", f"trap 'exit {status}' TERM\necho", 1)
    async with LocalCluster(python=stub(tmp_path, script)) as cluster:
        api = cluster.custom_objects_api
        sandbox = await create(cluster, "s")
        await api.until(lambda: reason(api.get("s")) == "DependenciesReady")
        api.subscribe(lambda _, sandbox: seen.append(sandbox))
        cluster.delete_pod("s")
        await api.until(lambda: seen and reason(seen[-1]) == "DependenciesReady")
        assert cluster.endpoint(sandbox) == f"unix:{cluster.directory}/2/socket"
        assert not (cluster.directory / "1").exists()
    assert condition(seen[0], "Finished")["reason"] == how
    assert seen[0]["status"]["podIPs"] == ["100::1"]
    assert {sandbox["metadata"]["uid"] for sandbox in seen} == {sandbox["metadata"]["uid"]}


async def test_a_dead_server_stays_dead_until_its_pod_is_deleted(tmp_path: Path) -> None:
    async with LocalCluster(python=stub(tmp_path)) as cluster:
        api = cluster.custom_objects_api
        await create(cluster, "s")
        await api.until(lambda: reason(api.get("s")) == "DependenciesReady")
        cluster.kill("s")
        await api.until(lambda: reason(api.get("s")) == "PodFailed")
        merge = {"spec": {"shutdownTime": in_seconds(3600)}}
        await api.patch_namespaced_custom_object(
            *AT, "s", merge, _content_type="application/merge-patch+json"
        )
        await api.until(lambda: condition(api.get("s"))["observedGeneration"] == 2)
        assert reason(api.get("s")) == "PodFailed"
        cluster.delete_pod("s")
        await api.until(lambda: reason(api.get("s")) == "DependenciesReady")


ECHO = 'echo "listening on unix:$6"'


@pytest.mark.usefixtures("patient_keeper")
async def test_a_name_waits_for_the_server_that_holds_it(tmp_path: Path) -> None:
    stays = f"trap '' TERM; {ECHO}; while ! [ -e {tmp_path}/end ]; do sleep 0.02; done; exit 0"
    script = STUB.replace(ECHO, f"if mkdir {tmp_path}/first; then {stays}; fi\n{ECHO}")
    async with LocalCluster(python=stub(tmp_path, script)) as cluster:
        api = cluster.custom_objects_api
        old = await create(cluster, "s")
        await api.until(lambda: reason(api.get("s")) == "DependenciesReady")
        await api.delete_namespaced_custom_object(*AT, "s")
        new = await create(cluster, "s")
        await api.until(lambda: reason(api.get("s")) == "ReconcilerError")
        assert condition(api.get("s"))["message"] == (
            f'Error seen: pod "s" is owned by Sandbox/s (UID: {old["metadata"]["uid"]}), not by sandbox "s"'
        )
        assert cluster.endpoint(new) is None
        (tmp_path / "end").touch()
        await api.until(lambda: reason(api.get("s")) == "DependenciesReady")
        assert cluster.endpoint(new) is not None
        assert cluster.endpoint(old) is None


async def test_decided_on_what_is_no_more_it_decides_again(tmp_path: Path) -> None:
    async with LocalCluster(python=stub(tmp_path)) as cluster:
        api = cluster.custom_objects_api
        with api.faults.add("patch", hold=True, times=1) as wire:
            await create(cluster, "s")
            await wire.reached()
            api.suspend("s")
        await api.until(lambda: condition(api.get("s"), "Suspended").get("status") == "True")
        assert list(cluster.directory.iterdir()) == []
        api.resume("s")
        await api.until(lambda: reason(api.get("s")) == "DependenciesReady")


async def test_so_many_servers_start_at_once_and_no_more(tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = STUB.replace("echo", f"echo start >>{log}; sleep 0.05; echo end >>{log}; echo", 1)
    async with LocalCluster(python=stub(tmp_path, script), max_starting=1) as cluster:
        api = cluster.custom_objects_api
        for name in ("a", "b", "c"):
            await create(cluster, name)
        await api.until(lambda: all(reason(sandbox) == "DependenciesReady" for sandbox in api.objects))
    assert log.read_text().split() == ["start", "end"] * 3


async def test_a_sandbox_deleted_while_it_waits_or_starts_gives_its_place_back(
    tmp_path: Path,
) -> None:
    # The first one never gets as far as serving.
    script = STUB.replace("echo", 'case "$6" in */1/socket) sleep 60;; esac\necho', 1)
    async with LocalCluster(python=stub(tmp_path, script), max_starting=1) as cluster:
        api = cluster.custom_objects_api
        for name in ("a", "b", "c"):
            await create(cluster, name)
        await api.until(lambda: all(reason(sandbox) for sandbox in api.objects))
        await api.delete_namespaced_custom_object(*AT, "b")
        assert reason(api.get("c")) == "DependenciesNotReady"
        await api.delete_namespaced_custom_object(*AT, "a")
        await api.until(lambda: reason(api.get("c")) == "DependenciesReady")


async def test_servers_get_only_the_environment_that_is_passed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SECRET", "x")
    monkeypatch.setenv("WANTED", "y")
    script = STUB.replace("read", "env >env; read", 1)
    async with LocalCluster(
        python=stub(tmp_path, script), pass_env=["PATH", "WANTED", "NOT_THERE"]
    ) as cluster:
        await create(cluster, "s")
        server = cluster.directory / "1"
        async with asyncio.timeout(PATIENCE):
            while not (server / "env").exists() or "WANTED=y" not in (server / "env").read_text():
                await asyncio.sleep(0.01)
        lines = (server / "env").read_text().splitlines()
        names = {line.partition("=")[0] for line in lines} - {"PWD", "OLDPWD", "SHLVL", "_"}
        assert names == {"PATH", "WANTED", "TMPDIR"}
        assert f"TMPDIR={server}/tmp" in lines


async def test_a_server_that_says_much_is_not_blocked(tmp_path: Path) -> None:
    script = STUB.replace("read", "head -c 300000 /dev/zero; touch said; read", 1)
    async with LocalCluster(python=stub(tmp_path, script)) as cluster:
        await create(cluster, "s")
        await until_there(cluster.directory / "1" / "said")


async def test_a_server_that_says_one_long_line_does_not_end_the_others(tmp_path: Path) -> None:
    line = "head -c 100000 /dev/zero | tr '\\0' x; echo"
    script = STUB.replace("echo", f'case "$6" in */1/socket) {line}; touch said;; esac\necho', 1)
    async with LocalCluster(python=stub(tmp_path, script)) as cluster:
        api = cluster.custom_objects_api
        await create(cluster, "long")
        await until_there(cluster.directory / "1" / "said")
        # The rest of the line is heard before this one is.
        await create(cluster, "other")
        await api.until(lambda: reason(api.get("other")) == "DependenciesReady")
        assert reason(api.get("long")) == "DependenciesNotReady"


class Unwatchable(FakeCustomObjectsApi):
    """As plain fakes are: lists, and nothing more."""

    async def list_namespaced_custom_object(  # type: ignore[override]
        self, group: str, version: str, namespace: str, plural: str, label_selector: str = ""
    ) -> Any:
        return await super().list_namespaced_custom_object(
            group, version, namespace, plural, label_selector=label_selector
        )


@pytest.mark.parametrize("version", ["v1alpha1", "v1beta1"])
async def test_where_it_cannot_watch_it_lists(
    version: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with Unwatchable(versions=[version]) as api:
        async with LocalCluster(custom_objects_api=api, python=stub(tmp_path), poll_interval=0.02) as cluster:
            sandbox = await create(cluster, "s", version)
            await api.until(lambda: reason(api.get("s")) == "DependenciesReady")
            with api.faults.add("list", error=500, times=2):
                count = api.count("list")
                await api.until(lambda: api.count("list") > count + 3)
            assert cluster.endpoint(sandbox) is not None
            api.delete_now("s")
            async with asyncio.timeout(PATIENCE):
                while cluster.endpoint(sandbox) is not None:
                    await asyncio.sleep(0.01)
        assert "task_failed" not in caplog.text
        # An API object that was passed in stays open.
        assert await api.get_api_resources(AT[0], version)


async def test_faults_of_the_api_are_survived(tmp_path: Path) -> None:
    async with LocalCluster(python=stub(tmp_path)) as cluster:
        api = cluster.custom_objects_api
        await create(cluster, "before")
        await api.until(lambda: reason(api.get("before")) == "DependenciesReady")
        api.faults.add("patch_status", error=503, times=2)
        api.compact()
        api.cut_watches()
        await create(cluster, "after")
        api.delete_now("before")
        await api.until(lambda: reason(api.get("after")) == "DependenciesReady")
        await until_gone(cluster.directory / "1")


async def test_a_status_that_may_not_be_written_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    async with LocalCluster(python=stub(tmp_path)) as cluster:
        api = cluster.custom_objects_api
        api.forbid("patch_status")
        await create(cluster, "s")
        await until(lambda: "request_retried" in caplog.text)
        assert "sandbox_abandoned" not in caplog.text
        put_forward(monkeypatch, STARTING_SERVER)
        await until(lambda: "sandbox_abandoned" in caplog.text)
        assert list(cluster.directory.iterdir()) == []


async def test_a_status_that_comes_late_does_not_go_to_a_successor(tmp_path: Path) -> None:
    async with LocalCluster(python=stub(tmp_path)) as cluster:
        api = cluster.custom_objects_api

        def is_ready() -> bool:
            return reason(api.get("s")) == "DependenciesReady"

        await create(cluster, "s")
        await api.until(is_ready)
        # It is on the wire: no cancellation takes it back.
        with api.faults.add("patch_status", hold=True, lands=True, times=1) as wire:
            cluster.kill("s")
            await wire.reached()
            await api.delete_namespaced_custom_object(*AT, "s")
            await create(cluster, "s")
            await api.until(is_ready)
        assert is_ready()


async def test_once_it_can_watch_again_it_lists_no_more(tmp_path: Path) -> None:
    async with LocalCluster(python=stub(tmp_path), poll_interval=0.01) as cluster:
        api, controller = cluster.custom_objects_api, cluster._controller
        assert controller is not None
        await api.until(lambda: api.watches)
        lists = api.count("list")
        controller.down()
        await create(cluster, "s")
        await api.until(lambda: reason(api.get("s")) == "DependenciesReady")
        assert api.count("list") == lists + 1


async def test_a_server_that_ends_says_how(tmp_path: Path) -> None:
    scripts = {
        "0": ("PodSucceeded", "The server ended with status 0"),
        "7": ("PodFailed", "The server ended with status 7: too bad"),
    }
    end = 'case "$6" in */1/socket) exit 0;; */2/socket) echo too bad >&2; exit 7;; *) kill -ABRT $$;; esac\n'
    async with LocalCluster(python=stub(tmp_path, f"#!/bin/sh\n{end}")) as cluster:
        api = cluster.custom_objects_api
        for name in ("0", "7", "abort"):
            await create(cluster, name)
            await api.until(lambda name=name: condition(api.get(name), "Finished"))
        for name, expected in scripts.items():
            found = condition(api.get(name))
            assert (found["reason"], found["message"]) == expected
        assert condition(api.get("abort"))["message"] == "The server ended with signal 6"


async def test_a_later_cluster_runs_what_is_there_and_not_what_is_over(tmp_path: Path) -> None:
    async with FakeCustomObjectsApi() as api:
        first = LocalCluster(custom_objects_api=api, python=stub(tmp_path))
        async with first:
            await create(first, "alive")
            await create(first, "dead")
            await api.until(lambda: {reason(sandbox) for sandbox in api.objects} == {"DependenciesReady"})
            first.kill("dead")
            await api.until(lambda: reason(api.get("dead")) == "PodFailed")
        async with LocalCluster(custom_objects_api=api, python=stub(tmp_path)) as second:
            count = api.count("patch_status", "dead")
            alive, dead = api.get("alive"), api.get("dead")
            assert alive is not None
            assert dead is not None
            await api.until(lambda: second.endpoint(alive) is not None)
            assert second.endpoint(dead) is None
            assert api.count("patch_status", "dead") == count


async def test_a_deletion_that_lingers_ends_the_server(tmp_path: Path) -> None:
    async with LocalCluster(python=stub(tmp_path)) as cluster:
        api = cluster.custom_objects_api
        await create(cluster, "s")
        await api.until(lambda: reason(api.get("s")) == "DependenciesReady")
        api.linger_deletes = True
        await api.delete_namespaced_custom_object(*AT, "s")
        await until_gone(cluster.directory / "1")
        assert api.get("s") is not None


async def test_a_list_from_before_a_sandbox_was_seen_does_not_end_it(tmp_path: Path) -> None:
    async with LocalCluster(python=stub(tmp_path)) as cluster:
        before = asyncio.get_running_loop().time()
        sandbox = await create(cluster, "s")
        api, controller = cluster.custom_objects_api, cluster._controller
        await api.until(lambda: reason(api.get("s")) == "DependenciesReady")
        assert controller is not None
        controller.synced([], before)
        await asyncio.sleep(0)
        assert cluster.endpoint(sandbox) is not None
        controller.synced([], asyncio.get_running_loop().time())
        await until_gone(cluster.directory / "1")


# Misuse


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"max_starting": 0}, "max_starting is 0: it must be an integer of at least 1"),
        ({"max_starting": True}, "max_starting is True"),
        ({"python": "/no/such/python"}, "python is '/no/such/python': there is no such program"),
        ({"server_args": "--max-output 5"}, "server_args is '--max-output 5'"),
        ({"server_args": [1]}, r"server_args is \[1\]"),
        ({"server_args": 5}, "server_args is 5: it must be a sequence of strings"),
        ({"server_args": ["--socket=/tmp/s"]}, "server_args has '--socket=/tmp/s': the cluster itself sets"),
        ({"server_args": ["--port", "1"]}, "server_args has '--port'"),
        ({"server_args": ["--tls-cert=/c"]}, "server_args has '--tls-cert=/c'"),
        ({"server_args": ["--check"]}, "server_args has '--check'"),
        ({"directory": "/no/such/directory"}, "directory is '/no/such/directory': there is no such"),
        ({"directory": "/" + "d" * 80}, "directory is '/ddd.*must have at most 75 bytes"),
        ({"namespace": "Not A Label"}, "namespace is 'Not A Label'"),
        ({"api_version": "v2"}, "api_version is 'v2'"),
        ({"poll_interval": 0}, "poll_interval is 0"),
        ({"pass_env": "PATH"}, "pass_env is 'PATH'"),
        ({"pass_env": None}, "pass_env is None"),
    ],
)
def test_a_wrong_argument_is_named(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        LocalCluster(**arguments)


async def test_a_temporary_directory_with_a_long_name_is_avoided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/" + "d" * 80)
    async with LocalCluster() as cluster:
        assert cluster.directory.parent == Path("/tmp")


async def test_a_cluster_is_started_once() -> None:
    cluster = LocalCluster()
    with pytest.raises(SandboxError, match="has not been started"):
        _ = cluster.directory
    with pytest.raises(SandboxError, match="has not been started"):
        cluster.endpoint({})
    with pytest.raises(KeyError):
        cluster.kill("s")
    async with cluster:
        with pytest.raises(SandboxError, match="make a new one"):
            await cluster.start()
    await cluster.aclose()
    with pytest.raises(SandboxError, match="make a new one"):
        await cluster.start()


async def test_it_needs_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(SandboxError, match=r"needs Linux .*, not darwin: run it in a container, or use a "):
        LocalCluster()


async def test_a_cluster_that_was_never_started_closes() -> None:
    cluster = LocalCluster()
    await cluster.aclose()
    await cluster.aclose()


def test_the_settings_fit_the_cluster() -> None:
    cluster = LocalCluster(namespace="mine", api_version="v1alpha1")
    config = cluster.config(max_sessions=3)
    assert (config.mode, config.namespace, config.api_version) == ("multi", "mine", "v1alpha1")
    assert (config.max_sessions, config.endpoint) == (3, cluster.endpoint)
    assert cluster.config(namespace="other").namespace == "other"
