"""A manager in another process or event loop than its own: an error that says so, and no hang."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from prodisco_sandbox import SandboxClient, SandboxError, SandboxManager, SandboxManagerConfig
from prodisco_sandbox.testing import FakeCustomObjectsApi, FakeSandboxServer
from tests.support.patience import PATIENCE

FORKING = """\
import asyncio, os, signal
from prodisco_sandbox import SandboxError, SandboxManager, SandboxManagerConfig
from prodisco_sandbox.testing import FakeCustomObjectsApi, FakeSandboxServer

async def use(manager, client):
    async def pinned():
        async with manager.session("known") as client:
            await client.execute(code="x")
    async def looked_up():
        await (await manager.get_client("known")).execute(code="x")
    calls = [
        client.execute(code="x"), client.health_check(), anext(client.execute_stream(code="x")),
        pinned(), looked_up(), manager.get_client("new"), manager.on_session_initialized("new"),
        manager.on_session_closed("known"), manager.cleanup_orphaned_sandboxes(), manager.start(),
        manager.shutdown(),
    ]
    for call in calls:
        try:
            await call
        except SandboxError as e:
            print(e, flush=True)
        else:
            print("no error", call, flush=True)

async def main():
    async with FakeSandboxServer() as server, FakeCustomObjectsApi(auto_ready=True) as api:
        config = SandboxManagerConfig(mode="multi", endpoint=lambda _: server.target)
        async with SandboxManager(config, custom_objects_api=api) as manager:
            client = await manager.get_client("known")
            await client.execute(code="x")
            if not (child := os.fork()):
                signal.alarm(60)
                asyncio.run(use(manager, client))
                os._exit(0)
            status = await asyncio.to_thread(os.waitpid, child, 0)
            assert status == (child, 0), f"the child hung or died: {status}"
            assert (await client.execute(code="x")).success
            assert await manager.get_client("known") is client
            assert len(api.objects) == 1

asyncio.run(main())
print("well")
"""


BUSY_AND_FORKING = """\
import asyncio, os
from prodisco_sandbox import SandboxClient
from prodisco_sandbox.testing import FakeSandboxServer

async def main():
    async with FakeSandboxServer() as server, SandboxClient(server.target) as client:
        async def calls():
            while True:
                assert (await client.execute(code="x")).success

        busy = [asyncio.create_task(calls()) for _ in range(4)]
        for _ in range(40):
            called = len(server.calls)
            if not (child := os.fork()):
                os._exit(0)
            print(await asyncio.to_thread(os.waitpid, child, 0) == (child, 0), flush=True)
            while len(server.calls) < called + 5:  # It goes on in the parent.
                await asyncio.sleep(0)
        for task in busy:
            assert not task.done()
            task.cancel()
        await asyncio.wait(busy)

asyncio.run(main())
"""


def forking(program: str) -> list[str]:
    """Lines that a program prints which forks while it uses gRPC."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "GRPC_ENABLE_FORK_SUPPORT": "0"},  # As docs/reliability.md says.
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_no_child_of_a_fork_dies_without_grpcs_fork_support() -> None:
    assert forking(BUSY_AND_FORKING) == ["True"] * 40


@pytest.mark.slow
def test_after_a_fork() -> None:
    lines = forking(FORKING)
    assert lines[-1:] == ["well"], lines
    assert len(lines) == 12
    assert all("fork" in line for line in lines[:-1]), lines


@contextmanager
def loop_in_a_thread() -> Iterator[Any]:
    """Another event loop, that runs all the time; gives a function that runs something there."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="other-loop")
    thread.start()
    try:
        yield lambda coroutine: asyncio.run_coroutine_threadsafe(coroutine, loop).result(PATIENCE)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(PATIENCE)
        loop.close()


async def test_from_another_loop_that_runs_at_the_same_time() -> None:
    async with FakeSandboxServer() as server, FakeCustomObjectsApi(auto_ready=True) as api:
        config = SandboxManagerConfig(mode="multi", endpoint=lambda _: server.target)
        async with SandboxManager(config, custom_objects_api=api) as manager:
            client = await manager.get_client("known")
            await client.execute(code="x")

            async def pinned() -> None:
                async with manager.session("known") as found:
                    await found.execute(code="x")

            async def looked_up() -> None:
                await (await manager.get_client("known")).execute(code="x")

            async def elsewhere() -> list[str]:
                calls: list[Any] = [
                    client.execute(code="x"),
                    client.health_check(),
                    anext(client.execute_stream(code="x")),
                    client.close(),
                    pinned(),
                    looked_up(),
                    manager.get_client("new"),
                    manager.on_session_initialized("new"),
                    manager.on_session_closed("known"),
                    manager.cleanup_orphaned_sandboxes(),
                    manager.start(),
                    manager.shutdown(),
                ]
                outcomes = [(await asyncio.gather(call, return_exceptions=True))[0] for call in calls]
                assert all(isinstance(outcome, SandboxError) for outcome in outcomes), outcomes
                return [str(outcome) for outcome in outcomes]

            with loop_in_a_thread() as run:
                said = await asyncio.to_thread(run, elsewhere())
            assert all("another event loop" in text for text in said), said
            assert (await client.execute(code="x")).success
            assert await manager.get_client("known") is client
            assert api.count("create") == 1
        assert api.objects == []


def test_shutting_down_again_in_another_loop_is_nothing_to_do() -> None:
    managers = [SandboxManager(SandboxManagerConfig(mode="multi")) for _ in range(2)]
    asyncio.run(started_and_shut_down(managers[0]))
    asyncio.run(managers[1].shutdown())
    for manager in managers:
        asyncio.run(manager.shutdown())


async def started_and_shut_down(manager: SandboxManager) -> None:
    await manager.start()
    await manager.shutdown()


def test_a_shutdown_under_way_is_waited_for_in_its_own_loop_only() -> None:
    api = FakeCustomObjectsApi(auto_ready=True)
    manager = SandboxManager(
        SandboxManagerConfig(mode="multi", shutdown_timeout=0.1),
        custom_objects_api=api,
        client_factory=lambda target: Healthy(target),
    )
    first = asyncio.new_event_loop()
    first.run_until_complete(manager.get_client("s"))
    api.faults.add("delete", latency=60.0)
    shutting_down = first.create_task(manager.shutdown())
    first.run_until_complete(asyncio.sleep(0))

    async def elsewhere() -> None:
        with pytest.raises(SandboxError, match="another event loop"):
            async with asyncio.timeout(PATIENCE):
                await manager.shutdown()

    asyncio.run(elsewhere())
    first.run_until_complete(shutting_down)
    first.run_until_complete(api.aclose())
    first.close()


class Healthy(SandboxClient):
    async def wait_for_healthy(self, timeout: float) -> bool:
        return True
