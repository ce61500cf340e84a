"""openai-agents."""

from contextlib import asynccontextmanager

from agents.mcp import MCPServerStdio, MCPServerStreamableHttp
from steps import COMMAND, ENV, TOOL, URL, Client, main


@asynccontextmanager
async def connect():
    server = (
        MCPServerStreamableHttp(params={"url": URL}, client_session_timeout_seconds=60)
        if URL
        else MCPServerStdio(
            params={"command": COMMAND[0], "args": COMMAND[1:], "env": ENV}, client_session_timeout_seconds=60
        )
    )
    async with server:

        async def tools():
            return [tool.name for tool in await server.list_tools()]

        yield Client(tools, lambda arguments: server.call_tool(TOOL, arguments))


main(connect)
