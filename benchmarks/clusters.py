"""The APIs that contenders work against: in memory, and a real API server."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

from kubernetes_asyncio.client import ApiClient, CoreV1Api, CustomObjectsApi

from prodisco_sandbox.testing import FakeCustomObjectsApi

from .controller import GROUP, next_address

KIND = "Sandbox"
OURS = '"userAgent":"OpenAPI-Generator/'
"""In the audit log: a request of kubernetes_asyncio, and so not of a controller."""
CRD_FILE = "sandboxes-v0.5.6.yaml"


class Access(Protocol):
    """One contender's way to a cluster, with a namespace of its own.

    Attributes:
        api: A CustomObjectsApi.
        sandbox_port: Where each sandbox's server listens.
    """

    api: Any
    namespace: str
    sandbox_port: int

    async def requests(self) -> Counter[str]:
        """How many requests there have been so far, by verb."""

    async def written(self) -> dict[str, float]:
        """When the status of each Sandbox was written, on the clock of perf_counter; each once."""

    def connections(self) -> int | None:
        """How many connections there are to the API server; None where there is none."""


class Cluster(Protocol):
    """A cluster whose controller makes every Sandbox ready, each at an address of its own."""

    name: str

    def access(self) -> contextlib.AbstractAsyncContextManager[Access]:
        """A new way in."""

    async def delay(self, low: float, high: float) -> None:
        """From now on a Sandbox becomes ready that many seconds after it was created."""


class _FakeAccess:
    def __init__(self, api: FakeCustomObjectsApi, cluster: FakeCluster) -> None:
        self.api = api
        self.namespace = "bench"
        self.sandbox_port = cluster.sandbox_port
        self._cluster = cluster
        self._written: dict[str, float] = {}
        api.subscribe(self._changed)

    def _changed(self, kind: str, sandbox: dict[str, Any]) -> None:
        if kind == "ADDED" and sandbox["kind"] == KIND:
            pause = random.uniform(*self._cluster.pause)
            asyncio.get_running_loop().call_later(pause, self._write, sandbox["metadata"]["name"])

    def _write(self, name: str) -> None:
        if self.api.get(name, kind=KIND) is not None:
            self.api.set_ready(name, podIPs=[next_address()])
            self._written[name] = time.perf_counter()

    async def requests(self) -> Counter[str]:
        verbs: tuple[Any, ...] = ("create", "get", "list", "watch", "patch", "delete")
        return Counter({verb: self.api.count(verb) for verb in verbs})

    async def written(self) -> dict[str, float]:
        written, self._written = self._written, {}
        return written

    def connections(self) -> int | None:
        return None

    def forget(self) -> None:
        """Drops all Sandboxes and records, without a word to anybody."""
        self.api.compact()
        self.api._store.objects.clear()
        self.api._requests.clear()
        self._written.clear()


class FakeCluster:
    """FakeCustomObjectsApi: the cluster's work is done in this process, but there is little of it."""

    name = "in memory"

    def __init__(self, sandbox_port: int) -> None:
        self.sandbox_port = sandbox_port
        self.pause = (0.0, 0.0)

    @asynccontextmanager
    async def access(self, auto_ready: Any = False) -> AsyncIterator[_FakeAccess]:
        async with FakeCustomObjectsApi(history=5_000, auto_ready=auto_ready) as api:
            yield _FakeAccess(api, self)

    async def delay(self, low: float, high: float) -> None:
        self.pause = (low, high)


class _RealAccess:
    def __init__(self, api: CustomObjectsApi, namespace: str, cluster: RealCluster) -> None:
        self.api = api
        self.namespace = namespace
        self.sandbox_port = cluster.sandbox_port
        self._cluster = cluster

    async def requests(self) -> Counter[str]:
        verbs: dict[str, str] = {}
        with self._cluster.audit.open() as log:
            for line in log:
                if f'"namespace":"{self.namespace}"' in line and OURS in line:
                    event = json.loads(line)
                    verbs[event["auditID"]] = event["verb"]
        return Counter(verbs.values())

    async def written(self) -> dict[str, float]:
        return dict(await self._cluster.command("written"))

    def connections(self) -> int | None:
        return _connections_to(self._cluster.server_port)


