"""The decisions of agent-sandbox's controllers (0.5.6) about claims and warm pools, as pure functions.

Each decides on one write at a time: carry it out, and ask again, until there is none.
`FakeCustomObjectsApi` and `LocalCluster` do so. Texts, reasons and the order of events are the
real ones.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from .._cluster import metadata
from .._cluster.claim import machine
from .._cluster.manifest import GROUP
from .._cluster.metadata import Object
from ._agent_sandbox import POD_NAME, Conditions, name_hash, seconds_left
from ._kinds import CLAIM, EXTENSIONS, POOL, SANDBOX, Kind

BOUND = f"{GROUP}/sandbox-name"
"""The annotation of a claim that names the member it has taken."""
MEMBER = f"{GROUP}/warm-pool-sandbox"
"""The label of a pool's members: a hash of the pool's name."""
_OBSERVED = f"{GROUP}/controller-first-observed-at"
_FIRST_READY = f"{GROUP}/claim-first-ready-at"
_TEMPLATE = f"{GROUP}/sandbox-template-ref"
_TEMPLATE_HASH = f"{GROUP}/sandbox-template-ref-hash"
_LAUNCH = f"{GROUP}/launch-type"
_CLAIM_UID = f"{GROUP}/claim-uid"

_WAIT_FOR_ADDRESS = 2.0
"""Seconds after its creation for which a claim waits for a member that has no address yet."""
_LOOK_AGAIN = 0.5
MISSING_RETRY = 60.0
"""Seconds until the next look for a template that is missing."""
STUCK = 300.0
"""Seconds for which a member may be not ready before it is replaced."""
_LABEL_DOMAIN = "sandbox.users.io"
_RESERVED_DOMAINS = ("kubernetes.io", "k8s.io", "agents.x-k8s.io")


@dataclass(frozen=True, slots=True)
class Step:
    """One write.

    Attributes:
        verb: What is done.
        of: The kind of object.
        name: Its name; empty where it is generated.
        body: The object, the merge patch or the DeleteOptions.
    """

    verb: Literal["create", "patch", "patch_status", "delete"]
    of: Kind
    name: str
    body: Object


@dataclass(frozen=True, slots=True)
class World:
    """What a claim's controller looks at.

    Attributes:
        sandbox: The Sandbox of a name in the claim's namespace, if there is one.
        members: The pool's, those that became its members first in front.
        pool: The SandboxWarmPool that the claim names.
        template: The SandboxTemplate that the pool names.
        now: Unix time.
        refusal: What the API server answered to the creation of a Sandbox, if it refused it.
    """

    sandbox: Callable[[str], Object | None]
    members: Iterable[Object]
    pool: Object | None
    template: Object | None
    now: float
    refusal: str = ""


class _Error(Exception):
    """Why a claim has no Sandbox."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def claim_step(claim: Object, world: World) -> Step | float | None:
    """The next write for a claim; or the seconds until the next look at it; None: nothing is to be done."""
    if metadata.is_deleting(claim):
        return None
    if _OBSERVED not in _annotations(claim):
        return _annotate(claim, _OBSERVED, _nanoseconds(world.now))
    left = seconds_left(claim["spec"].get("lifecycle") or {}, world.now)
    if left is not None and left <= 0:
        return _expired(claim, world)
    if _is_ready(claim.get("status") or {}) and _FIRST_READY not in _annotations(claim):
        return _annotate(claim, _FIRST_READY, _nanoseconds(world.now))
    retry = None
    try:
        found = _sandbox_step(claim, world)
        if isinstance(found, Step | float):
            return found
        status = _status(claim, world, found)
    except _Error as error:
        status = _status(claim, world, None, error)
        retry = MISSING_RETRY if error.reason.endswith("NotFound") else None
        retry = 1.0 if error.reason == "ReconcilerError" else retry
    if status != (claim.get("status") or {}):
        return Step("patch_status", CLAIM, metadata.name(claim), _replaced(claim, status))
    return min((seconds for seconds in (left, retry) if seconds is not None), default=None)


