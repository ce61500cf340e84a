"""A real API server takes the manifests of deploy/ and the examples of docs/kubernetes.md."""

from __future__ import annotations

import pytest
import yaml

from tests.support.envtest import DEPLOY, AuditedServer, accepted, examples

pytestmark = pytest.mark.envtest


@pytest.fixture(scope="module")
def prodisco(server: AuditedServer) -> AuditedServer:
    """A dry run does not make the namespace that the other objects are in."""
    server.kubectl("apply", "-f", str(DEPLOY / "base" / "namespace.yaml"))
    return server


@pytest.mark.parametrize("directory", ["base", "overlays/api-access"])
def test_the_manifests_are_accepted(prodisco: AuditedServer, directory: str) -> None:
    kinds = accepted(prodisco, "-k", str(DEPLOY / directory))
    assert kinds == {"namespace", "serviceaccount", "role", "rolebinding", "networkpolicy"}


def test_the_mcp_server_s_manifests_are_accepted(prodisco: AuditedServer) -> None:
    items = list(yaml.safe_load_all(prodisco.kubectl("kustomize", str(DEPLOY / "overlays" / "mcp-server"))))
    if prodisco.status("/apis/policy/v1") == 404:  # since 1.21
        (budget,) = [item for item in items if item["kind"] == "PodDisruptionBudget"]
        budget["apiVersion"] = "policy/v1beta1"
    added = {"deployment", "service", "poddisruptionbudget", "resourcequota"}
    base = {"namespace", "serviceaccount", "role", "rolebinding", "networkpolicy"}
    assert accepted(prodisco, "-f", "-", text=yaml.safe_dump_all(items)) == base | added


def test_the_documents_manifests_are_accepted(prodisco: AuditedServer) -> None:
    found = [yaml.safe_load(example) for example in examples("yaml")]
    kinds = {document["kind"].lower(): document for document in found}
    # cert-manager's own kinds need its definitions.
    assert kinds.pop("certificate")["apiVersion"] == "cert-manager.io/v1"
    # tests/controller applies it.
    assert kinds.pop("kustomization")["resources"] == ["../warm-pool"]
    assert set(kinds) == {"statefulset", "runtimeclass", "horizontalpodautoscaler", "resourcequota"}
    if prodisco.status("/apis/autoscaling/v2") == 404:
        assert kinds.pop("horizontalpodautoscaler")["apiVersion"] == "autoscaling/v2"  # since 1.23
    assert accepted(prodisco, "-f", "-", text=yaml.safe_dump_all(kinds.values())) == set(kinds)
    labels = kinds["statefulset"]["spec"]["template"]["metadata"]["labels"]
    policy = yaml.safe_load_all((DEPLOY / "base" / "networkpolicy.yaml").read_text())
    let_in = next(policy)["spec"]["ingress"][0]["from"][0]["podSelector"]["matchLabels"]
    assert let_in.items() <= labels.items()
