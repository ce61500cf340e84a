"""Waiting until a sandbox's server is healthy."""

from __future__ import annotations

import asyncio

from ..errors import SandboxError, SandboxReplacedError, SandboxTimeoutError, SandboxUnavailableError
from .codec import call_seconds
from .connection import Connection


async def wait_for_healthy(connection: Connection, timeout: float) -> bool:
    """See `SandboxClient.wait_for_healthy`; `Connection.health_error` says at any moment why not."""
    connection.health_error = None
    if isinstance(timeout, int | float) and not timeout >= 1e-9:  # type: ignore[redundant-expr]
        return False
    try:
        async with asyncio.timeout(call_seconds("timeout", timeout)):
            await _until_healthy(connection)
    except SandboxError as error:
        connection.health_error = error
    except TimeoutError:
        if connection.health_error is None:
            connection.health_error = SandboxTimeoutError(f"no answer from {connection.target}")
    else:
        connection.health_error = None
    return connection.health_error is None


async def _until_healthy(connection: Connection) -> None:
    """Returns once the server is healthy.

    Raises:
        SandboxError: Waiting cannot help: another machine answers, or the fault is on this side.
    """
    pause, patience = 0.01, 1.0
    while True:
        try:
            if (await connection.check_health(patience)).healthy:
                return
            connection.health_error = SandboxUnavailableError(
                f"{connection.target} answers that it is unhealthy"
            )
        except SandboxError as error:
            if error.status is None or isinstance(error, SandboxReplacedError):
                raise
            connection.health_error = error
            if isinstance(error, SandboxTimeoutError):
                patience = min(2 * patience, 5.0)
        await connection.renew()
        await asyncio.sleep(pause)
        pause = min(2 * pause, 0.25)
