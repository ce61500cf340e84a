"""The decisions of agent-sandbox's controller (0.5.6) about a Sandbox, as a pure function.

`reconcile` is one pass of the controller: given a Sandbox and its pod, it says what to do to
the pod and which status to write. `FakeCustomObjectsApi` and `LocalCluster` carry it out, each
with pods of its own kind. Texts, reasons and the order of conditions are the real ones.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from .._cluster import metadata
from .._cluster.metadata import Object

POD_NAME = "agents.x-k8s.io/pod-name"
"""The annotation that names a Sandbox's pod."""
_SELECTOR = "agents.x-k8s.io/sandbox-name-hash"
EXPIRY_SECONDS = 0.07
"""From SandboxExpired to the deletion, as seen on a cluster."""
_LEAST_WAIT = 2.0
"""Seconds until the controller's next pass for a shutdownTime, at least."""
_FINISHED = {
    "Succeeded": ("PodSucceeded", "Pod completed successfully"),
    "Failed": ("PodFailed", "Pod failed"),
}


@dataclass(frozen=True, slots=True)
class Pod:
    """As much of a pod as the controller reads.

    Attributes:
        name: Its name.
        owner: Name and uid of the Sandbox that controls it.
        phase: status.phase.
        node: The node that it is scheduled to; empty: none yet.
        ips: status.podIPs.
        ready: Whether its Ready condition is True.
        deleting: Whether it has a deletionTimestamp.
        message: How it ended, instead of the controller's own words.
    """

    name: str
    owner: tuple[str, str]
    phase: Literal["Pending", "Running", "Succeeded", "Failed"] = "Pending"
    node: str = ""
    ips: tuple[str, ...] = ()
    ready: bool = False
    deleting: bool = False
    message: str = ""


@dataclass(frozen=True, slots=True)
class Pass:
    """What one pass does, in the order of its fields.

    Attributes:
        create_pod: Whether `new_pod` is created.
        delete_pod: Whether the pod is deleted.
        delete_sandbox: Whether the Sandbox is deleted; then no status is written.
        pod_name: The value of the annotation `POD_NAME`; None: it is taken off.
        status: The whole status to write; None: it stays as it is.
        wait: Seconds to the next pass if nothing changes before; None: no pass is needed.
    """

    create_pod: bool = False
    delete_pod: bool = False
    delete_sandbox: bool = False
    pod_name: str | None = None
    status: Object | None = None
    wait: float | None = None


def new_pod(sandbox: Object) -> Pod:
    """The pod that the controller creates."""
    name = metadata.name(sandbox)
    return Pod(name, (name, str(metadata.uid(sandbox))))


def pod_name(sandbox: Object) -> str:
    """The name of the Sandbox's pod, there or not."""
    return _annotation(sandbox) or metadata.name(sandbox)


def is_suspended(sandbox: Object) -> bool:
    """Whether the spec asks for no pod: operatingMode, or the replicas of v1alpha1."""
    spec = sandbox["spec"]
    return bool(spec.get("operatingMode", "Suspended" if spec.get("replicas") == 0 else "") == "Suspended")


def reconcile(
    sandbox: Object, pod: Pod | None, now: float, *, refusal: str = "", expires: bool = True
) -> Pass:
    """One pass of the controller.

    Args:
        sandbox: The Sandbox as it is now.
        pod: The pod of the name `pod_name`, of any owner; None: there is none.
        now: Unix time.
        refusal: What the API server answers to the creation of a pod; empty: it creates it.
        expires: Whether spec.shutdownTime counts.
    """
    if metadata.is_deleting(sandbox):
        return Pass(pod_name=_annotation(sandbox))
    left = seconds_left(sandbox["spec"], now) if expires else None
    if left is not None and left <= 0:
        return _expired(sandbox, pod, now)
    name = metadata.name(sandbox)
    suspended, create, error = is_suspended(sandbox), False, ""
    if not suspended and pod is None:
        create, error = not refusal, refusal
        pod = new_pod(sandbox) if create else None
    elif not suspended and pod is not None and not _owns(sandbox, pod):
        owner, owner_uid = pod.owner
        error = f'pod "{pod.name}" is owned by Sandbox/{owner} (UID: {owner_uid}), not by sandbox "{name}"'
        pod = None
    owned = pod if pod is not None and _owns(sandbox, pod) else None
    return Pass(
        create_pod=create,
        delete_pod=suspended and owned is not None and not owned.deleting,
        pod_name=owned.name if owned else None,
        status=_changed(sandbox, _status(sandbox, pod, owned, error, now)),
        wait=None if left is None else max(left, _LEAST_WAIT),
    )


