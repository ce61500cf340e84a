"""Executions that are forked from a warm interpreter, and what they do not share."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import venv
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
import pytest_asyncio

from prodisco_sandbox.server._interpreter import Job, Processes
from prodisco_sandbox.server._memory import Inherited, Memory, MemoryWatch
from prodisco_sandbox.server._warm import Warm
from tests.support.patience import PATIENCE, until
from tests.support.servers import (
    Server,
    Stub,
    alive,
    code,
    needs_bubblewrap,
    needs_landlock,
    running,
    with_tests,
)

MIB = 1 << 20


async def output(stub: Stub, source: str) -> str:
    answer = await stub.Execute(code(source))
    assert answer.success, answer.error + answer.output
    return answer.output.strip()


@pytest_asyncio.fixture
async def cold_stub(cold_server: Server) -> AsyncIterator[Stub]:
    async with cold_server.connect() as stub:
        yield stub


# What code sees

PROBES = {
    "interpreter": "print(sys.flags, sys.path[:-1], sys.argv, sys.executable, sys.dont_write_bytecode)",
    "streams": """
for stream in (sys.stdin, sys.stdout, sys.stderr):
    print(stream.encoding, stream.errors, stream.isatty(), stream.seekable(), stream.line_buffering)
""",
    "main module": """
print(__name__, __spec__ if "__spec__" in globals() else None, sorted(globals()))
print(sys.modules["__main__"].__dict__ is globals(), os.path.dirname(__file__) == tempfile.gettempdir())
""",
    "environment": """
print(sorted(os.environ), os.getcwd() == os.environ["HOME"] == sys.path[-1], os.umask(0))
""",
    "signals": "import signal; print([(n, signal.getsignal(n)) for n in signal.valid_signals() if n < 32])",
    "threads": "import threading; print(threading.enumerate()[0].name, threading.active_count())",
    "diagnosis": """
import faulthandler, tracemalloc, warnings
print(faulthandler.is_enabled(), tracemalloc.is_tracing(), tracemalloc.get_traced_memory())
print(sys.gettrace(), sys.getprofile(), sys.getrecursionlimit(), warnings.filters)
""",
    "collector": "import gc; print(gc.isenabled(), gc.get_threshold(), gc.get_debug())",
    "session": "print(os.getsid(0) == os.getpgid(0) == os.getpid(), os.nice(0), os.getpid() != os.getppid())",
    "multiprocessing": """
import multiprocessing.process as m, multiprocessing
print(m.ORIGINAL_DIR == os.getcwd(), m.current_process().name, multiprocessing.get_start_method())
print(sys.modules["__mp_main__"] is sys.modules["__main__"], len(m.current_process().authkey))
""",
    "logging": """
import logging
record = logging.LogRecord("name", 10, "path", 1, "text", (), None)
print(record.relativeCreated < 60_000, logging.root.handlers)
""",
    "modules": """
before = set(sys.modules)
import json, decimal
new = sorted(set(sys.modules) - before - {"_json", "_decimal"})
print([n for n in new if n.startswith(("json", "decimal"))], "asyncio" in sys.modules, "uuid" in sys.modules)
print(json.__spec__.loader is json.__loader__, json.__spec__.name, json.__file__, json.decoder.__spec__.name)
""",
    "finding": "import importlib.util as u; print(u.find_spec('csv').origin, u.find_spec('no_such'))",
}


@pytest.mark.parametrize("probe", PROBES)
async def test_code_sees_what_it_sees_in_an_interpreter_of_its_own(
    stub: Stub, cold_stub: Stub, probe: str
) -> None:
    source = f"import os, sys, tempfile\n{PROBES[probe]}"
    expected = await output(cold_stub, source)
    assert await output(stub, source) == expected
    assert expected


async def test_executions_are_forked(stub: Stub, server: Server) -> None:
    source = """
