"""What a Sandbox looks like: names, labels, the body, and how its status is read.

Pure functions over plain dicts; everything that differs between the API versions of
``agents.x-k8s.io`` is here. The API: kubernetes-sigs/agent-sandbox.
"""

from __future__ import annotations

import copy
import datetime as dt
import hashlib
from dataclasses import dataclass
from typing import Any, Literal

from ..config import SandboxManagerConfig, TlsConfig
from . import refusals as _refusals

GROUP = "agents.x-k8s.io"
PLURAL = "sandboxes"
KIND = "Sandbox"
API_VERSIONS = ("v1beta1", "v1alpha1")
"""Newest first."""

LABEL_APP = "app"
LABEL_MANAGED_BY = "prodisco.dev/managed-by"
LABEL_INSTANCE = "prodisco.dev/instance"
LABEL_SESSION = "prodisco.dev/session"
LABEL_SANDBOX = "prodisco.dev/sandbox"
APP = "sandbox-server"
MANAGED_BY = "mcp-server"

CACHE_DIR = "/tmp/prodisco-scripts"
TLS_DIR = "/etc/prodisco/tls"

Object = dict[str, Any]
"""A Sandbox as the API server returns it."""


def session_hash(session_id: str) -> str:
    """The session's label value: 40 hex digits of the SHA-256 of its id.

    A label value holds 63 characters. The id itself never leaves the process: MCP
    session ids are as good as credentials.
    """
    return _digest(session_id).hex()[:40]


def name_digest(session_id: str, incarnation: int = 0) -> str:
    """What tells the name of a session's object from others: 32 hex digits."""
    return hashlib.sha256(_digest(session_id) + incarnation.to_bytes(8, "big")).hexdigest()[:32]


def sandbox_name(session_id: str, incarnation: int = 0) -> str:
    """The Sandbox's name: always a valid DNS label, different for different ids."""
    return f"sandbox-{name_digest(session_id, incarnation)}"


def _digest(session_id: str) -> bytes:
    # Text from elsewhere may hold lone surrogates, which plain UTF-8 refuses.
    return hashlib.sha256(session_id.encode("utf-8", "surrogatepass")).digest()


def managed_selector(
    instance: str | None = None, session: str | None = None, *, managed_by: str = MANAGED_BY
) -> str:
    """Label selector of the managed Sandboxes, of one instance or session if given."""
    parts = [f"{LABEL_MANAGED_BY}={managed_by}"]
    if instance is not None:
        parts.append(f"{LABEL_INSTANCE}={instance}")
    if session is not None:
        parts.append(f"{LABEL_SESSION}={session}")
    return ",".join(parts)


def matches(sandbox: Object, selector: str) -> bool:
    """Whether the labels fit an equality selector."""
    found = labels(sandbox)
    return all(found.get(key) == value for key, value in (part.split("=", 1) for part in selector.split(",")))