def _expired(sandbox: Object, pod: Pod | None, now: float) -> Pass:
    """Writes the condition first; the next pass does the rest, unless the time was moved meanwhile."""
    status = sandbox.get("status") or {}
    conditions = Conditions(sandbox, lambda: metadata.lease_time(now, 0))
    marked = conditions.reason("Ready") == "SandboxExpired"
    conditions.set("Ready", "False", "SandboxExpired", "Sandbox has expired")
    if not marked:
        conditions.remove("PodScheduled")
        status = {**status, "conditions": conditions.all}
        return Pass(pod_name=_annotation(sandbox), status=status, wait=EXPIRY_SECONDS)
    delete = sandbox["spec"].get("shutdownPolicy") == "Delete"
    return Pass(
        delete_pod=pod is not None and _owns(sandbox, pod) and not pod.deleting,
        delete_sandbox=delete,
        pod_name=_annotation(sandbox),
        status=None if delete else _changed(sandbox, {"conditions": conditions.all}),
    )


def _status(sandbox: Object, pod: Pod | None, owned: Pod | None, error: str, now: float) -> Object:
    name, status = metadata.name(sandbox), dict(sandbox.get("status") or {})
    for field in ("podIPs", "nodeName", "service", "serviceFQDN"):
        status.pop(field, None)
    if pod is not None:
        status["selector"] = f"{_SELECTOR}={name_hash(name)}"
    if owned is not None and owned.ips:
        status["podIPs"] = list(owned.ips)
    if owned is not None and owned.node:
        status["nodeName"] = owned.node
    if sandbox["spec"].get("service"):
        status |= {
            "service": name,
            "serviceFQDN": f"{name}.{sandbox['metadata']['namespace']}.svc.cluster.local",
        }
    conditions = Conditions(sandbox, lambda: metadata.lease_time(now, 0))
    conditions.set("Suspended", *_suspended(sandbox, pod, owned))
    finished = _FINISHED.get(owned.phase) if owned else None
    if owned and finished:
        conditions.set("Finished", "True", finished[0], owned.message or finished[1])
    else:
        conditions.remove("Finished")
    if scheduled := _scheduled(owned, error):
        conditions.set("PodScheduled", *scheduled)
    else:
        conditions.remove("PodScheduled")
    conditions.set("Ready", *_ready(sandbox, pod, error))
    status["conditions"] = conditions.all
    return status


def _suspended(sandbox: Object, pod: Pod | None, owned: Pod | None) -> tuple[str, str, str]:
    if not is_suspended(sandbox):
        return "False", "NotSuspended", "Sandbox is not suspended"
    if pod is None:
        return "True", "PodTerminated", "Pod has been terminated. Sandbox is suspended"
    if owned is None:
        return "False", "PodNotOwned", "Refused to delete pod because it is not owned by this sandbox"
    return "False", "PodTerminating", "Pod is terminating. Sandbox is suspending"


def _scheduled(owned: Pod | None, error: str) -> tuple[str, str, str] | None:
    if error:
        text = "Pod state is unknown. Pod scheduling cannot be determined"
        return "Unknown", "PodSchedulingUnknown", text
    if owned is None:
        return None
    if owned.node:
        return "True", "PodScheduled", ""
    return "Unknown", "PodSchedulingUnknown", "Pod has not reported a PodScheduled condition yet"


