"""A manager in a process of its own, to be killed: see `tests.support.killed`."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from prodisco_sandbox import SandboxManager, SandboxManagerConfig
from tests.support.managers import Clients


async def main(sessions: list[str], code: str, *, stubs: bool, **settings: Any) -> None:
    config = SandboxManagerConfig(mode="multi", **settings)
    async with SandboxManager(config, client_factory=Clients() if stubs else None) as manager:
        for client in await asyncio.gather(*map(manager.get_client, sessions)):
            assert not code or (await client.execute(code=code)).success
        print("ready", flush=True)
        await asyncio.Event().wait()


asyncio.run(main(**json.loads(sys.argv[1])))
