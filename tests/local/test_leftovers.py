"""LocalCluster leaves nothing behind, whichever way it ends."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from prodisco_sandbox import SandboxError, SandboxUnavailableError
from prodisco_sandbox.local import LocalCluster, _keeper, _processes
from prodisco_sandbox.server import _tree
from tests.support.local import AT, condition, create, processes, reason, stub, traces, until_gone
from tests.support.nested import nest, removed_by_force
from tests.support.patience import PATIENCE

pytestmark = pytest.mark.usefixtures("measured_children")

# Leaves a process in a session of its own; the first one also locks files, and does not end
# when it is asked to.
STUBBORN = """\
#!/bin/sh
setsid -f sleep 60
case "$6" in */1/socket)
    mkdir -p tmp/locked/inner
    chmod 000 tmp/locked/inner tmp/locked
    trap '' TERM
    echo "listening on unix:$6"
    while :; do sleep 60; done
esac
echo "listening on unix:$6"
read -r _ && read -r _
"""


def keeper_of(directory: Path) -> int:
    return next(pid for pid, arguments in processes(directory).items() if "_keeper.py" in arguments)


async def sleepers(directory: Path, count: int) -> None:
    """Waits for that many: a process has no arguments for a moment while it is made."""
    async with asyncio.timeout(PATIENCE):
        while list(processes(directory).values()).count("sleep 60") != count:
            await asyncio.sleep(0.01)


async def ready(cluster: LocalCluster, *names: str) -> None:
    for name in names:
        await create(cluster, name)
    api = cluster.custom_objects_api
    await api.until(lambda: all(reason(api.get(name)) == "DependenciesReady" for name in names))


async def test_what_is_stuck_hidden_or_locked_goes_too(tmp_path: Path) -> None:
    async with LocalCluster(directory=tmp_path, python=stub(tmp_path, STUBBORN)) as cluster:
        await ready(cluster, "deleted", "kept")
        await sleepers(tmp_path, 3)
        await cluster.custom_objects_api.delete_namespaced_custom_object(*AT, "deleted")
        await until_gone(cluster.directory / "1")
        await sleepers(tmp_path, 1)
        cluster.kill("kept")
        api = cluster.custom_objects_api
        await api.until(lambda: reason(api.get("kept")) == "PodFailed")
        assert traces(cluster.directory) == []
    assert traces(tmp_path) == []


@pytest.fixture
def slow_keeper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keepers do nothing until their cluster lets go of them, however slow the cluster is itself."""
    wait = "import select\nselect.select([0], [], [])\n"
    monkeypatch.setattr(_processes, "_BOOTSTRAP", wait + _processes._BOOTSTRAP)


@pytest.mark.usefixtures("slow_keeper")
async def test_a_cluster_that_is_cancelled_while_it_starts(tmp_path: Path) -> None:
    async def cancelled_after(turns: int) -> None:
        (directory := tmp_path / str(turns)).mkdir()
        starting = asyncio.create_task(LocalCluster(directory=directory).start(), name=f"start-{turns}")
        for _ in range(turns):
            await asyncio.sleep(0)
        begun.append(bool(processes(directory)))
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert traces(directory) == []

    begun: list[bool] = []
    await asyncio.gather(*(cancelled_after(turns) for turns in range(1, 7)))
    assert sum(begun) >= 4


async def test_a_cluster_that_another_task_closes_while_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = tmp_path / "go_on"
    wait = f"import os, time\nwhile not os.path.exists({str(go_on)!r}): time.sleep(0.01)\n"
    monkeypatch.setattr(_processes, "_BOOTSTRAP", wait + _processes._BOOTSTRAP)
    closed: list[LocalCluster] = []

    async def closed_after(turns: int) -> None:
        (directory := tmp_path / str(turns)).mkdir()
        cluster = LocalCluster(directory=directory)
        starting = asyncio.create_task(cluster.start(), name=f"start-{turns}")
        for _ in range(turns):
            await asyncio.sleep(0)
        closing = asyncio.create_task(cluster.aclose(), name=f"close-{turns}")
        await asyncio.sleep(0)
        closed.append(cluster)
        if len(closed) == 6:
            go_on.touch()
        async with asyncio.timeout(PATIENCE):
            await closing
            with pytest.raises(SandboxError, match="was closed while it started"):
                await starting
        assert traces(directory) == []

    await asyncio.gather(*(closed_after(turns) for turns in range(1, 7)))