class RealCluster:
    """etcd and kube-apiserver on loopback, and a controller in a process of its own."""

    name = "kube-apiserver"

    def __init__(
        self, server: Any, controller: asyncio.subprocess.Process | None, audit: Path, sandbox_port: int
    ) -> None:
        self.sandbox_port = sandbox_port
        self.server_port: int = server.port
        self.audit = audit
        self._server = server
        self._controller = controller
        self._numbers = itertools.count(1)
        self._turn = asyncio.Lock()

    @asynccontextmanager
    async def access(self) -> AsyncIterator[Access]:
        client: ApiClient = self._server.api_client()
        async with client:
            namespace = f"bench-{next(self._numbers)}"
            await CoreV1Api(client).create_namespace({"metadata": {"name": namespace}})
            yield _RealAccess(CustomObjectsApi(client), namespace, self)

    async def delay(self, low: float, high: float) -> None:
        await self.command("delay", low, high)

    async def command(self, *words: Any) -> Any:
        assert self._controller is not None
        assert self._controller.stdin is not None
        assert self._controller.stdout is not None
        async with self._turn:
            self._controller.stdin.write(json.dumps(words).encode() + b"\n")
            answer = await self._controller.stdout.readline()
        if not answer:
            raise RuntimeError("the controller has ended")
        return json.loads(answer)


def kubernetes_version() -> str | None:
    """The version of the API server that KUBEBUILDER_ASSETS names."""
    if not (assets := os.environ.get("KUBEBUILDER_ASSETS")):
        return None
    command = [f"{assets}/kube-apiserver", "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@asynccontextmanager
async def real_cluster(sandbox_port: int) -> AsyncIterator[RealCluster]:
    """Boots one from the binaries in KUBEBUILDER_ASSETS; takes some five seconds."""
    # Not above: without the binaries this needs nothing of the tests.
    from tests.support.apiserver import ApiServer
    from tests.support.sandbox_crd import sandbox_crd

    crds = os.environ.get("AGENT_SANDBOX_CRDS")
    definition = Path(crds) / CRD_FILE if crds else sandbox_crd("v1beta1", "v1alpha1")
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        policy = {
            "apiVersion": "audit.k8s.io/v1",
            "kind": "Policy",
            "omitStages": ["RequestReceived"],
            "rules": [{"level": "Metadata", "resources": [{"group": GROUP}]}, {"level": "None"}],
        }
        (directory / "policy.json").write_text(json.dumps(policy))
        audit = directory / "audit.log"
        flags = (f"--audit-policy-file={directory / 'policy.json'}", f"--audit-log-path={audit}")
        server = ApiServer(Path(os.environ["KUBEBUILDER_ASSETS"]), flags=flags)
        stack.callback(server.stop)
        await asyncio.to_thread(server.start)
        await asyncio.to_thread(server.install_crd, definition)
        async with _controller(server) as controller:
            yield RealCluster(server, controller, audit, sandbox_port)


@asynccontextmanager
async def _controller(server: Any) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(Path(__file__).with_name("controller.py"))),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=1 << 24,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        where = {"url": server.url, "ca": str(server.directory / "ca.crt"), "token": server.token()}
        process.stdin.write(json.dumps(where).encode() + b"\n")
        await process.stdout.readline()
        yield process
    finally:
        process.stdin.close()
        await process.wait()


def _connections_to(port: int) -> int:
    """How many connections this process has to a port of this machine (Linux only)."""
    ours = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            ours.add(str(descriptor.readlink()))
    found = 0
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        found += int(fields[2].rpartition(":")[2], 16) == port and f"socket:[{fields[9]}]" in ours
    return found