import os
def parent(pid): return int(open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[1])
print(parent(os.getppid()))
"""
    assert int(await output(stub, source)) in server.zygotes


async def test_executions_differ_in_what_is_random(stub: Stub) -> None:
    source = """
import multiprocessing, os, random, secrets, ssl, tempfile, uuid
print(random.random(), secrets.token_hex(), ssl.RAND_bytes(8).hex(), uuid.uuid4(), os.urandom(8).hex(),
      os.path.basename(tempfile.mktemp()), multiprocessing.current_process().authkey.hex(), sep="\\n")
"""
    first, second = [(await output(stub, source)).split("\n") for _ in range(2)]
    assert len(first) == 7
    assert not set(first) & set(second)


async def test_what_code_changes_is_gone(stub: Stub) -> None:
    source = """
import json, sys, os, decimal, random
print(hasattr(json, "changed"), "X" in os.environ, decimal.getcontext().prec, sys.getswitchinterval())
json.changed = os.environ["X"] = "yes"
decimal.getcontext().prec = 5
sys.setswitchinterval(1)
"""
    assert await output(stub, source) == await output(stub, source)


async def test_a_module_that_comes_first_on_the_path_is_the_one_imported(stub: Stub) -> None:
    source = """
import os, sys
os.makedirs("first", exist_ok=True)
open("first/csv.py", "w").write("mine = True")
sys.path.insert(0, "first")
import csv
print(csv.mine)
"""
    assert await output(stub, source) == "True"


async def test_several_threads_import_at_once(stub: Stub) -> None:
    source = """
import sys, threading
names = ["asyncio", "json", "decimal", "email.message", "concurrent.futures", "xml.etree.ElementTree"] * 4
go, errors, found = threading.Barrier(len(names)), [], {}
sys.setswitchinterval(1e-6)
def load(name):
    go.wait()
    try:
        __import__(name)
        found.setdefault(name, set()).add(id(sys.modules[name]))
    except BaseException as error:
        errors.append(repr(error))
threads = [threading.Thread(target=load, args=(name,)) for name in names]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(errors, {len(ids) for ids in found.values()})
"""
    for _ in range(5):
        assert await output(stub, source) == "[] {1}"


async def test_a_search_for_a_module_does_not_import_it(stub: Stub) -> None:
    source = """
import importlib.util, sys
print(importlib.util.find_spec("json").name, "json" in sys.modules)
import json.decoder
print(sys.modules["json"] is json, json.loads("[1]"))
"""
    assert await output(stub, source) == "json False\nTrue [1]"


# How code ends


@pytest.fixture(scope="session", params=["warm_server", "cold_server"])
def either_server(request: pytest.FixtureRequest) -> Server:
    found: Server = request.getfixturevalue(request.param)
    return found


@pytest_asyncio.fixture
async def either(either_server: Server) -> AsyncIterator[Stub]:
    async with either_server.connect() as stub:
        yield stub


ENDS = {
    "a file that is not closed": (
        "import json\njson.kept = open('left', 'w')\njson.kept.write('x' * 10)\nopen('also', 'w').write('y')",
        "import os; print(os.path.getsize('left'), os.path.getsize('also'))",
        "10 1",
    ),
    "destructors": (
        "class D:\n    def __del__(self): print('destroyed', N)\nd = D(); d.me = d; N = 5",
        None,
        "destroyed 5",
    ),
    "destructors of what refers to the module": (
        "import sys, atexit\nclass D:\n    def __del__(self): sys.stdout.write('gone')\nsys.d = D()\n"
        "sys.d.f = lambda: sys.d\natexit.register(lambda: delattr(sys, 'd'))",
        None,
        "gone",
    ),
    "a daemon thread": (
        """
import threading
ready, number = threading.Event(), 1
def work():
    ready.set()
    while True: number + 1
