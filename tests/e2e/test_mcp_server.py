"""The image of the MCP program, run as deploy/overlays/mcp-server says, on a real node."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from urllib.parse import urlsplit

import httpx2
import pytest
import yaml
from kubernetes_asyncio.client import AppsV1Api, CoreV1Api, RbacAuthorizationV1Api

from prodisco_sandbox._cluster.metadata import LABEL_SANDBOX
from tests.support.envtest import DEPLOY, rights
from tests.support.mcp_server import connect, run
from tests.support.patience import until
from tests.support.pods import NAMESPACE, READY, Object, Pods

pytestmark = pytest.mark.cluster

TOKEN = secrets.token_hex(32)
SECRETS = {"sandbox-handles": {"secret": secrets.token_hex(32)}, "sandbox-tokens": {"tokens": f"me {TOKEN}"}}


async def test_the_image_serves_a_session(pods: Pods) -> None:
    """kubelet holds it to another user than root and to a root file system that is read-only."""
    async with deployed(pods) as url, connect(url, "2026-07-28", token=TOKEN) as client:
        begun = await run(client, "open('kept', 'w').write('42')")
        assert (await run(client, "print(open('kept').read())", sandbox=begun["sandbox"]))["output"] == "42\n"
        (pod,) = await mcp_pods(pods)
        assert pod["status"]["containerStatuses"][0]["restartCount"] == 0
        async with httpx2.AsyncClient(timeout=READY, verify=False) as http:
            metrics = (await http.get(url.replace("/mcp", "/metrics"))).text
        assert 'prodisco_sandbox_executions_total{outcome="completed"}' in metrics


@asynccontextmanager
async def deployed(pods: Pods) -> AsyncIterator[str]:
    """The overlay's Deployment with one replica; gives the URL of its pod."""
    core, apps, rbac = CoreV1Api(pods.api), AppsV1Api(pods.api), RbacAuthorizationV1Api(pods.api)
    (role, binding), _ = rights(NAMESPACE)
    name = role["metadata"]["name"]
    async with AsyncExitStack() as stack:
        await rbac.create_namespaced_role(NAMESPACE, role)
        stack.push_async_callback(rbac.delete_namespaced_role, name, NAMESPACE)
        await rbac.create_namespaced_role_binding(NAMESPACE, binding)
        stack.push_async_callback(rbac.delete_namespaced_role_binding, name, NAMESPACE)
        for secret, data in SECRETS.items():
            await core.create_namespaced_secret(NAMESPACE, {"metadata": {"name": secret}, "stringData": data})
            stack.push_async_callback(core.delete_namespaced_secret, secret, NAMESPACE)
        await apps.create_namespaced_deployment(NAMESPACE, deployment(pods))
        stack.push_async_callback(gone, pods)
        stack.push_async_callback(apps.delete_namespaced_deployment, "mcp-server", NAMESPACE)
        await until(lambda: is_ready(pods), "the MCP server to be ready", READY)
        (pod,) = await mcp_pods(pods)
        yield f"http://{pod['status']['podIP']}:8000/mcp"


def deployment(pods: Pods) -> Object:
    found: Object = yaml.safe_load((DEPLOY / "overlays" / "mcp-server" / "deployment.yaml").read_text())
    found["spec"]["replicas"] = 1
    pod = found["spec"]["template"]["spec"]
    server = urlsplit(pods.api.configuration.host)
    if server.hostname in ("127.0.0.1", "::1", "localhost"):
        # The API server listens on its node's loopback address only.
        pod["hostNetwork"] = True
        address = {"KUBERNETES_SERVICE_HOST": server.hostname, "KUBERNETES_SERVICE_PORT": str(server.port)}
        pod["containers"][0]["env"] += [{"name": name, "value": value} for name, value in address.items()]
    return found


async def mcp_pods(pods: Pods) -> list[Object]:
    found = await CoreV1Api(pods.api).list_namespaced_pod(NAMESPACE, label_selector="app=mcp-server")
    return list(pods.api.sanitize_for_serialization(found)["items"])


async def is_ready(pods: Pods) -> bool:
    conditions = [c for pod in await mcp_pods(pods) for c in pod["status"].get("conditions", ())]
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


async def gone(pods: Pods) -> None:
    """Returns once the pod has ended, and with it the Sandboxes that it may have kept."""

    async def none_left() -> bool:
        return not await mcp_pods(pods)

    await until(none_left, "the MCP server to end", READY)
    for pod in await pods.list():
        await pods.delete_sandbox(pod["metadata"]["labels"][LABEL_SANDBOX], propagation="Background")
