"""The real agent-sandbox controller on a real API server, and what tests need of both.

No root and no container runtime: a program plays the node. It gives each pod a loopback address
and starts the project's own server there, so that sessions run code and machines really go.

Three variables name what is run, and without them the tests skip:

KUBEBUILDER_ASSETS   directory with etcd, kube-apiserver, kubectl and kube-controller-manager
AGENT_SANDBOX_DIR    directory with agent-sandbox-controller, and in ``crds-served`` its
                     definitions without the conversion webhook
AGENT_SANDBOX_PODS   the program that plays the node; KUBECONFIG says where

A test takes the fixture ``cluster``, a `ControlledNamespace` of its own::

    @pytest.mark.controller
    async def test_a_session(cluster: ControlledNamespace) -> None:
        async with cluster.managed() as manager:
            client = await manager.get_client("session")
            await cluster.delete_pod(manager.sandbox_name("session"))

and ``control_plane`` is the `ControlPlane` below it, one for each worker of the test run.
"""

from __future__ import annotations

import itertools
import json
import socket
import sys
import urllib.request
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import yaml
from kubernetes_asyncio.client import CoreV1Api

from prodisco_sandbox import SandboxManager, SandboxManagerConfig
from prodisco_sandbox._cluster.claim import CLAIM
from prodisco_sandbox._cluster.manifest import SANDBOX
from prodisco_sandbox._cluster.metadata import LABEL_SANDBOX
from tests.support.api import Event, watched
from tests.support.envtest import (
    DEPLOY,
    MERGE_PATCH,
    AuditedServer,
    Namespace,
    Object,
    made_namespace,
)
from tests.support.killed import killed
from tests.support.patience import PATIENCE, until, wait
from tests.support.ports import free_ports

VERSION = "v1beta1"

_numbers = itertools.count(1)


