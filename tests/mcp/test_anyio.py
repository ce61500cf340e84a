"""The client under anyio, whose cancel scopes an MCP server consists of."""

from __future__ import annotations

import anyio
import pytest

from prodisco_sandbox import SandboxClient
from prodisco_sandbox.testing import NEVER, FakeSandboxServer
from tests.support.patience import PATIENCE


@pytest.mark.parametrize("rpc", ["ExecuteTest", "ExecuteStream"])
async def test_a_cancel_scope_knows_its_own_cancellation_when_it_comes_out_of_a_call(rpc: str) -> None:
    async with FakeSandboxServer() as server, SandboxClient(server.target) as client:
        scope = anyio.CancelScope()

        def arrived(request: object) -> object:
            scope.cancel()
            return [NEVER] if rpc == "ExecuteStream" else NEVER

        server.script(rpc, arrived)
        with scope:
            if rpc == "ExecuteTest":
                await client.execute_test(tests="x")
            else:
                async with client.execute_stream(code="x") as stream:
                    await anext(stream)
        assert scope.cancelled_caught
        with anyio.fail_after(PATIENCE):
            await (await server.wait_for_call(rpc)).ended.wait()
        assert server.calls[-1].outcome == "cancelled"
        server.script(rpc, [NEVER] if rpc == "ExecuteStream" else NEVER)
        with pytest.raises(TimeoutError), anyio.fail_after(0.05):
            await client.execute_test(tests="x") if rpc == "ExecuteTest" else await anyio.sleep(1)
