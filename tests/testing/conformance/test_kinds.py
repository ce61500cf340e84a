"""What holds for claims, pools and templates on an API server, fake or real."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest

from tests.support.api import MERGE, Cluster, Object, lean, refusal

EXTENSIONS = "extensions.agents.x-k8s.io"
POD_TEMPLATE = {"spec": {"containers": [{"name": "sandbox"}]}}
SPECS: dict[str, tuple[str, Object, Object]] = {
    # Plural: kind, a spec, and what the server adds to it.
    "sandboxclaims": (
        "SandboxClaim",
        {"warmPoolRef": {"name": "p"}, "lifecycle": {"ttlSecondsAfterFinished": 5}},
        {"lifecycle": {"ttlSecondsAfterFinished": 5, "shutdownPolicy": "Retain"}},
    ),
    "sandboxwarmpools": (
        "SandboxWarmPool",
        {"sandboxTemplateRef": {"name": "t"}, "updateStrategy": {}},
        {"replicas": 1, "updateStrategy": {"type": "OnReplenish"}},
    ),
    "sandboxtemplates": (
        "SandboxTemplate",
        {"podTemplate": POD_TEMPLATE},
        {
            "envVarsInjectionPolicy": "Disallowed",
            "networkPolicyManagement": "Managed",
            "volumeClaimTemplatesPolicy": "Disallowed",
        },
    ),
}
MISTAKES = [
    ("sandboxclaims", {"warmPoolRef": None}, "spec.warmPoolRef"),
    ("sandboxclaims", {"warmPoolRef": {}}, "spec.warmPoolRef.name"),
    ("sandboxclaims", {"warmPoolRef": "p"}, "spec.warmPoolRef"),
    ("sandboxclaims", {"warmPoolRef": {"name": 1}}, "spec.warmPoolRef.name"),
    ("sandboxclaims", {"lifecycle": {"shutdownTime": "soon"}}, "spec.lifecycle.shutdownTime"),
    ("sandboxclaims", {"lifecycle": {"shutdownPolicy": "Remove"}}, "spec.lifecycle.shutdownPolicy"),
    (
        "sandboxclaims",
        {"lifecycle": {"ttlSecondsAfterFinished": -1}},
        "spec.lifecycle.ttlSecondsAfterFinished",
    ),
    ("sandboxclaims", {"env": [{"name": "A"}]}, "spec.env[0].value"),
    ("sandboxclaims", {"volumeClaimTemplates": [{}]}, "spec.volumeClaimTemplates[0].spec"),
    ("sandboxclaims", {"additionalPodMetadata": []}, "spec.additionalPodMetadata"),
    ("sandboxwarmpools", {"replicas": -1}, "spec.replicas"),
    ("sandboxwarmpools", {"replicas": "2"}, "spec.replicas"),
    ("sandboxwarmpools", {"sandboxTemplateRef": None}, "spec.sandboxTemplateRef"),
    ("sandboxwarmpools", {"updateStrategy": {"type": "Now"}}, "spec.updateStrategy.type"),
    ("sandboxtemplates", {"podTemplate": {}}, "spec.podTemplate.spec"),
    ("sandboxtemplates", {"envVarsInjectionPolicy": "No"}, "spec.envVarsInjectionPolicy"),
]


def at(cluster: Cluster, plural: str) -> tuple[str, str, str, str]:
    return EXTENSIONS, "v1beta1", cluster.namespace, plural


def told(cluster: Cluster, field: str) -> str:
    """A field as the server tells it: without indexes before Kubernetes 1.34."""
    return field if cluster.current else re.sub(r"\[\d+\]", "", field)


def body(plural: str, name: str = "a", **changes: Any) -> Object:
    kind, spec, _ = SPECS[plural]
    own = {"apiVersion": f"{EXTENSIONS}/v1beta1", "kind": kind, "metadata": {"name": name}}
    return {**own, "spec": copy.deepcopy(spec) | changes}


class TestKinds:
    @pytest.fixture
    def extended(self, cluster: Cluster) -> Cluster:
        if not cluster.extensions:
            pytest.skip("needs agent-sandbox's definitions, in AGENT_SANDBOX_DIR")
        return cluster

    async def test_the_extensions_are_discovered(self, extended: Cluster) -> None:
        found = await extended.api.get_api_resources(EXTENSIONS, "v1beta1")
        resources = {resource.name: resource for resource in found.resources}
        for plural, (kind, _, _) in SPECS.items():
            assert (resources[plural].kind, resources[plural].namespaced) == (kind, True)
        assert "sandboxclaims/status" in resources
        assert "sandboxtemplates/status" not in resources

    @pytest.mark.parametrize("plural", SPECS)
    async def test_each_kind_lives_by_itself(self, extended: Cluster, plural: str) -> None:
        api, here, (kind, spec, added) = extended.api, at(extended, plural), SPECS[plural]
        created = lean(await api.create_namespaced_custom_object(*here, body(plural)))
        assert created["spec"] == {**spec, **added}
        listed = lean(await api.list_namespaced_custom_object(*here))
        assert (listed["kind"], listed["items"]) == (f"{kind}List", [created])
        assert await extended.list_() == {**await extended.list_(), "items": []}
        error = await refusal(api.create_namespaced_custom_object(*here, body(plural)), 409)
        assert error["message"] == f'{plural}.{EXTENSIONS} "a" already exists'
        patch = {"metadata": {"labels": {"a": "b"}}}
        patched = await api.patch_namespaced_custom_object(*here, "a", patch, _content_type=MERGE)
        assert patched["metadata"]["generation"] == 1
        precondition = {"preconditions": {"uid": "other"}}
        error = await refusal(api.delete_namespaced_custom_object(*here, "a", body=precondition), 409)
        assert error["message"].startswith(f'Operation cannot be fulfilled on {kind}.{EXTENSIONS} "a"')
        await api.delete_namespaced_custom_object(*here, "a")
        error = await refusal(api.get_namespaced_custom_object(*here, "a"), 404)
        assert error["message"] == f'{plural}.{EXTENSIONS} "a" not found'
        assert error["details"] == {"name": "a", "group": EXTENSIONS, "kind": plural}
        error = await refusal(extended.nobody.list_namespaced_custom_object(*here), 403)
        assert f'cannot list resource "{plural}" in API group "{EXTENSIONS}"' in error["message"]

    @pytest.mark.parametrize(("plural", "change", "field"), MISTAKES, ids=str)
    async def test_mistakes_in_each_kind(
        self, extended: Cluster, plural: str, change: Object, field: str
    ) -> None:
        field = told(extended, field)
        answer = extended.api.create_namespaced_custom_object(*at(extended, plural), body(plural, **change))
        error = await refusal(answer, 422)
        # The scale subresource of pools has a word of its own on replicas.
        cause, *others = error["details"]["causes"]
        assert (cause["field"], error["details"]["kind"]) == (field, SPECS[plural][0])
        assert not others or field == "spec.replicas"
        assert error["message"].startswith(f'{SPECS[plural][0]}.{EXTENSIONS} "a" is invalid: ')
        assert f"{field}: {cause['message']}" in error["message"]
        known = {"FieldValueRequired", "FieldValueInvalid", "FieldValueNotSupported", "FieldValueTypeInvalid"}
        assert cause["reason"] in known

    async def test_a_claims_status(self, extended: Cluster) -> None:
        api, here = extended.api, at(extended, "sandboxclaims")
        await api.create_namespaced_custom_object(*here, body("sandboxclaims"))
        status = {"sandbox": {"name": "s", "podIPs": ["10.0.0.1"]}}
        change = {"status": status}
        patched = await api.patch_namespaced_custom_object_status(*here, "a", change, _content_type=MERGE)
        assert patched["status"] == status
        wrong = {"status": {"sandbox": {"podIPs": ["10.0.0.1", 5]}}}
        answer = api.patch_namespaced_custom_object_status(*here, "a", wrong, _content_type=MERGE)
        (cause,) = (await refusal(answer, 422))["details"]["causes"]
        assert cause["field"] == told(extended, "status.sandbox.podIPs[1]")
