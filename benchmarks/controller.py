"""A process that plays agent-sandbox's controller and the kubelet on a real API server.

It writes each new Sandbox's status, some time after it has appeared, and notes when the
API server has acknowledged that. A process of its own, as in a cluster: its work is no
part of what is measured. It speaks JSON lines: the first on standard input says where the
API server is, each later one is a command that is answered by a line.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import ssl
import sys
import time
from typing import Any

import aiohttp

Object = dict[str, Any]

GROUP, VERSION, PLURAL = "agents.x-k8s.io", "v1beta1", "sandboxes"
CONNECTIONS = 16

_addresses = itertools.count()


def next_address() -> str:
    """An address of the loopback network that no other sandbox has had."""
    number = next(_addresses)
    return f"127.{number // 62_500 % 250 + 1}.{number // 250 % 250}.{number % 250 + 1}"


def ready_status(address: str) -> Object:
    """What agent-sandbox's controller writes once the pod is ready."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    ready = {
        "type": "Ready",
        "status": "True",
        "reason": "DependenciesReady",
        "message": "Pod is Ready",
        "lastTransitionTime": now,
    }
    return {"podIPs": [address], "conditions": [ready]}


class _Controller:
    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._base = f"{url}/apis/{GROUP}/{VERSION}"
        self._delay = (0.0, 0.0)
        self._written: dict[str, float] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def watch(self) -> None:
        listing = f"{self._base}/{PLURAL}"
        async with self._session.get(listing) as answer:
            version = (await answer.json())["metadata"]["resourceVersion"]
        for number in itertools.count():
            query = {"watch": "true", "resourceVersion": version}
            async with self._session.get(listing, params=query) as answer:
                if number == 0:  # A later one would be taken for the answer to a command.
                    print(json.dumps("watching"), flush=True)
                async for line in answer.content:
                    event = json.loads(line)
                    metadata = event["object"]["metadata"]
                    version = metadata["resourceVersion"]
                    if event["type"] == "ADDED":
                        task = asyncio.create_task(self._make_ready(metadata["namespace"], metadata["name"]))
                        self._tasks.add(task)
                        task.add_done_callback(self._tasks.discard)

    async def _make_ready(self, namespace: str, name: str) -> None:
        await asyncio.sleep(random.uniform(*self._delay))
        url = f"{self._base}/namespaces/{namespace}/{PLURAL}/{name}/status"
        body = json.dumps({"status": ready_status(next_address())})
        headers = {"Content-Type": "application/merge-patch+json"}
        async with self._session.patch(url, data=body, headers=headers) as answer:
            await answer.read()
            self._written[name] = time.perf_counter()

    def command(self, name: str, *args: Any) -> Any:
        if name == "delay":
            self._delay = (args[0], args[1])
            return None
        written, self._written = self._written, {}
        return written


async def _main() -> None:
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(lines), sys.stdin.buffer
    )
    where = json.loads(await lines.readline())
    tls = ssl.create_default_context(cafile=where["ca"])
    async with aiohttp.ClientSession(
        headers={"Authorization": f"Bearer {where['token']}", "User-Agent": "controller"},
        connector=aiohttp.TCPConnector(ssl=tls, limit=CONNECTIONS),
        timeout=aiohttp.ClientTimeout(total=None),
    ) as session:
        controller = _Controller(session, where["url"])
        watching = asyncio.create_task(controller.watch())
        while line := await lines.readline():
            if watching.done():
                break
            print(json.dumps(controller.command(*json.loads(line))), flush=True)
        watching.cancel()
        await asyncio.wait({watching})


if __name__ == "__main__":
    asyncio.run(_main())
