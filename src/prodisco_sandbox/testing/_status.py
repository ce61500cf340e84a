"""Refusals of the API server: Status bodies, as kubernetes_asyncio raises them."""

from __future__ import annotations

import http
import json
from collections.abc import Iterable
from typing import Any

from multidict import CIMultiDict, CIMultiDictProxy

from .._cluster.metadata import Object
from ._kinds import SANDBOX, Kind
from ._libraries import kubernetes

Cause = tuple[str, str, str]
"""Reason, field and message of one error in an object."""

_DEFAULTS = {
    400: ("BadRequest", "the server rejected our request for an unknown reason"),
    401: ("Unauthorized", "Unauthorized"),
    403: ("Forbidden", f"{SANDBOX.resource} is forbidden"),
    404: ("NotFound", "the server could not find the requested resource"),
    409: ("Conflict", "the object has been modified; please apply your changes to the latest version"),
    410: ("Expired", "The resourceVersion for the provided watch is too old."),
    422: ("Invalid", "the server rejected our request due to an error in our request"),
    500: ("InternalError", "Internal error occurred: etcdserver: request timed out"),
    503: ("ServiceUnavailable", "the server is currently unable to handle the request"),
    504: ("Timeout", "Timeout: request did not complete within requested timeout"),
}
# Go's phrases; those of Python differ between versions.
_PHRASES = {413: "Request Entity Too Large", 422: "Unprocessable Entity"}


def api_error(
    status: int,
    message: str | None = None,
    *,
    reason: str | None = None,
    details: Object | None = None,
    metadata: Object | None = None,
    retry_after: int | None = None,
) -> Any:
    """An `ApiException` like those that kubernetes_asyncio makes of a refusal.

    Its ``body`` is the JSON of a Status, and ``headers`` find their names in any case.
    A 429 without a message is the one that the API server's own request limits give:
    plain text, and Retry-After of one second.

    Args:
        status: The HTTP status code.
        message: The Status's message; None: what the API server says with that code.
        reason: The Status's reason (``"NotFound"``); None: the usual one of that code;
            empty: none at all.
        details: The Status's details.
        metadata: The Status's metadata.
        retry_after: Seconds for the Retry-After header and the details; None: no header.
    """
    if status == 429 and message is None:
        return plain_error(429, "Too many requests, please try again later.\n", retry_after=retry_after or 1)
    usual_reason, usual_message = _DEFAULTS.get(status, ("", phrase(status)))
    body: Object = {"kind": "Status", "apiVersion": "v1", "metadata": metadata or {}, "status": "Failure"}
    body["message"] = usual_message if message is None else message
    if reason := usual_reason if reason is None else reason:
        body["reason"] = reason
    if details is not None or retry_after is not None:
        seconds = {} if retry_after is None else {"retryAfterSeconds": retry_after}
        body["details"] = {**(details or {}), **seconds}
    body["code"] = status
    return _exception(status, json.dumps(body) + "\n", "application/json", retry_after)


def plain_error(status: int, text: str, *, retry_after: int | None = None) -> Any:
    """An `ApiException` whose body is no Status but plain text, as proxies and filters give."""
    return _exception(status, text, "text/plain; charset=utf-8", retry_after)


def phrase(status: int) -> str:
    try:
        return _PHRASES.get(status) or http.HTTPStatus(status).phrase
    except ValueError:
        return ""


def _exception(status: int, body: str, content_type: str, retry_after: int | None) -> Any:
    headers = CIMultiDict({"Cache-Control": "no-cache, private", "Content-Type": content_type})
    if retry_after is not None:
        headers["Retry-After"] = str(retry_after)
    error: Any = kubernetes("ApiException")(status=status, reason=phrase(status))
    error.body, error.headers = body, CIMultiDictProxy(headers)
    return error


def page_not_found() -> Any:
    """The path itself is unknown: a version or a resource that is not served."""
    return plain_error(404, "404 page not found\n")


_JSON_TYPES = {dict: "object", list: "array", str: "string", bool: "bool", int: "number", float: "number"}


def unreadable(what: str, value: object, wanted: str) -> Any:
    """400 for JSON of another type than Go's decoder wants."""
    given = _JSON_TYPES.get(type(value), "null")
    return bad_request(f"{what}json: cannot unmarshal {given} into Go {wanted}")


def bad_request(message: str) -> Any:
    return api_error(400, message)


def not_found(of: Kind, name: str) -> Any:
    return api_error(404, f'{of.resource} "{name}" not found', details=_details(of, name, of.plural))


def namespace_not_found(namespace: str) -> Any:
    details = {"name": namespace, "kind": "namespaces"}
    return api_error(404, f'namespaces "{namespace}" not found', details=details)


def already_exists(of: Kind, name: str, *, deleting: bool) -> Any:
    message = f'{"object is being deleted: " if deleting else ""}{of.resource} "{name}" already exists'
    return api_error(409, message, reason="AlreadyExists", details=_details(of, name, of.plural))


def conflict(of: Kind, name: str, why: str, kind: str | None = None) -> Any:
    kind = kind or of.plural
    message = f'Operation cannot be fulfilled on {kind}.{of.group} "{name}": {why}'
    return api_error(409, message, details=_details(of, name, kind))


def modified(of: Kind, name: str) -> Any:
    return conflict(
        of,
        name,
        "the object has been modified; please apply your changes to the latest version and try again",
    )


def invalid(of: Kind, name: str, causes: Iterable[Cause], kind: str | None = None) -> Any:
    """422 with all errors in an object."""
    found, kind = list(causes), kind or of.kind
    texts = [f"{field}: {message}" for _, field, message in found]
    listed = texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]"
    details = _details(of, name, kind)
    details["causes"] = [{"reason": r, "message": m, "field": f} for r, f, m in found]
    return api_error(422, f'{kind}.{of.group} "{name}" is invalid: {listed}', details=details)


def forbidden(of: Kind, user: str, verb: str, resource: str, name: str | None, namespace: str) -> Any:
    """403 as RBAC gives it."""
    which = "" if name is None else f' "{name}"'
    message = (
        f'{of.resource}{which} is forbidden: User "{user}" cannot {verb} resource "{resource}"'
        f' in API group "{of.group}" in the namespace "{namespace}"'
    )
    return api_error(403, message, details=_details(of, name or "", of.plural))


def discovery_forbidden(user: str, path: str) -> Any:
    return api_error(403, f'forbidden: User "{user}" cannot get path "{path}"', details={})


def quota_exceeded(of: Kind, name: str, limit: int, used: int) -> Any:
    """403 as a ResourceQuota on the number of objects gives it."""
    count = f"count/{of.resource}"
    message = (
        f'{of.resource} "{name}" is forbidden: exceeded quota: {of.plural},'
        f" requested: {count}=1, used: {count}={used}, limited: {count}={limit}"
    )
    return api_error(403, message, details=_details(of, name, of.plural))


def expired_watch(asked: int, oldest: int) -> Object:
    """The Status of the ERROR event that ends a watch from a version that is too old."""
    message = f"too old resource version: {asked} ({oldest})"
    body = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message}
    return {**body, "reason": "Expired", "code": 410}


def _details(of: Kind, name: str, kind: str) -> dict[str, Any]:
    return {**({"name": name} if name else {}), "group": of.group, "kind": kind}
