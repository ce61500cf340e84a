"""What the answers of a Kubernetes API server mean: HTTP errors as the library's own."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import Any

from .errors import (
    SandboxCapacityError,
    SandboxConflictError,
    SandboxError,
    SandboxFailedError,
    SandboxPermissionError,
    SandboxUnavailableError,
)
from .manifest import GROUP, PLURAL


class RetryableError(SandboxUnavailableError):
    """A fault that may pass: 429, 5xx, a broken connection, no answer.

    Attributes:
        ambiguous: The request may have been carried out all the same, or still be.
        retry_after: The pause that the server asked for, in seconds.
    """

    ambiguous = True
    retry_after: float | None = None


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


def translate(
    verb: str, namespace: str, code: int, body: object, headers: Mapping[str, str] | None
) -> SandboxError:
    """What an HTTP error means. `body` is a Kubernetes Status in JSON, or any text."""
    status = _parsed(body)
    plain = status is None and bool(body)
    status = status or {}
    said = str(status.get("message") or (str(body)[:500] if body else f"HTTP {code}"))
    text = f"the API server refused to {verb} a Sandbox in namespace {namespace!r}: {said}"
    match code:
        case 401:
            return SandboxPermissionError(text, status=code)
        case 403 if "exceeded quota" in said:
            return SandboxCapacityError(text, status=code)
        case 403 if "being terminated" in said:
            return SandboxFailedError(text, status=code)
        case 403:
            rule = f'apiGroups ["{GROUP}"], resources ["{PLURAL}"], verbs ["{verb}"]'
            return SandboxPermissionError(f"{text} (a Role needs the rule {rule})", status=code)
        case 404 if plain:
            return VersionGoneError(text, status=code)
        case 404 if (status.get("details") or {}).get("kind") == "namespaces":
            return SandboxFailedError(text, status=code)
        case 404:
            return NotFoundError(text, status=code)
        case 405 | 415:
            return UnsupportedError(text, status=code)
        case 409 if verb == "create" and status.get("reason", "AlreadyExists") == "AlreadyExists":
            return AlreadyExistsError(text, status=code)
        case 409 if verb == "create":  # Not about the object: a ResourceQuota that others count on.
            return retryable(code, text, headers, ambiguous=False)
        case 409:
            return PreconditionError(text, status=code)
        case 410:
            return ExpiredError(text, status=code)
        case 422 if verb == "patch" and "uid" in said:
            return PreconditionError(text, status=code)
        case 429 | 500 | 502 | 503 | 504 | 0:
            return retryable(code, text, headers)
    return SandboxFailedError(text, status=code)


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
        parsed = json.loads(body) if isinstance(body, str | bytes) else None
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) else None
