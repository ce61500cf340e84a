"""What the server says of its queue, and that clients notice when it is stuck."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from prodisco_sandbox import SandboxClient
from prodisco_sandbox.errors import SandboxError, SandboxUnavailableError
from prodisco_sandbox.proto import sandbox_pb2 as pb
from prodisco_sandbox.results import ExecutionState
from tests.support.patience import PATIENCE, until
from tests.support.servers import Server, running

SLEEP = "import time; time.sleep(60)"


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("queue"), "--max-concurrent", "1") as server:
        yield server


@pytest.fixture
async def client(one_by_one: Server) -> AsyncIterator[SandboxClient]:
    async with SandboxClient(one_by_one.target) as client:
        yield client


async def some(client: SandboxClient, state: ExecutionState) -> bool:
    return bool(await client.list_executions(states=[state]))


RPCS: dict[str, tuple[type[Any], Any]] = {
    "Execute": (pb.ExecuteResponse, pb.ExecuteRequest(code="1")),
    "ExecuteStream": (pb.ExecuteChunk, pb.ExecuteRequest(code="1")),
    "ExecuteTest": (pb.ExecuteTestResponse, pb.ExecuteTestRequest(tests="")),
    "GetExecution": (pb.GetExecutionResponse, pb.GetExecutionRequest(wait=True)),
}


@pytest.mark.parametrize("rpc", RPCS)
async def test_the_initial_metadata_come_when_the_code_begins(
    one_by_one: Server, client: SandboxClient, rpc: str
) -> None:
    blocker = await client.execute_async(code=SLEEP, timeout=60)
    response, request = RPCS[rpc]
    if rpc == "GetExecution":
        request.execution_id = (await client.execute_async(code="1")).execution_id
    async with one_by_one.channel() as channel:
        # As of a stream, of which gRPC tells the metadata at once.
        call: Any = channel.unary_stream(
            f"/prodisco.sandbox.v1.SandboxService/{rpc}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=response.FromString,
        )(request)
        metadata = asyncio.ensure_future(call.initial_metadata())
        await until(lambda: some(client, ExecutionState.PENDING))
        await client.health_check()
        assert not metadata.done()
        assert (await client.cancel_execution(blocker.execution_id)).success
        assert "queue" in dict(iter(await metadata))["prodisco-features"].split(",")
        answers = [answer async for answer in call]
        assert answers
        assert isinstance(answers[0], response)


async def test_every_answer_says_that_it_does(one_by_one: Server) -> None:
    async with one_by_one.connect() as stub:
        call = stub.HealthCheck(pb.HealthCheckRequest())
        assert "queue" in str(dict(iter(await call.initial_metadata()))["prodisco-features"]).split(",")


async def test_what_is_refused_says_so_too(tmp_path: Path) -> None:
    with running(tmp_path, "--max-concurrent", "1", "--max-queued", "0") as server:
        async with SandboxClient(server.target) as client, server.connect() as stub:
            await client.execute_async(code=SLEEP, timeout=60)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Execute(pb.ExecuteRequest(code="1"))
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "queue" in str(dict(iter(caught.value.initial_metadata()))["prodisco-features"])


async def test_a_queued_asynchronous_execution_is_in_flight(one_by_one: Server) -> None:
    async with SandboxClient(one_by_one.target, deadline_margin=0.5) as client:
        blocker = await client.execute_async(code=SLEEP, timeout=60)
        queued = await client.execute_async(code="1", timeout=1)
        assert queued.state is ExecutionState.PENDING
        assert client.in_flight == 2
        await client.cancel_execution(blocker.execution_id)
        await until(lambda: client.in_flight == 0)  # Though nobody has asked about it.
        ended = await client.get_execution(queued.execution_id, wait=True)
        assert ended.state is ExecutionState.COMPLETED


# Servers that are gone or stuck


WAITS: dict[str, Callable[[SandboxClient], Awaitable[Any]]] = {
    "execute": lambda c: c.execute(code=SLEEP, timeout=60),
    "execute_stream": lambda c: anext(c.execute_stream(code=SLEEP, timeout=60)),
}


@pytest.mark.parametrize("name", ["execute", pytest.param("execute_stream", marks=pytest.mark.slow)])
@pytest.mark.parametrize("queued", [False, True], ids=["running", "queued"])
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL], ids=["stuck", "gone"])
async def test_a_server_that_is_stuck_or_gone_is_noticed(
    tmp_path: Path, name: str, queued: bool, number: signal.Signals
) -> None:
    with running(tmp_path, "--max-concurrent", "1") as server:
        suspected: list[bool] = []
        async with SandboxClient(server.target) as client:
            client._connection.beat = 0.5
            client.on_suspect = lambda: suspected.append(True)
            if queued:
                await client.execute_async(code=SLEEP, timeout=60)
            waiting = asyncio.ensure_future(WAITS[name](client))
            await until(lambda: some(client, ExecutionState.PENDING if queued else ExecutionState.RUNNING))
            os.kill(server.pid, number)
            try:
                # Long before the code has had its time.
                async with asyncio.timeout(50):
                    with pytest.raises(SandboxUnavailableError):
                        await waiting
            finally:
                if number is signal.SIGSTOP:
                    os.kill(server.pid, signal.SIGCONT)
                else:
                    server.wait()
            assert suspected


async def test_a_busy_server_is_not_stuck(one_by_one: Server) -> None:
    suspected: list[bool] = []
    async with SandboxClient(one_by_one.target, deadline_margin=PATIENCE) as client:
        client._connection.beat = 1.0
        client.on_suspect = lambda: suspected.append(True)
        blocker = await client.execute_async(code=SLEEP, timeout=60)
        waiting = [asyncio.ensure_future(client.execute(code="1")) for _ in range(10)]
        await until(lambda: some(client, ExecutionState.PENDING))
        await asyncio.sleep(2.5)  # Health checks enough to give up a stuck one.
        assert not any(call.done() for call in waiting)
        await client.cancel_execution(blocker.execution_id)
        await asyncio.gather(*waiting)
        assert suspected == []


async def test_an_unknown_execution_is_no_queue(client: SandboxClient) -> None:
    with pytest.raises(SandboxError) as caught:
        await client.wait_for_execution("unknown")
    assert caught.value.status == "NOT_FOUND"
