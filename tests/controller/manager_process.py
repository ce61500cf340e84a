"""A manager in a process of its own, to be killed: a sandbox for each session named.

python manager_process.py NAMESPACE PORT LEASE SESSION...   (KUBECONFIG says where)

With SANDBOX_WARM_POOL they are of that pool. Says ``ready`` once they all are, and then waits.
"""

from __future__ import annotations

import asyncio
import os
import sys

from prodisco_sandbox import SandboxManager, SandboxManagerConfig


async def main(namespace: str, port: str, lease: str, *sessions: str) -> None:
    config = SandboxManagerConfig(
        mode="multi",
        namespace=namespace,
        sandbox_port=int(port),
        lease_duration=float(lease),
        warm_pool=os.environ.get("SANDBOX_WARM_POOL"),
    )
    async with SandboxManager(config) as manager:
        await asyncio.gather(*map(manager.get_client, sessions))
        print("ready", flush=True)
        await asyncio.Event().wait()


asyncio.run(main(*sys.argv[1:]))
