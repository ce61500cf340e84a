"""Health: both protocols, and waiting for it at start, after a restart and in vain."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from typing import Any

import grpc.aio
import pytest

from prodisco_sandbox.client import SandboxClient
from prodisco_sandbox.errors import SandboxError, SandboxTimeoutError, SandboxUnavailableError
from prodisco_sandbox.results import ExecutionResult, HealthStatus
from prodisco_sandbox.testing import NEVER, FakeSandboxServer, FakeStatus
from tests.support.patience import PATIENCE, put_forward, until


def asked(server: FakeSandboxServer) -> list[str]:
    return [call.rpc for call in server.calls]


def count_channels(monkeypatch: pytest.MonkeyPatch) -> list[grpc.aio.Channel]:
    """The channels that are made from now on."""
    made: list[grpc.aio.Channel] = []
    make = grpc.aio.insecure_channel

    def counted(*args: Any, **options: Any) -> grpc.aio.Channel:
        made.append(make(*args, **options))
        return made[-1]

    monkeypatch.setattr(grpc.aio, "insecure_channel", counted)
    return made


def note_deadlines(client: SandboxClient, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long each call of a health service may take, from now on.

    Not as the server sees it: gRPC rounds what it sends.
    """
    given: list[float] = []
    call = client._connection._call

    async def noted(rpc: str, request: Any, timeout: float) -> Any:
        given.append(timeout)
        return await call(rpc, request, timeout)

    monkeypatch.setattr(client._connection, "_call", noted)
    return given


async def waits_in_vain(
    client: SandboxClient, monkeypatch: pytest.MonkeyPatch, until_then: Callable[[], object]
) -> None:
    """Waits for a healthy server, until that holds and it is too late."""
    waiting = asyncio.create_task(client.wait_for_healthy(2 * PATIENCE))
    await until(until_then)
    assert not waiting.done()
    put_forward(monkeypatch, 2 * PATIENCE)
    async with asyncio.timeout(PATIENCE):
        assert await waiting is False


# One check


async def test_the_standard_service_is_asked_first(server: FakeSandboxServer, client: SandboxClient) -> None:
    assert await client.health_check() == HealthStatus(True)
    server.set_serving(False)
    assert await client.health_check() == HealthStatus(False)
    assert asked(server) == ["Check", "Check"]


async def test_the_servers_own_service_is_asked_where_it_has_no_other() -> None:
    async with FakeSandboxServer(health="own") as server, SandboxClient(server.target) as client:
        server.script("HealthCheck", HealthStatus(True, "kind-kind"), HealthStatus(False))
        assert await client.health_check() == HealthStatus(True, "kind-kind")
        assert await client.health_check() == HealthStatus(False)


async def test_that_the_standard_service_is_missing_is_remembered(
    server: FakeSandboxServer, client: SandboxClient
) -> None:
    server.script("Check", FakeStatus("UNIMPLEMENTED"))
    assert (await client.health_check()).healthy
    assert (await client.health_check()).healthy
    assert asked(server) == ["Check", "HealthCheck", "HealthCheck"]


async def test_a_server_without_any_health_service_is_an_error(
    server: FakeSandboxServer, client: SandboxClient
) -> None:
    for rpc in ("Check", "HealthCheck"):
        server.script(rpc, FakeStatus("UNIMPLEMENTED"))
    with pytest.raises(SandboxError, match="UNIMPLEMENTED") as caught:
        await client.health_check()
    assert caught.value.status == "UNIMPLEMENTED"


