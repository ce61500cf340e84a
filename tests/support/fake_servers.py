"""Answers and calls of a FakeSandboxServer, and its end and new start, which a client notices."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from prodisco_sandbox import SandboxClient, SandboxUnavailableError
from prodisco_sandbox.results import ExecutionChunk, ExecutionOutcome, ExecutionState
from prodisco_sandbox.testing import FakeSandboxServer
from tests.support.patience import PATIENCE

OUTCOME = ExecutionOutcome(True, ExecutionState.COMPLETED)
SOME = ExecutionChunk("e-1", "output", "some\n")
END = ExecutionChunk("e-1", "result", result=OUTCOME)


async def ended(server: FakeSandboxServer, rpc: str, count: int = 1) -> str:
    """Waits for the end of a call on the server; returns its outcome."""
    call = await server.wait_for_call(rpc, count=count)
    async with asyncio.timeout(PATIENCE):
        await call.ended.wait()
    return call.outcome


async def restart(server: FakeSandboxServer, **changes: Any) -> None:
    """Another machine at the same address."""
    await server.kill()
    for name, value in changes.items():
        setattr(server, name, value)
    await server.start()
    server.calls.clear()


async def reached(call: Callable[[], Awaitable[Any]]) -> Any:
    """A call that gets to the server: not one that finds its old connection broken."""
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                return await call()
            except SandboxUnavailableError:
                await asyncio.sleep(0.01)


async def broken(client: SandboxClient) -> None:
    """Waits until the channel has noticed that its connection is broken."""
    channel = client._connection.channel.grpc_channel  # Calls would connect anew.
    assert channel is not None
    async with asyncio.timeout(PATIENCE):
        while (state := channel.get_state()) is grpc.ChannelConnectivity.READY:
            await channel.wait_for_state_change(state)
