"""What the answers of an API server mean: codes, Status bodies and texts, as errors."""

from __future__ import annotations

import json
from typing import Any

import pytest

from prodisco_sandbox import (
    SandboxCapacityError,
    SandboxConflictError,
    SandboxError,
    SandboxFailedError,
    SandboxPermissionError,
    SandboxUnavailableError,
)
from prodisco_sandbox._cluster.api_errors import (
    AlreadyExistsError,
    ExpiredError,
    NotFoundError,
    PreconditionError,
    RetryableError,
    UnsupportedError,
    VersionGoneError,
    rbac_refused,
    translate,
)


def status(code: int, message: str = "no", **fields: Any) -> str:
    return json.dumps({"kind": "Status", "code": code, "message": message, **fields})


RBAC = (
    'sandboxes.agents.x-k8s.io is forbidden: User "me" cannot {verb} resource "sandboxes"'
    ' in API group "agents.x-k8s.io" in the namespace "prodisco"'
)
DENIED = 'admission webhook "w.example.com" denied the request: no digest'
POLICY = (
    "sandboxes.agents.x-k8s.io \"x\" is forbidden: ValidatingAdmissionPolicy 'p' denied request: metadata.uid"
)
CALLING = 'Internal error occurred: failed calling webhook "w": Post "https://w.n.svc:443/": EOF'
WARMING = 'sandboxes.agents.x-k8s.io "x" is forbidden: not yet ready to handle request'
HTML = "<html><h1>403 Forbidden</h1><p>request blocked</p></html>"


@pytest.mark.parametrize(
    ("verb", "code", "said", "kind"),
    [
        ("get", 400, status(400), SandboxFailedError),
        ("get", 401, status(401), SandboxPermissionError),
        ("get", 403, status(403), SandboxPermissionError),
        ("delete", 403, None, SandboxPermissionError),
        ("create", 403, status(403, RBAC.format(verb="create")), SandboxPermissionError),
        ("patch", 403, status(403, RBAC.format(verb="patch")), SandboxPermissionError),
        ("create", 403, status(403, DENIED), SandboxFailedError),
        ("create", 403, status(403, 'x "y" is forbidden: [maximum cpu usage is 1]'), SandboxFailedError),
        ("create", 403, status(403, "no"), SandboxFailedError),
        ("create", 403, status(403, WARMING), RetryableError),
        ("create", 403, status(403, "status unknown for quota: q"), RetryableError),
        *((verb, 403, HTML, SandboxPermissionError) for verb in ("create", "list", "discover")),
        *(
            (verb, code, status(code, DENIED), SandboxFailedError)
            for verb in ("create", "patch", "delete")
            for code in (400, 401, 404, 405, 409, 410, 415, 422)
        ),
        *(
            (verb, code, status(code, DENIED), RetryableError)
            for verb in ("create", "delete")
            for code in (429, 500, 503)
        ),
        ("create", 422, status(422, POLICY), SandboxFailedError),
        ("patch", 422, status(422, POLICY), SandboxFailedError),
        ("patch", 422, status(422, "spec.podTemplate.spec.securityContext: uid"), SandboxFailedError),
        ("create", 500, status(500, CALLING), RetryableError),
        ("create", 403, status(403, "exceeded quota: q"), SandboxCapacityError),
        ("create", 403, status(403, f"{DENIED}: exceeded quota: q"), SandboxCapacityError),
        ("create", 403, status(403, "namespace is being terminated"), SandboxFailedError),
        ("get", 404, status(404), NotFoundError),
        ("get", 404, None, NotFoundError),
        ("get", 404, "404 page not found\n", VersionGoneError),
        ("create", 404, status(404, details={"kind": "namespaces"}), SandboxFailedError),
        ("get", 405, status(405), UnsupportedError),
        ("patch", 415, status(415), UnsupportedError),
        ("create", 409, status(409, reason="AlreadyExists"), AlreadyExistsError),
        ("create", 409, None, AlreadyExistsError),
        ("create", 409, status(409, reason="Conflict"), RetryableError),
        ("patch", 409, status(409, reason="Conflict"), PreconditionError),
        ("delete", 409, status(409, reason="Conflict"), PreconditionError),
        ("watch", 410, status(410), ExpiredError),
        ("patch", 422, status(422, "metadata.uid: field is immutable"), PreconditionError),
        ("patch", 422, status(422, "spec.podTemplate: required"), SandboxFailedError),
        ("create", 422, status(422, "spec.podTemplate: required"), SandboxFailedError),
        ("get", 429, "slow down", RetryableError),
        ("get", 500, status(500), RetryableError),
        ("get", 501, status(501), SandboxFailedError),
        ("get", 502, "<html>", RetryableError),
        ("get", 503, None, RetryableError),
        ("get", 504, status(504), RetryableError),
        ("get", 0, None, RetryableError),
    ],
)
def test_what_an_answer_means(verb: str, code: int, said: str | None, kind: type[SandboxError]) -> None:
    error = translate(verb, "prodisco", code, said, None)
    assert type(error) is kind
    assert error.status == code
    assert f"refused to {verb} a Sandbox in namespace 'prodisco'" in str(error)


