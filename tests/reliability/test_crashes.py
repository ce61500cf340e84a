"""The process of a manager is killed, and nothing of its sandboxes is left."""

from __future__ import annotations

import asyncio
import random
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.support.counts import count, tries
from tests.support.local import processes, traces, until_gone
from tests.support.patience import PATIENCE

PROGRAM = """\
import asyncio, contextlib, random, signal, sys
from prodisco_sandbox import SandboxError, SandboxManager
from prodisco_sandbox.local import LocalCluster

STRAY = '''
import subprocess
open("file", "w").write("x")
subprocess.Popen(["sleep", "600"], start_new_session=True)
while True: print("busy", flush=True)
'''

async def user(manager, chance):
    while True:
        session = f"session-{chance.randrange(4)}"
        with contextlib.suppress(SandboxError, TimeoutError):
            match chance.randrange(4):
                case 0:
                    async with asyncio.timeout(chance.random()), manager.session(session) as client:
                        await client.execute(code=STRAY)
                case 1:
                    async with manager.session(session) as client:
                        async for _ in client.execute_stream(code="print(1)"):
                            pass
                case 2:
                    await (await manager.get_client(session)).execute_async(code=STRAY)
                case 3:
                    await manager.on_session_closed(session)

async def main(directory, seed):
    async with LocalCluster(directory=directory) as cluster:
        api = cluster.custom_objects_api
        config = cluster.config(max_sessions=3, capacity_timeout=5.0)
        async with SandboxManager(config, custom_objects_api=api) as manager:
            await manager.get_client("session-0")
            print("up", flush=True)
            await asyncio.gather(*(user(manager, random.Random(seed + n)) for n in range(4)))

async def run():
    task = asyncio.ensure_future(main(sys.argv[1], int(sys.argv[2])))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await task
    print("drained", flush=True)

asyncio.run(run())
"""


@asynccontextmanager
async def busy_program(
    directory: Path, seed: int, *, up: bool = True
) -> AsyncIterator[asyncio.subprocess.Process]:
    program = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PROGRAM, str(directory), str(seed), stdout=asyncio.subprocess.PIPE, cwd="/"
    )
    try:
        if up:
            assert program.stdout is not None
            async with asyncio.timeout(2 * PATIENCE):
                assert await program.stdout.readline() == b"up\n"
        yield program
    finally:
        if program.returncode is None:
            program.kill()
        await program.wait()


@pytest.mark.slow
async def test_killed_at_random_moments(tmp_path: Path) -> None:
    number = tries(3)
    chance = random.Random(number)
    there, longest = 0, 0.0
    for kill in range(number):
        directory = tmp_path / str(kill)
        directory.mkdir()
        # One in ten dies while it starts, the others under load.
        early = kill % 10 == 9
        async with busy_program(directory, seed=kill, up=not early) as program:
            await asyncio.sleep(chance.uniform(0, 3))
            if program.returncode is not None:
                raise AssertionError(f"it has ended by itself: {program.returncode}")
            there += bool(processes(directory).keys() - {program.pid})
            program.kill()
            killed = time.monotonic()
        await until_gone(directory)
        longest = max(longest, time.monotonic() - killed)
        assert list(directory.iterdir()) == []
        count("kills")
    print(f"{number} kills, {there} of them with processes to leave; gone within {longest:.1f} s")
    assert there >= number * 0.7, "what is killed has something to leave"


@pytest.mark.slow
async def test_sigterm_drains(tmp_path: Path) -> None:
    async with busy_program(tmp_path, seed=1) as program:
        assert program.stdout is not None
        await asyncio.sleep(1)
        program.send_signal(signal.SIGTERM)
        async with asyncio.timeout(2 * PATIENCE):
            assert await program.stdout.readline() == b"drained\n"
            # Nothing is left to die.
            assert processes(tmp_path).keys() <= {program.pid}
            assert await program.wait() == 0
        assert traces(tmp_path) == []
    count("drains")
