"""An MCP server of one's own, whose sessions each have a sandbox to run code in.

`python examples/mcp_server.py` serves streamable HTTP at http://127.0.0.1:8000/mcp; the
sandboxes are pods on Kubernetes, as the SANDBOX_* variables say. For a server that has
nothing but sandboxes, and can also do without a cluster, there is `prodisco-sandbox-mcp`.
"""

from __future__ import annotations

from typing import Any

from mcp.server import MCPServer
from mcp.server.mcpserver import Context

from prodisco_sandbox import SandboxManager, SandboxManagerConfig
from prodisco_sandbox.mcp import add_sandbox_tools, sandbox_lifespan

manager = SandboxManager(SandboxManagerConfig.from_env(mode="multi"))
server = MCPServer("my-server", lifespan=sandbox_lifespan(manager))
add_sandbox_tools(server, manager)


@server.tool()
async def sandboxes(ctx: Context[Any, Any]) -> str:
    """How many sandboxes are in use: any tool may use the manager."""
    stats = manager.stats()
    return f"{stats.ready} are ready, {stats.creating} are being made"


if __name__ == "__main__":
    server.run("streamable-http")
