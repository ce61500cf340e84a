"""Memory: what is left for executions, and what happens to those that take more."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pytest

from prodisco_sandbox.server import _memory
from prodisco_sandbox.server._cgroup import find_memory_cgroup
from prodisco_sandbox.server._memory import Container, Memory, MemoryWatch
from tests.support.patience import PATIENCE
from tests.support.servers import Server, Stub, code, running, with_tests

MIB = 1 << 20
GIB = 1 << 30
MAX_V1 = 9223372036854771712


def fake(root: Path, version: int, files: dict[str, dict[str, object]], here: str) -> Path:
    """A /proc/self and a tree of cgroups; returns the former."""
    top = root / "cgroup"
    for directory, contents in files.items():
        place = top / directory
        place.mkdir(parents=True, exist_ok=True)
        for name, value in contents.items():
            (place / name).write_text(f"{value}\n")
    proc = root / "proc" / "self"
    proc.mkdir(parents=True)
    lines = {1: f"5:cpu:/\n4:hugetlb,memory:/{here}\n0::/else\n", 2: f"0::/{here}\n"}
    (proc / "cgroup").write_text(lines[version])
    kind = {1: "cgroup cgroup rw,hugetlb,memory", 2: "cgroup2 cgroup2 rw,nsdelegate"}
    (proc / "mountinfo").write_text(f"30 20 0:26 / {top} rw,nosuid shared:4 - {kind[version]}\n")
    return proc


@pytest.mark.parametrize(
    ("version", "files", "here", "limit", "directory"),
    [
        (2, {"": {}, "pod": {"memory.max": 512 * MIB}}, "pod", 512 * MIB, "pod"),
        (2, {"": {}, "pod": {"memory.max": "max"}}, "pod", None, None),
        (2, {"": {}, "pod": {"memory.max": GIB}, "pod/c": {"memory.max": "max"}}, "pod/c", GIB, "pod"),
        (2, {"": {}, "a": {"memory.max": 3 * GIB}, "a/b": {"memory.max": GIB}}, "a/b", GIB, "a/b"),
        (2, {"": {}, "a": {"memory.max": 3 * GIB}, "a/b/c": {}}, "a/b/c", 3 * GIB, "a"),
        (2, {"": {"memory.max": 5 * MIB}}, "", 5 * MIB, ""),
        (2, {"": {}, "a": {"memory.max": "max", "memory.high": 7 * MIB}}, "a", 7 * MIB, "a"),
        (1, {"": {"memory.limit_in_bytes": 512 * MIB}}, "", 512 * MIB, ""),
        (1, {"": {"memory.limit_in_bytes": MAX_V1}}, "", MAX_V1, ""),
        (
            1,
            {"": {"memory.limit_in_bytes": MAX_V1}, "a": {"memory.limit_in_bytes": GIB}, "a/b": {}},
            "a/b",
            GIB,
            "a",
        ),
        (2, {"": {}, "a": {"memory.max": "a surprise"}}, "a", None, None),
    ],
)
def test_the_tightest_limit_counts(
    tmp_path: Path,
    version: int,
    files: dict[str, dict[str, object]],
    here: str,
    limit: int | None,
    directory: str | None,
) -> None:
    found = Container.find(fake(tmp_path, version, files, here))
    if limit is None or directory is None:
        assert found is None
    else:
        assert found == Container(tmp_path / "cgroup" / directory, limit)


def test_without_cgroups_there_is_no_limit(tmp_path: Path) -> None:
    assert Container.find(tmp_path) is None


@pytest.mark.parametrize(
    ("limit", "wanted", "each", "total"),
    [
        (512 * MIB, None, 384 * MIB, 384 * MIB),
        (512 * MIB, 100 * MIB, 100 * MIB, 384 * MIB),
        (512 * MIB, 2 * GIB, 384 * MIB, 384 * MIB),
        (4 * GIB, None, 4 * GIB - 256 * MIB, 4 * GIB - 256 * MIB),
        (128 * MIB, None, 64 * MIB, 64 * MIB),
        (64 * MIB, None, 16 * MIB, 16 * MIB),
        (MAX_V1, None, 2 * GIB, 16 * GIB - 256 * MIB),
        (MAX_V1, 3 * GIB, 3 * GIB, 16 * GIB - 256 * MIB),
    ],
)
def test_what_is_left_for_executions(
    tmp_path: Path, limit: int, wanted: int | None, each: int, total: int
) -> None:
    proc = fake(tmp_path, 1, {"": {"memory.limit_in_bytes": limit}}, "").parent
    memory = Memory.find(wanted, proc, machine=16 * GIB)
    assert (memory.each, memory.total) == (each, total)


def test_what_can_be_reclaimed_is_not_in_use(tmp_path: Path) -> None:
    second = {
        "memory.current": 100,
        "memory.stat": "anon 50\nactive_file 10\ninactive_file 20\nslab_reclaimable 5",
    }
    first = {
        "memory.usage_in_bytes": 100,
        "memory.stat": "active_file 1\ninactive_file 2\ntotal_active_file 10\ntotal_inactive_file 20",
    }
    for number, files, used in ((2, second, 65), (1, first, 70)):
        directory = tmp_path / str(number)
        fake(directory, number, {"": files}, "")
        assert Container(directory / "cgroup", 1000).used() == used


class Pod:
    """A cgroup of 512 MiB, as a container has one."""

    limit = 512 * MIB

    def __init__(self) -> None:
        self.directory = find_memory_cgroup(Path("/proc/self")) / f"test-{uuid.uuid4().hex}"
        self.directory.mkdir()
        name = "memory.max" if (self.directory / "memory.max").exists() else "memory.limit_in_bytes"
        (self.directory / name).write_text(str(self.limit))

    @property
    def command(self) -> list[str]:
        step_in = f'echo $$ >{self.directory}/cgroup.procs && exec "$0" "$@"'
        return ["/bin/sh", "-c", step_in, sys.executable, "-m", "prodisco_sandbox.server"]

    def remove(self) -> None:
        self.directory.rmdir()


def _no_pods() -> str | None:
    try:
        Pod().remove()
    except OSError as error:
        return f"no memory cgroup can be made here: {error}"
    return None


needs_pod = pytest.mark.skipif(_no_pods() is not None, reason=str(_no_pods()))


@pytest.fixture
def pod() -> Iterator[Pod]:
    made = Pod()
    yield made
    made.remove()


@contextlib.contextmanager
def in_pod(directory: Path, pod: Pod, *options: str) -> Iterator[Server]:
    with running(directory, *options, command=pod.command) as server:
        yield server
        # On a busy machine code may outrun the watch; what the kernel kills then is never the server.
        assert server.process.poll() is None, server.log()


# Not so fast that a busy machine lets the kernel end it first.
LARGE = """
import time
x = []
for _ in range(300):
    x.append(bytearray(1 << 20))
    time.sleep(0.005)