threading.Thread(target=work, daemon=True).start(); ready.wait()
file = open("left by main", "w"); file.write("z")
""",
        "print(open('left by main').read())",
        "z",
    ),
    "output of C": ("import ctypes\nctypes.CDLL(None).printf(b'from C')", None, "from C"),
}


@pytest.mark.parametrize("end", ENDS)
async def test_nothing_is_lost_at_the_end(either: Stub, end: str) -> None:
    source, then, expected = ENDS[end]
    printed = await output(either, source)
    assert (await output(either, then) if then else printed) == expected


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ("None", None),
        ("0", None),
        ("-1", "SystemExit: -1"),
        ("256", "SystemExit: 256"),
        ("'no'", "SystemExit: no"),
    ],
)
async def test_exit_values(either: Stub, value: str, error: str | None) -> None:
    answer = await either.Execute(code(f"import sys\nsys.exit({value})"))
    assert (answer.error or None) == (None if value == "256" else error)


# What the zygote holds


def open_files(proc: Path) -> set[str]:
    found = set()
    for path in (proc / "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # Closed meanwhile.
            found.add(os.readlink(path))
    return found


async def test_it_has_nothing_of_the_servers(tmp_path: Path) -> None:
    with running(tmp_path, env={"SECRET": "s3cret"}, zygote=True) as server:
        proc = Path("/proc", str(server.zygote))
        assert os.listdir(proc / "task") == [str(server.zygote)]
        if os.geteuid() == 0:  # Others may not look: see the attacks.
            opened = open_files(proc)
            assert {name.partition(":")[0] for name in opened} == {"pipe", "socket"}
            assert b"s3cret" not in (proc / "environ").read_bytes()
            of_the_server = open_files(Path("/proc", str(server.pid)))
            assert not of_the_server & {name for name in opened if name.startswith("socket:")}
        server.kill()
        await until(lambda: not any(map(alive, server.zygotes)))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--isolation", "bwrap"], marks=needs_bubblewrap),
        ["--no-zygote"],
        ["--pass-env", "PYTHONHASHSEED"],
    ],
)
async def test_where_there_is_none(tmp_path: Path, options: list[str]) -> None:
    command = (sys.executable, "-c", "import sys; sys.argv.remove('--no-zygote'); " + RUN)
    with running(tmp_path, *options, command=command, env={"PYTHONHASHSEED": "1"}) as server:
        async with server.connect() as stub:
            assert await output(stub, "print(1)") == "1"
            await until(lambda: len(server.supervisors()) == 2)  # Spare interpreters.
            assert not server.zygotes


RUN = "from prodisco_sandbox.server import __main__ as program; sys.exit(program.main())"


# What is preloaded

MODULES = {
    "probe_thread": "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()",
    "probe_file": "kept = open(__file__)",
    "probe_broken": "raise ValueError('broken for this test')",
    "probe_good": "value = 1\nprint('loading')",
}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with modules of this test's, and all that this one has."""
    path = tmp_path_factory.mktemp("environment")
    venv.create(path, with_pip=False)
    for name, text in MODULES.items():
        (packages(path) / f"{name}.py").write_text(text)
    paths = [path for path in sys.path if Path(path).is_dir()]
    (packages(path) / "others.pth").write_text("\n".join(paths))
    return path


def packages(environment: Path) -> Path:
    return next((environment / "lib").glob("python*/site-packages"))


@contextlib.contextmanager
def running_in(environment: Path, directory: Path, *options: str, zygote: bool = True) -> Iterator[Server]:
    command = (str(environment / "bin" / "python"), "-m", "prodisco_sandbox.server")
    with running(directory, *options, command=command, zygote=zygote) as server:
        yield server


