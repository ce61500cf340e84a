"""fastmcp."""

from contextlib import asynccontextmanager

from fastmcp import Client as FastClient
from fastmcp.client.transports import StdioTransport, StreamableHttpTransport
from steps import COMMAND, ENV, TOOL, URL, Client, main


@asynccontextmanager
async def connect():
    transport = (
        StreamableHttpTransport(URL)
        if URL
        else StdioTransport(command=COMMAND[0], args=COMMAND[1:], env=ENV, keep_alive=False)
    )
    async with FastClient(transport) as client:

        async def tools():
            return [tool.name for tool in await client.list_tools()]

        async def call(arguments):
            return (await client.call_tool(TOOL, arguments, raise_on_error=False)).structured_content

        async def progress(arguments):
            came = []

            async def note(*values):
                came.append(values)

            result = await client.call_tool(TOOL, arguments, progress_handler=note)
            return result.structured_content, len(came)

        yield Client(tools, call, progress)


main(connect)
