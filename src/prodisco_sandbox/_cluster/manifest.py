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
from ..errors import SandboxError
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

_DEAD_REASONS = frozenset({"PodFailed", "PodSucceeded"})

Object = dict[str, Any]
"""A Sandbox as the API server returns it."""


def session_hash(session_id: str) -> str:
    """The session's label value: 40 hex digits of the SHA-256 of its id.

    A label value holds 63 characters. The id itself never leaves the process: MCP
    session ids are as good as credentials.
    """
    return _digest(session_id).hex()[:40]


def sandbox_name(session_id: str, incarnation: int = 0) -> str:
    """The Sandbox's name: always a valid DNS label, different for different ids."""
    digest = hashlib.sha256(_digest(session_id) + incarnation.to_bytes(8, "big"))
    return f"sandbox-{digest.hexdigest()[:32]}"


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


def sandbox_body(
    config: SandboxManagerConfig, api_version: str, name: str, session: str, lease: str | None = None
) -> Object:
    """The Sandbox to create.

    Args:
        config: Namespace, image, port, TLS and the optional pod template.
        api_version: ``v1alpha1`` or ``v1beta1``.
        name: From `sandbox_name`.
        session: From `session_hash`.
        lease: From `lease_time`: when the cluster removes it by itself.
    """
    labels = {
        LABEL_APP: APP,
        LABEL_MANAGED_BY: config.managed_by,
        LABEL_INSTANCE: config.instance_label,
        LABEL_SESSION: session,
    }
    template = _default_pod_template(config)
    if config.pod_template_spec is not None:
        template = copy.deepcopy(config.pod_template_spec)
    metadata = template["metadata"] = dict(template.get("metadata") or {})
    metadata["labels"] = {**(metadata.get("labels") or {}), **labels, LABEL_SANDBOX: name}
    spec: Object = {
        "podTemplate": template,
        # Since agent-sandbox 0.4.6 there is no Service, hence no serviceFQDN, without it.
        "service": True,
        **({"replicas": 1} if api_version == "v1alpha1" else {"operatingMode": "Running"}),
    }
    if lease is not None:
        spec |= lease_spec(lease)
    return {
        "apiVersion": f"{GROUP}/{api_version}",
        "kind": KIND,
        "metadata": {"name": name, "namespace": config.namespace, "labels": labels},
        "spec": spec,
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


def lease_spec(lease: str) -> Object:
    """The spec fields of a lease. The default shutdownPolicy, Retain, would keep it."""
    return {"shutdownTime": lease, "shutdownPolicy": "Delete"}


def lease_lapsed(sandbox: Object, now: float) -> bool:
    """Whether the Sandbox has a shutdownTime that lies before the Unix time `now`."""
    text = (sandbox.get("spec") or {}).get("shutdownTime")
    if not isinstance(text, str):
        return False
    try:
        # Offset-less times are no RFC 3339; UTC is what the API server would write.
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
    conditions = (sandbox.get("status") or {}).get("conditions") or ()
    since = [
        c.get("lastTransitionTime") for c in conditions if isinstance(c, dict) and c.get("type") == "Ready"
    ]
    return (target, pod_ips(sandbox), *since)


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
    conditions = _conditions(sandbox, since)
    if "Suspended" in conditions:
        return conditions["Suspended"].get("status") == "True"
    # Controllers before 0.5 do not say; what they said before the latest patch does not count.
    return bool(conditions or not since) and not pod_ips(sandbox)


def _conditions(sandbox: Object, since: int) -> dict[Any, Object]:
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
class Readiness:
    """What a Sandbox says of itself.

    Attributes:
        phase: ``"starting"``; ``"running"``: it can be connected to; ``"suspended"``, or about to
            be; ``"dead"``: its pod has come to its end and never runs again, which says nothing
            of the Sandbox; ``"ending"``: it is being deleted, or its own time is over;
            ``"never"``: its spec cannot work.
        target: gRPC target where it is running.
        text: The phase in words, with condition reason and message, for errors.
        refusal: What the controller is told each time it tries to make the pod, if that is
            unlikely to pass: see `refusal`.
    """

    phase: Phase
    target: str | None
    text: str
    refusal: Refusal | None = None


def readiness(sandbox: Object, config: SandboxManagerConfig, *, now: float, since: int = 0) -> Readiness:
    """Reads a Sandbox's status.

    Running means that the endpoint is known and that the Ready condition is True, or
    that the controller reports no Ready condition at all. A Service alone is not
    enough: it exists before its pod is ready.

    Args:
        sandbox: As the API server returns it.
        config: Where its endpoint is.
        now: The Unix time: SandboxExpired counts only once its own shutdownTime is past, since
            another manager may have moved that meanwhile.
        since: The generation that the reader's own latest patch has made; what the
            controller observed before that does not count.
    """
    if is_deleting(sandbox):
        return Readiness("ending", None, "it is being deleted")
    if 0 < generation(sandbox) < since:
        return Readiness("starting", None, "the latest change of its spec is not seen yet")
    status = sandbox.get("status") or {}
    conditions = _conditions(sandbox, since)
    ready, finished = conditions.get("Ready"), conditions.get("Finished")
    reason = ready.get("reason") if ready is not None and ready.get("status") == "False" else None
    if ready is not None and reason == "SandboxExpired" and lease_lapsed(sandbox, now):
        return Readiness("ending", None, _condition_text(ready))
    if not is_to_run(sandbox):
        return Readiness("suspended", None, _condition_text(ready) if ready else "it is suspended")
    if finished is not None and finished.get("status") == "True":
        return Readiness("dead", None, _condition_text(finished))
    if ready is not None and ready.get("status") != "True":
        text = _condition_text(ready)
        if reason in _DEAD_REASONS:
            return Readiness("dead", None, text)
        if reason == "InvalidConfiguration":
            return Readiness("never", None, text)
        return Readiness("starting", None, text, refusal(str(reason), str(ready.get("message") or "")))
    if ready is None and since and status.get("conditions"):
        return Readiness("starting", None, "the controller has not seen the latest change of its spec yet")
    target = endpoint(sandbox, config)
    if target is None:
        known = (
            "no status yet (does agent-sandbox's controller run?)"
            if not status
            else "no address in its status yet"
        )
        return Readiness("starting", None, known)
    return Readiness("running", target, "ready" if ready is None else _condition_text(ready))


def _condition_text(condition: Object) -> str:
    text = f"{condition.get('type')}={condition.get('status')}"
    if condition.get("reason"):
        text += f", reason {condition['reason']}"
    if condition.get("message"):
        text += f": {condition['message']}"
    return text


def endpoint(sandbox: Object, config: SandboxManagerConfig) -> str | None:
    """The gRPC target of a Sandbox as `config.endpoint` wants it; None if not known yet.

    "auto" prefers the pod IP: a headless Service is selected by a 32-bit hash of the
    name, so that two Sandboxes can share one, and its DNS lags. Where TLS verifies the
    host, only the Service has a name that a certificate can carry.
    """
    if callable(config.endpoint):
        try:
            target: object = config.endpoint(sandbox)
        except Exception as e:
            raise SandboxError(f"the function that is the setting endpoint failed: {e!r}") from e
        if target is None or isinstance(target, str):
            return target
        raise SandboxError(f"the setting endpoint returned {target!r}: it must be a gRPC target or None")
    status = sandbox.get("status") or {}
    ips, fqdn = pod_ips(sandbox), status.get("serviceFQDN")
    named = config.tls is not None and config.tls.server_name is None
    if config.endpoint == "pod-ip" or (config.endpoint == "auto" and ips and not named):
        if not ips:
            return None
        host = f"[{ips[0]}]" if ":" in ips[0] else ips[0]
    elif fqdn:
        host = str(fqdn)
    else:
        return None
    return f"{host}:{config.sandbox_port}"