async def test_what_cannot_be_preloaded_is_named_and_left_out(environment: Path, tmp_path: Path) -> None:
    names = [*MODULES, "no_such_module"]
    with running_in(environment, tmp_path, "--preload", f"json,{','.join(names)}") as server:
        await until(lambda: len(server.zygotes) == 2)
        log = server.log()
        assert "probe_thread is not preloaded: it starts threads when it is imported" in log
        assert "probe_file is not preloaded: it keeps files open when it is imported" in log
        assert "probe_broken is not preloaded: ValueError: broken for this test" in log
        assert "no_such_module is not preloaded: ModuleNotFoundError: No module named 'no_such_module'" in log
        assert "printed while modules were imported: loading" in log
        async with server.connect() as stub:
            # It is loaded already, and so prints nothing.
            assert await output(stub, "import probe_good; print(probe_good.value)") == "1"
            answer = await stub.Execute(code("import probe_broken"))
            assert answer.error == "ValueError: broken for this test"
            source = "import probe_thread, threading; print(threading.active_count())"
            assert await output(stub, source) == "2"
            tests = with_tests("import probe_good", "def test_it():\n    assert probe_good.value == 1")
            assert (await stub.ExecuteTest(tests)).success


async def test_a_module_that_is_installed_anew_is_seen(environment: Path, tmp_path: Path) -> None:
    path = packages(environment) / "probe_changed.py"
    path.write_text("value = 1")
    with running_in(environment, tmp_path, "--preload", "probe_changed") as server:
        async with server.connect() as stub:
            show = "import probe_changed; print(probe_changed.value)"
            await until(lambda: len(server.zygotes) == 2)
            assert await output(stub, show) == "1"
            # As an installation does it: at once.
            path.with_suffix(".new").write_text("value = 2")
            path.with_suffix(".new").rename(path)
            assert await output(stub, show) == "2"
            await until(lambda: len(server.zygotes) == 4)
            assert await output(stub, show) == "2"
            # In its place: at the next look at files that executions cannot change.
            path.write_text("value = 3")
            async with asyncio.timeout(PATIENCE):
                while await output(stub, show) != "3":
                    pass
            await until(lambda: len(server.zygotes) == 5)
            assert await output(stub, show) == "3"


@needs_landlock
async def test_it_does_not_import_what_executions_can_write(environment: Path, tmp_path: Path) -> None:
    site = packages(environment)
    trap = site / "probe_trap.py"
    trap.write_text("open('/proc/self/status').read().index('NoNewPrivs:\\t1'); value = 1")
    with running_in(environment, tmp_path, "--preload", "probe_trap", "--writable", str(site)) as server:
        async with server.connect() as stub:
            await until(lambda: len(server.zygotes) == 2)
            assert "probe_trap is not preloaded: ModuleNotFoundError: No module named" in server.log()
            show = "import probe_trap; print(probe_trap.value)"
            assert await output(stub, show) == "1"
            await output(stub, f"open({str(trap)!r}, 'w').write('value = 2')")
            assert await output(stub, show) == "2"
    trap.unlink()


# Its end


async def test_executions_outlive_it_and_go_on_without_it(tmp_path: Path) -> None:
    with running(tmp_path, "--preload", "json", zygote=True) as server:
        async with server.connect() as stub:
            first = server.zygote
            assert first is not None
            source = (
                "import os, time\nprint(1)\nwhile not os.path.exists('go on'): time.sleep(0.01)\nprint(2)"
            )
            chunks = aiter(stub.ExecuteStream(code(source)))
            assert (await anext(chunks)).output == "1\n"
            os.kill(first, signal.SIGKILL)
            await until(lambda: not alive(first))
            assert await output(stub, "open('go on', 'w'); print(3)") == "3"
            assert "".join([chunk.output async for chunk in chunks]) == "2\n"
            server.wait_for_zygote(but=first)
            assert await output(stub, "print(4)") == "4"
        assert "the zygote is replaced: it has ended" in server.log()


