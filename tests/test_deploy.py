"""The manifests in deploy/ say the same as the code."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Any

import pytest
import yaml

from prodisco_sandbox import SandboxManagerConfig
from prodisco_sandbox._cluster import manifest

DEPLOY = Path(__file__).parents[1] / "deploy"
BASE = DEPLOY / "base"
API_ACCESS = DEPLOY / "overlays" / "api-access"
WARM_POOL = DEPLOY / "overlays" / "warm-pool"


def objects(*paths: Path) -> dict[tuple[str, str], dict[str, Any]]:
    found = [item for path in paths for item in yaml.safe_load_all(path.read_text())]
    return {(item["kind"], item["metadata"]["name"]): item for item in found}


def base() -> dict[tuple[str, str], dict[str, Any]]:
    listed = yaml.safe_load((BASE / "kustomization.yaml").read_text())["resources"]
    assert sorted([*listed, "kustomization.yaml"]) == sorted(path.name for path in BASE.iterdir())
    return objects(*(BASE / name for name in listed))


def default_pod() -> dict[str, Any]:
    body = manifest.SANDBOX.body(SandboxManagerConfig(mode="multi"), "v1beta1", "sandbox-1", "5e")
    template: dict[str, Any] = body["spec"]["podTemplate"]
    return template


def warm_pool() -> dict[tuple[str, str], dict[str, Any]]:
    """The objects that the overlay adds to the base."""
    return objects(WARM_POOL / "template.yaml", WARM_POOL / "pool.yaml")


def warm_pod() -> dict[str, Any]:
    template: dict[str, Any] = warm_pool()["SandboxTemplate", "python"]["spec"]["podTemplate"]
    return template


def test_everything_is_in_the_default_namespace() -> None:
    namespace = SandboxManagerConfig(mode="multi").namespace
    for (kind, name), item in (base() | warm_pool()).items():
        assert (name if kind == "Namespace" else item["metadata"]["namespace"]) == namespace
    [subject] = base()["RoleBinding", "sandbox-manager"]["subjects"]
    assert subject == {"kind": "ServiceAccount", "name": "mcp-server", "namespace": namespace}


def test_the_manager_may_do_what_it_does_and_nothing_else() -> None:
    assert base()["Role", "sandbox-manager"]["rules"] == [
        {
            "apiGroups": [manifest.GROUP],
            "resources": [manifest.PLURAL],
            "verbs": ["create", "delete", "get", "list", "patch", "watch"],
        }
    ]
    assert not [name for kind, name in base() if kind in ("ClusterRole", "ClusterRoleBinding")]


def test_a_sandbox_gets_no_token() -> None:
    name = default_pod()["spec"]["serviceAccountName"]
    assert base()["ServiceAccount", name]["automountServiceAccountToken"] is False
    assert "automountServiceAccountToken" not in default_pod()["spec"], "the service account decides"


@pytest.mark.parametrize("warm", [False, True])
def test_the_policies_select_the_managers_pods(warm: bool) -> None:
    labels = (warm_pod() if warm else default_pod())["metadata"]["labels"]
    policies = [*base().items(), *objects(API_ACCESS / "networkpolicy.yaml").items()]
    selectors = [item["spec"]["podSelector"] for (kind, _), item in policies if kind == "NetworkPolicy"]
    assert len(selectors) == 3
    for selector in selectors:
        assert selector["matchLabels"]
        assert selector["matchLabels"].items() <= labels.items()


def test_only_the_mcp_server_reaches_a_sandbox_and_only_its_port() -> None:
    spec = base()["NetworkPolicy", "sandbox-ingress"]["spec"]
    assert spec["policyTypes"] == ["Ingress"]
    [rule] = spec["ingress"]
    assert rule["from"] == [{"podSelector": {"matchLabels": {"prodisco.dev/role": "mcp-server"}}}]
    [port] = default_pod()["spec"]["containers"][0]["ports"]
    assert rule["ports"] == [{"protocol": port["protocol"], "port": port["containerPort"]}]
    assert "prodisco.dev/role" not in default_pod()["metadata"]["labels"]


def reaches(address: str, port: int, rule: dict[str, Any]) -> bool:
    """Whether an egress rule lets TCP through to an address that is no pod's."""
    if "ports" in rule and {"protocol": "TCP", "port": port} not in rule["ports"]:
        return False
    ip = ipaddress.ip_address(address)
    return any(
        ip in ipaddress.ip_network(block["cidr"])
        and not any(ip in ipaddress.ip_network(hole) for hole in block.get("except", ()))
        for block in (peer["ipBlock"] for peer in rule["to"] if "ipBlock" in peer)
    )


