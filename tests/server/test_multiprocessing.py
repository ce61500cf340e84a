"""Child processes by the standard library's means, and what they leave in shared memory."""

from __future__ import annotations

import _multiprocessing  # type: ignore[import-not-found]
import asyncio
import contextlib
import mmap
import os
import shutil
import sys
import tempfile
import uuid
from pathlib import Path

import pytest

from prodisco_sandbox.server import _confine
from prodisco_sandbox.server._shared_memory import SharedMemory, _refusal
from tests.support.patience import PATIENCE, until
from tests.support.servers import Stub, code, needs_bubblewrap, running, with_tests

COMMON = """
import sys
from prodisco_sandbox.server import __main__, _shared_memory
_shared_memory._refusal = lambda: "refused for this test"
sys.exit(__main__.main())
"""
own_shared_memory = pytest.mark.skipif(_refusal() is not None, reason=f"no namespaces: {_refusal()}")

WAYS = {
    "private": pytest.param([], [sys.executable, "-m", "prodisco_sandbox.server"], marks=own_shared_memory),
    "by a user namespace": pytest.param(
        [],
        ["setpriv", "--bounding-set=-all,+setfcap", sys.executable, "-m", "prodisco_sandbox.server"],
        marks=[
            pytest.mark.slow,
            own_shared_memory,
            pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv is not installed"),
        ],
    ),
    "common": pytest.param([], [sys.executable, "-c", COMMON]),
    "bubblewrap": pytest.param(
        ["--isolation", "bwrap"],
        [sys.executable, "-m", "prodisco_sandbox.server"],
        marks=[pytest.mark.slow, needs_bubblewrap],
    ),
}
POOL = """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
def work(x):
    return x + 1
if __name__ == "__main__":
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(METHOD)) as executor:
        print(list(executor.map(work, [1, 2, 3])))
"""
ALL_KINDS = """
import multiprocessing
from multiprocessing import shared_memory
def square(x):
    return x * x
def put(queue, lock, event, counter, shared):
    with lock:
        counter.value += 1
    shared["key"] = "value"
    segment = shared_memory.SharedMemory(name=shared["segment"])
    segment.buf[0] = 42
    segment.close()
    queue.put("queued")
    event.set()
if __name__ == "__main__":
    context = multiprocessing.get_context(METHOD)
    with context.Pool(2) as pool:
        print(pool.map(square, [1, 2, 3]))
    with context.Manager() as manager:
        shared = manager.dict()
        segment = shared_memory.SharedMemory(create=True, size=100)
        shared["segment"] = segment.name
        parts = context.Queue(), context.Lock(), context.Event(), context.Value("i", 0), shared
        child = context.Process(target=put, args=parts)
        child.start()
        print(parts[0].get(timeout=60), parts[2].wait(60), segment.buf[0])
        child.join()
        print(parts[3].value, shared["key"], child.exitcode)
        segment.close()
        segment.unlink()
"""
SQUARES = "[1, 4, 9]\nqueued True 42\n1 value 0"


async def output(stub: Stub, source: str) -> str:
    answer = await stub.Execute(code(source, timeout_ms=120_000))
    assert answer.success, answer.error + answer.output
    return answer.output.strip()


@pytest.mark.parametrize(
    ("options", "command"),
    {**WAYS, "common": pytest.param(*WAYS["common"].values, marks=pytest.mark.slow)}.values(),
    ids=WAYS,
)
async def test_all_kinds_of_children(
    tmp_path_factory: pytest.TempPathFactory, options: list[str], command: list[str]
) -> None:
    # A path that is too long for the sockets of managers, but for the one without namespaces.
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        long = tmp_path_factory.mktemp("a-name-that-makes-the-path-too-long-for-sockets")
        directory = Path(short) if command[1] == "-c" else long
        await run_all_kinds_of_children(directory, options, command)


async def run_all_kinds_of_children(directory: Path, options: list[str], command: list[str]) -> None:
    with running(directory, *options, command=command) as server:
        async with server.connect() as stub:
            for method in ("fork", "spawn", "forkserver"):
                assert await output(stub, f"METHOD = {method!r}{POOL}") == "[2, 3, 4]", method
                assert await output(stub, f"METHOD = {method!r}{ALL_KINDS}") == SQUARES, method


@pytest.mark.parametrize(("options", "command"), WAYS.values(), ids=WAYS)
async def test_what_is_left_in_shared_memory_is_removed(
    tmp_path: Path, options: list[str], command: list[str]
) -> None:
    theirs = Path(_confine.SHARED_MEMORY, f"of-somebody-else-{uuid.uuid4().hex}")
    # Open, since servers of other workers clean up there, too.
    held = theirs.open("w")
    source = """
import multiprocessing, os
from multiprocessing import resource_tracker, shared_memory
segment = shared_memory.SharedMemory(create=True, size=1 << 20)
segment.buf[:6] = b"secret"
resource_tracker.unregister(segment._name, "shared_memory")
import _multiprocessing  # type: ignore[import-not-found]
_multiprocessing.SemLock(1, 1, 1, f"/left-{os.getpid()}", False)
print(segment._name.lstrip("/"), f"sem.left-{os.getpid()}")
print(*os.listdir("/dev/shm"))
"""
    try:
        with running(tmp_path, *options, command=command) as server:
            async with server.connect() as stub:
                made, seen = (set(line.split()) for line in (await output(stub, source)).splitlines())
                assert made <= seen
                if command[1] != "-c":
                    # TMPDIR is seen there, too, where its own path is too long.
                    assert seen - {"tmp"} == made
                left = (await output(stub, "import os; print(*os.listdir('/dev/shm'))")).split()
                assert not made & set(left)
                assert theirs.exists()
    finally:
        held.close()
        theirs.unlink()


