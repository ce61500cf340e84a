"""A manager's life as part of a server's."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any

from ..manager import SandboxManager


def sandbox_lifespan(
    manager: SandboxManager,
) -> Callable[[Any], AbstractAsyncContextManager[SandboxManager]]:
    """The ``lifespan`` of an ``MCPServer`` that starts a manager and shuts it down.

    The SDK enters a lifespan once for streamable HTTP and stdio, but once for every
    connection over SSE or in memory. They are counted: the first starts the manager, the
    last shuts it down, for good. If all connections may end before the server does, enter the
    manager yourself instead (``async with manager: ...``).

    In a lifespan of your own::

        async with sandbox_lifespan(manager)(server):
            yield my_state

    Returns:
        A function of the server whose context manager gives the manager.
    """
    users = 0
    stack = AsyncExitStack()

    @asynccontextmanager
    async def lifespan(server: object) -> AsyncIterator[SandboxManager]:
        nonlocal users
        users += 1
        try:
            if users == 1:
                await stack.enter_async_context(manager)
            yield manager
        finally:
            users -= 1
            if users == 0:
                await stack.aclose()

    return lifespan