async def test_leaving_waits_however_often_it_is_cancelled(tmp_path: Path) -> None:
    inside = asyncio.Event()

    async def body() -> None:
        async with LocalCluster(directory=tmp_path, python=stub(tmp_path)) as cluster:
            await ready(cluster, "s")
            inside.set()
            await asyncio.sleep(60)

    task = asyncio.create_task(body(), name="body")
    await inside.wait()
    while not task.done():
        task.cancel()
        await asyncio.sleep(0)
    assert task.cancelled()
    assert traces(tmp_path) == []


async def test_closing_goes_on_when_its_caller_is_cancelled(tmp_path: Path) -> None:
    cluster = LocalCluster(directory=tmp_path, python=stub(tmp_path))
    await cluster.start()
    await ready(cluster, "s")
    closing = asyncio.create_task(cluster.aclose(), name="close")
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    await until_gone(tmp_path)
    await cluster.aclose()
    assert traces(tmp_path) == []


async def test_an_error_inside_comes_through(tmp_path: Path) -> None:
    async def fails() -> None:
        async with LocalCluster(directory=tmp_path, python=stub(tmp_path)) as cluster:
            await create(cluster, "starting")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fails()
    assert traces(tmp_path) == []


async def test_many_clusters_one_after_another_and_at_once(tmp_path: Path) -> None:
    async with LocalCluster(directory=tmp_path, python=stub(tmp_path)) as first:
        await ready(first, "s")
        for _ in range(2):
            async with LocalCluster(directory=tmp_path, python=stub(tmp_path)) as other:
                await ready(other, "s")
                assert other.directory != first.directory
            assert not other.directory.exists()
        assert first.directory.exists()
        assert reason(first.custom_objects_api.get("s")) == "DependenciesReady"
    assert traces(tmp_path) == []


async def test_signals_of_the_terminal_do_not_reach_the_keeper(tmp_path: Path) -> None:
    async with LocalCluster(directory=tmp_path, python=stub(tmp_path)) as cluster:
        keeper = keeper_of(tmp_path)
        assert os.getsid(keeper) == keeper
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(keeper, number)
        await ready(cluster, "s")
        server = next(pid for pid, arguments in processes(tmp_path).items() if "socket" in arguments)
        assert os.getsid(server) == server


async def test_signals_that_the_cluster_blocks_do_reach_the_keeper(tmp_path: Path) -> None:
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, signal.SIGTERM})
    try:
        # Neither the end of its input nor that of its output tells of its own.
        mute = '#!/bin/sh\necho "listening on unix:$6"\nexec sleep 60 >&2\n'
        async with LocalCluster(directory=tmp_path, python=stub(tmp_path, mute)) as cluster:
            await ready(cluster, "s")
            await sleepers(tmp_path, 1)
            cluster.kill("s")
            api = cluster.custom_objects_api
            await api.until(lambda: reason(api.get("s")) == "PodFailed")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


# A server that does not look at its input.
DEAF = '#!/bin/sh\necho "listening on unix:$6"\nexec sleep 60\n'


