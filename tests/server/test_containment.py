"""What code can reach, and what is left of it: quick ones. See attack/ for the rest."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prodisco_sandbox.proto import sandbox_pb2 as pb
from prodisco_sandbox.server import _confine, _usage
from prodisco_sandbox.server._cgroup import find_pids_cgroups
from prodisco_sandbox.server._containment import Containment
from prodisco_sandbox.server._memory import Memory
from prodisco_sandbox.server._options import parse
from tests.support.nested import removed_by_force
from tests.support.patience import PATIENCE
from tests.support.servers import (
    Server,
    Stub,
    alive,
    code,
    needs_bubblewrap,
    needs_landlock,
    own_cgroups,
    running,
)


@pytest.fixture(scope="module", params=["warm_server", pytest.param("cold_server", marks=pytest.mark.slow)])
def server(request: pytest.FixtureRequest) -> Server:
    found: Server = request.getfixturevalue(request.param)
    return found


async def output(stub: Stub, source: str) -> str:
    answer = await stub.Execute(code(source))
    assert answer.success, answer.error
    return answer.output


async def test_the_environment_is_scrubbed(tmp_path: Path) -> None:
    env = {
        "SECRET_TOKEN": "s3cret",
        "SANDBOX_TLS_KEY_PATH": "/k",
        "GIVEN": "yes",
        "PYTHONSTARTUP": "/nowhere",
    }
    with running(tmp_path, "--pass-env", "GIVEN,ABSENT", env=env) as server:
        async with server.connect() as stub:
            names = await output(stub, "import os; print(*os.environ, os.environ['GIVEN'])")
            assert names.split() == [
                *("PATH", "HOME", "TMPDIR", "LANG", "PYTHONDONTWRITEBYTECODE", "GIVEN", "yes")
            ]
            source = f"print(open('/proc/{server.pid}/environ').read())"
            answer = await stub.Execute(code(source))
            if os.geteuid() != 0 or _confine.landlock_version():
                assert "PermissionError" in answer.error
            parent = await stub.Execute(
                code("import os; print(open(f'/proc/{os.getppid()}/environ').read())")
            )
            assert "s3cret" not in parent.output + parent.error


async def test_no_descriptor_of_the_server_is_inherited(stub: Stub) -> None:
    source = """
import os
for fd in range(1000):
    try:
        print(fd, os.readlink(f"/proc/self/fd/{fd}"))
    except FileNotFoundError:
        pass
"""
    lines = (await output(stub, source)).splitlines()
    found = dict(line.split(" ", 1) for line in lines)
    assert set(found) == {"0", "1", "2", "3"}
    assert found["0"] == "/dev/null"
    assert all(found[fd].startswith("pipe:") for fd in "123")


async def test_limits_are_set(stub: Stub, server: Server) -> None:
    source = """
import resource
for name in ("DATA", "CPU", "FSIZE", "NOFILE", "CORE"):
    print(*resource.getrlimit(getattr(resource, "RLIMIT_" + name)))
names = ("NoNewPrivs", "CapEff", "CapPrm")
print(*[line.split()[1] for line in open("/proc/self/status") if line.startswith(names)])
"""
    lines = (await output(stub, source)).splitlines()
    soft, hard = map(int, lines[0].split())
    inherited = soft - Memory.find(None).each
    assert hard == sys.maxsize
    # A zygote's memory is not the code's.
    assert 0 < inherited < 512 << 20 if server.zygote else inherited == 0
    assert lines[1:5] == ["120 121", f"{256 << 20} {256 << 20}", "1024 1024", "0 0"]
    assert lines[5] == "0000000000000000 0000000000000000 1"


@pytest.mark.parametrize("end", ["", "1/0", "import os; os._exit(0)", "os.kill(os.getpid(), 9)"])
async def test_every_descendant_is_gone_whatever_the_end(stub: Stub, end: str) -> None:
    source = f"""
import os, subprocess, sys, time
print(subprocess.Popen(["sleep", "1000"], start_new_session=True).pid)
print(subprocess.Popen(["sleep", "1000"]).pid)
read, write = os.pipe()
if os.fork() == 0:          # the daemon's way: double fork, new session
    os.setsid()
    if os.fork() == 0:
        os.write(write, b"%d\\n" % os.getpid())
        time.sleep(1000)
    os._exit(0)