time.sleep(1000)
"""
GREEDY = "x = []\nwhile True: x.append(bytearray(1 << 20))"
# Nobody of them is large.
CROWD = """
import os, time
for _ in range(10):
    if os.fork() == 0:
        x = bytearray(80 << 20)
        time.sleep(1000)
time.sleep(1000)
"""
WAIT = "import os, time\nwhile not os.path.exists({!r}): time.sleep(0.01)"
PATIENT = f"open('begun', 'w').close()\n{WAIT.format('over')}\nprint('still here')"
MODERATE = "x = bytearray({} << 20); open({!r}, 'w').close()\nimport time; time.sleep(1000)"


async def failed(stub: Stub, source: str) -> str:
    answer = await stub.Execute(code(source, timeout_ms=60_000), timeout=60 + PATIENCE)
    assert not answer.success
    return answer.error


async def healthy(stub: Stub) -> None:
    answer = await stub.Execute(code("x = bytearray(200 << 20); print(len(x) >> 20)"))
    assert answer.output == "200\n", answer


@pytest.mark.slow  # Beside a busy worker the kernel may be quicker than the server.
@needs_pod
async def test_in_a_pod_of_512_mib(tmp_path: Path, pod: Pod) -> None:
    with in_pod(tmp_path, pod) as server:
        async with server.connect() as stub:
            assert await failed(stub, GREEDY) == "MemoryError"
            assert await failed(stub, "x = bytearray(10**12)") == "MemoryError"
            other = stub.Execute(code(PATIENT))
            assert (await stub.Execute(code(WAIT.format("begun")))).success
            error = await failed(stub, CROWD)
            # Which of them is met first depends on how fast the machine is.
            limits = (
                "killed: its processes used more than 384 MiB of memory",
                "killed: executions together used more than 384 MiB of memory",
                "killed: the container was about to run out of its 512 MiB of memory",
            )
            assert error.startswith(limits), error
            assert (await stub.Execute(code("open('over', 'w')"))).success
            answer = await other
            assert answer.output == "still here\n", answer
            await healthy(stub)


@needs_pod
async def test_executions_together_have_what_the_pod_has(tmp_path: Path, pod: Pod) -> None:
    with in_pod(tmp_path, pod) as server:
        async with server.connect() as stub:
            small = stub.Execute(code(MODERATE.format(150, "small"), 300_000))
            assert (await stub.Execute(code(WAIT.format("small")))).success
            error = await failed(stub, LARGE)
            assert error.startswith("killed: executions together used more than 384 MiB of memory"), error
            assert not small.done()
            small.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await small
            await healthy(stub)


@pytest.mark.slow  # Beside a busy worker the kernel may be quicker than the server.
@needs_pod
async def test_shared_memory_counts(tmp_path: Path, pod: Pod) -> None:
    # Not so fast that a busy machine lets the kernel end it first.
    fill = "import time; f = open('/dev/shm/f', 'wb', 0)\nwhile f.write(bytes(1 << 20)): time.sleep(0.005)"
    both = f"x = bytearray(250 << 20)\n{fill}"
    with in_pod(tmp_path, pod, "--file-size-limit-mb", "1000") as server:
        async with server.connect() as stub:
            error = await failed(stub, both)
            assert "more than 384 MiB of memory" in error, error
            error = await failed(stub, fill)
            assert "of memory" in error or "No space left" in error, error
            await healthy(stub)


@needs_pod
async def test_a_workspace_in_memory_counts(pod: Pod) -> None:
    # Which also keeps executions from having another in its place.
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        workspace = ["--workspace", f"{memory}/workspace", "--file-size-limit-mb", "1000"]
        with in_pod(Path(memory), pod, *workspace) as server:
            async with server.connect() as stub:
                # Not so fast that a busy machine lets it fill the last MiB before the next look.
                fill = "import time; f = open('f', 'wb', 0)\nwhile f.write(bytes(1 << 20)): time.sleep(0.002)"
                error = await failed(stub, fill)
                assert "the container was about to run out of its 512 MiB of memory" in error, error
                # What is full already can be emptied.
                answer = await stub.Execute(code("import os, time; time.sleep(0.2); os.unlink('f')"))
                assert answer.success, answer.error
                await healthy(stub)


async def test_what_processes_share_counts_once(tmp_path: Path) -> None:
    source = """
