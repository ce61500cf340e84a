"""What agent-sandbox's Sandbox looks like: its spec, its pod's template, how it is suspended.

Everything that differs between the API versions of ``agents.x-k8s.io`` is here. The API:
kubernetes-sigs/agent-sandbox.
"""

from __future__ import annotations

import copy
from decimal import Decimal
from typing import Literal

from ..config import SandboxManagerConfig, TlsConfig
from .metadata import Object, conditions, name
from .resource import Machine, Resource

GROUP = "agents.x-k8s.io"
PLURAL = "sandboxes"
KIND = "Sandbox"
API_VERSIONS = ("v1beta1", "v1alpha1")
"""Newest first."""

CACHE_DIR = "/tmp/prodisco-scripts"
WORKSPACE, WORKSPACE_DIR = "workspace", "/workspace"
MOST_WORKSPACE = 2**20
"""The largest limit that the server takes, in MiB."""
GROUP_ID = 65532
"""Group of the image's user. A new volume belongs to root; fsGroup gives it to this group."""
TLS_DIR = "/etc/prodisco/tls"


def sandbox_spec(config: SandboxManagerConfig, api_version: str, labels: dict[str, str]) -> Object:
    """The spec of a new Sandbox; `labels` are those of its pod."""
    template = copy.deepcopy(config.pod_template_spec)
    if template is None:
        template = _default_pod_template(config)
    metadata = template["metadata"] = dict(template.get("metadata") or {})
    metadata["labels"] = {**(metadata.get("labels") or {}), **labels}
    claims = {} if config.workspace_storage is None else {"volumeClaimTemplates": [_workspace_claim(config)]}
    return {
        "podTemplate": template,
        **claims,
        # Since agent-sandbox 0.4.6 there is no Service, hence no serviceFQDN, without it.
        "service": True,
        **({"replicas": 1} if api_version == "v1alpha1" else {"operatingMode": "Running"}),
    }


def _mebibytes(quantity: str) -> int:
    """A quantity of bytes, as the Kubernetes API writes it, in whole MiB."""
    number = quantity.rstrip("EPTGMKkim")
    suffix = quantity[len(number) :]
    base = 1024 if suffix.endswith("i") else 1000
    power = -1 if suffix == "m" else " KMGTPE".index(suffix[:1].upper() or " ")
    return max(1, int(Decimal(number) * Decimal(base) ** power / 2**20))


def _workspace_claim(config: SandboxManagerConfig) -> Object:
    kind = {"storageClassName": config.workspace_storage_class} if config.workspace_storage_class else {}
    resources = {"requests": {"storage": config.workspace_storage}}
    return {
        "metadata": {"name": WORKSPACE},
        "spec": {"accessModes": ["ReadWriteOnce"], **kind, "resources": resources},
    }


