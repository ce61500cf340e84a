"""The manifests in deploy/ say the same as the code."""

from __future__ import annotations

import ipaddress
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from prodisco_sandbox import SandboxManagerConfig
from prodisco_sandbox._cluster import manifest
from prodisco_sandbox.mcp._auth import read_auth_options, server_auth
from prodisco_sandbox.mcp._options import HANDLE_SECRET, make_parser
from prodisco_sandbox.mcp._serve import CLOSE_TIMEOUT, SETTLE_TIME
from tests.support import ROOT

DEPLOY = ROOT / "deploy"
BASE = DEPLOY / "base"
API_ACCESS = DEPLOY / "overlays" / "api-access"
WARM_POOL = DEPLOY / "overlays" / "warm-pool"
MCP_SERVER = DEPLOY / "overlays" / "mcp-server"


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


def mcp_server() -> dict[tuple[str, str], dict[str, Any]]:
    """The objects that the overlay adds to the base."""
    listed = yaml.safe_load((MCP_SERVER / "kustomization.yaml").read_text())["resources"]
    assert listed[0] == "../../base"
    assert sorted([*listed[1:], "kustomization.yaml"]) == sorted(path.name for path in MCP_SERVER.iterdir())
    return objects(*(MCP_SERVER / name for name in listed[1:]))


def mcp_pod() -> dict[str, Any]:
    template: dict[str, Any] = mcp_server()["Deployment", "mcp-server"]["spec"]["template"]
    return template


def mcp_container() -> dict[str, Any]:
    [container] = mcp_pod()["spec"]["containers"]
    return dict(container)


