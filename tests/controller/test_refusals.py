"""What the controller says of a pod that the API server refuses, and how that reads."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from kubernetes_asyncio.client import AdmissionregistrationV1Api

from prodisco_sandbox._cluster.manifest import SANDBOX
from prodisco_sandbox._cluster.refusals import exceeded_quota, permanent_refusal
from tests.support.controller import ControlledNamespace, condition
from tests.support.envtest import GROUP, MERGE_PATCH, PLURAL, Object
from tests.support.patience import PATIENCE

pytestmark = pytest.mark.controller


async def refused(cluster: ControlledNamespace, **spec: Any) -> str:
    """Makes a Sandbox, with these fields in its pod's spec besides: what the controller says of it."""
    body = SANDBOX.body(cluster.config(), cluster.version, "refused", "0" * 40)
    body["spec"]["podTemplate"]["spec"] |= spec
    await cluster.api.create_namespaced_custom_object(GROUP, cluster.version, cluster.name, PLURAL, body)
    async with asyncio.timeout(PATIENCE):
        while (found := condition(await cluster.get("refused"))).get("reason") != "ReconcilerError":
            assert found.get("reason") in (None, "DependenciesNotReady"), found
            await asyncio.sleep(0.02)
    return str(found["message"])


async def made(cluster: ControlledNamespace, kind: str, spec: Object) -> None:
    found = {"apiVersion": "v1", "kind": kind, "metadata": {"name": "rule"}, "spec": spec}
    await cluster.kubectl("create", "-f", "-", text=json.dumps(found))


CONTAINER = {"name": "sandbox", "image": "sandbox"}


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"runtimeClassName": "gvisor"}, 'RuntimeClass "gvisor" not found'),
        ({"priorityClassName": "high"}, "no PriorityClass with name high was found"),
        ({"containers": [{**CONTAINER, "ports": [{"containerPort": 70000}]}]}, "is invalid: spec.containers"),
    ],
)
async def test_what_no_pod_can_have(cluster: ControlledNamespace, spec: Object, said: str) -> None:
    message = await refused(cluster, **spec)
    assert said in message
    assert permanent_refusal(message)


async def test_what_the_namespace_forbids(cluster: ControlledNamespace) -> None:
    labels = {"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "restricted"}}}
    await cluster.core.patch_namespace(cluster.name, labels, _content_type=MERGE_PATCH)
    message = await refused(cluster)
    assert 'violates PodSecurity "restricted:latest"' in message
    assert permanent_refusal(message)


async def test_what_a_limit_range_forbids(cluster: ControlledNamespace) -> None:
    await made(cluster, "LimitRange", {"limits": [{"type": "Container", "max": {"cpu": "100m"}}]})
    message = await refused(cluster)
    assert "maximum cpu usage per Container is 100m" in message
    assert permanent_refusal(message)


async def test_what_a_policy_forbids(cluster: ControlledNamespace) -> None:
    admission = AdmissionregistrationV1Api(cluster.api.api_client)
    name = cluster.name
    rule = {"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}
    policy = {
        "metadata": {"name": name},
        "spec": {
            "matchConstraints": {"resourceRules": [rule]},
            "validations": [{"expression": "false", "message": "not here"}],
        },
    }
    only = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}
    binding = {
        "metadata": {"name": name},
        "spec": {"policyName": name, "validationActions": ["Deny"], "matchResources": only},
    }
    await admission.create_validating_admission_policy(policy)
    await admission.create_validating_admission_policy_binding(binding)
    try:
        await until_forbidden(cluster)
        message = await refused(cluster)
    finally:
        await admission.delete_validating_admission_policy_binding(name)
        await admission.delete_validating_admission_policy(name)
    assert "denied request: not here" in message
    assert permanent_refusal(message)


async def until_forbidden(cluster: ControlledNamespace) -> None:
    pod = {"metadata": {"name": "probe"}, "spec": {"containers": [CONTAINER]}}
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                await cluster.core.create_namespaced_pod(cluster.name, pod, dry_run="All")
            except Exception as e:
                if "denied request" in str(e):
                    return
                raise
            await asyncio.sleep(0.05)


async def test_a_quota_is_a_matter_of_capacity(cluster: ControlledNamespace) -> None:
    await made(cluster, "ResourceQuota", {"hard": {"pods": "0"}})
    async with asyncio.timeout(PATIENCE):
        while not (await cluster.core.read_namespaced_resource_quota("rule", cluster.name)).status.used:
            await asyncio.sleep(0.02)
    message = await refused(cluster)
    assert exceeded_quota(message), message
    assert not permanent_refusal(message)
