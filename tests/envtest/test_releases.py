"""The definitions of real releases of agent-sandbox, where AGENT_SANDBOX_CRDS names their directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prodisco_sandbox import SandboxFailedError, SandboxManagerConfig, TlsConfig
from prodisco_sandbox._cluster.manifest import SANDBOX
from tests.support.envtest import GROUP, PLURAL, Namespace, examples
from tests.support.sandbox_crd import real_crd

from .test_lifecycle import live

pytestmark = pytest.mark.envtest

SERVED = {
    "sandboxes-v0.4.5.yaml": "v1alpha1",
    "sandboxes-v0.4.6.yaml": "v1alpha1",
    "sandboxes-v0.5.6.yaml": "v1beta1",
    "sandboxes-v1beta1-only.yaml": "v1beta1",
}
"""The newest version that each release of agent-sandbox serves."""


def each_release() -> list[Any]:
    cases = []
    for name, version in SERVED.items():
        path = real_crd(name)
        skip = pytest.mark.skipif(path is None, reason="AGENT_SANDBOX_CRDS is not set")
        cases.append(pytest.param(path, version, id=name, marks=skip))
    return cases


@pytest.mark.parametrize(("definition", "version"), each_release())
async def test_a_session_lives_on_each_release(namespace: Namespace, definition: Path) -> None:
    await live(namespace, api_version="auto")
    for tls in (None, TlsConfig(ca="ca.crt", cert="tls.crt", key="tls.key", secret_name="sandbox-tls")):
        await nothing_is_pruned(namespace, tls, service=definition.name != "sandboxes-v0.4.5.yaml")


async def nothing_is_pruned(namespace: Namespace, tls: TlsConfig | None, *, service: bool) -> None:
    """A field that a definition does not know vanishes without a word."""
    config = SandboxManagerConfig(mode="multi", namespace=namespace.name, tls=tls)
    body = SANDBOX.body(config, namespace.version, "whole", "0" * 40, "2100-01-01T00:00:00Z")
    await namespace.api.create_namespaced_custom_object(
        GROUP, namespace.version, namespace.name, PLURAL, body
    )
    stored = (await namespace.get("whole"))["spec"]
    await namespace.delete("whole")
    if not service:  # Up to 0.4.5 there is always a Service, and no field to ask for it.
        assert "service" not in stored
        body["spec"].pop("service")
    assert stored == body["spec"]


WRONG = {
    "containerPort": {"name": "sandbox", "ports": [{"containerPort": "grpc"}]},
    "imagePullPolicy": {"name": "sandbox", "imagePullPolicy": 1},
    r"env\S*name": {"name": "sandbox", "env": [{"value": "1"}]},
}


@pytest.mark.parametrize(("definition", "version"), each_release()[-1:])
async def test_what_is_wrong_in_a_container_is_named(namespace: Namespace) -> None:
    for said, container in WRONG.items():
        async with namespace.managed(pod_template_spec={"spec": {"containers": [container]}}) as manager:
            with pytest.raises(SandboxFailedError, match=said) as raised:
                await manager.get_client("session")
            assert raised.value.status == 422


@pytest.mark.parametrize(("definition", "version"), each_release()[-1:])
async def test_the_documents_pod_template_keeps_every_field(namespace: Namespace) -> None:
    found: dict[str, Any] = {"TlsConfig": TlsConfig}
    for example in examples("python"):
        exec(example, found)
    template, tls = found["pod_template_spec"], found["tls"]
    config = SandboxManagerConfig(mode="multi", namespace=namespace.name, pod_template_spec=template, tls=tls)
    body = SANDBOX.body(config, namespace.version, "documented", "0" * 40)
    made = await namespace.api.create_namespaced_custom_object(
        GROUP, namespace.version, namespace.name, PLURAL, body
    )
    assert made["spec"]["podTemplate"] == body["spec"]["podTemplate"]