async def test_a_killed_keeper_takes_the_servers_along(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with LocalCluster(directory=tmp_path, python=stub(tmp_path, DEAF)) as cluster:
        await ready(cluster, "s")
        api = cluster.custom_objects_api
        keeper = keeper_of(tmp_path)
        os.kill(keeper, signal.SIGSTOP)
        await create(cluster, "ordered")
        await api.until(lambda: reason(api.get("ordered")) == "DependenciesNotReady")
        os.kill(keeper, signal.SIGKILL)
        await api.until(lambda: {reason(sandbox) for sandbox in api.objects} == {"PodFailed"})
        assert all(cluster.endpoint(sandbox) is None for sandbox in api.objects)
        await create(cluster, "later")
        await api.until(lambda: reason(api.get("later")) == "PodFailed")
        async with asyncio.timeout(PATIENCE):
            while processes(tmp_path):
                await asyncio.sleep(0.01)
    assert "keeper_lost" in caplog.text
    assert traces(tmp_path) == []


async def test_a_keeper_that_hangs_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_processes, "END_TIMEOUT", 0.1)
    async with LocalCluster(directory=tmp_path, python=stub(tmp_path, DEAF)) as cluster:
        await ready(cluster, "s")
        os.kill(keeper_of(tmp_path), signal.SIGSTOP)
    assert "keeper_stuck" in caplog.text
    await until_gone(tmp_path)


@pytest.mark.usefixtures("slow_keeper")
async def test_a_keeper_that_is_slow_to_start_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_processes, "START_TIMEOUT", 0.001)
    with pytest.raises(SandboxUnavailableError, match=r"did not start in 0.001 s"):
        await LocalCluster(directory=tmp_path).start()
    assert traces(tmp_path) == []


async def test_a_keeper_that_cannot_start_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    cluster = LocalCluster(directory=gone)
    gone.rmdir()
    with pytest.raises(SandboxUnavailableError, match=r"did not start(.|\n)*No such file or directory"):
        await cluster.start()
    cluster = LocalCluster(directory=tmp_path)
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(SandboxUnavailableError, match="cannot be started") as caught:
        await cluster.start()
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    assert traces(tmp_path) == []


async def test_a_server_that_cannot_be_run_says_so(tmp_path: Path) -> None:
    async with LocalCluster(directory=tmp_path, python=stub(tmp_path, "#!/no/such/program\n")) as cluster:
        api = cluster.custom_objects_api
        await create(cluster, "s")
        await api.until(lambda: reason(api.get("s")) == "PodFailed")
        assert "ended with status 127: cannot run" in condition(api.get("s"))["message"]
        await until_gone(cluster.directory / "1")
        # A directory that is taken: the same, and the server that has it is left alone.
        (cluster.directory / "2").mkdir()
        await create(cluster, "t")
        await api.until(lambda: reason(api.get("t")) == "PodFailed")
        assert "could not be started: " in condition(api.get("t"))["message"]


PARENT = """\
import asyncio, os, subprocess, sys, time
from prodisco_sandbox import SandboxManager
from prodisco_sandbox.local import LocalCluster

CODE = '''
import subprocess, time
subprocess.Popen(["sleep", "60"], start_new_session=True)
print("running", flush=True)
time.sleep(60)
'''

async def use(cluster):
    manager = SandboxManager(cluster.config(), custom_objects_api=cluster.custom_objects_api)
    stream = (await manager.get_client("session")).execute_stream(code=CODE)
    async for chunk in stream:
        print(chunk.text, end="", flush=True)

async def suspend(cluster):
    config = cluster.config(on_idle="suspend", session_idle_timeout=0.01, idle_check_interval=0.01)
    manager = SandboxManager(config, custom_objects_api=cluster.custom_objects_api)
    async with manager.session("suspended") as client:
        await client.execute("open('file', 'w')")
    while not manager.stats().suspended:
        await asyncio.sleep(0.01)

async def main(directory):
    async with LocalCluster(directory=directory) as one, LocalCluster(directory=directory, warm=1) as two:
        # Children with copies of whatever descriptor they can get; both outlive this.
        if not (pid := os.fork()):
            time.sleep(60)
            os._exit(0)
        other = subprocess.Popen(["sleep", "60"], close_fds=False, stdout=subprocess.DEVNULL)
        print(pid, other.pid, flush=True)
        await suspend(one)
        await asyncio.gather(use(one), use(two))

asyncio.run(main(sys.argv[1]))
"""