class ControlPlane(AuditedServer):
    """An API server, Kubernetes' garbage collector, agent-sandbox, and a program that plays the node.

    Args:
        binaries: Directory with etcd, kube-apiserver, kubectl and kube-controller-manager.
        agent_sandbox: Directory with agent-sandbox-controller and ``crds-served``.
        node: The program that plays the node.
        directory: For the audit log.
    """

    def __init__(self, binaries: Path, agent_sandbox: Path, node: Path, directory: Path) -> None:
        super().__init__(binaries, directory)
        self._agent_sandbox = agent_sandbox
        self._node = node
        # Pods of other test runs have the same addresses: held here, the port is ours alone.
        self._held = socket.socket()
        self.sandbox_port = 0

    def start(self) -> None:
        super().start()
        (self.sandbox_port,) = free_ports(1)
        self._held.bind(("127.0.0.1", self.sandbox_port))
        self.kubectl("create", "--validate=false", "-f", str(self._agent_sandbox / "crds-served"))
        # The controller ends where a definition is not established yet.
        self.kubectl("wait", "--for=condition=Established", f"--timeout={PATIENCE:.0f}s", "crd", "--all")
        # The last lets go of volume claims.
        controllers = "garbage-collector namespace resourcequota persistentvolumeclaim-protection"
        self._run(
            "kube-controller-manager",
            f"--kubeconfig={self._kubeconfig}",
            f"--controllers={','.join(f'{name}-controller' for name in controllers.split())}",
            "--leader-elect=false",
            "--secure-port=0",
        )
        self._start(
            "node",
            *("env", f"KUBECONFIG={self._kubeconfig}", f"TMPDIR={self.directory}"),
            *(sys.executable, str(self._node)),
        )
        self.start_controller()
        wait(self._has_node, "the node")

    def start_controller(self, *, collector: str | None = None) -> None:
        """Starts agent-sandbox, again after `kill_controller`, and returns once it works.

        Args:
            collector: Where it sends spans, by OTLP over gRPC, soon after their end; None: it makes none.
        """
        (health,) = free_ports(1)
        traces = ("env", f"OTEL_EXPORTER_OTLP_ENDPOINT={collector}", "OTEL_BSP_SCHEDULE_DELAY=50")
        self._start(
            "agent-sandbox",
            *(() if collector is None else traces),
            str(self._agent_sandbox / "agent-sandbox-controller"),
            f"--kubeconfig={self._kubeconfig}",
            "--extensions",
            "--leader-elect=false",
            "--enable-webhook=false",
            "--metrics-bind-address=0",
            f"--health-probe-bind-address=127.0.0.1:{health}",
            f"--enable-tracing={'false' if collector is None else 'true'}",
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

        def ready() -> bool:
            self._check_running("agent-sandbox")
            try:
                return bool(opener.open(f"http://127.0.0.1:{health}/readyz", timeout=5).status == 200)
            except OSError:
                return False

        wait(ready, "agent-sandbox")

    def kill_controller(self) -> None:
        self._ask("kill", "agent-sandbox")

    def stop(self) -> None:
        if self._keeper is not None:
            self._ask("terminate", "node")  # It ends its servers and removes their files.
        self._held.close()
        super().stop()

    @property
    def _kubeconfig(self) -> Path:
        return self._path("admin.kubeconfig")

    def _has_node(self) -> bool:
        self._check_running("node", "kube-controller-manager")
        return self.status("/api/v1/nodes/loopback") == 200


class ControlledNamespace(Namespace):
    """A namespace in which agent-sandbox makes pods of Sandboxes."""

    server: ControlPlane

    @property
    def core(self) -> CoreV1Api:
        """The administrator's."""
        return CoreV1Api(self.api.api_client)

    @asynccontextmanager
    async def managed(self, clients: Any = None, **settings: Any) -> AsyncIterator[SandboxManager]:
        """A manager with the rights of deploy/base/rbac.yaml, whose clients reach the pods."""
        config = self.config(**settings)
        manager = SandboxManager(config, custom_objects_api=self.manager_api, client_factory=clients)
        async with manager:
            yield manager

    def killed(self, *sessions: str, **settings: Any) -> AbstractAsyncContextManager[None]:
        """A manager with a sandbox for each session, in a process that is killed at the end."""
        return killed(self.server.directory / "admin.kubeconfig", *sessions, **self._settings(settings))

    def config(self, **settings: Any) -> SandboxManagerConfig:
        return SandboxManagerConfig(mode="multi", **self._settings(settings))

    def _settings(self, settings: Object) -> Object:
        port = self.server.sandbox_port
        return {"namespace": self.name, "ready_timeout": PATIENCE, "sandbox_port": port, **settings}

    async def make_pool(self, replicas: int, *, ready: bool = True) -> None:
        """The pool, template and rights of deploy/overlays/warm-pool; returns once its members are ready."""
        overlay = DEPLOY / "overlays" / "warm-pool"
        text = (overlay / "template.yaml").read_text().replace("50051", str(self.server.sandbox_port))
        template, pool = yaml.safe_load(text), yaml.safe_load((overlay / "pool.yaml").read_text())
        pool["spec"]["replicas"] = replicas
        (patch,) = yaml.safe_load((overlay / "kustomization.yaml").read_text())["patches"]
        rules = [yaml.safe_load(patch["patch"])[0]["value"]]
        about = {"name": "claims", "namespace": self.name}
        role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "claims"}
        account = {"kind": "ServiceAccount", "name": self.account.rpartition(":")[2], "namespace": self.name}
        rbac = {"apiVersion": "rbac.authorization.k8s.io/v1", "metadata": about}
        objects: tuple[Object, ...] = (
            {**rbac, "kind": "Role", "rules": rules},
            {**rbac, "kind": "RoleBinding", "roleRef": role, "subjects": [account]},
            template,
            pool,
        )
        for made in objects:
            made["metadata"]["namespace"] = self.name
            await self.kubectl("create", "--validate=false", "-f", "-", text=json.dumps(made))
        if ready:
            await until(lambda: self._has_members(replicas))

    async def _has_members(self, replicas: int) -> bool:
        ready = [s for s in await self.list() if condition(s).get("status") == "True" and is_member(s)]
        return len(ready) == replicas

    async def claims(self) -> list[Object]:
        return await self.list(CLAIM)

    async def claim(self, name: str) -> Object | None:
        return await self.find(name, CLAIM)

    async def change(self, plural: str, name: str, spec: Object) -> None:
        """Changes the spec of a claim or pool, as an operator does."""
        await self.api.patch_namespaced_custom_object(
            CLAIM.group, VERSION, self.name, plural, name, {"spec": spec}, _content_type=MERGE_PATCH
        )

    async def patch(self, name: str, spec: Object) -> Object:
        """Changes a Sandbox's spec, as an operator does."""
        found: Object = await self.api.patch_namespaced_custom_object(
            *self._at(SANDBOX), name, {"spec": spec}, _content_type=MERGE_PATCH
        )
        return found

    async def suspend(self, name: str) -> None:
        """As an operator does; returns once the controller says that it is suspended."""
        await self.patch(name, {"operatingMode": "Suspended"})
        await until(lambda: self.is_suspended(name))

    async def is_suspended(self, name: str) -> bool:
        return condition(await self.get(name), "Suspended").get("status") == "True"

    async def pods(self, sandbox: str | None = None) -> list[Object]:
        """All pods, or those of the Sandbox of this name, ending ones included."""
        selector = None if sandbox is None else f"{LABEL_SANDBOX}={sandbox}"
        found = await self.core.list_namespaced_pod(self.name, label_selector=selector)
        return list(self.api.api_client.sanitize_for_serialization(found)["items"])

    async def pod(self, sandbox: str) -> Object:
        (pod,) = await self.pods(sandbox)
        return pod

    async def delete_pod(self, sandbox: str) -> None:
        """As a drain does; returns before the pod is gone."""
        pod = await self.pod(sandbox)
        await self.core.delete_namespaced_pod(pod["metadata"]["name"], self.name)

    def watched(self) -> AbstractAsyncContextManager[list[Event]]:
        """What a client's watch sees meanwhile."""
        return watched(self.api, self._at(SANDBOX))


def is_member(sandbox: Object) -> bool:
    """Whether a Sandbox waits in a pool."""
    return any(owner["kind"] == "SandboxWarmPool" for owner in sandbox["metadata"].get("ownerReferences", ()))


def condition(sandbox: Object, kind: str = "Ready") -> Object:
    """A condition of its status; empty where there is none."""
    conditions = (sandbox.get("status") or {}).get("conditions") or ()
    return next((found for found in conditions if found["type"] == kind), {})


@asynccontextmanager
async def controlled_namespace(control_plane: ControlPlane) -> AsyncIterator[ControlledNamespace]:
    async with made_namespace(control_plane, f"test-{next(_numbers)}", VERSION) as namespace:
        yield ControlledNamespace(**vars(namespace))
