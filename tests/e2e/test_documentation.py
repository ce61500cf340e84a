"""What docs/kubernetes.md shows, on real pods."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes_asyncio.client import ApiException, CoreV1Api, NodeV1Api

from prodisco_sandbox import SandboxCapacityError
from tests.support.envtest import examples
from tests.support.patience import until
from tests.support.pods import GONE, Pods, managed, output, tls_secret

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
    async with tls_secret(pods, tmp_path, mutual=mutual) as tls, managed(tls=tls) as manager:
        client = await manager.get_client(session)
        assert await output(client, "import os; print(os.environ.get('SANDBOX_TLS_KEY_PATH'))") == "None"


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("sandboxes.agents.x-k8s.io", {}),
        ("sandboxclaims.extensions.agents.x-k8s.io", {"warm_pool": "any"}),
    ],
    ids=["sandboxes", "claims"],
)
async def test_a_quota(
    session: str, restricted: str, pods: Pods, kind: str, settings: dict[str, Any]
) -> None:
    core = CoreV1Api(pods.api)
    hard = {f"count/{kind}": "0"}
    await core.create_namespaced_resource_quota(
        restricted, {"metadata": {"name": "sandboxes"}, "spec": {"hard": hard}}
    )

    async def counted() -> bool:
        found = await core.read_namespaced_resource_quota("sandboxes", restricted)
        return bool(found.status.hard == hard)

    await until(counted, "the quota to be counted", 60)
    async with managed(namespace=restricted, **settings) as manager:
        with pytest.raises(SandboxCapacityError, match="exceeded quota: sandboxes"):
            await manager.get_client(session)