def test_errors_keep_to_the_public_tree() -> None:
    assert issubclass(AlreadyExistsError, SandboxConflictError)
    assert issubclass(PreconditionError, SandboxConflictError)
    for kind in (RetryableError, ExpiredError, VersionGoneError):
        assert issubclass(kind, SandboxUnavailableError)


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (status(400, "the server's words"), "the server's words"),
        ({"message": "a dict already"}, "a dict already"),
        (status(400, "bytes").encode(), "bytes"),
        ("Zugriff verweigert: gesch\u00fctzt".encode("latin-1"), "Zugriff verweigert: gesch\ufffdtzt"),
        ("plain text", "plain text"),
        ("x" * 10_000, "x" * 500),
        ("[1, 2]", "[1, 2]"),
        (None, "HTTP 400"),
    ],
)
def test_the_servers_words_are_kept(said: Any, text: str) -> None:
    assert str(translate("get", "n", 400, said, None)).endswith(f": {text}")


@pytest.mark.parametrize("verb", ["create", "get", "list", "watch", "delete", "patch"])
def test_a_missing_permission_names_the_rule(verb: str) -> None:
    rule = f'apiGroups ["agents.x-k8s.io"], resources ["sandboxes"], verbs ["{verb}"]'
    for said in (status(403, RBAC.format(verb=verb)), status(403, "Forbidden"), None):
        assert rule in str(translate(verb, "n", 403, said, None))
        assert rbac_refused(verb, 403, said)


@pytest.mark.parametrize("said", [status(403, DENIED), status(403, "no"), HTML, status(403, POLICY)])
@pytest.mark.parametrize("verb", ["create", "list", "patch", "discover"])
def test_what_rbac_has_not_refused_does_not_name_a_rule(verb: str, said: str) -> None:
    assert "needs the rule" not in str(translate(verb, "n", 403, said, None))
    assert not rbac_refused(verb, 403, said)


@pytest.mark.parametrize(
    ("code", "said"), [(500, CALLING), (500, DENIED), (503, DENIED), (403, WARMING), (429, DENIED)]
)
def test_what_admission_could_not_decide_has_done_nothing(code: int, said: str) -> None:
    error = translate("create", "n", code, status(code, said), None)
    assert isinstance(error, RetryableError)
    assert not error.ambiguous


@pytest.mark.parametrize(
    ("code", "headers", "pause"),
    [
        (429, {"Retry-After": "7"}, 7.0),
        (429, {"retry-after": "0"}, 0.0),
        (429, {"RETRY-AFTER": "1.5"}, 1.5),
        (429, {"Retry-After": "-3"}, 0.0),
        (429, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, None),
        (429, {}, None),
        (429, None, None),
        (503, {"Retry-After": "7"}, None),
        (500, {"Retry-After": "7"}, None),
    ],
)
def test_retry_after_is_read_on_429_only(
    code: int, headers: dict[str, str] | None, pause: float | None
) -> None:
    error = translate("get", "n", code, None, headers)
    assert isinstance(error, RetryableError)
    assert error.retry_after == pause
    assert error.ambiguous == (code != 429)
