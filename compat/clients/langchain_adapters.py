"""langchain-mcp-adapters."""

from contextlib import asynccontextmanager

from langchain_mcp_adapters.client import MultiServerMCPClient
from langchain_mcp_adapters.tools import load_mcp_tools
from steps import COMMAND, ENV, TOOL, URL, Client, main


@asynccontextmanager
async def connect():
    server = (
        {"transport": "streamable_http", "url": URL}
        if URL
        else {"transport": "stdio", "command": COMMAND[0], "args": COMMAND[1:], "env": ENV}
    )
    async with MultiServerMCPClient({"sandbox": server}).session("sandbox") as session:
        loaded = await load_mcp_tools(session)
        (tool,) = (tool for tool in loaded if tool.name == TOOL)

        async def tools():
            return [tool.name for tool in loaded]

        yield Client(tools, tool.ainvoke)


main(connect)
