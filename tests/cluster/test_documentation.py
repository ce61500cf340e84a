"""What docs/kubernetes.md shows, on real pods."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from envtest.support import examples
from kubernetes_asyncio.client import ApiException, CoreV1Api, NodeV1Api

from prodisco_sandbox import SandboxCapacityError, TlsConfig

from .support import GONE, Pods, managed, output, until

pytestmark = pytest.mark.cluster

ENFORCE = "pod-security.kubernetes.io/enforce"


@pytest.fixture
async def restricted(pods: Pods) -> AsyncIterator[str]:
    """A namespace of its own in which pod security admission takes hardened pods alone."""
    core, name = CoreV1Api(pods.api), f"docs-{secrets.token_hex(4)}"
    await core.create_namespace({"metadata": {"name": name, "labels": {ENFORCE: "restricted"}}})
    await core.create_namespaced_service_account(name, {"metadata": {"name": "sandbox-server"}})
    yield name
    await core.delete_namespace(name)

    async def gone() -> bool:
        return name not in [found.metadata.name for found in (await core.list_namespace()).items]

    await until(gone, f"the end of the namespace {name}", GONE)


async def test_the_hardened_template_runs_under_restricted_pod_security(
    pods: Pods, session: str, restricted: str
) -> None:
    [text] = [example for example in examples("python") if example.startswith("pod_template_spec")]
    shown: dict[str, Any] = {}
    exec(text, shown)
    template = shown["pod_template_spec"]
    image = {"image": "prodisco/sandbox-server:latest", "imagePullPolicy": "IfNotPresent"}
    template["spec"]["containers"][0].update(image)
    # An ordinary runtime under the name that the page uses, for a node that has no other.
    runtime: dict[str, Any] = {"metadata": {"name": template["spec"]["runtimeClassName"]}, "handler": "runc"}
    node = NodeV1Api(pods.api)
    with_own = True
    try:
        await node.create_runtime_class(runtime)
    except ApiException as e:
        if e.status != 409:
            raise
        with_own = False
    try:
        async with managed(namespace=restricted, pod_template_spec=template) as manager:
            client = await manager.get_client(session)
            assert await output(client, "import os; print(os.getuid())") == "65532"
            assert await output(client, "open('kept', 'w').write('42'); print(open('kept').read())") == "42"
            result = await client.execute(code="open('/opt/x', 'w')")
            assert not result.success
            assert "Read-only file system" in (result.error or "")
    finally:
        if with_own:
            await node.delete_runtime_class(runtime["metadata"]["name"])


@pytest.mark.parametrize("mutual", [False, True], ids=["tls", "mtls"])
async def test_tls_from_a_secret(pods: Pods, session: str, tmp_path: Path, mutual: bool) -> None:
    core, name = CoreV1Api(pods.api), f"tls-{secrets.token_hex(4)}"
    authority, served = trustme.CA(), "sandbox.prodisco.svc"
    certificate = authority.issue_cert(served)
    authority.cert_pem.write_to_path(tmp_path / "ca.crt")
    own: dict[str, Any] = {}
    if mutual:
        client_certificate = authority.issue_cert("manager")
        client_certificate.cert_chain_pems[0].write_to_path(tmp_path / "tls.crt")
        client_certificate.private_key_pem.write_to_path(tmp_path / "tls.key")
        own = {"cert": str(tmp_path / "tls.crt"), "key": str(tmp_path / "tls.key")}
    data = {
        "tls.crt": certificate.cert_chain_pems[0].bytes().decode(),
        "tls.key": certificate.private_key_pem.bytes().decode(),
        "ca.crt": authority.cert_pem.bytes().decode(),
    }
    secret = {"metadata": {"name": name}, "type": "kubernetes.io/tls", "stringData": data}
    await core.create_namespaced_secret(pods.namespace, secret)
    tls = TlsConfig(ca=str(tmp_path / "ca.crt"), server_name=served, secret_name=name, **own)
    try:
        async with managed(tls=tls) as manager:
            client = await manager.get_client(session)
            assert await output(client, "import os; print(os.environ.get('SANDBOX_TLS_KEY_PATH'))") == "None"
    finally:
        await core.delete_namespaced_secret(name, pods.namespace)


async def test_a_quota_on_sandboxes(session: str, restricted: str, pods: Pods) -> None:
    core = CoreV1Api(pods.api)
    hard = {"count/sandboxes.agents.x-k8s.io": "0"}
    await core.create_namespaced_resource_quota(
        restricted, {"metadata": {"name": "sandboxes"}, "spec": {"hard": hard}}
    )

    async def counted() -> bool:
        found = await core.read_namespaced_resource_quota("sandboxes", restricted)
        return bool(found.status.hard == hard)

    await until(counted, "the quota to be counted", 60)
    async with managed(namespace=restricted) as manager:
        with pytest.raises(SandboxCapacityError, match="exceeded quota: sandboxes"):
            await manager.get_client(session)
