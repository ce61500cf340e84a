"""How long calls that wait for code may take: their time counts from where the code begins."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Self

import pytest

from prodisco_sandbox.client import SandboxClient
from prodisco_sandbox.errors import SandboxError, SandboxTimeoutError, SandboxUnavailableError
from prodisco_sandbox.proto import sandbox_pb2 as pb
from prodisco_sandbox.results import (
    ExecutionChunk,
    ExecutionResult,
    ExecutionState,
    ExecutionStatus,
    HealthStatus,
    StartedExecution,
)
from prodisco_sandbox.testing import NEVER, FakeSandboxServer
from tests.support.fake_servers import END, OUTCOME, SOME
from tests.support.patience import PATIENCE, put_forward, until

DONE = ExecutionStatus("e", ExecutionState.COMPLETED, result=OUTCOME)
LIMIT = 1.05
"""Seconds for code, margin included, with the clients below."""


class Setup:
    """A server, a client of it, and how often that was suspect."""

    def __init__(self, *, queues: bool = True, beat: float | None = None) -> None:
        self.server = FakeSandboxServer(queues=queues)
        self.suspected = 0
        self._beat = beat

    async def __aenter__(self) -> Self:
        await self.server.start()
        self.client = Brisk(self.server.target, call_timeout=PATIENCE, deadline_margin=LIMIT - 1)
        self.client.on_suspect = self._suspect
        if self._beat is not None:
            self.client._connection.beat = self._beat  # A setting that no caller needs.
        return self

    def _suspect(self) -> None:
        self.suspected += 1

    async def __aexit__(self, *_: object) -> None:
        await self.client.close()
        await self.server.kill()

    def hold(self, answer: Any, rpc: str) -> asyncio.Event:
        """Has calls wait for the event that is returned, and then get this answer."""
        free = asyncio.Event()

        async def held(request: object) -> Any:
            await free.wait()
            return answer

        self.server.script(rpc, held)
        return free


class Brisk(SandboxClient):
    """Takes it that no code of a server may run longer than a second."""

    _greatest_timeout = 1.0


@pytest.fixture
def beat() -> float | None:
    """Seconds of silence before a server is asked for its health; None: as usual."""
    return None


quick = pytest.mark.parametrize("beat", [0.25])


@pytest.fixture
async def queue(beat: float | None) -> AsyncIterator[Setup]:
    async with Setup(beat=beat) as setup:
        yield setup


@pytest.fixture
async def mute(beat: float | None) -> AsyncIterator[Setup]:
    """Its server does not say when code begins."""
    async with Setup(queues=False, beat=beat) as setup:
        yield setup


async def _chunks(client: SandboxClient) -> list[ExecutionChunk]:
    return [chunk async for chunk in client.execute_stream(code="x", timeout=1)]


CALLS: dict[str, tuple[str, Any, Callable[[SandboxClient], Awaitable[Any]]]] = {
    "execute": ("Execute", ExecutionResult(True), lambda c: c.execute(code="x", timeout=1)),
    "execute_stream": ("ExecuteStream", [SOME, END], _chunks),
    "execute_test": (
        "ExecuteTest",
        pb.ExecuteTestResponse(success=True),
        lambda c: c.execute_test(tests="x", timeout=1),
    ),
    "get_execution": ("GetExecution", DONE, lambda c: c.get_execution("e", wait=True)),
    "wait_for_execution": ("GetExecution", DONE, lambda c: c.wait_for_execution("e")),
}


@pytest.mark.parametrize("asked", [False, True], ids=["first call", "later call"])
async def test_a_call_lasts_however_long_it_is_queued(queue: Setup, asked: bool) -> None:
    held = [queue.hold(answer, rpc) for rpc, answer, _ in CALLS.values()]
    if asked:
        await queue.client.health_check()
    calls = [asyncio.ensure_future(call(queue.client)) for _, _, call in CALLS.values()]
    done, _ = await asyncio.wait(calls, timeout=2 * LIMIT, return_when=asyncio.FIRST_COMPLETED)
    assert not done, done
    assert queue.client.in_flight == len(calls)
    for free in held:
        free.set()
    results = await asyncio.gather(*calls)
    assert results[0] == ExecutionResult(True)
    assert results[1] == [SOME, END]
    assert results[2].success
    assert results[3:] == [DONE, DONE]
    assert (queue.suspected, queue.client.in_flight) == (0, 0)


@pytest.mark.parametrize("asked", [False, True], ids=["first call", "later call"])
async def test_code_that_has_begun_has_its_time_and_no_more(queue: Setup, asked: bool) -> None:
    queue.server.script("ExecuteStream", [SOME, NEVER])
    if asked:
        await queue.client.health_check()
    loop = asyncio.get_running_loop()
    begun = loop.time()
    stream = queue.client.execute_stream(code="x", timeout=1)
    assert await anext(stream) == SOME
    with pytest.raises(SandboxTimeoutError, match=r"DEADLINE_EXCEEDED: the code had 1.05 s") as caught:
        await anext(stream)
    assert caught.value.status == "DEADLINE_EXCEEDED"
    assert loop.time() - begun >= LIMIT
    call = await queue.server.wait_for_call("ExecuteStream")
    await call.ended.wait()
    assert call.outcome == "cancelled"
    assert queue.suspected == 0, "it is well: it answers health checks"


@pytest.mark.parametrize("asked", [False, True], ids=["first call", "later call"])
@pytest.mark.parametrize("name", CALLS)
async def test_of_a_server_that_does_not_say_the_time_counts_from_the_call(
    mute: Setup, name: str, asked: bool
) -> None:
    rpc, _, call = CALLS[name]
    mute.server.script(rpc, NEVER)
    if asked:
        await mute.client.health_check()
    with pytest.raises(SandboxTimeoutError):
        async with asyncio.timeout(PATIENCE):
            await call(mute.client)
    assert mute.suspected == 0, "it is busy, and answers health checks"


@quick
@pytest.mark.parametrize("asked", [False, True], ids=["first call", "later call"])
async def test_who_is_late_and_answers_no_health_check_is_suspect(mute: Setup, asked: bool) -> None:
    mute.server.script("Execute", NEVER)
    if asked:
        await mute.client.health_check()
    mute.server.script("Check", NEVER)
    with pytest.raises(SandboxTimeoutError):
        await mute.client.execute(code="x", timeout=1)
    assert mute.suspected == 1


async def test_a_server_that_no_longer_says_when_code_begins(queue: Setup) -> None:
    """What a client knows of a server is what its last answer says."""
    await queue.client.health_check()
    await queue.server.kill()
    queue.server = FakeSandboxServer(port=int(queue.server.target.rpartition(":")[2]))
    await queue.server.start()
    async with asyncio.timeout(PATIENCE):
        assert await queue.client.wait_for_healthy(PATIENCE)
        queue.server.script("Execute", NEVER)
        with pytest.raises(SandboxTimeoutError):
            await queue.client.execute(code="x", timeout=1)


# Servers that are stuck


@quick
async def test_a_queued_call_of_a_stuck_server_is_given_up(queue: Setup) -> None:
    for rpc in ("Execute", "GetExecution"):
        queue.server.script(rpc, NEVER)
    await queue.client.health_check()
    queue.server.script("Check", NEVER)
    calls = (
        queue.client.execute(code="x", timeout=100),
        queue.client.wait_for_execution("e", timeout=100),
    )
    async with asyncio.timeout(PATIENCE):
        errors = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(error) for error in errors] == [SandboxUnavailableError] * 2
    assert "the server does not answer health checks" in str(errors[0])
    assert queue.suspected == 2


@quick
async def test_a_call_whose_code_runs_on_a_stuck_server_is_given_up(queue: Setup) -> None:
    queue.server.script("ExecuteStream", [SOME, NEVER])
    stream = queue.client.execute_stream(code="x", timeout=100)
    assert await anext(stream) == SOME
    queue.server.script("Check", NEVER)
    async with asyncio.timeout(PATIENCE):
        with pytest.raises(SandboxUnavailableError, match="does not answer health checks"):
            await anext(stream)
    assert queue.suspected == 1


@quick
async def test_one_health_check_without_an_answer_is_no_reason(queue: Setup) -> None:
    free = queue.hold(ExecutionResult(True), "Execute")
    await queue.client.health_check()
    # Three times without an answer are one miss.
    queue.server.script("Check", *(NEVER, NEVER, NEVER, HealthStatus(True)) * 3, HealthStatus(True))
    call = asyncio.ensure_future(queue.client.execute(code="x"))
    await queue.server.wait_for_call("Check", count=14)
    free.set()
    assert await call == ExecutionResult(True)
    assert queue.suspected == 0


@quick
async def test_whatever_a_server_says_of_its_health_it_is_not_stuck(queue: Setup) -> None:
    queue.server.script("Execute", NEVER)
    queue.server.set_serving(False)
    call = asyncio.ensure_future(queue.client.execute(code="x"))
    await queue.server.wait_for_call("Check", count=6)
    assert not call.done()
    call.cancel()
    await asyncio.wait({call})


@quick
async def test_a_frozen_server_that_does_not_say_when_code_begins_is_left_its_time(mute: Setup) -> None:
    """Code that never lets go keeps the stock Node server from answering anything."""
    free = mute.hold(ExecutionResult(True), "Execute")
    await mute.client.health_check()
    mute.server.script("Check", NEVER)
    call = asyncio.ensure_future(mute.client.execute(code="x", timeout=100))
    await mute.server.wait_for_call("Check", count=8)
    free.set()
    assert await call == ExecutionResult(True)
    assert mute.suspected == 0


@quick
async def test_many_calls_share_the_health_checks(queue: Setup) -> None:
    queue.server.script("Execute", NEVER)
    await queue.client.health_check()
    calls = [asyncio.ensure_future(queue.client.execute(code="x")) for _ in range(50)]
    await queue.server.wait_for_call("Execute", count=50)
    loop = asyncio.get_running_loop()
    begun, before = loop.time(), len(queue.server.calls)
    await until(lambda: loop.time() > begun + 1)
    beats = (loop.time() - begun) / 0.25 + 1
    assert len(queue.server.calls) - before <= 3 * beats, "it is asked three times at most"
    for call in calls:
        call.cancel()
    await asyncio.wait(calls)


# Streams


async def test_the_time_that_a_reader_takes_does_not_count(queue: Setup) -> None:
    chunks = [ExecutionChunk("e", "output", str(n) * 100_000) for n in range(9)] + [END]
    queue.server.script("ExecuteStream", chunks)
    await queue.client.health_check()
    stream = queue.client.execute_stream(code="x", timeout=1)
    read = [await anext(stream)]
    for _ in range(2):
        await asyncio.sleep(0.7)
        read.append(await anext(stream))
    assert read + [chunk async for chunk in stream] == chunks
    assert queue.suspected == 0


async def test_a_server_that_dribbles_is_not_given_more_time(queue: Setup) -> None:
    async def dribble(request: object) -> AsyncIterator[ExecutionChunk]:
        while True:
            yield SOME
            await asyncio.sleep(0.01)

    queue.server.script("ExecuteStream", dribble)
    with pytest.raises(SandboxTimeoutError):
        async with asyncio.timeout(PATIENCE):
            await _chunks(queue.client)


async def test_a_stream_that_nobody_reads_ends_once_its_code_has_begun(
    queue: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = asyncio.Event()
    queue.server.script("ExecuteStream", [free, *[ExecutionChunk("e", "output", "x" * 1_000_000)] * 9, NEVER])
    await queue.client.health_check()
    async with queue.client.execute_stream(code="x", timeout=1) as stream:
        loop = asyncio.get_running_loop()
        entered = loop.time()
        await until(lambda: loop.time() > entered + 1.5 * LIMIT)
        assert queue.client.in_flight == 1, "it is queued"
        free.set()
        await until(lambda: queue.client.in_flight == 0)
        with pytest.raises(SandboxTimeoutError):
            await anext(stream)


# Asynchronous executions


async def test_a_queued_asynchronous_execution_counts_until_it_has_had_its_time(queue: Setup) -> None:
    queue.server.script("ExecuteAsync", StartedExecution("e", ExecutionState.PENDING))
    free = queue.hold(DONE, "GetExecution")
    loop = asyncio.get_running_loop()
    started = loop.time()
    await queue.client.execute_async(code="x", timeout=1)
    call = await queue.server.wait_for_call("GetExecution")
    assert call.request.wait
    await until(lambda: loop.time() > started + 1.5 * LIMIT)
    assert queue.client.in_flight == 1
    begun = loop.time()
    free.set()
    await until(lambda: queue.client.in_flight == 0)
    assert loop.time() - begun >= LIMIT
    assert queue.client.last_used >= begun + LIMIT


async def test_an_execution_that_runs_at_once_counts_from_there(queue: Setup) -> None:
    queue.server.script("ExecuteAsync", StartedExecution("e", ExecutionState.RUNNING))
    await queue.client.execute_async(code="x", timeout=1)
    await until(lambda: queue.client.in_flight == 0)
    assert [call.rpc for call in queue.server.calls] == ["ExecuteAsync"]


@quick
async def test_a_queued_execution_is_forgotten_with_its_server(queue: Setup) -> None:
    queue.server.script("ExecuteAsync", StartedExecution("e", ExecutionState.PENDING))
    queue.server.script("GetExecution", NEVER)
    await queue.client.execute_async(code="x", timeout=1)
    await queue.server.wait_for_call("GetExecution")
    await queue.server.kill()
    await until(lambda: queue.client.in_flight == 0)


async def test_waiting_goes_on_while_a_server_that_cuts_polls_short_says_pending(
    mute: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    pending = ExecutionStatus("e", ExecutionState.PENDING)

    def late(request: object) -> ExecutionStatus:
        put_forward(monkeypatch, 50)
        return pending

    mute.server.script("GetExecution", late, late, pending, DONE)
    assert await mute.client.wait_for_execution("e") == DONE


async def test_closing_ends_what_is_queued(queue: Setup) -> None:
    queue.server.script("ExecuteAsync", StartedExecution("e", ExecutionState.PENDING))
    for rpc in ("Execute", "GetExecution", "ExecuteStream"):
        queue.server.script(rpc, NEVER)
    await queue.client.execute_async(code="x")
    calls = (queue.client.execute(code="x"), _chunks(queue.client), queue.client.wait_for_execution("e"))
    waiting = [asyncio.ensure_future(call) for call in calls]
    await queue.server.wait_for_call("GetExecution", count=2)
    await queue.client.close()
    for call in waiting:
        with pytest.raises(SandboxError, match="the client was closed meanwhile"):
            await call
    assert queue.client.in_flight == 0
    assert queue.suspected == 0
