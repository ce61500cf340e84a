"""deploy/overlays/warm-pool on a real API server, with the real controller filling the pool."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes_asyncio.client import AuthorizationV1Api, CoreV1Api, CustomObjectsApi

from prodisco_sandbox import SandboxManagerConfig, TlsConfig
from prodisco_sandbox._cluster.manifest import SANDBOX
from tests.support.controller import ControlPlane, condition
from tests.support.envtest import CLAIMS, DEPLOY, EXTENSIONS, Object, accepted, connected, examples
from tests.support.patience import PATIENCE, until

pytestmark = pytest.mark.controller

OVERLAY = DEPLOY / "overlays" / "warm-pool"
NAMESPACE = "prodisco"
AT = (EXTENSIONS, "v1beta1", NAMESPACE)
ACCOUNT = f"system:serviceaccount:{NAMESPACE}:mcp-server"


@pytest.fixture
async def api(control_plane: ControlPlane) -> AsyncIterator[CustomObjectsApi]:
    """The administrator's, with the namespace there, which a dry run does not make."""
    control_plane.kubectl("apply", "-f", str(DEPLOY / "base" / "namespace.yaml"))
    async with connected(control_plane) as api:
        yield api
    control_plane.kubectl("delete", "namespace", NAMESPACE, f"--timeout={PATIENCE:.0f}s")


async def test_the_overlay_makes_a_pool(api: CustomObjectsApi, control_plane: ControlPlane) -> None:
    kinds = accepted(control_plane, "-k", str(OVERLAY))
    base = {"namespace", "serviceaccount", "role", "rolebinding", "networkpolicy"}
    assert kinds == {*base, "sandboxtemplate", "sandboxwarmpool"}

    # Pods of other test runs have the same addresses.
    text = control_plane.kubectl("kustomize", str(OVERLAY)).replace("50051", str(control_plane.sandbox_port))
    control_plane.kubectl("apply", "--server-side", "-f", "-", text=text)
    written = {item["kind"]: item for item in yaml.safe_load_all(text)}
    template = await stored(api, "sandboxtemplates")
    assert template["spec"] == {
        **written["SandboxTemplate"]["spec"],
        "envVarsInjectionPolicy": "Disallowed",
        "volumeClaimTemplatesPolicy": "Disallowed",
    }
    pool = await stored(api, "sandboxwarmpools")
    assert pool["spec"] == written["SandboxWarmPool"]["spec"]
    await check_rights(api)
    await until(lambda: filled(api), "the pool to fill")

    claim: Object = {"metadata": {"name": "a-session"}, "spec": {"warmPoolRef": {"name": "python"}}}
    claim |= {"apiVersion": "/".join(AT[:2]), "kind": "SandboxClaim"}
    await api.create_namespaced_custom_object(*AT, CLAIMS, claim)

    async def bound() -> bool:
        return condition(await stored(api, CLAIMS, "a-session")).get("status") == "True"

    await until(bound, "the claim to be bound")
    taken = (await stored(api, CLAIMS, "a-session"))["status"]["sandbox"]["name"]
    assert taken.startswith("python-"), "a member of the pool"
    pod = await CoreV1Api(api.api_client).read_namespaced_pod(taken, NAMESPACE)
    policies = [item for item in yaml.safe_load_all(text) if item["kind"] == "NetworkPolicy"]
    assert len(policies) == 2
    for policy in policies:
        assert policy["spec"]["podSelector"]["matchLabels"].items() <= pod.metadata.labels.items()
    control_plane.kubectl("scale", "sandboxwarmpool", "python", "--replicas=0", f"--namespace={NAMESPACE}")
    await until(lambda: filled(api, 0), "the scale subresource to empty the pool")


def test_the_documents_overlay_gives_the_pool_tls(control_plane: ControlPlane, tmp_path: Path) -> None:
    shutil.copytree(DEPLOY, tmp_path / "deploy")
    [text] = [example for example in examples("yaml") if "kind: Kustomization" in example]
    overlay = tmp_path / "deploy" / "overlays" / "mine"
    overlay.mkdir()
    (overlay / "kustomization.yaml").write_text(text)
    made = yaml.safe_load_all(control_plane.kubectl("kustomize", str(overlay)))
    [pod] = [item["spec"]["podTemplate"] for item in made if item["kind"] == "SandboxTemplate"]
    config = SandboxManagerConfig(mode="multi", tls=TlsConfig(ca="ca.crt", secret_name="sandbox-tls"))
    cold = SANDBOX.body(config, "v1beta1", "any", "any")["spec"]["podTemplate"]
    assert pod["spec"]["containers"][0].pop("readinessProbe")
    for spec in (pod["spec"], cold["spec"]):
        spec["containers"][0]["env"].sort(key=itemgetter("name"))
    assert pod["spec"] == cold["spec"]


async def stored(api: CustomObjectsApi, plural: str, name: str = "python") -> Object:
    found: Object = await api.get_namespaced_custom_object(*AT, plural, name)
    return found


async def filled(api: CustomObjectsApi, members: int = 3) -> bool:
    status = (await stored(api, "sandboxwarmpools")).get("status") or {}
    return (status.get("replicas", 0), status.get("readyReplicas", 0)) == (members, members)


async def check_rights(api: CustomObjectsApi) -> None:
    verbs = ("create", "delete", "deletecollection", "get", "list", "patch", "update", "watch")
    allowed = {verb for verb in verbs if await may(api, verb, CLAIMS)}
    assert allowed == {"create", "delete", "get", "list", "patch", "watch"}
    for plural in ("sandboxwarmpools", "sandboxtemplates"):
        assert not [verb for verb in verbs if await may(api, verb, plural)]
    assert not await may(api, "patch", CLAIMS, subresource="status")


async def may(api: CustomObjectsApi, verb: str, plural: str, **more: Any) -> bool:
    attributes = {"verb": verb, "group": EXTENSIONS, "resource": plural, "namespace": NAMESPACE, **more}
    review = {"spec": {"user": ACCOUNT, "resourceAttributes": attributes}}
    answer = await AuthorizationV1Api(api.api_client).create_subject_access_review(review)
    return bool(answer.status.allowed)
