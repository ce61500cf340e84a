"""The Python SDK 2.x."""

from contextlib import asynccontextmanager

from mcp import Client as McpClient
from mcp.client.stdio import StdioServerParameters
from steps import COMMAND, ENV, TOOL, URL, Client, main


@asynccontextmanager
async def connect():
    target = URL or StdioServerParameters(command=COMMAND[0], args=COMMAND[1:], env=ENV)
    async with McpClient(target) as client:

        async def tools():
            return [tool.name for tool in (await client.list_tools()).tools]

        async def progress(arguments):
            came = []

            async def note(*values):
                came.append(values)

            return await client.call_tool(TOOL, arguments, progress_callback=note), len(came)

        yield Client(tools, lambda arguments: client.call_tool(TOOL, arguments), progress)


main(connect)