@pytest.mark.parametrize(
    ("address", "reached"),
    [
        ("93.184.215.14", True),
        ("2606:4700:4700::1111", True),
        # Metadata services: AWS, Google, Azure; Azure's wire server; Alibaba; and by NAT64.
        ("169.254.169.254", False),
        ("fd00:ec2::254", False),
        ("fd20:ce::254", False),
        ("168.63.129.16", False),
        ("100.100.100.200", False),
        ("64:ff9b::a9fe:a9fe", False),
        # Where pods, services, nodes and the API server are.
        ("10.96.0.1", False),
        ("172.18.0.2", False),
        ("192.168.49.2", False),
        ("100.64.0.1", False),
        ("fd00::1", False),
        ("fe80::1", False),
        ("127.0.0.1", False),
        ("::1", False),
    ],
)
def test_a_sandbox_reaches_the_internet_and_nothing_private(address: str, reached: bool) -> None:
    spec = base()["NetworkPolicy", "sandbox-egress"]["spec"]
    assert spec["policyTypes"] == ["Egress"]
    assert any(reaches(address, 443, rule) for rule in spec["egress"]) is reached


def test_the_overlay_opens_one_address_and_mounts_the_token() -> None:
    kustomization = yaml.safe_load((API_ACCESS / "kustomization.yaml").read_text())
    assert kustomization["resources"] == ["../../base", "networkpolicy.yaml"]
    [patch] = kustomization["patches"]
    assert patch["target"] == {"kind": "ServiceAccount", "name": default_pod()["spec"]["serviceAccountName"]}
    assert yaml.safe_load(patch["patch"]) == [
        {"op": "replace", "path": "/automountServiceAccountToken", "value": True}
    ]
    [policy] = objects(API_ACCESS / "networkpolicy.yaml").values()
    [rule] = policy["spec"]["egress"]
    assert reaches("192.0.2.1", 6443, rule)
    assert not reaches("192.0.2.2", 6443, rule)
    assert not reaches("192.0.2.1", 443, rule)


def test_a_warm_pod_is_the_default_one_with_a_probe() -> None:
    template = warm_pool()["SandboxTemplate", "python"]["spec"]
    assert template.keys() == {"networkPolicyManagement", "podTemplate"}
    assert template["networkPolicyManagement"] == "Unmanaged", "deploy/base has the policies"
    pod = warm_pod()
    # A pod of the pool belongs to no session yet.
    shared = {"app": "sandbox-server", "prodisco.dev/managed-by": "mcp-server"}
    assert shared.items() <= default_pod()["metadata"]["labels"].items()
    assert pod["metadata"] == {"labels": shared}
    [container] = pod["spec"]["containers"]
    [port] = container["ports"]
    assert container.pop("readinessProbe") == {
        "tcpSocket": {"port": port["containerPort"]},
        "periodSeconds": 1,
    }
    assert pod["spec"] == default_pod()["spec"]


def test_the_pool_is_made_of_the_template() -> None:
    pool = warm_pool()["SandboxWarmPool", "python"]
    assert pool["spec"]["sandboxTemplateRef"] == {"name": "python"}
    assert {item["apiVersion"] for item in warm_pool().values()} == {"extensions.agents.x-k8s.io/v1beta1"}


def test_the_warm_pool_overlay_adds_claims_to_the_managers_role() -> None:
    kustomization = yaml.safe_load((WARM_POOL / "kustomization.yaml").read_text())
    assert kustomization["resources"] == ["../../base", "template.yaml", "pool.yaml"]
    image = default_pod()["spec"]["containers"][0]["image"]
    assert [f"{entry['name']}:{entry['newTag']}" for entry in kustomization["images"]] == [image]
    [patch] = kustomization["patches"]
    assert ("Role", patch["target"]["name"]) in base()
    [operation] = yaml.safe_load(patch["patch"])
    assert operation == {
        "op": "add",
        "path": "/rules/-",
        "value": {
            "apiGroups": ["extensions.agents.x-k8s.io"],
            "resources": ["sandboxclaims"],
            "verbs": ["create", "delete", "get", "list", "patch", "watch"],
        },
    }