def pool_step(
    pool: Object, members: Iterable[Object], template: Object | None, now: float
) -> Step | float | None:
    """The next Sandbox that a pool creates or deletes; or the seconds until the next look at it."""
    there = list(members)
    active = [member for member in there if not metadata.is_deleting(member)]
    unready = [member for member in active if not _is_ready(member.get("status") or {})]
    wanted = pool["spec"].get("replicas", 1)
    # Those that are not ready go first, the newest first.
    surplus = sorted(active, key=lambda member: (member not in unready, _age(member, now)))
    stuck = [member for member in unready if _age(member, now) > STUCK]
    for member in stuck or surplus[: max(0, len(active) - wanted)]:
        return Step("delete", SANDBOX, metadata.name(member), {})
    if len(there) >= wanted or template is None:
        return min((STUCK - _age(member, now) for member in unready), default=None)
    name = metadata.name(pool)
    labels = {MEMBER: name_hash(name), _TEMPLATE_HASH: name_hash(metadata.name(template))}
    body = _sandbox(pool, POOL, template, _pod_metadata(pool, template, labels))
    own = {**labels, _LAUNCH: "warm", f"{GROUP}/created-by": "controller"}
    body["metadata"] |= {"generateName": f"{name}-", "labels": own}
    return Step("create", SANDBOX, "", body)


def pool_status(pool: Object, members: Iterable[Object]) -> Object:
    """The status of a pool."""
    active = [member for member in members if not metadata.is_deleting(member)]
    ready = sum(1 for member in active if _is_ready(member.get("status") or {}))
    return {
        "observedGeneration": metadata.generation(pool),
        "selector": f"{MEMBER}={name_hash(metadata.name(pool))}",
        **{key: count for key, count in (("readyReplicas", ready), ("replicas", len(active))) if count},
    }


def owner(obj: Object) -> Object:
    """The reference to the object that controls this one; empty: nothing does."""
    references = (obj.get("metadata") or {}).get("ownerReferences") or ()
    return next((reference for reference in references if reference.get("controller")), {})


def owns(owner_: Object, obj: Object) -> bool:
    return bool(owner(obj).get("uid") == metadata.uid(owner_))


def _expired(claim: Object, world: World) -> Step | float | None:
    status = dict(claim.get("status") or {})
    conditions = Conditions(claim, lambda: metadata.lease_time(world.now, 0))
    if conditions.reason("Ready") != "ClaimExpired":
        conditions.set("Ready", "False", "ClaimExpired", "Claim expired. Sandbox cleanup initiated.")
        status |= {"conditions": _in_order(conditions.all), "sandbox": status.get("sandbox", {})}
        return Step("patch_status", CLAIM, metadata.name(claim), _replaced(claim, status))
    policy = claim["spec"]["lifecycle"].get("shutdownPolicy")
    if policy in ("Delete", "DeleteForeground"):
        options = {"propagationPolicy": "Foreground"} if policy == "DeleteForeground" else {}
        return Step("delete", CLAIM, metadata.name(claim), options)
    sandbox = world.sandbox((status.get("sandbox") or {}).get("name") or metadata.name(claim))
    if sandbox is not None and owns(claim, sandbox):
        if metadata.is_deleting(sandbox):
            return None
        return Step("delete", SANDBOX, metadata.name(sandbox), {})
    if status.get("sandbox"):
        status["sandbox"] = {}
        return Step("patch_status", CLAIM, metadata.name(claim), _replaced(claim, status))
    return None


def _sandbox_step(claim: Object, world: World) -> Object | Step | float:
    """The claim's Sandbox; or the next write to get one, or the seconds to wait for one."""
    _check_metadata(claim["spec"].get("additionalPodMetadata") or {})
    name = metadata.name(claim)
    known = machine(claim).pod
    sandbox = world.sandbox(known) if known else None
    if sandbox is not None and owns(claim, sandbox):
        return sandbox
    if assigned := _annotations(claim).get(BOUND):
        sandbox = world.sandbox(assigned)
        if sandbox is not None and owns(claim, sandbox):
            return sandbox
        if sandbox is None or not _is_adoptable(sandbox):
            return _annotate(claim, BOUND, None)
        return Step("patch", SANDBOX, assigned, _adopted(claim, sandbox, world.template))
    sandbox = world.sandbox(name)
    if sandbox is not None and not owns(claim, sandbox):
        raise _Error(
            "ReconcilerError",
            f'Error seen: sandbox "{name}" is not controlled by claim "{name}".'
            " Please use a different claim name or delete the sandbox manually",
        )
    if sandbox is not None:
        return sandbox
    if not claim["spec"].get("env") and not claim["spec"].get("volumeClaimTemplates"):
        candidates = [member for member in world.members if _is_adoptable(member)]
        addressed = [member for member in candidates if (member.get("status") or {}).get("podIPs")]
        for member in sorted(addressed, key=lambda found: not _is_ready(found.get("status") or {})):
            step = _annotate(claim, BOUND, metadata.name(member))
            # The controller writes the whole claim, which changes its generation.
            step.body["spec"] = {"additionalPodMetadata": claim["spec"].get("additionalPodMetadata") or {}}
            return step
        if candidates and (left := _WAIT_FOR_ADDRESS - _age(claim, world.now)) > 0:
            return min(_LOOK_AGAIN, left)
    return _cold(claim, world)