def mcp_environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Sets what the pod of the MCP server has in its environment; returns what is not plain text."""
    for name in [name for name in os.environ if name.startswith("SANDBOX_")]:
        monkeypatch.delenv(name)
    sources = {}
    for entry in mcp_container()["env"]:
        if "value" in entry:
            monkeypatch.setenv(entry["name"], entry["value"])
        else:
            sources[entry["name"]] = entry["valueFrom"]
    return sources


def test_everything_is_in_the_default_namespace() -> None:
    namespace = SandboxManagerConfig(mode="multi").namespace
    for (kind, name), item in (base() | warm_pool() | mcp_server()).items():
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


def test_the_replicas_share_their_sessions_and_their_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = mcp_environment(monkeypatch)
    assert sources == {
        HANDLE_SECRET: {"secretKeyRef": {"name": "sandbox-handles", "key": "secret"}},
        "SANDBOX_NAMESPACE": {"fieldRef": {"fieldPath": "metadata.namespace"}},
    }
    config = SandboxManagerConfig.from_env(mode="multi")
    assert (config.shared, config.instance_id) == (True, "mcp-server")
    assert config.sandbox_image == SandboxManagerConfig(mode="multi").sandbox_image
    hard = mcp_server()["ResourceQuota", "sandboxes"]["spec"]["hard"]
    assert hard == {f"count/{manifest.PLURAL}.{manifest.GROUP}": str(config.max_sessions)}
    assert mcp_server()["Deployment", "mcp-server"]["spec"]["replicas"] == 3


def test_the_program_authenticates_by_the_mounted_tokens(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mcp_environment(monkeypatch)
    args = make_parser().parse_args(mcp_container()["args"])
    assert (args.kubernetes, args.transport, args.language, args.path) == (True, "http", "Python", "/mcp")
    read_auth_options(args, os.environ)
    [mount], [volume] = mcp_container()["volumeMounts"], mcp_pod()["spec"]["volumes"]
    assert mount["readOnly"]
    directory, _, name = args.auth_token_file.rpartition("/")
    assert (directory, mount["name"]) == (mount["mountPath"], volume["name"])
    assert volume["secret"]["secretName"] == "sandbox-tokens"

    # As kubelet makes it: of root, and of the group fsGroup.
    tokens = tmp_path / name
    tokens.write_text("me " + "5e" * 32 + "\n")
    tokens.chmod(volume["secret"]["defaultMode"])
    assert volume["secret"]["defaultMode"] == 0o440
    assert mcp_pod()["spec"]["securityContext"]["fsGroup"] == 65532
    args.auth_token_file = str(tokens)
    assert server_auth(args, args.host, args.port)["token_verifier"]


def test_no_secret_is_in_the_repository_and_the_commands_make_those_that_are_used() -> None:
    everything = objects(*(path for path in DEPLOY.rglob("*.yaml") if path.name != "kustomization.yaml"))
    assert not [name for kind, name in everything if kind == "Secret"]
    commands = (MCP_SERVER / "kustomization.yaml").read_text()
    assert re.findall(r"create secret generic (\S+) -n prodisco (--from-\w+=\w+)", commands) == [
        ("sandbox-handles", "--from-literal=secret"),
        ("sandbox-tokens", "--from-file=tokens"),
    ]


def test_no_call_is_cut_by_a_rolling_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """New pods are ready before old ones leave; those get no more requests, and finish what they have."""
    mcp_environment(monkeypatch)
    spec, container = mcp_pod()["spec"], mcp_container()
    rolling = mcp_server()["Deployment", "mcp-server"]["spec"]["strategy"]["rollingUpdate"]
    assert rolling["maxUnavailable"] == 0
    args = make_parser().parse_args(container["args"])
    assert args.drain_timeout > 120, "the longest call that the tool allows"
    command, pause = container["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    probe = container["readinessProbe"]
    assert float(pause) > probe["periodSeconds"] * probe["failureThreshold"]
    shutdown = SandboxManagerConfig.from_env(mode="multi").shutdown_timeout
    needed = float(pause) + args.drain_timeout + SETTLE_TIME + CLOSE_TIMEOUT + shutdown
    assert spec["terminationGracePeriodSeconds"] >= needed


def test_the_probes_and_the_service_lead_to_the_program() -> None:
    container = mcp_container()
    [port] = container["ports"]
    assert port["containerPort"] == make_parser().parse_args(container["args"]).port
    probes = {kind: container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")}
    assert probes == {
        "startup": {"path": "/healthz", "port": port["name"]},
        "readiness": {"path": "/readyz", "port": port["name"]},
        "liveness": {"path": "/healthz", "port": port["name"]},
    }
    service = mcp_server()["Service", "mcp-server"]["spec"]
    assert service == {
        "selector": {"app": "mcp-server"},
        "ports": [{"name": "http", "port": 8000, "targetPort": port["name"], "protocol": "TCP"}],
    }


def test_the_replicas_are_selected_spread_and_kept_up() -> None:
    added, labels = mcp_server(), mcp_pod()["metadata"]["labels"]
    own = {"matchLabels": {"app": "mcp-server"}}
    assert own["matchLabels"].items() <= labels.items()
    assert added["Deployment", "mcp-server"]["spec"]["selector"] == own
    assert added["PodDisruptionBudget", "mcp-server"]["spec"] == {"maxUnavailable": 1, "selector": own}
    spread = mcp_pod()["spec"]["topologySpreadConstraints"]
    assert [each["topologyKey"] for each in spread] == [
        "kubernetes.io/hostname",
        "topology.kubernetes.io/zone",
    ]
    assert all(each["labelSelector"] == own for each in spread)
    [rule] = base()["NetworkPolicy", "sandbox-ingress"]["spec"]["ingress"]
    assert rule["from"][0]["podSelector"]["matchLabels"].items() <= labels.items()
    [subject] = base()["RoleBinding", "sandbox-manager"]["subjects"]
    assert mcp_pod()["spec"]["serviceAccountName"] == subject["name"]


def test_the_program_runs_as_nobody_in_particular() -> None:
    spec, container = mcp_pod()["spec"], mcp_container()
    assert spec["securityContext"]["runAsNonRoot"]
    dockerfile = (DEPLOY.parent / "Dockerfile").read_text()
    ids = (spec["securityContext"]["runAsUser"], spec["securityContext"]["runAsGroup"])
    assert set(re.findall(r"^USER (\d+):(\d+)$", dockerfile, re.MULTILINE)) == {tuple(map(str, ids))}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    kustomization = yaml.safe_load((MCP_SERVER / "kustomization.yaml").read_text())
    assert [f"{e['name']}:{e['newTag']}" for e in kustomization["images"]] == [container["image"]]
    assert "FROM base AS mcp-server" in dockerfile


def test_only_chosen_namespaces_reach_the_program_and_it_reaches_the_sandboxes() -> None:
    spec = mcp_server()["NetworkPolicy", "mcp-server"]["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    [into] = spec["ingress"]
    assert into["from"] == [{"namespaceSelector": {"matchLabels": {"prodisco.dev/mcp-clients": "true"}}}]
    assert into["ports"] == [{"protocol": "TCP", "port": mcp_container()["ports"][0]["containerPort"]}]
    [namespace] = [item for (kind, _), item in base().items() if kind == "Namespace"]
    assert "prodisco.dev/mcp-clients" not in namespace["metadata"]["labels"], "sandboxes are in there"
    to_sandbox, to_dns, to_others = spec["egress"]
    [sandboxes] = to_sandbox["to"]
    assert sandboxes["podSelector"]["matchLabels"].items() <= default_pod()["metadata"]["labels"].items()
    [port] = default_pod()["spec"]["containers"][0]["ports"]
    assert to_sandbox["ports"] == [{"protocol": port["protocol"], "port": port["containerPort"]}]
    assert to_dns == base()["NetworkPolicy", "sandbox-egress"]["spec"]["egress"][0]
    assert "to" not in to_others
    assert [each["port"] for each in to_others["ports"]] == [443, 6443]
