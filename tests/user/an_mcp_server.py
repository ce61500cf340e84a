"""A user's program, for type checkers: it is not run. `make typing` checks it against the wheel."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import assert_type

from mcp.server import MCPServer
from mcp.server.mcpserver import Context

from prodisco_sandbox import (
    CancelResult,
    ExecutionChunk,
    ExecutionInfo,
    ExecutionResult,
    ExecutionState,
    ExecutionStatus,
    FileInfo,
    HealthStatus,
    SandboxCapacityError,
    SandboxClient,
    SandboxError,
    SandboxManager,
    SandboxManagerConfig,
    SandboxManagerStats,
    SandboxRef,
    SandboxReplacedError,
    StartedExecution,
    TestReport,
    TlsConfig,
)
from prodisco_sandbox.local import LocalCluster
from prodisco_sandbox.mcp import add_sandbox_tools, sandbox_lifespan
from prodisco_sandbox.testing import FakeCustomObjectsApi, FakeSandboxServer

config = SandboxManagerConfig(
    mode="multi",
    namespace="prodisco",
    max_sessions=50,
    on_idle="suspend",
    workspace_storage="1Gi",
    tls=TlsConfig(ca="/tls/ca.crt", server_name="sandbox.prodisco.svc"),
)
manager = SandboxManager(config)


@asynccontextmanager
async def lifespan(server: MCPServer[None]) -> AsyncGenerator[None]:
    async with sandbox_lifespan(manager)(server):
        yield


server = MCPServer[None]("my-server", lifespan=lifespan)
add_sandbox_tools(server, manager, language="Python")


@server.tool()
async def double(number: int, ctx: Context[None]) -> str:
    client = assert_type(await manager.get_client("session", owner="me"), SandboxClient)
    try:
        result = assert_type(await client.execute(f"print(2 * {number})", timeout=5), ExecutionResult)
    except SandboxReplacedError as error:
        return "again" if not error.ran else "lost"
    except SandboxCapacityError as error:
        return f"{error.status}"
    except SandboxError:
        return "broken"
    return result.output if result.success else f"{result.error}"


async def everything_a_client_does(client: SandboxClient) -> None:
    started = assert_type(await client.execute_async("print(1)"), StartedExecution)
    status = assert_type(await client.wait_for_execution(started.execution_id), ExecutionStatus)
    assert_type(status.state, ExecutionState)
    assert_type(await client.cancel_execution(started.execution_id), CancelResult)
    assert_type(await client.list_executions(), tuple[ExecutionInfo, ...])
    assert_type(await client.execute_test(tests="", code=""), TestReport)
    assert_type(await client.health_check(), HealthStatus)
    async with client.execute_stream("print(1)") as stream:
        async for chunk in stream:
            assert_type(chunk, ExecutionChunk)
    await client.files.write("a.txt", b"hello")
    assert_type(await client.files.read("a.txt"), bytes)
    assert_type(await client.files.stat("a.txt"), FileInfo)
    assert_type(client.sandbox, SandboxRef | None)


async def tests_of_ones_own() -> None:
    async with FakeSandboxServer() as double_server, FakeCustomObjectsApi(auto_ready=True) as api:
        api.faults.add("create", lost=True, times=1)
        fake = SandboxManagerConfig(mode="multi", endpoint=lambda sandbox: double_server.target)
        async with SandboxManager(fake, custom_objects_api=api) as tried, tried.session("s") as client:
            await everything_a_client_does(client)
            assert_type(tried.stats(), SandboxManagerStats)
    async with LocalCluster(warm=1) as cluster:
        SandboxManager(cluster.config(max_sessions=5), custom_objects_api=cluster.custom_objects_api)
