"""A manager in a process of its own, to be killed: a Sandbox for each session named.

python envtest_manager.py NAMESPACE INSTANCE LEASE SESSION...   (KUBECONFIG says where)

Says ``ready`` once they all are, and then waits.
"""

from __future__ import annotations

import asyncio
import sys

from prodisco_sandbox import SandboxManager, SandboxManagerConfig
from tests.support.managers import Clients


async def main(namespace: str, instance: str, lease: str, *sessions: str) -> None:
    config = SandboxManagerConfig(
        mode="multi", namespace=namespace, instance_id=instance, lease_duration=float(lease)
    )
    async with SandboxManager(config, client_factory=Clients()) as manager:
        await asyncio.gather(*map(manager.get_client, sessions))
        print("ready", flush=True)
        await asyncio.Event().wait()


asyncio.run(main(*sys.argv[1:]))