def _cold(claim: Object, world: World) -> Step:
    pool, template, name = world.pool, world.template, metadata.name(claim)
    if pool is None:
        wanted = claim["spec"]["warmPoolRef"]["name"]
        raise _Error("WarmPoolNotFound", f'SandboxWarmPool "{wanted}" not found')
    if template is None:
        wanted = pool["spec"]["sandboxTemplateRef"]["name"]
        raise _Error("TemplateNotFound", f'SandboxTemplate "{wanted}" not found')
    volumes = claim["spec"].get("volumeClaimTemplates")
    if volumes and template["spec"].get("volumeClaimTemplatesPolicy", "Disallowed") == "Disallowed":
        raise _Error(
            "VolumeClaimTemplatesError",
            "failed to merge volume claim templates: volume claim templates are disallowed by the template",
        )
    if claim["spec"].get("env") and template["spec"].get("envVarsInjectionPolicy") == "Disallowed":
        raise _Error(
            "EnvVarsInjectionRejected",
            "environment variable injection rejected:"
            " environment variable injection is not allowed by the template policy",
        )
    if world.refusal:
        raise _Error("ReconcilerError", f"Error seen: sandbox create error: {world.refusal}")
    labels = {_CLAIM_UID: str(metadata.uid(claim)), _TEMPLATE_HASH: name_hash(metadata.name(template))}
    body = _sandbox(claim, CLAIM, template, _pod_metadata(claim, template, labels))
    body["metadata"] |= {"name": name, "labels": {**labels, _LAUNCH: "cold"}}
    if volumes := [*(template["spec"].get("volumeClaimTemplates") or ()), *(volumes or ())]:
        body["spec"]["volumeClaimTemplates"] = volumes
    return Step("create", SANDBOX, name, body)


def _sandbox(owner: Object, of: Kind, template: Object, pod_metadata: Object) -> Object:
    """A Sandbox of the template, without a name."""
    spec = {key: value for key, value in template["spec"].items() if key in ("podTemplate", "service")}
    pod = {"automountServiceAccountToken": False, **spec["podTemplate"]["spec"]}
    return {
        "apiVersion": f"{GROUP}/{SANDBOX.versions[0]}",
        "kind": SANDBOX.kind,
        "metadata": {
            "namespace": owner["metadata"].get("namespace"),
            "annotations": {_TEMPLATE: metadata.name(template)},
            "ownerReferences": [_reference(owner, of)],
        },
        "spec": {
            **spec,
            "podTemplate": {"metadata": pod_metadata, "spec": pod},
            "operatingMode": "Running",
        },
    }


def _adopted(claim: Object, sandbox: Object, template: Object | None) -> Object:
    """The patch by which a member becomes the claim's."""
    labels = {_CLAIM_UID: str(metadata.uid(claim)), _TEMPLATE_HASH: metadata.labels(sandbox)[_TEMPLATE_HASH]}
    old = sandbox["spec"]["podTemplate"].get("metadata") or {}
    wanted = _pod_metadata(claim, template or sandbox, labels)
    changes = {key: {**dict.fromkeys(old.get(key) or ()), **value} for key, value in wanted.items()}
    return {
        "metadata": {
            "labels": {MEMBER: None, f"{GROUP}/created-by": None, _LAUNCH: "warm", **labels},
            "annotations": {POD_NAME: metadata.name(sandbox)},
            "ownerReferences": [_reference(claim, CLAIM)],
        },
        "spec": {"podTemplate": {"metadata": changes}},
    }


