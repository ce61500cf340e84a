"""The Python SDK 2.x."""

from contextlib import asynccontextmanager

from mcp import Client as McpClient
from mcp.client.stdio import StdioServerParameters
from steps import COMMAND, ENV, URL, main, of_session


@asynccontextmanager
async def connect():
    target = URL or StdioServerParameters(command=COMMAND[0], args=COMMAND[1:], env=ENV)
    async with McpClient(target) as client:
        yield of_session(client)


main(connect)
