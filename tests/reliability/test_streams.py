"""A stream is cancelled at every point at which it waits, and nothing of it remains."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from prodisco_sandbox import SandboxClient, SandboxManager
from prodisco_sandbox.local import LocalCluster
from prodisco_sandbox.results import ExecutionChunk, ExecutionOutcome, ExecutionState
from prodisco_sandbox.testing import FakeSandboxServer
from tests.support.counts import count
from tests.support.patience import PATIENCE

OUTPUTS = 6
CODE = f"for number in range({OUTPUTS}): print(number, flush=True)"


class Steps:
    """Awaits something, and acts when it is suspended for the n-th time, and from then on."""

    def __init__(self, awaitable: Awaitable[Any], at: int, times: int, act: Callable[[], object]) -> None:
        self.taken = 0
        self._awaitable = awaitable
        self._when = range(at, at + times)
        self._act = act

    def __await__(self) -> Generator[Any, Any, Any]:
        inner: Any = self._awaitable.__await__()
        step, value = inner.send, None
        while True:
            try:
                awaited = step(value)
            except StopIteration as end:
                return end.value
            self.taken += 1
            if self.taken in self._when:
                self._act()
            try:
                step, value = inner.send, (yield awaited)
            except BaseException as e:
                step, value = inner.throw, e


async def iterate(client: SandboxClient) -> None:
    async for _ in client.execute_stream(code=CODE):
        pass


async def enter(client: SandboxClient) -> None:
    async with client.execute_stream(code=CODE) as stream:
        async for _ in stream:
            await asyncio.sleep(0)


async def use_in_parts(client: SandboxClient) -> None:
    stream = client.execute_stream(code=CODE)
    try:
        await anext(stream)
        await anext(stream)
    finally:
        await stream.aclose()


USES = [iterate, enter, use_in_parts]


@asynccontextmanager
async def fake() -> AsyncIterator[tuple[FakeSandboxServer, SandboxClient]]:
    done = ExecutionOutcome(success=True, state=ExecutionState.COMPLETED)
    chunks = [ExecutionChunk("e", "output", text=f"{number}\n") for number in range(OUTPUTS)]
    async with FakeSandboxServer() as server:
        server.script("ExecuteStream", [*chunks, ExecutionChunk("e", "result", result=done)])
        async with SandboxClient(server.target) as client:
            yield server, client


async def sweep(client: SandboxClient, use: Any, times: int, after: Callable[[], Awaitable[None]]) -> int:
    """Cancels at the first, the second, ... point; returns how many there were."""
    for at in itertools.count(1):

        async def cancelled(at: int = at) -> None:
            task = asyncio.current_task()
            assert task is not None
            await Steps(use(client), at, times, task.cancel)

        task = asyncio.create_task(cancelled(), name=f"cancelled-at-{at}")
        await asyncio.wait({task}, timeout=PATIENCE)
        assert task.done(), f"cancelling at point {at} makes it hang"
        if not task.cancelled():
            task.result()
            return at - 1
        assert client.in_flight == 0
        await after()
        count("cancellations of streams")
    raise AssertionError


@pytest.mark.parametrize("times", [1, 4])
@pytest.mark.parametrize("use", USES)
async def test_cancelled_at_every_point(use: Any, times: int) -> None:
    async with fake() as (server, client):

        async def over() -> None:
            async with asyncio.timeout(PATIENCE):
                for call in server.calls:
                    await call.ended.wait()

        points = await sweep(client, use, times, over)
        print(f"{points} points of {use.__name__} tried, {times} cancellations at each")
        assert points >= 2
        assert (await client.execute(code="x")).success


@pytest.mark.parametrize("use", USES)
async def test_in_a_scope_of_anyio_cancelled_at_every_point(use: Any) -> None:
    async with fake() as (_, client):
        for at in range(1, 100):
            with anyio.CancelScope() as scope:
                await Steps(use(client), at, 1, scope.cancel)
            assert client.in_flight == 0
            assert (await client.execute(code="x")).success
            if not scope.cancel_called:
                break  # it was over before
            count("cancellations of streams")
    assert 2 < at < 99


@pytest.mark.slow
@pytest.mark.parametrize("use", USES)
async def test_cancelled_at_every_point_on_a_real_server(use: Any) -> None:
    """The execution ends with its stream, the sandbox stays well, and is seen to be idle."""
    async with (
        LocalCluster() as cluster,
        SandboxManager(cluster.config(), custom_objects_api=cluster.custom_objects_api) as manager,
    ):
        client = await manager.get_client("s")

        async def over() -> None:
            async with asyncio.timeout(PATIENCE):
                while await client.list_executions(states=[ExecutionState.RUNNING, ExecutionState.PENDING]):
                    await asyncio.sleep(0.01)

        points = await sweep(client, use, 1, over)
        print(f"{points} points of {use.__name__} tried on a real server")
        assert points >= 2
        assert (await client.execute(code="print(1)")).output == "1\n"
        assert await manager.get_client("s") is client