import os, time
x = b"x" * (150 << 20)
children = []
for _ in range(8):
    if not (child := os.fork()):
        time.sleep(1)
        os._exit(0)
    children.append(child)
print([os.waitpid(child, 0)[1] for child in children])
"""
    with running(tmp_path, "--memory-limit-mb", "256") as server:
        async with server.connect() as stub:
            answer = await stub.Execute(code(source))
            assert answer.output == f"{[0] * 8}\n", answer


async def test_stacks_of_threads_count_as_far_as_they_are_used(tmp_path: Path) -> None:
    source = """
import threading, time
done = threading.Event()
started = 0
while started < 48:
    try:
        threading.Thread(target=done.wait).start()
    except RuntimeError:  # A busy machine's server has not looked yet.
        time.sleep(0.1)
    else:
        started += 1
        time.sleep(0.01)
done.set()
while True:
    try:
        x = bytearray(150 << 20)
        break
    except MemoryError:  # As above.
        time.sleep(0.1)
print("fits")
"""
    with running(tmp_path, "--memory-limit-mb", "256") as server:
        async with server.connect() as stub:
            answer = await stub.Execute(code(source))
            assert answer.output == "fits\n", answer
            assert await failed(stub, GREEDY) == "MemoryError"


WASM = """
const memory = new WebAssembly.Memory({initial: 16, maximum: 65536});
memory.grow(64);
console.log(memory.buffer.byteLength, [1, 2, 3].map(x => x * x).join());
"""
JAVA = 'class Hello { public static void main(String[] args) { System.out.println("hello"); } }'


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
async def test_node_and_webassembly_run(stub: Stub) -> None:
    source = f"import subprocess; print(subprocess.check_output(['node', '-e', {WASM!r}], text=True))"
    answer = await stub.Execute(code(source))
    assert answer.output.strip() == f"{80 << 16} 1,4,9", answer


@pytest.mark.skipif(shutil.which("java") is None, reason="java is not installed")
async def test_java_runs(stub: Stub) -> None:
    source = "import subprocess; print(subprocess.run(['java', '-version']).returncode)"
    answer = await stub.Execute(code(source))
    assert answer.output.strip().endswith("0"), answer
    assert answer.success


@needs_pod
@pytest.mark.slow
async def test_other_runtimes_run_in_a_pod_of_512_mib(tmp_path: Path, pod: Pod) -> None:
    node = f"subprocess.run(['node', '-e', {WASM!r}]).returncode"
    java = f"open('Hello.java', 'w').write({JAVA!r}) and subprocess.run(['java', 'Hello.java']).returncode"
    with in_pod(tmp_path, pod) as server:
        async with server.connect() as stub:
            for program, run in (("node", node), ("javac", java)):
                if shutil.which(program):
                    answer = await stub.Execute(code(f"import subprocess; print({run})", timeout_ms=100_000))
                    assert answer.output.endswith("0\n"), (program, answer)


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process with one below it, which uses some 40 MiB."""
    below = "x = b'x' * (40 << 20); print('ready', flush=True); import time; time.sleep(1000)"
    command = f"{shlex.quote(sys.executable)} -S -c {shlex.quote(below)} & wait"
    with subprocess.Popen(
        ["/bin/sh", "-c", command], stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def watch(each: int) -> MemoryWatch:
    return MemoryWatch(Memory(each, 100 * each), own_shared_memory=True)


def test_what_the_machine_has_in_shared_memory_does_not_count(child: subprocess.Popen[bytes]) -> None:
    """As a process sees it that has but just been forked."""
    looking = watch(64 * MIB)
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file, looking.watching(child.pid) as watched:
        os.posix_fallocate(file.fileno(), 0, 96 * MIB)
        looking.look()
        assert watched.pids
        assert watched.killed_for is None
        assert watched.use < 64 * MIB


def kernel_that_says(monkeypatch: pytest.MonkeyPatch, change: Callable[[str, list[bytes]], None]) -> None:
    """Has the lines of files in /proc changed, by their name."""

    def opened(path: str, _mode: str) -> BinaryIO:
        with open(path, "rb") as file:
            lines = file.read().splitlines()
        change(path.rpartition("/")[2], lines)
        return io.BytesIO(b"\n".join(lines))

    monkeypatch.setattr(_memory, "open", opened, raising=False)


def test_memory_counts_where_the_kernel_tells_no_kinds_apart(
    child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in gVisor."""

    def change(name: str, lines: list[bytes]) -> None:
        if name == "smaps_rollup":
            raise FileNotFoundError
        lines[:] = [line for line in lines if not line.startswith((b"Rss", b"VmSwap"))]

    kernel_that_says(monkeypatch, change)
    looking = watch(8 * MIB)
    with looking.watching(child.pid) as watched:
        looking.look()
        assert watched.killed_for is not None
        assert 40 * MIB < watched.use < 80 * MIB


@pytest.mark.parametrize("exact", [True, False])
def test_memory_in_swap_counts(
    child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch, *, exact: bool
) -> None:
    def change(name: str, lines: list[bytes]) -> None:
        if name == "smaps_rollup" and not exact:
            raise PermissionError
        if name in ("status", "smaps_rollup"):
            figure = b"VmSwap:" if name == "status" else b"SwapPss:"
            lines[:] = [line for line in lines if not line.startswith(figure)]
            lines.append(figure + b" 102400 kB")

    kernel_that_says(monkeypatch, change)
    looking = watch(80 * MIB)
    with looking.watching(child.pid) as watched:
        looking.look()
        assert watched.killed_for is not None
        assert 140 * MIB < watched.use < 180 * MIB


def test_no_execution_goes_unwatched(child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    looking = watch(8 * MIB)

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as context:
        context.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start"), looking.watching(child.pid):
            pass
    with looking.watching(child.pid) as watched:
        child.wait(PATIENCE)  # Its child is killed, which is all that it waits for.
        assert watched.killed_for is not None


@dataclass(frozen=True)
class Full(Container):
    """A container that is always full."""

    def used(self) -> int:
        return self.limit


def test_nobody_is_killed_for_the_memory_of_what_was_killed(child: subprocess.Popen[bytes]) -> None:
    looking = MemoryWatch(Memory(8 * MIB, GIB, Full(Path(), GIB), GIB // 2), own_shared_memory=False)
    command = ["/bin/sh", "-c", "sleep 1000 & echo; wait"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as small:
        assert small.stdout is not None
        small.stdout.readline()
        try:
            with contextlib.ExitStack() as watching:
                greedy = watching.enter_context(looking.watching(child.pid))
                looking.look()
                assert greedy.killed_for is not None
                with looking.watching(small.pid) as watched:
                    looking.look()
                    assert watched.pids
                    meanwhile = watched.killed_for
                    watching.close()  # It is gone, and the container is as full as before.
                    looking.look()
                    assert meanwhile is None
                    assert watched.killed_for is not None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(small.pid, signal.SIGKILL)


async def test_a_hoard_is_killed_where_the_limit_was_lifted(tmp_path: Path) -> None:
    """Code may lift its own soft limit."""
    lift = f"import resource; resource.setrlimit(resource.RLIMIT_DATA, ({sys.maxsize}, {sys.maxsize}))\n"
    with running(tmp_path, "--memory-limit-mb", "200") as server:
        async with server.connect() as stub:
            error = await failed(stub, lift + GREEDY)
            assert error.startswith("killed: its processes used more than 200 MiB of memory"), error
            tests = "def test_it():\n    x = []\n    while True: x.append(bytearray(1 << 20))"
            answer = await stub.ExecuteTest(with_tests(lift, tests))
            assert "more than 200 MiB of memory" in answer.error, answer
