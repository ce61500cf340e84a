"""A kind of object is a value: a SandboxClaim beside the Sandbox, without a change of the requests."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from kubernetes_asyncio.client import ApiException

from prodisco_sandbox import SandboxPermissionError
from prodisco_sandbox._cluster.claim import CLAIM
from prodisco_sandbox._cluster.manifest import SANDBOX
from prodisco_sandbox._cluster.metadata import LABEL_SESSION
from prodisco_sandbox._cluster.requests import SandboxResources
from tests.support.resources import settings


def claim(reason: str = "", *, ready: str = "False", ip: str | None = None, until: str | None = None) -> Any:
    spec = {} if until is None else {"lifecycle": {"shutdownTime": until}}
    bound = {} if ip is None else {"sandbox": {"name": "warm-1", "podIPs": [ip]}}
    condition = {"type": "Ready", "status": ready, "reason": reason}
    return {"metadata": {"name": "session-x"}, "spec": spec, "status": {"conditions": [condition], **bound}}


def test_its_body_and_where_its_deadline_is() -> None:
    name = CLAIM.name("s")
    body = CLAIM.body(
        settings(warm_pool="python"), "v1beta1", name, "0" * 40, "2026-01-01T00:00:00Z", 1767225601.25
    )
    assert (body["apiVersion"], body["kind"]) == ("extensions.agents.x-k8s.io/v1beta1", "SandboxClaim")
    assert body["metadata"]["name"] == "session-" + SANDBOX.name("s").removeprefix("sandbox-")
    assert body["metadata"]["labels"][LABEL_SESSION] == "0" * 40
    assert body["spec"] == {
        "warmPoolRef": {"name": "python"},
        "lifecycle": {"shutdownTime": "2026-01-01T00:00:00Z", "shutdownPolicy": "Delete"},
    }
    requested = {"agents.x-k8s.io/client-first-requested-at": "2026-01-01T00:00:01.250000Z"}
    assert body["metadata"]["annotations"] == requested
    assert CLAIM.deadline_spec(None) == {"lifecycle": {"shutdownTime": None}}
    assert SANDBOX.deadline_spec(None) == {"shutdownTime": None}


@pytest.mark.parametrize(
    ("found", "phase", "target"),
    [
        (claim("DependenciesNotReady"), "starting", None),
        (claim("DependenciesReady", ready="True"), "starting", None),
        (claim("DependenciesReady", ready="True", ip="10.0.0.1"), "running", "10.0.0.1:50051"),
        (claim("InvalidMetadata"), "never", None),
        (claim("EnvVarsInjectionRejected"), "never", None),
        (claim("VolumeClaimTemplatesError"), "never", None),
        (claim("WarmPoolNotFound"), "starting", None),
        (claim("TemplateNotFound"), "starting", None),
        (claim("SandboxSuspended", ip="10.0.0.1"), "suspended", None),
        (claim("PodFailed", ip="10.0.0.1"), "dead", None),
        (claim("InvalidConfiguration"), "starting", None),
        (claim("ClaimExpired", until="2026-01-01T00:00:00Z"), "ending", None),
        (claim("ClaimExpired", until="2026-01-01T00:00:02Z"), "starting", None),
        (claim("SandboxExpired", until="2026-01-01T00:00:00Z"), "starting", None),
    ],
)
def test_how_it_is_read(found: dict[str, Any], phase: str, target: str | None) -> None:
    reading = CLAIM.reading(found, settings(), now=1767225601.0)
    assert (reading.phase, reading.target) == (phase, target)
    assert reading.machine.pod == ("warm-1" if found["status"].get("sandbox") else "")


def test_what_is_missing_is_named_with_what_to_do() -> None:
    reading = CLAIM.reading(claim("WarmPoolNotFound"), settings(), now=0.0)
    assert reading.text == (
        "Ready=False, reason WarmPoolNotFound (create it in this namespace, or correct warm_pool)"
    )


@pytest.mark.parametrize(
    ("message", "refusal"),
    [
        ('Error seen: sandbox "a" is not controlled by claim "a". Please use another', "occupied"),
        ('Error seen: sandboxes "a" is forbidden: exceeded quota: q, requested: count/x=1', "quota"),
        ("Error seen: the object has been modified", None),
    ],
)
def test_what_keeps_a_claim_from_a_sandbox(message: str, refusal: str | None) -> None:
    found = claim("ReconcilerError")
    found["status"]["conditions"][0]["message"] = message
    assert CLAIM.reading(found, settings(), now=0.0).refusal == refusal


@pytest.mark.looptime
async def test_what_is_asked_of_the_api_server() -> None:
    asked: list[tuple[object, ...]] = []

    class Api:
        def __getattr__(self, method: str) -> Any:
            async def call(*args: object, **_: object) -> None:
                asked.append((method, *args))
                raise ApiException(status=403)

            return call

    resources = SandboxResources(settings(), Api(), resource=CLAIM)
    with pytest.raises(SandboxPermissionError, match=r"to get a SandboxClaim.*sandboxclaims"):
        await resources.get("session-x")
    with contextlib.suppress(SandboxPermissionError):
        await anext(resources.watch("a=b", ""))
    target = ("extensions.agents.x-k8s.io", "v1beta1", "prodisco", "sandboxclaims")
    assert asked == [
        ("get_api_resources", "extensions.agents.x-k8s.io", "v1beta1"),
        ("get_namespaced_custom_object", *target, "session-x"),
        ("list_namespaced_custom_object", *target),
    ]