@own_shared_memory
async def test_executions_do_not_see_the_shared_memory_of_others(stub: Stub) -> None:
    source = "import time; open('/dev/shm/first', 'w'); open('ready', 'w'); time.sleep(1000)"
    first = stub.Execute(code(source, 60_000))
    look = """
import os, time
while not os.path.exists("ready"):
    time.sleep(0.01)
os.unlink("ready")
print("first" in os.listdir("/dev/shm"))
"""
    assert await output(stub, look) == "False"
    first.cancel()


@own_shared_memory
async def test_system_v_segments_go_with_their_execution(stub: Stub) -> None:
    source = """
import ctypes
libc = ctypes.CDLL(None)
print(libc.shmget(4711, 1 << 20, 0o1600 if MAKE else 0) >= 0)
"""
    assert await output(stub, f"MAKE = True{source}") == "True"
    assert await output(stub, f"MAKE = False{source}") == "False"


def test_files_that_are_open_somewhere_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prodisco_sandbox.server._shared_memory._refusal", lambda: "refused")
    memory = SharedMemory(in_namespaces=False, directory=tmp_path)
    assert not memory.private
    (tmp_path / "old").touch()
    memory.begin()
    for name in ("new", "open"):
        (tmp_path / name).touch()
    with (tmp_path / "open").open():
        memory.end()
        assert {path.name for path in tmp_path.iterdir()} == {"old", "open"}
    memory.end()
    assert {path.name for path in tmp_path.iterdir()} == {"old"}


def test_a_semaphore_that_no_child_has_opened_yet_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its maker has it mapped under another name, which is gone."""
    monkeypatch.setattr("prodisco_sandbox.server._shared_memory._refusal", lambda: "refused")
    memory = SharedMemory(in_namespaces=False)
    memory.begin()
    name = f"/prodisco-{uuid.uuid4().hex}"
    semaphore = _multiprocessing.SemLock(1, 1, 1, name, False)  # As multiprocessing makes it.
    path = Path("/dev/shm", f"sem.{name[1:]}")
    try:
        memory.end()
        assert path.exists()
        assert semaphore.acquire(False)
    finally:
        path.unlink(missing_ok=True)


def test_files_with_odd_names_that_are_mapped_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prodisco_sandbox.server._shared_memory._refusal", lambda: "refused")
    memory = SharedMemory(in_namespaces=False, directory=tmp_path)
    memory.begin()
    names = {os.fsdecode(b"no UTF-8: \xff"), "a\rb", "a\x1c\u2028b"}
    with contextlib.ExitStack() as mapped:
        for name in names:
            (tmp_path / name).write_bytes(b"x")
            with (tmp_path / name).open("rb") as file:
                mapped.enter_context(mmap.mmap(file.fileno(), 1, access=mmap.ACCESS_READ))
        memory.end()
        assert {path.name for path in tmp_path.iterdir()} == names
    memory.end()
    assert not list(tmp_path.iterdir())


async def test_what_is_queued_starts_whatever_cleaning_up_does(tmp_path: Path) -> None:
    broken = f"""
from prodisco_sandbox.server._shared_memory import SharedMemory
def end(self):
    raise ValueError("broken for this test")
SharedMemory.end = end
{COMMON}"""
    with running(tmp_path, "--max-concurrent", "1", command=[sys.executable, "-c", broken]) as server:
        async with server.connect() as stub:
            answers = await asyncio.gather(
                *(stub.Execute(code(f"print({n})"), timeout=PATIENCE) for n in range(3))
            )
            assert [answer.output for answer in answers] == ["0\n", "1\n", "2\n"]
        assert "broken for this test" in server.log()


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
async def test_children_of_code_under_test(stub: Stub, method: str) -> None:
    request = with_tests(
        f"METHOD = {method!r}\nimport multiprocessing\ndef work(x):\n    return x + 1\n",
        """
def twice(x):
    return work(work(x))
def test_pool():
    with multiprocessing.get_context(METHOD).Pool(2) as pool:
        assert pool.map(work, [1, 2]) == [2, 3]
        assert pool.map(twice, [1, 2]) == [3, 4]
""",
    )
    answer = await stub.ExecuteTest(request)
    assert answer.success, answer


async def test_the_main_module_is_the_same_in_children(stub: Stub) -> None:
    """Text is text: a line that declares an encoding declares nothing here."""
    source = """# -*- coding: latin-1 -*-
import multiprocessing
def show(): print("grüße", TEXT)
TEXT = "łódź"
if __name__ == "__main__":
    child = multiprocessing.get_context("spawn").Process(target=show)
    child.start(); child.join()
"""
    assert await output(stub, source) == "grüße łódź"


async def test_the_main_module_is_in_a_file_while_it_runs(stub: Stub, tmp_path: Path) -> None:
    source = """
import inspect, sys
class Kept: pass
print(__file__)
print(open(__file__).read() == inspect.getsource(sys.modules["__main__"]))
print(inspect.getsource(Kept))
"""
    path, same, text = (await output(stub, source)).split("\n", 2)
    assert (same, text.strip()) == ("True", "class Kept: pass")
    await until(lambda: not Path(path).exists())


async def test_code_runs_where_its_file_cannot_be_made(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        async with server.connect() as stub:
            await output(stub, "import os, tempfile; os.chmod(tempfile.gettempdir(), 0)")
            assert await output(stub, "print('__file__' in globals(), __name__)") == "False __main__"
