"""Settings of the manager, checked when they are made."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from operator import getitem
from typing import TYPE_CHECKING, Any, Literal, Self

from ._checks import env_flag, env_int, env_seconds, integer, seconds, wrong
from ._targets import grpc_address, target_from_env

if TYPE_CHECKING:
    from .client import SandboxClient

Mode = Literal["single", "multi"]
TransportMode = Literal["insecure", "tls", "mtls"]
Endpoint = Literal["auto", "pod-ip", "service"] | Callable[[dict[str, Any]], str | None]

TRANSPORT_MODES = ("insecure", "tls", "mtls")
SHARED_PREFIX = "shared-"
"""Of the instance label of managers that share their sessions, and of no other."""

# RFC 1123 label; a quantity and a label value as the Kubernetes API documentation defines them.
_DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_DNS_NAME = re.compile(r"(?=.{1,253}$)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_QUANTITY = re.compile(r"(?=.*[1-9])[0-9]+(\.[0-9]+)?([EPTGM]i?|Ki|k|m)?")
_LABEL_VALUE = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")

# Where `SandboxManagerConfig.from_env` has its fields from, and how they are read.
_VARIABLES: dict[str, tuple[str, Callable[[Mapping[str, str], str], object]]] = {
    "namespace": ("SANDBOX_NAMESPACE", getitem),
    "sandbox_image": ("SANDBOX_IMAGE", getitem),
    "instance_id": ("SANDBOX_INSTANCE_ID", getitem),
    "warm_pool": ("SANDBOX_WARM_POOL", getitem),
    "on_idle": ("SANDBOX_ON_IDLE", getitem),
    "when_full": ("SANDBOX_WHEN_FULL", getitem),
    "workspace_storage": ("SANDBOX_WORKSPACE_STORAGE", getitem),
    "workspace_storage_class": ("SANDBOX_WORKSPACE_STORAGE_CLASS", getitem),
    "managed_by": ("SANDBOX_MANAGED_BY", getitem),
    "max_sessions": ("SANDBOX_MAX_SESSIONS", env_int),
    "sandbox_port": ("SANDBOX_TCP_PORT", env_int),
    "capacity_timeout": ("SANDBOX_CAPACITY_TIMEOUT", env_seconds),
    "evict_after": ("SANDBOX_EVICT_AFTER", env_seconds),
    "clock_skew": ("SANDBOX_CLOCK_SKEW", env_seconds),
    "shared": ("SANDBOX_SHARED", env_flag),
}


@dataclass(frozen=True, kw_only=True)
class TlsConfig:
    """TLS of the channel to a sandbox, and the Secret that the sandbox's pod mounts.

    With ``cert`` and ``key`` the client shows a certificate of its own (mTLS). Each
    client reads the files once, when it is first used.
    """

    ca: str | os.PathLike[str] | None = None
    """PEM file with the authorities that the server's certificate is checked against;
    None: the system's."""
    cert: str | os.PathLike[str] | None = None
    """PEM file with the client's certificate chain; together with `key`."""
    key: str | os.PathLike[str] | None = None
    """PEM file with the client's private key; together with `cert`."""
    server_name: str | None = None
    """The name to verify in the server's certificate instead of the target's host."""
    secret_name: str | None = None
    """Kubernetes Secret with cert-manager's keys tls.crt, tls.key and ca.crt, mounted
    into the default pod template so that the sandbox can serve TLS."""

    def __post_init__(self) -> None:
        for name in ("ca", "cert", "key"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str | os.PathLike) or not str(value)):
                raise ValueError(f"TlsConfig.{name} is {value!r}: give the path of a PEM file, or None")
        for name in ("server_name", "secret_name"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise ValueError(f"TlsConfig.{name} is {value!r}: give a non-empty string, or None")
        if (self.cert is None) != (self.key is None):
            missing = "key" if self.key is None else "cert"
            raise ValueError(f"TlsConfig.{missing} is None: a client certificate needs both cert and key")

    @property
    def mode(self) -> TransportMode:
        """``"mtls"`` with a client certificate, else ``"tls"``."""
        return "tls" if self.cert is None else "mtls"

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Self | None:
        """Reads SANDBOX_TRANSPORT_MODE and the SANDBOX_TLS_* variables of a client.

        SANDBOX_TLS_SECRET_NAME, which only a manager in multi mode reads, names the
        Secret of the default pod template.

        Returns:
            None where the mode is ``insecure``, the default.

        Raises:
            ValueError: An unknown mode (never a downgrade to insecure), or ``mtls``
                without a certificate and key.
        """
        env = os.environ if environ is None else environ
        mode = env.get("SANDBOX_TRANSPORT_MODE") or "insecure"
        if mode not in TRANSPORT_MODES:
            raise ValueError(f"SANDBOX_TRANSPORT_MODE is {mode!r}: use one of {', '.join(TRANSPORT_MODES)}")
        if mode == "insecure":
            return None
        cert = key = None
        if mode == "mtls":
            cert = env.get("SANDBOX_TLS_CLIENT_CERT_PATH") or None
            key = env.get("SANDBOX_TLS_CLIENT_KEY_PATH") or None
            if cert is None or key is None:
                name = "SANDBOX_TLS_CLIENT_CERT_PATH" if cert is None else "SANDBOX_TLS_CLIENT_KEY_PATH"
                raise ValueError(f"{name} is not set: SANDBOX_TRANSPORT_MODE=mtls needs it")
        return cls(
            ca=env.get("SANDBOX_TLS_CA_PATH") or None,
            cert=cert,
            key=key,
            server_name=env.get("SANDBOX_TLS_SERVER_NAME") or None,
            secret_name=env.get("SANDBOX_TLS_SECRET_NAME") or None,
        )


@dataclass(frozen=True, kw_only=True)
class SandboxManagerConfig:
    """Settings of a `SandboxManager`. Every duration is in seconds.

    Raises:
        ValueError: A value is out of range; the message names the field, the value and
            what would be right.
    """

    mode: Mode
    """"single": all sessions share one client; "multi": a Sandbox per session."""
    single_client: SandboxClient | None = None
    """The shared client in single mode. The manager leaves it open at shutdown."""
    single_target: str | None = None
    """Instead of `single_client`, the gRPC target of a shared client that the manager makes, with
    `tls`, and closes at shutdown."""
    namespace: str = "prodisco"
    """Where Sandboxes are created."""
    sandbox_port: int = 50051
    """gRPC port of a sandbox pod."""
    sandbox_image: str = "prodisco/sandbox-server:latest"
    """Image of the default pod template."""
    pod_template_spec: dict[str, Any] | None = None
    """Replaces the default ``spec.podTemplate`` (a dict with ``spec`` and, if need be,
    ``metadata``) whole; the pod labels are added to a copy."""
    warm_pool: str | None = None
    """Name of a SandboxWarmPool in `namespace`: each session is then a SandboxClaim on it, which binds
    a sandbox that runs already. The pool's SandboxTemplate says what runs, so image, pod template and
    the Secret for TLS are set there. A change between pool and none needs a new `instance_id`."""
    ready_timeout: float = 120.0
    """One deadline for creation, readiness and health together."""
    ready_poll_interval: float = 1.0
    """How often a Sandbox is read while no watch is available."""
    session_idle_timeout: float = 600.0
    """A session that nobody has used for this long is closed."""
    on_idle: Literal["delete", "suspend"] = "delete"
    """What becomes of a Sandbox that nobody has used for that long. "suspend": its pod goes, its volumes
    stay, and the next use starts it again; `shutdown` suspends too if `instance_id` is set. The default
    pod template needs `workspace_storage` then."""
    suspended_for: float = 86_400.0
    """A suspended Sandbox that nobody comes back to is deleted after this."""
    max_suspended: int | None = None
    """Cap on suspended Sandboxes, which hold no slot: the one that was suspended first is deleted. None:
    10 times `max_sessions`."""
    workspace_storage: str | None = None
    """Size of a volume for the workspace, a quantity such as "1Gi", which outlives the Sandbox's pods;
    None: the workspace is the pod's. In a `pod_template_spec` the volume is called ``workspace``, and the
    template mounts it."""
    workspace_storage_class: str | None = None
    """Its StorageClass; None: the cluster's default."""
    idle_check_interval: float = 60.0
    """How often the reaper looks."""
    max_sessions: int = 10
    """Cap on sessions that are being created, ready or being closed."""
    capacity_timeout: float = 0.0
    """How long a new session may queue for a slot, first come first served; 0 refuses
    at once."""
    when_full: Literal["refuse", "evict"] = "refuse"
    """What a new session does that finds no slot. "evict": the first in the queue ends an idle session, as
    `on_idle` says: one of its own owner's, one of the owner with most, one that nobody has come back to,
    or one that is idle for half of `session_idle_timeout`, in this order. Owners (``owner=`` of
    `SandboxManager.get_client`) keep their share of the slots. A session for which another one is being
    ended waits for that longer than `capacity_timeout`."""
    evict_after: float = 30.0
    """Sessions that were used within this time are not ended for others."""
    api_version: Literal["auto", "v1alpha1", "v1beta1"] = "auto"
    """Version of agents.x-k8s.io; "auto" takes the newest that the API server serves."""
    endpoint: Endpoint = "auto"
    """Where a sandbox is reached. "auto": the pod IP where status has one and no TLS
    name is at stake, else status.serviceFQDN; "pod-ip"; "service"; or a callable that
    maps a Sandbox (a dict; with `warm_pool` a SandboxClaim) to a gRPC target, None for "not known
    yet"."""
    tls: TlsConfig | None = None
    """TLS of the channels and of the default pod template; None: plaintext."""
    instance_id: str = field(default_factory=lambda: _RandomId(os.urandom(8).hex()))
    """Names the owner of a Sandbox among several managers of one namespace: random for each config
    that is made, unless set, so give each live manager a config of its own. A value that is
    set promises that one live manager uses it. One that is no valid label value is hashed."""
    managed_by: str = "mcp-server"
    """Value of the label ``prodisco.dev/managed-by`` on Sandboxes and pods. Managers see and delete
    only Sandboxes that carry theirs, so give those of different programs different ones."""
    lease_duration: float | None = 1800.0
    """A Sandbox outlives its dead manager by at most this; None turns leases off."""
    shutdown_timeout: float = 30.0
    """Bound on `SandboxManager.shutdown`."""
    shared: bool = False
    """Several managers serve the same sessions side by side: all that have the same `instance_id`, which
    must be set. Each object carries its session's deadline, moved ahead by uses, and the cluster deletes
    it between one and one and a half `session_idle_timeout` after the last use anywhere. Managers need
    leave to watch and to patch."""
    clock_skew: float = 30.0
    """With `shared`, how far the clocks of managers and cluster may be apart, caches' lag and one request
    included; `session_idle_timeout` must be at least four times as long."""

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            check(name, getattr(self, name))
        if self.single_target is not None and self.single_client is not None:
            raise wrong("single_target", self.single_target, "None where single_client is given")
        if self.workspace_storage_class is not None and self.workspace_storage is None:
            right = "None without workspace_storage"
            raise wrong("workspace_storage_class", self.workspace_storage_class, right)
        if self.mode == "single":
            return
        if self.on_idle == "suspend":
            self._check_suspension()
        if self.shared:
            self._check_shared()
        if self.warm_pool is not None:
            self._check_warm_pool()
        elif self.tls and not (self.tls.secret_name or self.pod_template_spec):
            # The sandbox would have no certificate to serve: its pod would not start, and every
            # session would time out.
            raise ValueError(
                "tls.secret_name is None: the default pod template mounts the server's certificate"
                " from a Secret; name it, or give a pod_template_spec that brings one"
            )

    def _check_suspension(self) -> None:
        if self.warm_pool is not None:
            right = '"delete" with warm_pool: a member of a pool is not started again'
            raise wrong("on_idle", self.on_idle, right)
        if self.api_version == "v1alpha1":
            raise wrong("on_idle", self.on_idle, '"delete" with api_version "v1alpha1"')
        if self.workspace_storage is None and self.pod_template_spec is None:
            raise ValueError(
                "workspace_storage is None: with on_idle 'suspend' the default pod template would keep"
                " nothing; give it a size such as '1Gi'"
            )

    def _check_shared(self) -> None:
        if self.has_random_instance_id:
            raise ValueError("instance_id is not set: with shared it must be the same in all managers")
        if self.on_idle != "delete":
            raise wrong("on_idle", self.on_idle, '"delete" with shared: the cluster can only delete')
        if self.lease_duration is None:
            raise wrong("lease_duration", None, "left out with shared: the objects' deadlines end sessions")
        if self.session_idle_timeout < 4 * self.clock_skew:
            least = f"at least 4 times clock_skew ({4 * self.clock_skew:g}) with shared"
            raise wrong("session_idle_timeout", self.session_idle_timeout, least)

    def _check_warm_pool(self) -> None:
        template = "the SandboxTemplate of warm_pool says that"
        for name in ("pod_template_spec", "workspace_storage"):
            if getattr(self, name) is not None:
                raise wrong(name, getattr(self, name), f"None: {template}")
        if self.sandbox_image != type(self).sandbox_image:
            raise wrong("sandbox_image", self.sandbox_image, f"left out: {template}")
        if self.tls is not None and self.tls.secret_name is not None:
            raise wrong("tls.secret_name", self.tls.secret_name, f"None: {template}")
        if self.tls is not None and self.tls.server_name is None:
            right = "the name in the servers' certificate: a sandbox of a warm_pool has no name of its own"
            raise wrong("tls.server_name", None, right)
        if self.endpoint == "service":
            raise wrong("endpoint", self.endpoint, '"pod-ip": a SandboxClaim names no Service')
        if self.api_version == "v1alpha1":
            raise wrong("api_version", self.api_version, '"auto" or "v1beta1", the only one that has claims')

    @property
    def most_suspended(self) -> int:
        """`max_suspended`, or its default."""
        return 10 * self.max_sessions if self.max_suspended is None else self.max_suspended

    @property
    def has_random_instance_id(self) -> bool:
        """Whether `instance_id` was left out."""
        return isinstance(self.instance_id, _RandomId)

    @property
    def instance_label(self) -> str:
        """The owner as a label value: `instance_id` where it is a valid one, else its hash.

        With `shared` it is the group's: ``shared-`` and the hash, which no other manager's is.
        """
        text = self.instance_id
        if self.group:
            return self.group
        if _LABEL_VALUE.fullmatch(text) and not text.startswith(SHARED_PREFIX):
            return text
        return _hashed(text)

    @property
    def group(self) -> str:
        """The managers that share their sessions, as a label value; empty: this one shares none."""
        return SHARED_PREFIX + _hashed(self.instance_id) if self.shared and self.mode == "multi" else ""

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None, **overrides: Any) -> Self:
        """Reads the environment; an explicit keyword beats it.

        Variables: SANDBOX_MODE (default ``single``), SANDBOX_NAMESPACE, SANDBOX_IMAGE,
        SANDBOX_MAX_SESSIONS, SANDBOX_TCP_PORT, SANDBOX_INSTANCE_ID,
        SANDBOX_MANAGED_BY, SANDBOX_WARM_POOL, SANDBOX_CAPACITY_TIMEOUT, SANDBOX_WHEN_FULL,
        SANDBOX_EVICT_AFTER, SANDBOX_ON_IDLE, SANDBOX_WORKSPACE_STORAGE,
        SANDBOX_WORKSPACE_STORAGE_CLASS, SANDBOX_SHARED, SANDBOX_CLOCK_SKEW, and the TLS variables of
        `TlsConfig.from_env`. In single mode without a ``single_client``, ``single_target`` is what
        `SandboxClient.from_env` connects to.

        Raises:
            ValueError: A variable has a value out of range; the message names it.
        """
        env = os.environ if environ is None else environ
        values: dict[str, Any] = {"mode": env.get("SANDBOX_MODE") or "single"}
        if values["mode"] not in ("single", "multi") and "mode" not in overrides:
            raise ValueError(f'SANDBOX_MODE is {values["mode"]!r}: use "single" or "multi"')
        for name, (variable, read) in _VARIABLES.items():
            if env.get(variable) and name not in overrides:
                values[name] = read(env, variable)
        if "tls" not in overrides:
            values["tls"] = TlsConfig.from_env(env)
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(overrides) - known):
            raise ValueError(f"unknown setting {unknown[0]!r}: the settings are {', '.join(sorted(known))}")
        values.update(overrides)
        given = values.get("single_client") or values.get("single_target")
        if values["mode"] == "single" and given is None:
            values["single_target"] = target_from_env(env)
        try:
            return cls(**values)
        except ValueError as error:
            # A user who only sets variables does not know the field's name.
            variables = {name: variable for name, (variable, _) in _VARIABLES.items()}
            variables |= {
                f"tls.{each}": f"SANDBOX_TLS_{each.upper()}" for each in ("secret_name", "server_name")
            }
            name = str(error).partition(" ")[0]
            if name not in variables or name.partition(".")[0] in overrides:
                raise
            raise ValueError(f"{variables[name]}: {error}") from None


