"""What the tests on a real cluster share: its pods, managers, and waiting."""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import trustme
from kubernetes_asyncio.client import ApiClient, ApiException, CoreV1Api, CustomObjectsApi
from kubernetes_asyncio.config import new_client_from_config

from prodisco_sandbox import SandboxClient, SandboxManager, SandboxManagerConfig, TlsConfig
from prodisco_sandbox._cluster.manifest import API_VERSIONS, GROUP, PLURAL, SANDBOX
from prodisco_sandbox._cluster.metadata import LABEL_SANDBOX, is_deleting, managed_selector
from tests.support.envtest import MERGE_PATCH, connections
from tests.support.patience import until

Object = dict[str, Any]

NAMESPACE = "prodisco"
READY = 90.0
"""How long a sandbox may take, on a machine with other things to do."""
GONE = 60.0
"""How long a pod may take to go: kubelet looks at what has ended every ten seconds or so."""


class Pods:
    """The sandboxes' pods, and the Sandboxes, as an administrator sees them."""

    def __init__(self, api: ApiClient, version: str) -> None:
        self.api = api
        self.namespace = NAMESPACE
        self._core = CoreV1Api(api)
        self._custom = CustomObjectsApi(api)
        self._at = (GROUP, version, NAMESPACE, PLURAL)

    async def list(self, sandbox: str | None = None) -> list[Object]:
        """All pods, or those of the Sandbox of this name, past ones that still end included."""
        selector = managed_selector() if sandbox is None else f"{LABEL_SANDBOX}={sandbox}"
        found = await self._core.list_namespaced_pod(NAMESPACE, label_selector=selector, _request_timeout=10)
        return list(self.api.sanitize_for_serialization(found)["items"])

    async def one(self, sandbox: str) -> Object:
        (pod,) = await self.list(sandbox)
        return pod

    async def delete(self, pod: Object) -> None:
        await self._core.delete_namespaced_pod(pod["metadata"]["name"], NAMESPACE, _request_timeout=10)

    async def end(self, pod: str) -> None:
        """Makes kubelet kill the pod of this name: it becomes Failed, and is not deleted."""
        deadline = {"spec": {"activeDeadlineSeconds": 1}}
        await self._core.patch_namespaced_pod(pod, NAMESPACE, deadline, _content_type=MERGE_PATCH)

    async def going(self, sandbox: str) -> None:
        """Waits until the Sandbox's pods are told to end; that they do is looked at once, at the end."""

        async def all_told() -> bool:
            return all(is_deleting(pod) for pod in await self.list(sandbox))

        await until(all_told, f"the pods of {sandbox} to be deleted")

    async def sandbox(self, name: str) -> Object | None:
        try:
            found: Object = await self._custom.get_namespaced_custom_object(
                *self._at, name, _request_timeout=10
            )
        except ApiException as e:
            if e.status == 404:
                return None
            raise
        return found

    async def delete_sandbox(self, name: str, *, propagation: str) -> None:
        await self._custom.delete_namespaced_custom_object(
            *self._at, name, propagation_policy=propagation, _request_timeout=10
        )


@asynccontextmanager
async def administered() -> AsyncIterator[Pods]:
    async with await new_client_from_config(os.environ["E2E_KUBECONFIG"], persist_config=False) as api:
        yield Pods(api, await served(api))
    # aiohttp does not wait for the end of TLS, and the loop may be closed before.
    port = urlsplit(api.configuration.host).port or 443
    await until(lambda: connections(port) == 0, "the connections to be closed")


async def served(api: ApiClient) -> str:
    """The newest version of agent-sandbox that the cluster has."""
    for version in API_VERSIONS:
        try:
            await CustomObjectsApi(api).get_api_resources(GROUP, version, _request_timeout=10)
        except ApiException as e:
            if e.status != 404:
                raise
        else:
            return version
    raise AssertionError(f"the cluster of E2E_KUBECONFIG serves no {GROUP}: install agent-sandbox")


@asynccontextmanager
async def managed(**settings: Any) -> AsyncIterator[SandboxManager]:
    """A manager that connects by KUBECONFIG and deletes all that it made."""
    settings = {"mode": "multi", "namespace": NAMESPACE, "ready_timeout": READY, **settings}
    async with SandboxManager(SandboxManagerConfig(**settings)) as manager:
        yield manager
    assert "shutdown_incomplete" not in manager.stats().events


@asynccontextmanager
async def tls_secret(pods: Pods, directory: Path, *, mutual: bool) -> AsyncIterator[TlsConfig]:
    """A Secret with the certificate of all sandboxes, and the settings that go with it."""
    core, name = CoreV1Api(pods.api), f"tls-{secrets.token_hex(4)}"
    authority, served = trustme.CA(), "sandbox.prodisco.svc"
    certificate = authority.issue_cert(served)
    authority.cert_pem.write_to_path(directory / "ca.crt")
    own: dict[str, Any] = {}
    if mutual:
        client_certificate = authority.issue_cert("manager")
        client_certificate.cert_chain_pems[0].write_to_path(directory / "tls.crt")
        client_certificate.private_key_pem.write_to_path(directory / "tls.key")
        own = {"cert": str(directory / "tls.crt"), "key": str(directory / "tls.key")}
    data = {
        "tls.crt": certificate.cert_chain_pems[0].bytes().decode(),
        "tls.key": certificate.private_key_pem.bytes().decode(),
        "ca.crt": authority.cert_pem.bytes().decode(),
    }
    secret = {"metadata": {"name": name}, "type": "kubernetes.io/tls", "stringData": data}
    await core.create_namespaced_secret(pods.namespace, secret)
    try:
        yield TlsConfig(ca=str(directory / "ca.crt"), server_name=served, secret_name=name, **own)
    finally:
        await core.delete_namespaced_secret(name, pods.namespace)


def pod_template(tls: TlsConfig | None = None, **container: Any) -> Object:
    """The default pod template with other fields in its container, for the caller to change."""
    config = SandboxManagerConfig(mode="multi", tls=tls)
    body = SANDBOX.body(config, API_VERSIONS[0], "any", "any")
    template: Object = {"spec": body["spec"]["podTemplate"]["spec"]}
    template["spec"]["containers"][0].update(container)
    return template


def limits(*, memory: str, cpu: str = "20m") -> Object:
    """Resources that ask for little, so that many fit, and are bounded as given."""
    return {"requests": {"memory": "32Mi", "cpu": cpu}, "limits": {"memory": memory, "cpu": "1"}}


async def output(client: SandboxClient, code: str) -> str:
    result = await client.execute(code=code)
    assert result.success, result.error
    return result.output.strip()
