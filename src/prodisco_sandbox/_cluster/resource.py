"""The object that a session has in the cluster, as a value: of which kind, and how it is written and read.

Another kind is another `Resource`: requests and the watch take one, and know nothing of its fields.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ..config import SandboxManagerConfig
from ..errors import SandboxError
from . import manifest
from .manifest import Machine, Object, Reading


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    """A kind of object.

    Attributes:
        group: API group.
        plural: Name in paths and RBAC rules.
        kind: Name in bodies and errors.
        versions: Of the API group, newest first; the last is assumed where the API server
            cannot be asked.
        name_prefix: Of the objects' names.
        spec: The spec of a new object, given its API version and the labels of its pods.
        machine: Where its status says that the pod is.
        lifecycle: The field of its spec that holds the deadline; None: the spec itself.
        mode_spec: The spec fields that start or suspend it; None: it cannot be suspended.
        never: Reasons of Ready=False that no time mends.
        dead: Reasons of Ready=False that say that the pod has come to its end.
        expired: The reason once the deadline is past.
    """

    group: str
    plural: str
    kind: str
    versions: tuple[str, ...]
    name_prefix: str
    spec: Callable[[SandboxManagerConfig, str, dict[str, str]], Object]
    machine: Callable[[Object], Machine]
    lifecycle: str | None = None
    mode_spec: Callable[[Object, Literal["Running", "Suspended"]], Object] | None = None
    never: frozenset[str]
    dead: frozenset[str] = frozenset()
    expired: str

    def name(self, session_id: str, incarnation: int = 0) -> str:
        """Always a valid DNS label, different for different ids."""
        return f"{self.name_prefix}-{manifest.name_digest(session_id, incarnation)}"

    def body(
        self,
        config: SandboxManagerConfig,
        api_version: str,
        name: str,
        session: str,
        lease: str | None = None,
    ) -> Object:
        """The object to create.

        Args:
            config: Namespace, image, port, TLS and the optional pod template.
            api_version: One of `versions`.
            name: From `name`.
            session: From `manifest.session_hash`.
            lease: From `manifest.lease_time`: when the cluster itself deletes the object.
        """
        labels = {
            manifest.LABEL_APP: manifest.APP,
            manifest.LABEL_MANAGED_BY: config.managed_by,
            manifest.LABEL_INSTANCE: config.instance_label,
            manifest.LABEL_SESSION: session,
        }
        spec = self.spec(config, api_version, {**labels, manifest.LABEL_SANDBOX: name})
        return {
            "apiVersion": f"{self.group}/{api_version}",
            "kind": self.kind,
            "metadata": {"name": name, "namespace": config.namespace, "labels": labels},
            "spec": spec if lease is None else spec | self.deadline_spec(lease),
        }

    def deadline_spec(self, lease: str | None) -> Object:
        """The spec fields of a deadline; of None: those that take it away.

        The default shutdownPolicy, Retain, would keep the object beyond it.
        """
        fields = {"shutdownTime": lease} | ({} if lease is None else {"shutdownPolicy": "Delete"})
        return fields if self.lifecycle is None else {self.lifecycle: fields}

    def lapsed(self, obj: Object, now: float) -> bool:
        """Whether its deadline lies before the Unix time `now`."""
        spec = obj.get("spec") or {}
        return manifest.time_lapsed(spec if self.lifecycle is None else spec.get(self.lifecycle) or {}, now)

    def reading(self, obj: Object, config: SandboxManagerConfig, *, now: float, since: int = 0) -> Reading:
        """What the object says of itself.

        Running means that the endpoint is known and that the Ready condition is True, or
        that the controller reports no Ready condition at all. A Service alone is not
        enough: it exists before its pod is ready.

        Args:
            obj: As the API server returns it.
            config: Where its endpoint is.
            now: The Unix time. That it has expired counts only with its own deadline past,
                which another manager may have moved meanwhile.
            since: The generation that the reader's own latest patch has made; what the
                controller observed before that does not count.
        """
        machine = self.machine(obj)

        def reads(phase: manifest.Phase, text: str, refusal: manifest.Refusal | None = None) -> Reading:
            return Reading(phase, None, text, refusal, machine)

        if manifest.is_deleting(obj):
            return reads("ending", "it is being deleted")
        if 0 < manifest.generation(obj) < since:
            return reads("starting", "the latest change of its spec is not seen yet")
        status = obj.get("status") or {}
        conditions = manifest.conditions(obj, since)
        ready, finished = conditions.get("Ready"), conditions.get("Finished")
        text = "ready" if ready is None else _described(ready)
        reason = ready.get("reason") if ready is not None and ready.get("status") == "False" else None
        if reason == self.expired and self.lapsed(obj, now):
            return reads("ending", text)
        if not manifest.is_to_run(obj):
            return reads("suspended", text if ready else "it is suspended")
        if finished is not None and finished.get("status") == "True":
            return reads("dead", _described(finished))
        if reason in self.dead:
            return reads("dead", text)
        if reason in self.never:
            return reads("never", text)
        if ready is not None and ready.get("status") != "True":
            message = str(ready.get("message") or "")
            return reads("starting", text, manifest.refusal(str(reason), message))
        if ready is None and since and status.get("conditions"):
            return reads("starting", "the controller has not seen the latest change of its spec yet")
        target = endpoint(obj, machine, config)
        if target is not None:
            return Reading("running", target, text, None, machine)
        if status:
            return reads("starting", "no address in its status yet")
        return reads("starting", "no status yet (does agent-sandbox's controller run?)")


def _described(condition: Object) -> str:
    text = f"{condition.get('type')}={condition.get('status')}"
    if condition.get("reason"):
        text += f", reason {condition['reason']}"
    if condition.get("message"):
        text += f": {condition['message']}"
    return text


def endpoint(obj: Object, machine: Machine, config: SandboxManagerConfig) -> str | None:
    """The gRPC target of an object as `config.endpoint` wants it; None if not known yet.

    "auto" prefers the pod IP: a headless Service is selected by a 32-bit hash of the
    name, so that two Sandboxes can share one, and its DNS lags. Where TLS verifies the
    host, only the Service has a name that a certificate can carry.
    """
    if callable(config.endpoint):
        try:
            target: object = config.endpoint(obj)
        except Exception as e:
            raise SandboxError(f"the function that is the setting endpoint failed: {e!r}") from e
        if target is None or isinstance(target, str):
            return target
        raise SandboxError(f"the setting endpoint returned {target!r}: it must be a gRPC target or None")
    verified = config.tls is not None and config.tls.server_name is None
    host = machine.service
    if config.endpoint == "pod-ip" or (config.endpoint == "auto" and machine.ips and not verified):
        host = machine.ips[0] if machine.ips else None
    if host is None:
        return None
    return f"[{host}]:{config.sandbox_port}" if ":" in host else f"{host}:{config.sandbox_port}"


SANDBOX = Resource(
    group=manifest.GROUP,
    plural=manifest.PLURAL,
    kind=manifest.KIND,
    versions=manifest.API_VERSIONS,
    name_prefix="sandbox",
    spec=manifest.sandbox_spec,
    machine=manifest.machine,
    mode_spec=manifest.mode_spec,
    never=frozenset({"InvalidConfiguration"}),
    dead=frozenset({"PodFailed", "PodSucceeded"}),
    expired="SandboxExpired",
)
"""agent-sandbox's Sandbox, which holds its pod's template itself."""