def _ready(sandbox: Object, pod: Pod | None, error: str) -> tuple[str, str, str]:
    if error:
        return "False", "ReconcilerError", f"Error seen: {error}"
    if is_suspended(sandbox):
        return "False", "SandboxSuspended", f"Sandbox is {'suspended' if pod is None else 'suspending'}"
    assert pod is not None  # noqa: S101 - a Sandbox that runs has a pod, or an error
    if finished := _FINISHED.get(pod.phase):
        return "False", finished[0], pod.message or finished[1]
    service = "; Service Exists" if sandbox["spec"].get("service") else ""
    if pod.phase != "Running":
        return "False", "DependenciesNotReady", f"Pod exists with phase: {pod.phase}{service}"
    if not pod.ready:
        return "False", "DependenciesNotReady", f"Pod is Running but not Ready{service}"
    if not pod.ips:
        return "False", "DependenciesNotReady", f"Pod is Ready but has no podIPs yet{service}"
    return "True", "DependenciesReady", f"Pod is Ready{service}"


def _changed(sandbox: Object, status: Object) -> Object | None:
    """The status, if the controller writes it: it does not write for a node's name alone."""
    old = sandbox.get("status") or {}
    if status == old:
        return None
    node = {"nodeName": old["nodeName"]} if "nodeName" in old else {}
    same = {**{field: value for field, value in status.items() if field != "nodeName"}, **node} == old
    is_ready = any(c["type"] == "Ready" and c["status"] == "True" for c in status["conditions"])
    return None if same and not is_ready else status


class Conditions:
    """The conditions of a status, which keep their places, and their times while their status stays."""

    def __init__(self, sandbox: Object, timestamp: Callable[[], str]) -> None:
        self.all: list[Object] = [dict(c) for c in (sandbox.get("status") or {}).get("conditions") or ()]
        self._generation = sandbox["metadata"].get("generation", 1)
        self._timestamp = timestamp

    def reason(self, kind: str) -> str | None:
        return next((c["reason"] for c in self.all if c["type"] == kind), None)

    def set(self, kind: str, status: str, reason: str, message: str) -> None:
        found = next((c for c in self.all if c["type"] == kind), None)
        if found is None:
            found = {"type": kind}
            self.all.append(found)
        if found.get("status") != status:
            found["lastTransitionTime"] = self._timestamp()
        fields = {"status": status, "reason": reason, "message": message}
        found.update(fields, observedGeneration=self._generation)

    def copy(self, condition: Object) -> None:
        """Takes over a condition of another object; its time only where its status is new."""
        found = next((c for c in self.all if c["type"] == condition["type"]), None)
        if found is None:
            self.all.append(dict(condition))
        else:
            same = found.get("status") == condition["status"]
            kept = {"lastTransitionTime": found["lastTransitionTime"]} if same else {}
            found.update(condition | kept)

    def remove(self, kind: str) -> None:
        self.all = [c for c in self.all if c["type"] != kind]


def name_hash(name: str) -> str:
    """FNV-1a of 32 bits, in hex: what selects a Sandbox's pods."""
    value = 2166136261
    for byte in name.encode():
        value = (value ^ byte) * 16777619 % 2**32
    return f"{value:08x}"


def _owns(sandbox: Object, pod: Pod) -> bool:
    return pod.owner[1] == metadata.uid(sandbox)


def _annotation(sandbox: Object) -> str | None:
    return (sandbox["metadata"].get("annotations") or {}).get(POD_NAME) or None


def seconds_left(spec: Object, now: float) -> float | None:
    """Seconds until the shutdownTime; None: there is none that can be read."""
    text: Any = spec.get("shutdownTime")
    try:
        end = dt.datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None
    return (end if end.tzinfo else end.replace(tzinfo=dt.UTC)).timestamp() - now
