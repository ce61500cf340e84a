"""What the tests of the client's calls have in common."""

from __future__ import annotations

import asyncio

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
