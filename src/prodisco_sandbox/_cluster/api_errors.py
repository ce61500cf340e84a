"""What the answers of a Kubernetes API server mean: HTTP errors as the library's own."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import Any

from .._aio.pacing import backoff
from ..errors import (
    SandboxCapacityError,
    SandboxConflictError,
    SandboxError,
    SandboxFailedError,
    SandboxPermissionError,
    SandboxUnavailableError,
)
from . import refusals as _refusals
from .manifest import SANDBOX
from .resource import Resource


class RetryableError(SandboxUnavailableError):
    """A fault that may pass: 429, 5xx, a broken connection, no answer.

    Attributes:
        ambiguous: The request may have been carried out all the same, or still be.
        retry_after: The pause that the server asked for, in seconds.
    """

    ambiguous = True
    retry_after: float | None = None

    def pause(self, attempt: int) -> float:
        """Seconds to wait before the next try; `attempt` counts the tries that failed before this one."""
        return backoff(attempt) if self.retry_after is None else self.retry_after


class NotFoundError(SandboxError):
    """The object does not exist."""


class AlreadyExistsError(SandboxConflictError):
    """An object of this name exists."""


class PreconditionError(SandboxConflictError):
    """The object is not the one that was meant: another uid or resourceVersion."""


class ExpiredError(SandboxUnavailableError):
    """The resourceVersion or the continue token is too old (410)."""


class UnsupportedError(SandboxError):
    """The API, or the object that stands for it, cannot do this."""


class UnexpectedError(SandboxError):
    """The API object raised what no Kubernetes client raises.

    Attributes:
        ambiguous: As for `RetryableError`.
    """

    ambiguous = True


class VersionGoneError(SandboxUnavailableError):
    """The API server knows no such path: the API version is not served (any more)."""


WRITES = ("create", "patch", "delete")
"""The verbs that admission looks at."""


def translate(
    verb: str,
    namespace: str,
    code: int,
    body: object,
    headers: Mapping[str, str] | None,
    resource: Resource = SANDBOX,
) -> SandboxError:
    """What an HTTP error means. `body` is a Kubernetes Status in JSON, or any text."""
    status, said = _read(code, body)
    text = f"the API server refused to {verb} a {resource.kind} in namespace {namespace!r}: {said}"
    if _refusals.is_denied(said) and not _refusals.exceeded_quota(said):
        # The webhook chooses the code: one that failed inside says 500.
        if code == 429 or code >= 500:
            return retryable(code, text, headers, ambiguous=False)
        return SandboxFailedError(text, status=code)
    match code:
        case 401:
            why = "the credentials are missing, have expired or were revoked"
            return SandboxPermissionError(f"{text}: {why}", status=code)
        case 403:
            return _forbidden(verb, said, text, resource, is_status=(status or {}).get("kind") == "Status")
        case 404 if status is None and body:
            return VersionGoneError(text, status=code)
        case 404 if ((status or {}).get("details") or {}).get("kind") == "namespaces":
            return SandboxFailedError(text, status=code)
        case 404:
            return NotFoundError(text, status=code)
        case 405 | 415:
            return UnsupportedError(text, status=code)
        case 409 if verb == "create" and (status or {}).get("reason", "AlreadyExists") == "AlreadyExists":
            return AlreadyExistsError(text, status=code)
        case 409 if verb == "create":  # Not about the object: a ResourceQuota that others count on.
            return retryable(code, text, headers, ambiguous=False)
        case 409:
            return PreconditionError(text, status=code)
        case 410:
            return ExpiredError(text, status=code)
        case 422 if verb == "patch" and "metadata.uid" in said:
            return PreconditionError(text, status=code)
        case 429 | 500 | 502 | 503 | 504 | 0:
            # Admission comes before anything is stored.
            return retryable(code, text, headers, ambiguous=False if _refusals.may_pass(said) else None)
    return SandboxFailedError(text, status=code)


def _forbidden(verb: str, said: str, text: str, resource: Resource, *, is_status: bool) -> SandboxError:
    """What a 403 means: RBAC, a quota, an admission plugin and proxies all use it."""
    if _refusals.exceeded_quota(said):
        return SandboxCapacityError(text, status=403)
    if rule := _missing_rule(verb, said, resource):
        return SandboxPermissionError(f"{text} ({rule})", status=403)
    if _refusals.may_pass(said):
        return retryable(403, text, None, ambiguous=False)
    if is_status and verb in WRITES:
        return SandboxFailedError(text, status=403)
    if not is_status:
        text += " (this is not the API server's own answer, but that of something in front of it)"
    return SandboxPermissionError(text, status=403)


def rbac_refused(verb: str, code: int, body: object) -> bool:
    """Whether RBAC refused, which it does to everybody while an API server starts."""
    said = _read(code, body)[1]
    return code == 403 and not _refusals.is_denied(said) and _missing_rule(verb, said, SANDBOX) is not None


def _missing_rule(verb: str, said: str, resource: Resource) -> str | None:
    text = "" if said == "HTTP 403" else said
    return _refusals.missing_rule(text, resource.group, resource.plural, verb)


def _read(code: int, body: object) -> tuple[dict[str, Any] | None, str]:
    """The Status, if it is one, and what it or the text says."""
    if isinstance(body, bytes):
        body = body.decode(errors="replace")
    status = _parsed(body)
    message = (status or {}).get("message")
    return status, str(message or (str(body)[:500] if body else f"HTTP {code}"))


def retryable(
    code: int, text: str, headers: Mapping[str, str] | None, *, ambiguous: bool | None = None
) -> RetryableError:
    error = RetryableError(text, status=code)
    error.ambiguous = code != 429 if ambiguous is None else ambiguous
    if code == 429 and headers is not None:
        # Header names know no case, and a plain fake's dict does.
        lower = {str(key).lower(): value for key, value in headers.items()}
        with contextlib.suppress(KeyError, ValueError):
            error.retry_after = max(0.0, float(lower["retry-after"]))
    return error


def _parsed(body: object) -> dict[str, Any] | None:
    if isinstance(body, dict):
        return body
    try:
        parsed = json.loads(body) if isinstance(body, str) else None
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) else None
