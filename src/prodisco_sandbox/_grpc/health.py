"""Waiting until a sandbox's server is healthy."""

from __future__ import annotations

import asyncio

from ..errors import SandboxError, SandboxReplacedError, SandboxTimeoutError, SandboxUnavailableError
from . import codec as m
from .channel import Connection


async def wait_for_healthy(connection: Connection, timeout: float) -> bool:
    """See `SandboxClient.wait_for_healthy`. Why not is in the connection's `health_error`, at any moment."""
    connection.health_error = None
    if isinstance(timeout, int | float) and not timeout >= 1e-9:  # type: ignore[redundant-expr]
        return False
    try:
        async with asyncio.timeout(m.call_seconds("timeout", timeout)):
            await _until_healthy(connection)
    except TimeoutError:
        silence = SandboxTimeoutError(f"no answer from {connection.target}")
        connection.health_error = connection.health_error or silence  # type: ignore[redundant-expr]
    except SandboxError as error:
        connection.health_error = error
    else:
        connection.health_error = None
    return connection.health_error is None


async def _until_healthy(connection: Connection) -> None:
    pause, patience = 0.01, 1.0
    while True:
        try:
            if (await connection.check_health(patience)).healthy:
                return
            connection.health_error = SandboxUnavailableError(
                f"{connection.target} answers that it is unhealthy"
            )
        except SandboxError as error:
            # Not the other side's doing, or the doing of another machine, for good.
            if error.status is None or isinstance(error, SandboxReplacedError):
                raise
            connection.health_error = error
            if isinstance(error, SandboxTimeoutError):
                patience = min(2 * patience, 5.0)
        await connection.renew()
        await asyncio.sleep(pause)
        pause = min(2 * pause, 0.25)