def _pod_metadata(claim: Object, template: Object, labels: dict[str, str]) -> Object:
    """A template's pod metadata with what the claim adds."""
    own = template["spec"]["podTemplate"].get("metadata") or {}
    extra = claim["spec"].get("additionalPodMetadata") or {}
    found = {"labels": {**(own.get("labels") or {}), **labels, **(extra.get("labels") or {})}}
    annotations = {**(own.get("annotations") or {}), **(extra.get("annotations") or {})}
    return found | ({"annotations": annotations} if annotations else {})


def _check_metadata(given: Object) -> None:
    for key in given.get("labels") or {}:
        domain = key.lower().rpartition("/")[0]
        error = f'label domain "{domain}" is not in the allowlist'
        if not domain:
            error = (
                f"label \"{key}\" must have a domain prefix (e.g. 'sandbox.users.io/my-label') to prevent"
                " opting into unintended policy domains"
            )
        if not _is_below(domain, _LABEL_DOMAIN):
            raise _invalid(f'label "{key}": {error}')
    for key in given.get("annotations") or {}:
        domain = key.lower().rpartition("/")[0]
        if any(_is_below(domain, reserved) for reserved in _RESERVED_DOMAINS):
            text = f'restricted system domain: "{domain}" is not allowed in AdditionalPodMetadata'
            raise _invalid(f'annotation "{key}": {text}')


def _invalid(what: str) -> _Error:
    return _Error("InvalidMetadata", f"invalid additionalPodMetadata: failed to validate {what}")


def _is_below(domain: str, parent: str) -> bool:
    return domain == parent or domain.endswith(f".{parent}")


def _status(claim: Object, world: World, sandbox: Object | None, error: _Error | None = None) -> Object:
    conditions = Conditions(claim, lambda: metadata.lease_time(world.now, 0))
    theirs = metadata.conditions(sandbox or {})
    ready = theirs.get("Ready")
    if error is not None:
        conditions.set("Ready", "False", error.reason, str(error))
    elif ready is None:
        conditions.set("Ready", "False", "SandboxNotReady", "Sandbox is not ready")
    elif ready["reason"] == "SandboxExpired":
        text = "Underlying Sandbox resource has expired independently of the Claim."
        conditions.set("Ready", "False", "SandboxExpired", text)
    else:
        conditions.copy(ready)
    if "Finished" in theirs:
        conditions.copy(theirs["Finished"])
    else:
        conditions.remove("Finished")
    status = {"conditions": _in_order(conditions.all)}
    if sandbox is None:
        return {**status, "sandbox": (claim.get("status") or {}).get("sandbox") or {}}
    ips = (sandbox.get("status") or {}).get("podIPs")
    return {**status, "sandbox": {"name": metadata.name(sandbox), **({"podIPs": ips} if ips else {})}}


def _in_order(conditions: list[Object]) -> list[Object]:
    return sorted(conditions, key=lambda condition: str(condition["type"]))


def _replaced(claim: Object, status: Object) -> Object:
    """The merge patch that makes this the whole status."""
    old = (claim.get("status") or {}).get("sandbox") or {}
    return {"status": {**status, "sandbox": {**dict.fromkeys(old), **status["sandbox"]}}}


def _is_ready(status: Object) -> bool:
    return any(c["type"] == "Ready" and c["status"] == "True" for c in status.get("conditions") or ())


def _is_adoptable(sandbox: Object) -> bool:
    return not metadata.is_deleting(sandbox) and MEMBER in metadata.labels(sandbox)


def _reference(owner: Object, of: Kind) -> Object:
    own = {"name": metadata.name(owner), "uid": metadata.uid(owner)}
    where = {"apiVersion": f"{EXTENSIONS}/{of.versions[0]}", "kind": of.kind}
    return {**where, **own, "controller": True, "blockOwnerDeletion": True}


def _annotations(obj: Object) -> dict[str, str]:
    return obj["metadata"].get("annotations") or {}


def _annotate(claim: Object, annotation: str, value: str | None) -> Step:
    return Step("patch", CLAIM, metadata.name(claim), {"metadata": {"annotations": {annotation: value}}})


def _age(obj: Object, now: float) -> float:
    return now - dt.datetime.fromisoformat(obj["metadata"]["creationTimestamp"]).timestamp()


def _nanoseconds(now: float) -> str:
    return f"{dt.datetime.fromtimestamp(now, dt.UTC):%Y-%m-%dT%H:%M:%S.%f}000Z"
