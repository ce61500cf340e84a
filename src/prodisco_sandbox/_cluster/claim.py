"""agent-sandbox's SandboxClaim: a session's object where its sandbox comes from a warm pool.

The API: kubernetes-sigs/agent-sandbox, ``extensions.agents.x-k8s.io``.
"""

from __future__ import annotations

from ..config import SandboxManagerConfig
from .manifest import SANDBOX
from .metadata import Object, conditions
from .resource import Machine, Resource

GROUP = "extensions.agents.x-k8s.io"
PLURAL = "sandboxclaims"
KIND = "SandboxClaim"

REQUESTED_AT = "agents.x-k8s.io/client-first-requested-at"
"""Annotation from which the controller's own metric of start-up latency counts."""


def claim_spec(config: SandboxManagerConfig, _version: str, _labels: dict[str, str]) -> Object:
    """The spec of a new claim, without env and volumes: either would make every start cold."""
    return {"warmPoolRef": {"name": config.warm_pool}}


def machine(claim: Object) -> Machine:
    """The bound Sandbox's pod, which has the name of its Sandbox."""
    bound = (claim.get("status") or {}).get("sandbox") or {}
    return Machine(str(bound.get("name") or ""), tuple(bound.get("podIPs") or ()))


def is_to_run(claim: Object) -> bool:
    """Whether its Sandbox is not suspended, which only the status tells."""
    return (conditions(claim).get("Ready") or {}).get("reason") != "SandboxSuspended"


CLAIM = Resource(
    group=GROUP,
    plural=PLURAL,
    kind=KIND,
    versions=("v1beta1",),
    # A cold start makes a Sandbox of the claim's name, which no session of the other kind has.
    name_prefix="session",
    spec=claim_spec,
    machine=machine,
    lifecycle="lifecycle",
    requested_at=REQUESTED_AT,
    is_to_run=is_to_run,
    never=frozenset({"InvalidMetadata", "EnvVarsInjectionRejected", "VolumeClaimTemplatesError"}),
    dead=SANDBOX.dead,
    expired="ClaimExpired",
    release="agent-sandbox with its extensions (sandbox-with-extensions.yaml)",
    advice={
        "WarmPoolNotFound": "create it in this namespace, or correct warm_pool",
        "TemplateNotFound": "create the SandboxTemplate that the pool refers to",
    },
)


def resource_for(config: SandboxManagerConfig) -> Resource:
    """The kind of object that the sessions of a manager have."""
    return SANDBOX if config.warm_pool is None else CLAIM