async def test_a_stopped_one_holds_nothing_up(tmp_path: Path) -> None:
    options = ["--preload", "json", "--spare-interpreters", "0"]
    with running(tmp_path, *options, zygote=True) as server:
        async with server.connect() as stub:
            first = server.zygote
            assert first is not None
            os.kill(first, signal.SIGSTOP)
            assert await output(stub, "print(1)") == "1"
            assert "the zygote does not answer" in server.log()
            server.wait_for_zygote(but=first)
            await until(lambda: not alive(first))
            assert await output(stub, "print(2)") == "2"


async def test_supervisors_are_used_again_unless_something_is_wrong(stub: Stub) -> None:
    show = "import os; print(os.getpid(), os.getppid())"
    seen = [(await output(stub, show)).split() for _ in range(6)]
    assert len({child for child, _ in seen}) == 6
    assert len({parent for _, parent in seen}) < 6


async def test_no_child_is_forked_ahead_outside_the_cgroup() -> None:
    ours, theirs = socket.socketpair()
    run = "import sys, prodisco_sandbox.server._zygote as z; z._supervise(int(sys.argv[1]), [], ahead=True)"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", run, str(theirs.fileno())), pass_fds=[theirs.fileno()]
    )
    theirs.close()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")

    async def cancelled_before_it_has_a_job() -> None:
        control, status = os.pipe(), os.pipe()
        os.close(control[1])
        socket.send_fds(ours, [b"x"], [control[0], status[1], control[0], control[0]])
        os.close(control[0])
        os.close(status[1])
        assert await asyncio.to_thread(os.read, status[0], 1) == b""
        os.close(status[0])

    with ours:
        assert await asyncio.to_thread(ours.recv, 8) == process.pid.to_bytes(8, "big")
        # When the second has ended, what followed the first is over.
        await cancelled_before_it_has_a_job()
        await cancelled_before_it_has_a_job()
        assert not children.read_text()
        ours.send(b"x")
        await until(children.read_text)
        [child] = map(int, children.read_text().split())
    await process.wait()
    await until(lambda: not alive(child))


async def test_a_child_that_was_forked_ahead_and_has_ended_is_replaced(stub: Stub) -> None:
    source = "import os; print(os.getpid(), os.getppid())"
    supervisor = int((await output(stub, source)).split()[1])
    children = Path(f"/proc/{supervisor}/task/{supervisor}/children")
    await until(children.read_text)
    waiting = int(children.read_text())
    os.kill(waiting, signal.SIGKILL)
    await until(lambda: ") Z" in Path(f"/proc/{waiting}/stat").read_text())
    seen = [(await output(stub, source)).split() for _ in range(6)]
    assert str(waiting) not in {child for child, _ in seen}
    assert str(supervisor) in {parent for _, parent in seen}


async def test_executions_are_forked_from_the_smallest_zygote_that_has_their_modules() -> None:
    small, standard, large = (
        Mock(ready=True, may_import=may_import)
        for may_import in (
            {"os", "json"}.__contains__,
            {"os", "json", "asyncio", "pytest"}.__contains__,
            bool,
        )
    )
    processes = Mock(_zygotes=[small, standard, large], _large_names=["pandas"])
    processes._ready_zygotes = lambda: Processes._ready_zygotes(processes)

    def best(source: str, tests: str | None = None) -> object:
        found = Processes._zygotes_for(processes, Job(source, tests))
        assert {*map(id, found)} == {id(zygote) for zygote in processes._zygotes if zygote.ready}
        return found[0]

    assert best("print(1)") is best("import os, json\nfrom json import loads") is small
    assert best("import os, asyncio") is best("x = 1", "assert x") is standard
    assert best("  from asyncio.tasks import gather") is best("import json as x, asyncio as y") is standard
    assert best("import mine") is best("__import__('pandas')") is best("import os, pandas.core as x") is large
    large.ready = False
    assert best("import pandas") is standard


