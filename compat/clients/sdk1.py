"""The Python SDK 1.x."""

from contextlib import asynccontextmanager

from mcp import ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client
from mcp.client.streamable_http import streamablehttp_client
from steps import COMMAND, ENV, TOOL, URL, Client, main


@asynccontextmanager
async def connect():
    streams = (
        streamablehttp_client(URL)
        if URL
        else stdio_client(StdioServerParameters(command=COMMAND[0], args=COMMAND[1:], env=ENV))
    )
    async with streams as (read, write, *_), ClientSession(read, write) as session:
        await session.initialize()

        async def tools():
            return [tool.name for tool in (await session.list_tools()).tools]

        async def progress(arguments):
            came = []

            async def note(*values):
                came.append(values)

            return await session.call_tool(TOOL, arguments, progress_callback=note), len(came)

        yield Client(tools, lambda arguments: session.call_tool(TOOL, arguments), progress)


main(connect)
