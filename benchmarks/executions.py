"""Scenario 12: what an execution takes on the reference server, with a zygote and without."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import grpc.aio

from prodisco_sandbox.proto import sandbox_pb2 as pb
from prodisco_sandbox.proto import sandbox_pb2_grpc
from prodisco_sandbox.server._warm import SMALL_MODULES, STANDARD_MODULES

from .measure import Figure, compared, interleaved
from .scale import Setting

PAUSE = 0.1
"""Seconds between calls, in which a server gets ready for the next one."""
AT_ONCE = 8
PRELOADED = "executions are forked from"
LARGE = ("numpy", "pandas", "matplotlib")
PRINT, SUM = "print(1)", "import pandas; print(pandas.DataFrame({'a': range(1000)}).sum()['a'])"
KERNEL_AND = 3.0
"""Milliseconds that an execution may take longer than in a kernel that is there already."""
FORKS = f"""\
import gc, importlib, os, sys, time
for name in sys.argv[2:]:
    importlib.import_module(name)
gc.freeze()
count = int(sys.argv[1])
began = time.perf_counter()
for caller in range({AT_ONCE}):
    if not os.fork():
        for _ in range(count):
            if not os.fork():
                os._exit(0)
            os.wait()
        os._exit(0)
for caller in range({AT_ONCE}):
    os.wait()
print({AT_ONCE} * count / (time.perf_counter() - began))
"""
HELD = (
    "import os, time\nopen(f'held-{os.getpid()}', 'w')\nwhile not os.path.exists('go on'): time.sleep(0.01)"
)


class Server:
    """A server, and calls of it."""

    def __init__(self, process: asyncio.subprocess.Process, workspace: Path, stub: Any) -> None:
        self._process = process
        self._workspace = workspace
        self._stub = stub

    async def execute(self, code: str) -> float:
        return await self._timed(self._stub.Execute, pb.ExecuteRequest(code=code, timeout_ms=120_000))

    async def execute_test(self) -> float:
        request = pb.ExecuteTestRequest(code="x = 1", tests="def test_x():\n    assert x == 1")
        return await self._timed(self._stub.ExecuteTest, request)

    async def _timed(self, call: Callable[[Any], Any], request: Any) -> float:
        """Milliseconds until the answer."""
        await asyncio.sleep(PAUSE)
        began = time.perf_counter()
        answer = await call(request)
        took = time.perf_counter() - began
        if not answer.success:
            raise RuntimeError(answer.error)
        return took * 1000

    async def at_once(self, count: int) -> float:
        """Executions per second, of callers that do not pause."""

        async def caller() -> None:
            for _ in range(count):
                await self._stub.Execute(pb.ExecuteRequest(code=PRINT))

        began = time.perf_counter()
        await asyncio.gather(*(caller() for _ in range(AT_ONCE)))
        return AT_ONCE * count / (time.perf_counter() - began)

    async def memory(self) -> float:
        """MiB that executions and their zygote use while some of them hold pandas."""
        code = f"{SUM}\n{HELD}"
        calls = [self._stub.Execute(pb.ExecuteRequest(code=code, timeout_ms=120_000)) for _ in range(AT_ONCE)]
        gathered = asyncio.gather(*calls)
        while len(list(self._workspace.glob("held-*"))) < AT_ONCE:
            await asyncio.sleep(0.05)
        used = sum(map(proportional, below(self._process.pid))) / (1 << 20)
        (self._workspace / "go on").touch()
        await gathered
        for path in self._workspace.iterdir():
            path.unlink()
        return used


def below(pid: int) -> list[int]:
    found = [pid]
    for one in found:  # grows while it is walked
        for path in Path(f"/proc/{one}/task").glob("*/children"):
            found += map(int, path.read_text().split())
    return found[1:]


def proportional(pid: int) -> int:
    """Bytes that a process uses, each page divided by how many share it."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


@contextlib.asynccontextmanager
async def serving(*options: str, zygote: bool = True, **env: str) -> AsyncIterator[Server]:
    """A server that is warm: the zygote is there, or spare interpreters are."""
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        (workspace := Path(directory, "workspace")).mkdir()
        process = await start(directory, *options, "--workspace", str(workspace), **env)
        try:
            assert process.stderr is not None
            zygotes = 2 + any(map(importlib.util.find_spec, LARGE)) if zygote else 0
            while zygotes:
                zygotes -= PRELOADED in (await process.stderr.readline()).decode()
            drained = asyncio.create_task(process.stderr.read())
            async with grpc.aio.insecure_channel(f"unix:{directory}/run/s") as channel:
                server = Server(process, workspace, sandbox_pb2_grpc.SandboxServiceStub(channel))
                await server.execute(SUM if importlib.util.find_spec("pandas") else PRINT)
                yield server
        finally:
            await stop(process)
            await drained


async def start(directory: str, *options: str, **env: str) -> asyncio.subprocess.Process:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "prodisco_sandbox.server", "--exit-with-parent"),
        *("--socket", f"{directory}/run/s", "--cache-dir", f"{directory}/cache", *options),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **env},
    )
    assert process.stdout is not None
    await process.stdout.readline()
    return process