def _default_pod_template(config: SandboxManagerConfig) -> Object:
    container: Object = {
        "name": "sandbox",
        "image": config.sandbox_image,
        "imagePullPolicy": "IfNotPresent",
        "ports": [{"name": "grpc", "containerPort": config.sandbox_port, "protocol": "TCP"}],
        "env": [
            {"name": "SANDBOX_USE_TCP", "value": "true"},
            {"name": "SANDBOX_TCP_HOST", "value": "0.0.0.0"},  # noqa: S104 - inside its pod
            {"name": "SANDBOX_TCP_PORT", "value": str(config.sandbox_port)},
            {"name": "SCRIPTS_CACHE_DIR", "value": CACHE_DIR},
            {"name": "SANDBOX_POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
            *_tls_env(config.tls),
        ],
        "resources": {
            "requests": {"memory": "128Mi", "cpu": "100m"},
            # A lower CPU limit holds up the server's start, most of it one thread's work.
            "limits": {"memory": "512Mi", "cpu": "1", "ephemeral-storage": "1Gi"},
        },
        "volumeMounts": [{"name": "scripts-cache", "mountPath": CACHE_DIR}],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
    volumes: list[Object] = [{"name": "scripts-cache", "emptyDir": {"sizeLimit": "256Mi"}}]
    if config.tls is not None:
        container["volumeMounts"].append({"name": "tls", "mountPath": TLS_DIR, "readOnly": True})
        volumes.append({"name": "tls", "secret": {"secretName": config.tls.secret_name}})
    spec: Object = {
        "serviceAccountName": "sandbox-server",
        # A container restarted in place would be an empty machine that looks like the old one.
        "restartPolicy": "Never",
        # Until the pod is gone its name is taken, and a session that comes back waits.
        "terminationGracePeriodSeconds": 5,
        "containers": [container],
        "volumes": volumes,
    }
    if config.workspace_storage is not None:
        size = str(min(_mebibytes(config.workspace_storage), MOST_WORKSPACE))
        container["env"].append({"name": "SANDBOX_WORKSPACE", "value": WORKSPACE_DIR})
        container["env"].append({"name": "SANDBOX_WORKSPACE_LIMIT_MB", "value": size})
        container["volumeMounts"].append({"name": WORKSPACE, "mountPath": WORKSPACE_DIR})
        spec["securityContext"] = {"fsGroup": GROUP_ID, "fsGroupChangePolicy": "OnRootMismatch"}
    return {"spec": spec}


def _tls_env(tls: TlsConfig | None) -> list[Object]:
    if tls is None:
        return [{"name": "SANDBOX_TRANSPORT_MODE", "value": "insecure"}]
    env = [
        {"name": "SANDBOX_TRANSPORT_MODE", "value": tls.mode},
        {"name": "SANDBOX_TLS_CERT_PATH", "value": f"{TLS_DIR}/tls.crt"},
        {"name": "SANDBOX_TLS_KEY_PATH", "value": f"{TLS_DIR}/tls.key"},
    ]
    if tls.mode == "mtls":
        env.append({"name": "SANDBOX_TLS_CA_PATH", "value": f"{TLS_DIR}/ca.crt"})
    return env


def grace_period(config: SandboxManagerConfig) -> float:
    """How long a pod may go on after its deletion, in seconds."""
    template = config.pod_template_spec or _default_pod_template(config)
    seconds = (template.get("spec") or {}).get("terminationGracePeriodSeconds")
    return float(seconds) if isinstance(seconds, int) else 30.0  # Kubernetes' default


def pod_name(sandbox: Object) -> str:
    """Its own, unless the controller has noted another."""
    noted = ((sandbox.get("metadata") or {}).get("annotations") or {}).get(f"{GROUP}/pod-name")
    return noted if isinstance(noted, str) and noted else name(sandbox)


def pod_ips(sandbox: Object) -> tuple[str, ...]:
    return tuple((sandbox.get("status") or {}).get("podIPs") or ())


def holds_volumes(sandbox: Object) -> bool:
    """Whether deleting it deletes volumes of its own: what outlives its pod."""
    return bool((sandbox.get("spec") or {}).get("volumeClaimTemplates"))


def mode_spec(api_version: str, mode: Literal["Running", "Suspended"]) -> Object:
    """The spec field that starts or suspends a Sandbox, as its API version has it."""
    if api_version.endswith("v1alpha1"):
        return {"replicas": 1 if mode == "Running" else 0}
    return {"operatingMode": mode}


def is_to_run(sandbox: Object) -> bool:
    """Whether its spec does not say that it is to be suspended."""
    spec = sandbox.get("spec") or {}
    return spec.get("operatingMode") != "Suspended" and spec.get("replicas") != 0


def is_suspended(sandbox: Object, since: int = 0) -> bool:
    """Whether a Sandbox that is to be suspended has no pod any more.

    Started before that, it would report its dying pod as ready (agent-sandbox 0.5.6).
    """
    found = conditions(sandbox, since)
    if "Suspended" in found:
        return found["Suspended"].get("status") == "True"
    # Controllers before 0.5 do not say; what they said before the latest patch does not count.
    return bool(found or not since) and not pod_ips(sandbox)


def machine(sandbox: Object) -> Machine:
    service = (sandbox.get("status") or {}).get("serviceFQDN")
    return Machine(pod_name(sandbox), pod_ips(sandbox), str(service) if service else None)


SANDBOX = Resource(
    group=GROUP,
    plural=PLURAL,
    kind=KIND,
    versions=API_VERSIONS,
    name_prefix="sandbox",
    spec=sandbox_spec,
    machine=machine,
    mode_spec=mode_spec,
    is_to_run=is_to_run,
    is_suspended=is_suspended,
    never=frozenset({"InvalidConfiguration"}),
    dead=frozenset({"PodFailed", "PodSucceeded"}),
    expired="SandboxExpired",
)
"""agent-sandbox's Sandbox, which holds its pod's template itself."""