class _RandomId(str):
    """An `instance_id` that no later process has."""

    __slots__ = ()


def _hashed(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:40]


Check = Callable[[str, Any], object]


def _is(test: Callable[[Any], object], right: str) -> Check:
    def check(name: str, value: object) -> None:
        if not test(value):
            raise wrong(name, value, right)

    return check


def _text(pattern: re.Pattern[str], right: str) -> Check:
    return _is(lambda value: isinstance(value, str) and pattern.fullmatch(value), right)


def _optional(check: Check) -> Check:
    return lambda name, value: value is None or check(name, value)


def _check_pod_template(_: str, value: object) -> None:
    if not isinstance(value, dict) or not isinstance(value.get("spec"), dict):
        raise wrong("pod_template_spec", value, 'a pod template: a dict with a "spec" dict')
    if unknown := sorted(set(value) - {"spec", "metadata"}, key=str):
        raise ValueError(
            f"pod_template_spec has the key {unknown[0]!r}: a pod template has metadata and spec"
        )
    metadata = value.get("metadata") or {}
    if not isinstance(metadata, dict) or not isinstance(metadata.get("labels") or {}, dict):
        raise wrong("pod_template_spec.metadata", metadata, "a dict whose labels are a dict")


_CHECKS: dict[str, Check] = {
    "mode": _is(("single", "multi").__contains__, '"single" or "multi"'),
    "single_client": _optional(
        _is(
            lambda value: hasattr(value, "execute") and not isinstance(value, type),
            "a SandboxClient, such as SandboxClient('localhost:50051')",
        )
    ),
    "single_target": _optional(lambda name, value: grpc_address(value, name)),
    "namespace": _text(_DNS_LABEL, "an RFC 1123 label such as 'prodisco'"),
    "sandbox_port": partial(integer, least=1, most=65535),
    "sandbox_image": _text(re.compile(r"\S+"), "an image reference without white space"),
    "pod_template_spec": _optional(_check_pod_template),
    "ready_timeout": seconds,
    "ready_poll_interval": seconds,
    "session_idle_timeout": seconds,
    "idle_check_interval": seconds,
    "shutdown_timeout": seconds,
    "suspended_for": seconds,
    "max_suspended": _optional(partial(integer, least=1, most=None)),
    "capacity_timeout": partial(seconds, zero=True),
    "when_full": _is(("refuse", "evict").__contains__, '"refuse" or "evict"'),
    "evict_after": seconds,
    "lease_duration": _optional(seconds),
    "max_sessions": partial(integer, least=1, most=None),
    "api_version": _is(("auto", "v1alpha1", "v1beta1").__contains__, '"auto", "v1alpha1" or "v1beta1"'),
    "endpoint": _is(
        lambda value: value in ("auto", "pod-ip", "service") or callable(value),
        '"auto", "pod-ip", "service" or a callable',
    ),
    "tls": _optional(_is(lambda value: isinstance(value, TlsConfig), "a TlsConfig or None")),
    "warm_pool": _optional(_text(_DNS_LABEL, "the name of a SandboxWarmPool, or None")),
    "on_idle": _is(("delete", "suspend").__contains__, '"delete" or "suspend"'),
    "workspace_storage": _optional(_text(_QUANTITY, "a quantity such as '1Gi', or None")),
    "workspace_storage_class": _optional(_text(_DNS_NAME, "the name of a StorageClass, or None")),
    "clock_skew": seconds,
    "managed_by": _text(_LABEL_VALUE, "a label value such as 'mcp-server'"),
    "instance_id": _text(re.compile(r"(?s:.+)"), "a non-empty string"),
}