async def stop(process: asyncio.subprocess.Process) -> None:
    assert process.stdin is not None
    process.stdin.close()
    await process.wait()


async def start_up(*options: str, **env: str) -> float:
    """Milliseconds until a server serves."""
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        began = time.perf_counter()
        process = await start(directory, *options, **env)
        took = time.perf_counter() - began
        await stop(process)
    return took * 1000


async def bare() -> float:
    """Milliseconds of the least possible Python process."""
    await asyncio.sleep(PAUSE)
    began = time.perf_counter()
    await (await asyncio.create_subprocess_exec(sys.executable, "-I", "-c", "pass")).wait()
    return (time.perf_counter() - began) * 1000


async def forks(count: int, modules: Iterable[str]) -> float:
    """Forks per second of processes that have these modules and end at once: what the kernel alone takes."""
    command = [sys.executable, "-I", "-c", FORKS, str(count), *modules]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    return float((await process.communicate())[0])


@contextlib.asynccontextmanager
async def kernel() -> AsyncIterator[Callable[[], Awaitable[float]]]:
    """Milliseconds of `PRINT` in an IPython kernel that is warm."""
    manager, client = await importlib.import_module("jupyter_client.manager").start_new_async_kernel()

    async def execute() -> float:
        await asyncio.sleep(PAUSE)
        began = time.perf_counter()
        await client.execute_interactive(PRINT, output_hook=lambda _: None)
        return (time.perf_counter() - began) * 1000 + KERNEL_AND

    try:
        await execute()
        yield execute
    finally:
        client.stop_channels()
        await manager.shutdown_kernel(now=True)


async def run(setting: Setting) -> list[Figure]:
    scale = setting.scale
    async with serving() as warm, serving("--no-zygote", zygote=False) as cold:
        figures = await measured(scale.rounds, scale.executions, warm, cold, lambda: start_up("--no-zygote"))
        if not all(map(importlib.util.find_spec, ("ipykernel", "jupyter_client"))):
            print("no IPython kernel: ipykernel and jupyter_client are not installed", file=sys.stderr)
            return figures
        async with kernel() as in_kernel:
            found = await interleaved(
                scale.executions, {"print": lambda: warm.execute(PRINT), "kernel": in_kernel}
            )
    against = f"an IPython kernel + {KERNEL_AND:g} ms"
    what = "print(1) beside a warm IPython kernel"
    return [
        *figures,
        compared(12, what, found["print"], found["kernel"], "ms", target=1.0, against=against, note=against),
    ]


async def measured(
    rounds: int, calls: int, warm: Server, cold: Server, cold_start: Callable[[], Any]
) -> list[Figure]:
    found = await interleaved(
        calls,
        {
            "bare": bare,
            "print": lambda: warm.execute(PRINT),
            "print, cold": lambda: cold.execute(PRINT),
            "test": warm.execute_test,
            "test, cold": cold.execute_test,
        },
    )
    bare_one, one = "python -I -c pass", "print(1)"
    figures = [
        compared(12, "print(1)", found["print"], found["bare"], "ms", target=0.5, against=bare_one),
        compared(12, "print(1), no zygote", found["print, cold"], found["bare"], "ms", against=bare_one),
    ]
    figures += [
        compared(12, "ExecuteTest", found["test"], found["print"], "ms", target=3.0, against=one),
        compared(12, "ExecuteTest, no zygote", found["test, cold"], found["print, cold"], "ms", against=one),
    ]
    found = await interleaved(
        rounds,
        {
            "warm": lambda: warm.at_once(calls),
            "cold": lambda: cold.at_once(max(1, calls // 4)),
            "small": lambda: forks(calls, sorted(SMALL_MODULES)),
            "all": lambda: forks(calls, [*STANDARD_MODULES, *filter(importlib.util.find_spec, LARGE)]),
        },
    )
    old, rates = "no zygote", found["cold"]
    what = f"{AT_ONCE} at once"
    figures.append(compared(12, what, found["warm"], rates, "/s", target=4.0, at_least=True, against=old))
    figures += [
        compared(12, f"{what}, bare forks with {name} modules", found[name], rates, "/s", against=old)
        for name in ("small", "all")
    ]
    if importlib.util.find_spec("pandas") is not None:
        found = await interleaved(
            calls, {"sum": lambda: warm.execute(SUM), "print": lambda: warm.execute(PRINT)}
        )
        figures.append(
            compared(12, "pandas sum", found["sum"], found["print"], "ms", target=2.0, against=one)
        )
        used = await interleaved(1, {"warm": warm.memory, "cold": cold.memory})
        what = f"memory of {AT_ONCE} with pandas"
        figures.append(compared(12, what, used["warm"], used["cold"], "MiB", target=1 / 3, against=old))
    found = await interleaved(rounds, {"warm": start_up, "cold": cold_start})
    figures.append(compared(12, "start-up", found["warm"], found["cold"], "ms", target=1.1, against=old))
    return figures