async def test_one_check_has_one_deadline_over_both_services(
    server: FakeSandboxServer, client: SandboxClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    given = note_deadlines(client, monkeypatch)

    async def slow(request: Any) -> FakeStatus:
        await asyncio.sleep(0.1)
        return FakeStatus("UNIMPLEMENTED")

    server.script("Check", slow)
    begun = loop.time()
    await client.health_check(timeout=PATIENCE)
    took = loop.time() - begun
    assert given[0] == PATIENCE
    assert PATIENCE - took < given[1] < PATIENCE - 0.09
    assert asked(server) == ["Check", "HealthCheck"]


async def test_a_check_that_fails_otherwise_does_not_fall_back(
    server: FakeSandboxServer, client: SandboxClient
) -> None:
    server.script("Check", FakeStatus("UNAVAILABLE"))
    with pytest.raises(SandboxUnavailableError):
        await client.health_check()
    assert asked(server) == ["Check"]


# Waiting


async def test_waiting_for_a_healthy_server_is_one_call(
    server: FakeSandboxServer, client: SandboxClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = count_channels(monkeypatch)
    assert await client.wait_for_healthy(PATIENCE)
    assert client.health_error is None
    assert await client.wait_for_healthy(PATIENCE)
    assert (asked(server), len(made)) == (["Check", "Check"], 1)


async def test_waiting_asks_again_soon_until_the_server_is_healthy(
    server: FakeSandboxServer, client: SandboxClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = count_channels(monkeypatch)
    server.script(
        "Check", HealthStatus(False), FakeStatus("INTERNAL"), HealthStatus(False), HealthStatus(True)
    )
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def noted(seconds: float) -> None:
        pauses.append(seconds)
        await sleep(seconds)

    monkeypatch.setattr(asyncio, "sleep", noted)
    assert await client.wait_for_healthy(PATIENCE)
    assert pauses == [0.01, 0.02, 0.04]
    assert (len(server.calls), len(made)) == (4, 1)
    assert client.health_error is None


async def test_waiting_in_vain_says_why(
    server: FakeSandboxServer, client: SandboxClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.set_serving(False)
    await waits_in_vain(client, monkeypatch, lambda: client.health_error)
    assert str(client.health_error) == f"{server.target} answers that it is unhealthy"
    await server.kill()

    def has_failed() -> bool:
        return client.health_error is not None and client.health_error.status is not None

    await waits_in_vain(client, monkeypatch, has_failed)
    assert isinstance(client.health_error, SandboxUnavailableError)
    assert client.health_error.status == "UNAVAILABLE"


@pytest.mark.parametrize("timeout", [0, -1.5, 1e-12, float("nan")])
async def test_no_time_to_wait_is_no(
    server: FakeSandboxServer, client: SandboxClient, timeout: float
) -> None:
    assert await client.wait_for_healthy(timeout) is False
    assert server.calls == []


async def test_a_server_that_never_answers_does_not_hold_the_wait(
    server: FakeSandboxServer, client: SandboxClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.script("Check", NEVER)
    await waits_in_vain(client, monkeypatch, lambda: server.calls)
    server.script("Check", NEVER, HealthStatus(True))
    given = note_deadlines(client, monkeypatch)
    loop = asyncio.get_running_loop()
    started = loop.time()
    assert await client.wait_for_healthy(PATIENCE)
    assert loop.time() - started > 0.9
    assert given[:2] == [1, 2]


async def test_a_port_that_accepts_and_says_nothing_does_not_hold_the_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.setblocking(False)
        accepted: list[socket.socket] = []

        def accept() -> bool:
            with contextlib.suppress(BlockingIOError):
                accepted.append(silent.accept()[0])
            return bool(accepted)

        async with SandboxClient(f"127.0.0.1:{silent.getsockname()[1]}") as client:
            await waits_in_vain(client, monkeypatch, accept)
        for connection in accepted:
            connection.close()


async def test_cancelling_the_wait_cancels_the_check(
    server: FakeSandboxServer, client: SandboxClient
) -> None:
    server.script("Check", NEVER)
    task = asyncio.create_task(client.wait_for_healthy(PATIENCE))
    call = await server.wait_for_call("Check")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(call.ended.wait(), PATIENCE)
    assert call.outcome == "cancelled"


async def test_a_server_that_comes_up_is_noticed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async with FakeSandboxServer() as server:
        await server.kill()
        async with SandboxClient(server.target) as client:
            made = count_channels(monkeypatch)
            waiting = asyncio.create_task(client.wait_for_healthy(PATIENCE))
            async with asyncio.timeout(PATIENCE):
                while len(made) < 4:  # Each attempt connects at once, whatever gRPC's backoff.
                    await asyncio.sleep(0.001)
            assert isinstance(client.health_error, SandboxUnavailableError)
            await server.start()
            assert await waiting


async def test_a_channel_with_a_call_on_it_is_not_replaced(
    server: FakeSandboxServer, client: SandboxClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.script("Execute", NEVER)
    server.script("ExecuteStream", NEVER)
    connection = client._connection  # `renew` is what `wait_for_healthy` does, without its pauses.
    task = asyncio.create_task(client.execute(code="x"))
    await server.wait_for_call("Execute")
    channel = connection.channel.grpc_channel
    # As if the connection were lost: what counts is that the channel is in use.
    monkeypatch.setattr(type(channel), "get_state", lambda self: None)
    await connection.renew()
    assert connection.channel.grpc_channel is channel
    task.cancel()
    await asyncio.wait([task])
    async with client.execute_stream(code="x"):
        await connection.renew()
        assert connection.channel.grpc_channel is channel
    await connection.renew()
    await connection.renew()
    assert (await client.health_check()).healthy
    assert connection.channel.grpc_channel is not channel


async def test_a_server_that_is_restarted_is_reached_within_a_second(
    server: FakeSandboxServer, client: SandboxClient
) -> None:
    server.script("Execute", ExecutionResult(True, "42\n"))
    assert (await client.execute(code="x")).success
    loop = asyncio.get_running_loop()

    async def restart() -> float:
        """How long it is not reached."""
        await server.kill()
        for _ in range(3):
            with pytest.raises(SandboxUnavailableError):
                await client.execute(code="x")
            await asyncio.sleep(0.05)
        await server.start()
        started = loop.time()
        while True:
            try:
                assert (await client.execute(code="x")).output == "42\n"
                return loop.time() - started
            except SandboxUnavailableError:
                await asyncio.sleep(0.01)

    # Mostly a tenth of it; but this machine itself may be away for a while.
    async with asyncio.timeout(PATIENCE):
        while await restart() > 1:
            pass


async def test_a_new_client_does_not_inherit_the_backoff_of_an_old_one() -> None:
    async with FakeSandboxServer() as server:
        await server.kill()
        async with SandboxClient(server.target) as old, SandboxClient(server.target) as new:
            for _ in range(3):
                with pytest.raises(SandboxUnavailableError):
                    await old.execute(code="x")
            await server.start()
            assert (await new.execute(code="x")).success


async def test_a_proxy_in_the_environment_is_not_used(
    server: FakeSandboxServer, client: SandboxClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert (await client.execute(code="x")).success


async def test_what_an_earlier_wait_met_is_not_said_of_a_later_one(
    server: FakeSandboxServer, client: SandboxClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.set_serving(False)
    await waits_in_vain(client, monkeypatch, lambda: client.health_error)
    assert isinstance(client.health_error, SandboxUnavailableError)
    server.script("Check", NEVER)
    assert await client.wait_for_healthy(0.1) is False
    assert isinstance(client.health_error, SandboxTimeoutError)
    assert str(client.health_error) == f"no answer from {server.target}"


async def test_answers_to_health_checks_wait_for_their_turn(
    server: FakeSandboxServer, client: SandboxClient
) -> None:
    turns: list[str] = []

    async def turn() -> None:
        turns.append("a turn")

    client._connection.pace = turn  # As a manager shares one among its clients.
    server.script("Execute", ExecutionResult(success=True, output=""))
    await client.execute(code="x")
    assert turns == []
    assert (await client.health_check()).healthy
    assert await client.wait_for_healthy(PATIENCE)
    assert len(turns) == 2