async def test_a_killed_process_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd="/") as parent:
        try:
            assert parent.stdout is not None
            forked, other = map(int, parent.stdout.readline().split())
            assert [parent.stdout.readline() for _ in range(2)] == ["running\n"] * 2
            await sleepers(tmp_path, 2)
            assert [path.name for path in tmp_path.glob("*/workspace-*/*")] == ["file"]
        finally:
            parent.kill()
            # Or the end of its output would not come.
            os.kill(forked, signal.SIGSTOP)
        try:
            os.kill(other, 0)
            async with asyncio.timeout(PATIENCE):
                while processes(tmp_path).keys() - {forked} or any(tmp_path.iterdir()):
                    await asyncio.sleep(0.01)
        finally:
            os.kill(forked, signal.SIGKILL)
            os.kill(other, signal.SIGKILL)
    async with asyncio.timeout(PATIENCE):
        while traces(tmp_path):  # A killed process takes a moment to go.
            await asyncio.sleep(0.01)


def talk(base: Path, parent: int) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Starts a keeper, and speaks for its cluster."""
    ours, theirs = socket.socketpair()
    ours.settimeout(PATIENCE)
    command = [sys.executable, "-I", "-c", _processes._BOOTSTRAP, _keeper.__file__, str(base), str(parent)]
    with theirs:
        return subprocess.Popen(command, stdin=theirs.fileno(), stderr=subprocess.DEVNULL), ours


def test_a_keeper_whose_cluster_is_gone_already(tmp_path: Path) -> None:
    process, ours = talk(tmp_path, parent=1)
    with process, ours:
        assert process.wait(PATIENCE) == 0
    assert traces(tmp_path) == []


def test_a_keeper_whose_cluster_vanishes_without_having_listened(tmp_path: Path) -> None:
    process, ours = talk(tmp_path, os.getpid())
    with process, ours:
        assert b"ready" in ours.recv(1000, socket.MSG_PEEK)
        argv = ["/bin/sh", "-c", "echo listening on x; exec sleep 60"]
        orders = [
            {"do": "stop", "server": "unknown"},
            {"do": "start", "server": "1", "argv": argv, "env": {}, "workspace": "workspace-1"},
        ]
        ours.sendall(b"".join(json.dumps(order).encode() + b"\n" for order in orders))
        while b"first_line" not in ours.recv(1000, socket.MSG_PEEK):
            pass
        ours.close()
        assert process.wait(PATIENCE) == 0
    assert traces(tmp_path) == []


def test_a_keeper_that_breaks_leaves_nothing_either(tmp_path: Path) -> None:
    process, ours = talk(tmp_path, os.getpid())
    with process, ours:
        argv = ["/bin/sh", "-c", "echo listening on x; exec sleep 60"]
        orders = [{"do": "start", "server": "1", "argv": argv, "env": {}}, {"not": "an order"}]
        ours.sendall(b"".join(json.dumps(order).encode() + b"\n" for order in orders))
        assert process.wait(PATIENCE) == 1
        assert b"KeyError" in ours.recv(10_000)
    assert traces(tmp_path) == []


def test_what_cannot_be_removed_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locked = tmp_path / "locked" / "inner"
    locked.mkdir(parents=True)
    (locked / "file").touch()
    (locked / "link").symlink_to(tmp_path)
    locked.chmod(0)
    locked.parent.chmod(0)
    assert _keeper.remove(tmp_path / "locked")
    assert not (tmp_path / "locked").exists()
    # Whoever may do everything, as root may, meets no lock above.
    (tmp_path / "busy" / "inner").mkdir(parents=True)
    (tmp_path / "busy" / "link").symlink_to(tmp_path)
    rmtree = shutil.rmtree

    def refuse_once(*_: object, **__: object) -> None:
        monkeypatch.setattr(shutil, "rmtree", rmtree)
        raise PermissionError

    monkeypatch.setattr(shutil, "rmtree", refuse_once)
    assert _keeper.remove(tmp_path / "busy")
    (tmp_path / "busy").mkdir()
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    assert not _keeper.remove(tmp_path / "busy")


def test_what_is_nested_deeper_than_recursion_goes_is_removed(tmp_path: Path) -> None:
    (directory := tmp_path / "directory").mkdir()
    with removed_by_force(directory):
        nest(directory)
        assert _keeper.remove(directory)
        assert not directory.exists()


@pytest.mark.slow
async def test_the_files_of_one_sandbox_do_not_end_another(tmp_path: Path) -> None:
    (directory := tmp_path / "directory").mkdir()
    with removed_by_force(directory):
        async with LocalCluster(directory=directory, python=stub(tmp_path)) as cluster:
            await ready(cluster, "deep", "other")
            nest(cluster.directory / "1" / "tmp")
            api = cluster.custom_objects_api
            await api.delete_namespaced_custom_object(*AT, "deep")
            async with asyncio.timeout(PATIENCE):
                while (cluster.directory / "1").exists():
                    await asyncio.sleep(0.01)
            assert reason(api.get("other")) == "DependenciesReady"
        assert traces(directory) == []


def test_what_is_gone_already_is_no_error(tmp_path: Path) -> None:
    with subprocess.Popen(["/bin/true"]) as process:
        process.wait(PATIENCE)
    _tree.kill_tree(process.pid)
    assert _keeper.remove(tmp_path / "nothing")
    assert "cannot be read" in _keeper._tail(tmp_path / "nothing")


async def test_what_is_left_behind_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_processes, "END_TIMEOUT", 0.1)
    monkeypatch.setattr(_processes, "remove", lambda _: False)
    async with LocalCluster(directory=tmp_path) as cluster:
        cluster._keeper._on_report({"event": "left", "what": "a file"})
        os.kill(keeper_of(tmp_path), signal.SIGSTOP)  # So that it is killed, and removes nothing.
    assert "what='a file'" in caplog.text
    assert f"what='files that cannot be removed, in {cluster.directory}'" in caplog.text


# The keeper alone

# A stand-in for a cluster's process; its orders come from the test, over the same socket.
LAUNCHER = """\
import os, subprocess, sys, time
argv = [sys.executable, "-I", "-c", *sys.argv[1:], str(os.getpid())]
print(subprocess.Popen(argv, stdin=0, stdout=subprocess.DEVNULL, start_new_session=True).pid, flush=True)
time.sleep(60)
"""


@pytest.mark.slow
async def test_an_order_that_a_keeper_reads_after_its_end(tmp_path: Path) -> None:
    (base := tmp_path / "base").mkdir()
    ours, theirs = socket.socketpair()
    argv = [sys.executable, "-c", LAUNCHER, _processes._BOOTSTRAP, str(_processes._FILE), str(base)]
    with ours, subprocess.Popen(argv, stdin=theirs.fileno(), stdout=subprocess.PIPE) as cluster:
        theirs.close()
        assert cluster.stdout is not None
        keeper = int(cluster.stdout.readline())
        ours.recv(1000)  # ready

        def start(key: str, script: str) -> None:
            order = {"do": "start", "server": key, "argv": ["/bin/sh", "-c", script], "env": dict(os.environ)}
            ours.sendall(json.dumps(order).encode() + b"\n")

        start("1", f"cd {base}; until [ -e go ]; do sleep 0.02; done; echo listening on x; exec sleep 60")
        async with asyncio.timeout(PATIENCE):
            while not (base / next(iter(os.listdir(base)), "") / "1" / "tmp").exists():
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        # It finds all at once when it goes on: a server's word, an order, and the cluster's end.
        os.kill(keeper, signal.SIGSTOP)
        (base / "go").touch()
        await asyncio.sleep(0.3)
        start("2", f"cd {base}; exec sleep 60")
        cluster.kill()
    (base / "go").unlink()
    try:
        os.kill(keeper, signal.SIGCONT)
        await until_gone(base)
    finally:
        if Path("/proc", str(keeper)).exists():
            os.kill(keeper, signal.SIGKILL)


def test_a_link_in_the_place_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "home" / "a" / "b").mkdir(parents=True)
    (tmp_path / "1").symlink_to(tmp_path / "home")
    assert _keeper.remove(tmp_path / "1")
    assert not (tmp_path / "1").is_symlink()
    assert (tmp_path / "home" / "a" / "b").is_dir()