print(os.read(read, 20).decode(), end="")
sys.stdout.flush()
{end}
"""
    answer = await stub.Execute(code(source))
    pids = [int(pid) for pid in re.findall(r"^\d+$", answer.output, re.MULTILINE)]
    assert len(pids) == 3
    assert not any(map(alive, pids))


async def test_a_process_whose_main_thread_has_ended_is_found(stub: Stub) -> None:
    # To /proc it looks like a zombie.
    source = """
import ctypes, os, threading, time
pid = os.fork()
if pid == 0:
    threading.Thread(target=time.sleep, args=(1000,)).start()
    ctypes.CDLL(None).pthread_exit(None)
while open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z": time.sleep(0.01)
print(*[line for line in open(f"/proc/{os.getpid()}/task/{os.getpid()}/children")])
"""
    pid = int(await output(stub, source))
    assert not alive(pid)


async def test_output_of_a_descendant_that_outlives_the_code_is_not_waited_for(stub: Stub) -> None:
    assert await output(stub, "import os, time\nif os.fork() == 0: time.sleep(1000)\nprint('x')") == "x\n"


@needs_landlock
async def test_landlock_keeps_writes_and_signals_inside(stub: Stub, server: Server, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    bystander = subprocess.Popen(["sleep", "1000"])
    try:
        attempts = [
            f"open({str(tmp_path / 'new')!r}, 'w')",
            f"open({str(tmp_path / 'mine')!r}, 'w')",
            f"os.truncate({str(tmp_path / 'mine')!r}, 0)",
            f"os.unlink({str(tmp_path / 'mine')!r})",
            f"os.link({str(tmp_path / 'mine')!r}, 'link')",
            f"os.kill({server.pid}, 9)",
            f"os.kill({bystander.pid}, 9)",
            "os.kill(os.getppid(), 19)",
            f"open('/proc/{server.pid}/mem', 'rb')",
        ]
        for attempt in attempts:
            answer = await stub.Execute(code(f"import os\n{attempt}"))
            assert "PermissionError" in answer.error or "OSError" in answer.error, attempt
        assert (tmp_path / "mine").read_text() == "mine"
        assert bystander.poll() is None
        allowed = (
            "import os, tempfile, subprocess\ntempfile.TemporaryFile()\nos.mkdir('d'); os.rename('d', 'e')\n"
        )
        assert await output(stub, allowed + "open('/dev/null', 'w').write('x'); print('ok')") == "ok\n"
    finally:
        bystander.kill()
        bystander.wait()


@needs_landlock
async def test_killing_everything_kills_only_itself(stub: Stub, server: Server) -> None:
    wait = "import os, time\nprint('here')\nwhile not os.path.exists('go on'): time.sleep(0.01)\n"
    other = aiter(stub.ExecuteStream(code(wait + "print('still here')")))
    assert (await anext(other)).output == "here\n"
    answer = await stub.Execute(code("import os, signal\nos.kill(-1, signal.SIGKILL)\nprint('survived')"))
    assert not answer.success or "survived" in answer.output
    assert (await stub.Execute(code("open('go on', 'w')"))).success
    assert "".join([chunk.output async for chunk in other]) == "still here\n"
    assert (await stub.HealthCheck(pb.HealthCheckRequest())).healthy


async def test_what_a_killed_supervisor_leaves_is_found(server: Server, stub: Stub) -> None:
    source = """
import os, time
if os.fork() == 0: os.setsid()
print(os.getpid(), flush=True)
time.sleep(1000)
"""
    started = await stub.ExecuteAsync(code(source))
    pids: list[int] = []
    async with asyncio.timeout(PATIENCE):
        while len(pids) < 2:
            answer = await stub.GetExecution(pb.GetExecutionRequest(execution_id=started.execution_id))
            pids = [int(pid) for pid in answer.output.split()]
    supervisor = next(pid for pid, children in server.supervisors().items() if set(pids) & set(children))
    os.kill(supervisor, 9)
    ended = await stub.GetExecution(pb.GetExecutionRequest(execution_id=started.execution_id, wait=True))
    assert ended.result.error == "its processes were killed from outside"
    assert not any(map(alive, pids))


FORKS = """
import os, time
count = 0
try:
    while count < 50:
        if os.fork() == 0: time.sleep(1000)
        count += 1
except BlockingIOError:
    print(count)
"""
THREADS = """
import threading, time
count = 0
try:
    while count < 50:
        threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
        count += 1
