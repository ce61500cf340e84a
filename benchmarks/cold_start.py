"""What the start of a sandbox in a real pod is made of, stage by stage.

``E2E_KUBECONFIG=FILE python -m benchmarks.cold_start [STARTS]`` in the repository's root, on a
cluster with agent-sandbox, the namespace prodisco and its service accounts; or, on a node that is
made for it, ``tools/cluster-tests DIRECTORY .venv/bin/python -m benchmarks.cold_start``. Sessions
start one after the other, each once the pod of the one before is gone.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from kubernetes_asyncio.client import CoreV1Api, CustomObjectsApi
from kubernetes_asyncio.config import new_client_from_config

from prodisco_sandbox import SandboxManager, SandboxManagerConfig
from prodisco_sandbox._cluster.manifest import GROUP, PLURAL, SANDBOX
from prodisco_sandbox._cluster.metadata import LABEL_SANDBOX, managed_selector

Object = dict[str, Any]

STAGES = {
    "create acknowledged": "the API server has the Sandbox",
    "pod seen": "the controller has made the pod",
    "scheduled": "the pod has a node",
    "network": "PodReadyToStartContainers: the pod has its address",
    "container running": "the container runtime has started the server",
    "Ready": "the controller says so of the Sandbox",
    "healthy": "get_client returns: the server answers a health check",
    "first result": "print(1) has run",
}
GONE = 60.0
"""Seconds that a pod may take to go."""


class Moments:
    """When each stage was first seen, by the name of the Sandbox, on the clock of perf_counter."""

    def __init__(self) -> None:
        self._found: dict[str, dict[str, float]] = {}

    def note(self, sandbox: str, stage: str) -> None:
        self._found.setdefault(sandbox, {}).setdefault(stage, time.perf_counter())

    async def since(self, begun: float, sandbox: str) -> list[float]:
        """Milliseconds from `begun` to each stage; waits for news that are on their way."""
        async with asyncio.timeout(10):
            while STAGES.keys() - self._found[sandbox].keys():
                await asyncio.sleep(0.05)
        return [(self._found[sandbox][stage] - begun) * 1000 for stage in STAGES]

    def pod(self, kind: str, pod: Object) -> None:
        name = pod["metadata"]["labels"][LABEL_SANDBOX]
        if kind != "DELETED":
            self.note(name, "pod seen")
        if pod["spec"].get("nodeName"):
            self.note(name, "scheduled")
        status = pod.get("status") or {}
        if is_true(status, "PodReadyToStartContainers"):
            self.note(name, "network")
        if any("running" in container["state"] for container in status.get("containerStatuses") or ()):
            self.note(name, "container running")

    def sandbox(self, _kind: str, sandbox: Object) -> None:
        if is_true(sandbox.get("status") or {}, "Ready"):
            self.note(sandbox["metadata"]["name"], "Ready")


def is_true(status: Object, kind: str) -> bool:
    conditions = status.get("conditions") or ()
    return any(found["type"] == kind and found["status"] == "True" for found in conditions)


class TimedApi:
    """A CustomObjectsApi that notes when a create is acknowledged."""

    def __init__(self, api: CustomObjectsApi, moments: Moments) -> None:
        self._api, self._moments = api, moments

    def __getattr__(self, name: str) -> Any:
        return getattr(self._api, name)

    async def create_namespaced_custom_object(self, *args: Any, **kwargs: Any) -> Any:
        made = await self._api.create_namespaced_custom_object(*args, **kwargs)
        self._moments.note(made["metadata"]["name"], "create acknowledged")
        return made


@asynccontextmanager
async def watched(list_: Any, *at: str, see: Any) -> AsyncIterator[None]:
    """Calls `see` with each event of the managed objects meanwhile."""
    selector = managed_selector()
    response = await list_(*at, label_selector=selector, watch=True, _preload_content=False)

    async def read() -> None:
        while line := await response.content.readline():
            event = json.loads(line)
            see(event["type"], event["object"])

    reading = asyncio.create_task(read())
    try:
        yield
    finally:
        reading.cancel()
        await asyncio.wait([reading])
        response.close()


def settings(namespace: str, cpu: str | None) -> SandboxManagerConfig:
    """The default pod template, with another CPU limit if one is given."""
    config = SandboxManagerConfig(mode="multi", namespace=namespace)
    if cpu is None:
        return config
    template = SANDBOX.body(config, "v1beta1", "any", "any")["spec"]["podTemplate"]
    template["spec"]["containers"][0]["resources"]["limits"]["cpu"] = cpu
    return dataclasses.replace(config, pod_template_spec=template)


async def measure(starts: int, namespace: str, cpu: str | None) -> list[list[float]]:
    """Milliseconds to each stage, for each start but a first one that warms up what is made once."""
    moments, found = Moments(), []
    api = await new_client_from_config(os.environ["E2E_KUBECONFIG"], persist_config=False)
    async with api:
        core, custom = CoreV1Api(api), CustomObjectsApi(api)
        at = (GROUP, "v1beta1", namespace, PLURAL)
        config = settings(namespace, cpu)
        async with (
            watched(core.list_namespaced_pod, namespace, see=moments.pod),
            watched(custom.list_namespaced_custom_object, *at, see=moments.sandbox),
            SandboxManager(config, custom_objects_api=TimedApi(custom, moments)) as manager,
        ):
            for number in range(starts + 1):
                session = f"cold start {number} of {os.getpid()}"
                begun = time.perf_counter()
                client = await manager.get_client(session)
                name = manager.sandbox_name(session)
                moments.note(name, "healthy")
                result = await client.execute("print(1)")
                moments.note(name, "first result")
                if result.output != "1\n":
                    raise RuntimeError(f"print(1) gave {result}")
                found.append(await moments.since(begun, name))
                await manager.on_session_closed(session)
                async with asyncio.timeout(GONE):
                    while (
                        await core.list_namespaced_pod(namespace, label_selector=managed_selector())
                    ).items:
                        await asyncio.sleep(0.1)
    return found[1:]


async def no_pods_left(core: CoreV1Api, namespace: str) -> None:
    async with asyncio.timeout(GONE):
        while (await core.list_namespaced_pod(namespace, label_selector=managed_selector())).items:
            await asyncio.sleep(0.1)


def table(found: list[list[float]]) -> str:
    """Medians: when each stage was reached, and how long it took after the one before."""
    lines = ["| stage | reached | took | |", "| --- | ---: | ---: | --- |"]
    for number, (stage, meaning) in enumerate(STAGES.items()):
        reached = statistics.median(start[number] for start in found)
        took = statistics.median(start[number] - (start[number - 1] if number else 0) for start in found)
        lines.append(f"| {stage} | {reached:.0f} ms | {took:.0f} ms | {meaning} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("starts", type=int, nargs="?", default=10)
    parser.add_argument("--namespace", default="prodisco")
    parser.add_argument("--cpu", help="the CPU limit of the pods, if not the default template's")
    given = parser.parse_args()
    if "E2E_KUBECONFIG" not in os.environ:
        parser.error("E2E_KUBECONFIG is not set: it names the kubeconfig of a cluster with agent-sandbox")
    print(f"medians of {given.starts} starts on {os.cpu_count()} processors\n")
    print(table(asyncio.run(measure(given.starts, given.namespace, given.cpu))))
