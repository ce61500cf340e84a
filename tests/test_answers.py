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
from prodisco_sandbox._answers import (
    AlreadyExistsError,
    ExpiredError,
    NotFoundError,
    PreconditionError,
    RetryableError,
    UnsupportedError,
    VersionGoneError,
    translate,
)


def status(code: int, message: str = "no", **fields: Any) -> str:
    return json.dumps({"kind": "Status", "code": code, "message": message, **fields})


@pytest.mark.parametrize(
    ("verb", "code", "said", "kind"),
    [
        ("get", 400, status(400), SandboxFailedError),
        ("get", 401, status(401), SandboxPermissionError),
        ("get", 403, status(403), SandboxPermissionError),
        ("create", 403, status(403, "exceeded quota: q"), SandboxCapacityError),
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
    assert rule in str(translate(verb, "n", 403, status(403), None))


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
