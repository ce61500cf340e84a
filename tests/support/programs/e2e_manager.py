"""A manager in a process of its own, to be killed: a sandbox with a file for each session named.

python e2e_manager.py NAMESPACE INSTANCE LEASE SESSION...   (KUBECONFIG says where, and
SANDBOX_WARM_POOL, if set, from which pool)

Says ``ready`` once they all are, and then waits.
"""

from __future__ import annotations

import asyncio
import os
import sys

from prodisco_sandbox import SandboxManager, SandboxManagerConfig


async def main(namespace: str, instance: str, lease: str, *sessions: str) -> None:
    config = SandboxManagerConfig(
        mode="multi",
        namespace=namespace,
        instance_id=instance,
        lease_duration=float(lease),
        warm_pool=os.environ.get("SANDBOX_WARM_POOL"),
    )
    async with SandboxManager(config) as manager:
        for client in await asyncio.gather(*map(manager.get_client, sessions)):
            assert (await client.execute(code="open('kept', 'w').write('42')")).success
        print("ready", flush=True)
        await asyncio.Event().wait()


asyncio.run(main(*sys.argv[1:]))