def sandbox_spec(config: SandboxManagerConfig, api_version: str, labels: dict[str, str]) -> Object:
    """The spec of a new Sandbox; `labels` are those of its pod."""
    template = copy.deepcopy(config.pod_template_spec)
    if template is None:
        template = _default_pod_template(config)
    metadata = template["metadata"] = dict(template.get("metadata") or {})
    metadata["labels"] = {**(metadata.get("labels") or {}), **labels}
    return {
        "podTemplate": template,
        # Since agent-sandbox 0.4.6 there is no Service, hence no serviceFQDN, without it.
        "service": True,
        **({"replicas": 1} if api_version == "v1alpha1" else {"operatingMode": "Running"}),
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
    spec = {
        "serviceAccountName": "sandbox-server",
        # A container restarted in place would be an empty machine that looks like the old one.
        "restartPolicy": "Never",
        # Until the pod is gone its name is taken, and a session that comes back waits.
        "terminationGracePeriodSeconds": 5,
        "containers": [container],
        "volumes": volumes,
    }
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


def lease_time(now: float, duration: float) -> str:
    """RFC 3339 time `duration` seconds after the Unix time `now`, in whole seconds."""
    end = dt.datetime.fromtimestamp(now + duration, dt.UTC)
    return end.strftime("%Y-%m-%dT%H:%M:%SZ")


def time_lapsed(spec: Object, now: float) -> bool:
    """Whether a spec has a shutdownTime that lies before the Unix time `now`."""
    text = spec.get("shutdownTime")
    if not isinstance(text, str):
        return False
    try:
        # The API server writes UTC; a time without an offset is no RFC 3339.
        time = dt.datetime.fromisoformat(text)
    except ValueError:
        return False
    return (time if time.tzinfo else time.replace(tzinfo=dt.UTC)).timestamp() < now


def labels(sandbox: Object) -> dict[str, str]:
    return (sandbox.get("metadata") or {}).get("labels") or {}


def instance(sandbox: Object) -> str | None:
    """The manager that owns it."""
    return labels(sandbox).get(LABEL_INSTANCE)


def uid(sandbox: Object) -> str | None:
    value = (sandbox.get("metadata") or {}).get("uid")
    return value if isinstance(value, str) else None


def resource_version(sandbox: Object) -> str | None:
    return (sandbox.get("metadata") or {}).get("resourceVersion")


def name(sandbox: Object) -> str:
    return str((sandbox.get("metadata") or {}).get("name"))


def pod_name(sandbox: Object) -> str:
    """The name of its pod: its own, unless the controller has noted another."""
    noted = ((sandbox.get("metadata") or {}).get("annotations") or {}).get(f"{GROUP}/pod-name")
    return noted if isinstance(noted, str) and noted else name(sandbox)


def is_of(
    sandbox: Object, session: str, instance: str | None = None, *, managed_by: str = MANAGED_BY
) -> bool:
    """Whether `managed_selector` of this session, and of this instance if given, finds it."""
    found = labels(sandbox)
    managed = found.get(LABEL_MANAGED_BY) == managed_by and found.get(LABEL_SESSION) == session
    return managed and (instance is None or found.get(LABEL_INSTANCE) == instance)


def is_deleting(sandbox: Object) -> bool:
    return bool((sandbox.get("metadata") or {}).get("deletionTimestamp"))


def pod_ips(sandbox: Object) -> tuple[str, ...]:
    return tuple((sandbox.get("status") or {}).get("podIPs") or ())


def place(sandbox: Object, target: str) -> tuple[object, ...]:
    """Where its status says that its machine is, and since when: what another machine changes."""
    ready = conditions(sandbox).get("Ready")
    return (target, pod_ips(sandbox), *(() if ready is None else (ready.get("lastTransitionTime"),)))


def holds_volumes(sandbox: Object) -> bool:
    """Whether deleting it deletes volumes of its own: what outlives its pod."""
    return bool((sandbox.get("spec") or {}).get("volumeClaimTemplates"))


def generation(sandbox: Object | None) -> int:
    """How often its spec has changed; 0 where the API does not count."""
    value = ((sandbox or {}).get("metadata") or {}).get("generation")
    return value if isinstance(value, int) else 0


def mode_spec(sandbox: Object, mode: Literal["Running", "Suspended"]) -> Object:
    """The spec field that starts or suspends a Sandbox, as its API version has it."""
    if str(sandbox.get("apiVersion")).endswith("/v1alpha1"):
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


def conditions(sandbox: Object, since: int = 0) -> dict[Any, Object]:
    """The conditions by type, without those from before the generation `since`."""
    found = [c for c in (sandbox.get("status") or {}).get("conditions") or () if isinstance(c, dict)]
    return {c.get("type"): c for c in found if not _is_older(c.get("observedGeneration"), since)}


def _is_older(observed: object, since: int) -> bool:
    return isinstance(observed, int) and observed < since


Refusal = Literal["permanent", "quota", "occupied"]


def refusal(reason: str, message: str) -> Refusal | None:
    """What a Ready condition that is False says of the pod's creation, if that is unlikely to pass.

    Returns:
        ``"permanent"``, ``"quota"`` (an exceeded ResourceQuota) or ``"occupied"``: the pod or
        Service of an earlier Sandbox of that name is not gone yet.
    """
    if reason == "MultiplePods":
        return "permanent"
    if reason not in ("ReconcilerError", "DependenciesNotReady"):
        return None
    if " is owned by " in message:
        return "occupied"
    if _refusals.permanent_refusal(message):
        return "permanent"
    return "quota" if _refusals.exceeded_quota(message) else None


Phase = Literal["starting", "running", "suspended", "dead", "ending", "never"]


@dataclass(frozen=True, slots=True)
class Machine:
    """Where the status says that the pod is.

    Attributes:
        pod: The pod's name.
        ips: Its addresses.
        service: The DNS name of its Service, if there is one.
    """

    pod: str = ""
    ips: tuple[str, ...] = ()
    service: str | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """What an object says of itself.

    Attributes:
        phase: ``"starting"``; ``"running"``: it can be connected to; ``"suspended"``, or about to
            be; ``"dead"``: its pod has come to its end and never runs again, which says nothing
            of the object; ``"ending"``: it is being deleted, or its own time is over;
            ``"never"``: its spec cannot work.
        target: gRPC target where it is running.
        text: The phase in words, with condition reason and message, for errors.
        refusal: What the controller is told each time it tries to make the pod, if that is
            unlikely to pass: see `refusal`.
        machine: Its pod.
    """

    phase: Phase
    target: str | None
    text: str
    refusal: Refusal | None = None
    machine: Machine = Machine()


def machine(sandbox: Object) -> Machine:
    service = (sandbox.get("status") or {}).get("serviceFQDN")
    return Machine(pod_name(sandbox), pod_ips(sandbox), str(service) if service else None)


# For callers that know Sandboxes alone.

Readiness = Reading


def sandbox_body(
    config: SandboxManagerConfig, api_version: str, name: str, session: str, lease: str | None = None
) -> Object:
    from .resource import SANDBOX

    return SANDBOX.body(config, api_version, name, session, lease)


def readiness(sandbox: Object, config: SandboxManagerConfig, *, now: float, since: int = 0) -> Reading:
    from .resource import SANDBOX

    return SANDBOX.reading(sandbox, config, now=now, since=since)


def endpoint(sandbox: Object, config: SandboxManagerConfig) -> str | None:
    from .resource import endpoint

    return endpoint(sandbox, machine(sandbox), config)


def lease_spec(lease: str) -> Object:
    from .resource import SANDBOX

    return SANDBOX.deadline_spec(lease)


def lease_lapsed(sandbox: Object, now: float) -> bool:
    from .resource import SANDBOX

    return SANDBOX.lapsed(sandbox, now)
