"""pydantic-ai."""

from contextlib import asynccontextmanager

from fastmcp.client.transports import StdioTransport
from pydantic_ai.mcp import MCPToolset
from steps import COMMAND, ENV, TOOL, URL, Client, main


@asynccontextmanager
async def connect():
    stdio = StdioTransport(command=COMMAND[0], args=COMMAND[1:], env=ENV, keep_alive=False)
    async with MCPToolset(URL or stdio, init_timeout=60, read_timeout=60) as toolset:

        async def tools():
            return [tool.name for tool in await toolset.list_tools()]

        yield Client(tools, lambda arguments: toolset.direct_call_tool(TOOL, arguments))


main(connect)
