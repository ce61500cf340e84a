"""google-adk."""

from contextlib import asynccontextmanager

from google.adk.tools.mcp_tool.mcp_session_manager import (
    StdioConnectionParams,
    StreamableHTTPConnectionParams,
)
from google.adk.tools.mcp_tool.mcp_toolset import McpToolset
from mcp import StdioServerParameters
from steps import COMMAND, ENV, TOOL, URL, Client, main


@asynccontextmanager
async def connect():
    toolset = McpToolset(
        connection_params=StreamableHTTPConnectionParams(url=URL)
        if URL
        else StdioConnectionParams(
            server_params=StdioServerParameters(command=COMMAND[0], args=COMMAND[1:], env=ENV), timeout=60
        )
    )
    try:
        loaded = await toolset.get_tools()

        async def tools():
            return [tool.name for tool in loaded]

        # The declared way to call a tool needs an agent with a model.
        async def call(arguments):
            session = await toolset._mcp_session_manager.create_session()
            return await session.call_tool(TOOL, arguments=arguments)

        yield Client(tools, call)
    finally:
        await toolset.close()


main(connect)