except RuntimeError:
    print(count)
"""


@pytest.mark.skipif(own_cgroups() is not None, reason="no pids cgroup can be made here")
async def test_a_pids_cgroup_bounds_processes_and_threads(tmp_path: Path) -> None:
    with running(tmp_path, "--max-processes", "5") as server:
        async with server.connect() as stub:
            assert await output(stub, FORKS) == "4\n"
            assert await output(stub, THREADS) == "4\n"
        probe = find_pids_cgroups()
        probe.remove()
        base = probe.base.parent / f"prodisco-sandbox-{server.pid}"
        assert base.is_dir()
        assert server.stop() == 0
        assert not base.exists()


def test_cgroups_of_version_2(tmp_path: Path) -> None:
    """Where they are looked for; the kernel here may have version 1 only."""
    own = tmp_path / "fs" / "user.slice"
    own.mkdir(parents=True)
    (own / "cgroup.controllers").write_text("cpu memory\n")
    proc = tmp_path / "proc"
    proc.mkdir()
    (proc / "cgroup").write_text("0::/user.slice\n")
    (proc / "mountinfo").write_text(f"30 20 0:26 / {tmp_path}/fs rw,nosuid shared:4 - cgroup2 cgroup2 rw\n")
    with pytest.raises(FileNotFoundError, match=r"user\.slice has no pids controller"):
        find_pids_cgroups(proc)
    assert [path.name for path in own.iterdir()] == ["cgroup.controllers"]


@pytest.mark.slow
@needs_bubblewrap
async def test_namespaces_by_bubblewrap(tmp_path: Path) -> None:
    with running(tmp_path, "--isolation", "bwrap", "--max-processes", "20") as server:
        async with server.connect() as stub:
            source = f"""
import os, socket
print([pid for pid in os.listdir("/proc") if pid.isdigit()])
print([name for _, name in socket.if_nameindex()])
print(os.path.exists({str(tmp_path / "log")!r}))
open("/tmp/x", "w"); open("kept", "w").write("1")
for path in ("/new", "/usr/new", "/dev/new", "/etc/new"):
    try:
        open(path, "w")
        print(path)
    except OSError:
        pass
"""
            assert await output(stub, source) == "['1', '2']\n['lo']\nFalse\n"
            assert await output(stub, "print(open('kept').read())") == "1\n"
            assert await output(stub, FORKS) == "19\n"
            seconds = f"1000.{os.getpid()}"  # Nobody else's.
            source = f"""
import os, subprocess
subprocess.Popen(["sleep", "{seconds}"], start_new_session=True)
while True: pass
"""
            answer = await stub.Execute(code(source, timeout_ms=1000))
            assert answer.error == "timed out after 1000 ms"
            assert seconds not in commands()


def commands() -> str:
    """The command lines of all processes."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found.append(path.read_text(errors="replace"))
    return "\n".join(found)


def test_what_lies_deeper_than_paths_go_counts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with removed_by_force(tmp_path / "top"):
        (tmp_path / "top").mkdir()
        here = os.open(tmp_path / "top", os.O_RDONLY)
        for _ in range(20):
            os.mkdir("n" * 250, dir_fd=here)
            below = os.open("n" * 250, os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = below
        with open(os.open("file", os.O_WRONLY | os.O_CREAT, dir_fd=here), "wb") as file:
            file.write(b"x" * (1 << 20))
        os.close(here)
        assert 1 << 20 <= _usage.disk_usage([tmp_path], sys.maxsize) < 2 << 20
        assert _usage.disk_usage([tmp_path], 4096) > 4096
        # Each piece holds a descriptor, and code could use up all of the server's.
        monkeypatch.setattr(_usage, "_PIECES", 2)
        assert 0 < _usage.disk_usage([tmp_path], sys.maxsize) < 1 << 20


def test_a_writable_directory_that_is_closed_to_the_server_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat = os.stat

    def refuse(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        if str(path) == "/closed/to/us":  # as below another user's directory of mode 0700; root meets none
            raise PermissionError(13, "Permission denied", path)
        return stat(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", refuse)
    containment = Containment(parse(["--writable", f"/closed/to/us:{tmp_path}"], {}), tmp_path, tmp_path)
    try:
        assert [path for path, _ in containment.job()["writable"]] == [str(tmp_path)]
    finally:
        containment.close()
