"""The Python SDK 1.x."""

from contextlib import asynccontextmanager

from mcp import ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client
from mcp.client.streamable_http import streamablehttp_client
from steps import COMMAND, ENV, URL, main, of_session


@asynccontextmanager
async def connect():
    streams = (
        streamablehttp_client(URL)
        if URL
        else stdio_client(StdioServerParameters(command=COMMAND[0], args=COMMAND[1:], env=ENV))
    )
    async with streams as (read, write, *_), ClientSession(read, write) as session:
        await session.initialize()
        yield of_session(session)


main(connect)