def test_supervisors_are_counted_in_a_thread_while_others_are_forked(tmp_path: Path) -> None:
    warm = Warm(
        spawn=Mock(),
        make_cgroup=Mock(),
        prelude=b"",
        modules=[],
        may_import=Mock(),
        ahead=True,
        home=tmp_path,
        writable=None,
        most=0,
        on_ready=Mock(),
    )

    class Forked(Mock):
        pid = 1

        @property
        def ended(self) -> bool:
            warm._supervisors.add(Mock(ended=False, pid=2))
            return False

    warm._supervisors.add(Forked())
    assert warm.pids == {1}
    assert warm.pids == {1, 2}


async def test_memory_that_is_the_zygotes_is_free(tmp_path: Path) -> None:
    with running(tmp_path, "--memory-limit-mb", "64", zygote=True) as server:
        async with server.connect() as stub:
            assert (
                await output(stub, "x = bytearray(50 << 20); import time; time.sleep(0.5); print(1)") == "1"
            )
            answer = await stub.Execute(code("x = [bytearray(1 << 20) for _ in range(200)]"))
            assert answer.error == "MemoryError" or "more than 64 MiB of memory" in answer.error


def test_memory_that_is_the_zygotes_does_not_count() -> None:
    below = "x = b'x' * (40 << 20); print('ready', flush=True); import time; time.sleep(1000)"
    command = ["/bin/sh", "-c", f'{sys.executable} -S -c "{below}" & wait']
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        try:
            looking = MemoryWatch(Memory(256 * MIB, 1024 * MIB), own_shared_memory=False)
            with looking.watching(process.pid, Inherited(0, 30 * MIB)) as watched:
                looking.look()
                assert 10 * MIB < watched.use < 30 * MIB
        finally:
            os.killpg(process.pid, signal.SIGKILL)


# Large libraries


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    pytest.importorskip("numpy", reason="NumPy is not installed")
    with running(tmp_path_factory.mktemp("large"), zygote=True) as server:
        server.wait_for_zygote(but=server.zygote if len(server.zygotes) == 1 else None)
        yield server


@pytest.mark.science
async def test_numpy_is_right_and_parallel_after_the_fork(large: Server) -> None:
    assert all(len(os.listdir(f"/proc/{pid}/task")) == 1 for pid in large.zygotes)
    source = """
import numpy, os, threading
print(numpy.random.random(), numpy.random.default_rng().random())
a = numpy.arange(360_000, dtype=float).reshape(600, 600) / 360_000
print(numpy.allclose((a @ a)[7], sum(a[7, k] * a[k] for k in range(600))))
print(len(os.listdir("/proc/self/task")) == len(os.sched_getaffinity(0)))
print("OPENBLAS_NUM_THREADS" in os.environ)
"""
    async with large.connect() as stub:
        first, second = [(await output(stub, source)).split("\n") for _ in range(2)]
    assert first[1:] == second[1:] == ["True", "True", "False"]
    assert not set(first[0].split()) & set(second[0].split())


@pytest.mark.science
async def test_pandas_and_matplotlib_work_after_the_fork(large: Server) -> None:
    pytest.importorskip("pandas", reason="pandas is not installed")
    pytest.importorskip("matplotlib", reason="Matplotlib is not installed")
    source = """
import sys
print("pandas" in sys.modules)
import pandas
print(pandas.DataFrame({"a": range(1000), "b": "x"}).groupby("b").sum()["a"]["x"])
import matplotlib, matplotlib.pyplot as plt, os
plt.plot([1, 2]); plt.savefig("figure.png"); plt.show()
print(os.path.getsize("figure-1.png") > 1000)
print(os.path.getsize("figure.png") > 1000, matplotlib.get_cachedir().startswith(os.getcwd()))
print(plt.rcParams["lines.linewidth"])
open("matplotlibrc", "w").write("lines.linewidth: 7")
"""
    async with large.connect() as stub:
        assert await output(stub, source) == "False\n499500\nTrue\nTrue True\n1.5"
        # A configuration in the working directory holds as ever.
        assert await output(stub, source) == "False\n499500\nTrue\nTrue True\n7.0"
