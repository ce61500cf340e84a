"""The object of a session as a value: of which kind, how it is written, and how it is read.

Another kind is another `Resource`: requests and the watch take one, and know nothing of its fields.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from ..config import SandboxManagerConfig
from ..errors import SandboxError
from . import metadata
from . import refusals as _refusals
from .metadata import Object

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
    if " is owned by " in message or " is not controlled by claim " in message:
        return "occupied"
    if _refusals.permanent_refusal(message):
        return "permanent"
    return "quota" if _refusals.exceeded_quota(message) else None


Phase = Literal["starting", "running", "suspended", "dead", "ending", "never"]


@dataclass(frozen=True, slots=True)
class Machine:
    """Where the status says that the pod is: its name and addresses, and the DNS name of its Service."""

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
        changed: When the Ready condition has changed last.
    """

    phase: Phase
    target: str | None
    text: str
    refusal: Refusal | None = None
    machine: Machine = Machine()
    changed: str | None = None

    @property
    def place(self) -> tuple[object, ...]:
        """Where the machine is, and since when: what another machine changes."""
        return self.target, self.machine, self.changed


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
        requested_at: The annotation that says when a new object was asked for; None: it has none.
        mode_spec: The spec fields that start or suspend it, given its API version.
        is_to_run: Whether it is not suspended, nor to be.
        is_suspended: Whether one that is not to run may be started now, given the generation that the
            reader's latest patch has made. By default never: somebody else starts it.
        never: Reasons of Ready=False for a spec that cannot work.
        dead: Reasons of Ready=False once the pod has come to its end.
        expired: The reason of Ready=False once the deadline is past.
        release: What to install where the API server does not serve it.
        advice: By reason of Ready=False, what to do about it.
    """

    group: str
    plural: str
    kind: str
    versions: tuple[str, ...]
    name_prefix: str
    spec: Callable[[SandboxManagerConfig, str, dict[str, str]], Object]
    machine: Callable[[Object], Machine]
    lifecycle: str | None = None
    requested_at: str | None = None
    mode_spec: Callable[[str, Literal["Running", "Suspended"]], Object] = lambda _version, _mode: {}
    is_to_run: Callable[[Object], bool] = lambda _: True
    is_suspended: Callable[[Object, int], bool] = lambda _, _since: False
    never: frozenset[str]
    dead: frozenset[str] = frozenset()
    expired: str
    release: str = "agent-sandbox (kubernetes-sigs/agent-sandbox)"
    advice: Mapping[str, str] = field(default_factory=dict)

    def name(self, session_id: str, incarnation: int = 0, group: str = "") -> str:
        """Always a valid DNS label, different for different ids, and for each group of managers."""
        return f"{self.name_prefix}-{metadata.name_digest(session_id, incarnation, group)}"

    def body(
        self,
        config: SandboxManagerConfig,
        api_version: str,
        name: str,
        session: str,
        lease: str | None = None,
        requested: float = 0.0,
        annotations: Mapping[str, str] = MappingProxyType({}),
        owner: str | None = None,
    ) -> Object:
        """The object to create.

        Args:
            config: Namespace; image, port, TLS and the optional pod template, or the warm pool.
            api_version: One of `versions`.
            name: From `name`.
            session: From `metadata.session_hash`.
            lease: From `metadata.lease_time`: when the cluster itself deletes the object.
            requested: The Unix time at which the session was asked for.
            annotations: Of the object.
            owner: Whose session it is, for a label that other managers read.
        """
        labels = {
            metadata.LABEL_APP: metadata.APP,
            metadata.LABEL_MANAGED_BY: config.managed_by,
            metadata.LABEL_INSTANCE: config.instance_label,
            metadata.LABEL_SESSION: session,
        }
        if owner is not None:
            labels[metadata.LABEL_OWNER] = metadata.owner_label(owner)
        spec = self.spec(config, api_version, {**labels, metadata.LABEL_SANDBOX: name})
        about: Object = {"name": name, "namespace": config.namespace, "labels": labels}
        if self.requested_at is not None:
            annotations = {self.requested_at: metadata.timestamp(requested), **annotations}
        if annotations:
            about["annotations"] = dict(annotations)
        return {
            "apiVersion": f"{self.group}/{api_version}",
            "kind": self.kind,
            "metadata": about,
            "spec": spec if lease is None else spec | self.deadline_spec(lease),
        }

    def deadline_spec(self, lease: str | None) -> Object:
        """The spec fields of a deadline; of None: those that take it away. By default it would be kept."""
        fields = {"shutdownTime": lease} | ({} if lease is None else {"shutdownPolicy": "Delete"})
        return fields if self.lifecycle is None else {self.lifecycle: fields}

    def deadline(self, obj: Object) -> float | None:
        """When the cluster deletes it, as a Unix time; None: never."""
        spec = obj.get("spec") or {}
        fields = spec if self.lifecycle is None else spec.get(self.lifecycle) or {}
        return metadata.unix_time(fields.get("shutdownTime"))

    def lapsed(self, obj: Object, now: float) -> bool:
        """Whether its deadline lies before the Unix time `now`."""
        deadline = self.deadline(obj)
        return deadline is not None and deadline < now

    def reading(self, obj: Object, config: SandboxManagerConfig, *, now: float, since: int = 0) -> Reading:
        """What the object says of itself.

        Running means that the endpoint is known and that the Ready condition is True, or that the
        controller reports no Ready condition at all. A Service alone is not enough: it exists before its
        pod is ready.

        Args:
            obj: As the API server returns it.
            config: Where its endpoint is.
            now: The Unix time. That it has expired counts only with its own deadline past,
                which another manager may have moved meanwhile.
            since: The generation that the reader's own latest patch has made; what the
                controller observed before that does not count.
        """
        machine = self.machine(obj)
        phase, text, refused = self._phase(obj, now, since)
        if phase != "running":
            return Reading(phase, None, text, refused, machine)
        target = endpoint(obj, machine, config)
        if target is not None:
            changed = metadata.conditions(obj).get("Ready", {}).get("lastTransitionTime")
            return Reading("running", target, text, None, machine, changed)
        known = "no address in its status yet"
        if not obj.get("status"):
            known = "no status yet (does agent-sandbox's controller run?)"
        return Reading("starting", None, known, None, machine)

    def _phase(self, obj: Object, now: float, since: int) -> tuple[Phase, str, Refusal | None]:
        """Phase, text and refusal; "running" if only its endpoint may be missing."""
        if metadata.is_deleting(obj):
            return "ending", "it is being deleted", None
        if 0 < metadata.generation(obj) < since:
            return "starting", "the latest change of its spec is not seen yet", None
        conditions = metadata.conditions(obj, since)
        ready, finished = conditions.get("Ready"), conditions.get("Finished")
        text = "ready" if ready is None else self._described(ready)
        reason = ready.get("reason") if ready is not None and ready.get("status") == "False" else None
        if reason == self.expired and self.lapsed(obj, now):
            return "ending", text, None
        if not self.is_to_run(obj):
            return "suspended", text if ready else "it is suspended", None
        if finished is not None and finished.get("status") == "True":
            return "dead", self._described(finished), None
        if reason in self.dead:
            return "dead", text, None
        if reason in self.never:
            return "never", text, None
        if ready is not None and ready.get("status") != "True":
            return "starting", text, refusal(str(reason), str(ready.get("message") or ""))
        if ready is None and since and (obj.get("status") or {}).get("conditions"):
            return "starting", "the controller has not seen the latest change of its spec yet", None
        return "running", text, None

    def _described(self, condition: Object) -> str:
        text = f"{condition.get('type')}={condition.get('status')}"
        if condition.get("reason"):
            text += f", reason {condition['reason']}"
        if condition.get("message"):
            text += f": {condition['message']}"
        advice = self.advice.get(str(condition.get("reason")))
        return text if advice is None else f"{text} ({advice})"


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
