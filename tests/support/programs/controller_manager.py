"""A manager in a process of its own, to be killed: a sandbox for each session named.

python controller_manager.py SETTINGS SESSION...   (settings as JSON; KUBECONFIG says where)

Says ``ready`` once they all are, and then waits.
"""

from __future__ import annotations

import asyncio
import json
import sys

from prodisco_sandbox import SandboxManager, SandboxManagerConfig


async def main(settings: str, *sessions: str) -> None:
    config = SandboxManagerConfig(mode="multi", **json.loads(settings))
    async with SandboxManager(config) as manager:
        await asyncio.gather(*map(manager.get_client, sessions))
        print("ready", flush=True)
        await asyncio.Event().wait()


asyncio.run(main(*sys.argv[1:]))
