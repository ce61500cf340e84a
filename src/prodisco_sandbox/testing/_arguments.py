"""The arguments of CustomObjectsApi's methods, read as kubernetes_asyncio and the server do."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from . import _status
from ._faults import VERBS, Verb
from ._kinds import Kind
from ._libraries import kubernetes
from ._watch import Timeouts

COMMON = frozenset(
    {
        "async_req",
        "_content_type",
        "_headers",
        "_preload_content",
        "_request_auth",
        "_request_timeout",
        "_return_http_data_only",
    }
)
WRITE = COMMON | {"dry_run", "field_manager", "field_validation"}
PATCH = WRITE | {"force"}
DELETE = COMMON | {"body", "dry_run", "grace_period_seconds", "orphan_dependents", "propagation_policy"}
LIST = COMMON | {
    "_continue",
    "allow_watch_bookmarks",
    "field_selector",
    "label_selector",
    "limit",
    "pretty",
    "resource_version",
    "resource_version_match",
    "timeout_seconds",
    "watch",
}


class Call(NamedTuple):
    """The arguments of a method call."""

    verb: Verb
    group: str
    version: str
    namespace: str = ""
    plural: str = ""
    name: str | None = None
    body: Any = None


def check_arguments(call: Call, kwargs: Mapping[str, Any], known: Iterable[str]) -> None:
    for key in kwargs:
        if key not in known:
            raise _wrong(
                "ApiTypeError", f"Got an unexpected keyword argument '{key}' to a {call.verb} request"
            )
    for field in ("group", "version", "namespace", "plural"):
        if getattr(call, field) is None:
            raise _missing(call, field)
    if call.name is None and call.verb not in ("create", "list", "watch", "discovery"):
        raise _missing(call, "name")
    if call.body is None and call.verb in ("create", "patch", "patch_status", "replace", "replace_status"):
        raise _missing(call, "body")


def _missing(call: Call, field: str) -> Exception:
    return _wrong("ApiValueError", f"Missing the required parameter `{field}` of a {call.verb} request")


def _wrong(kind: str, text: str) -> Exception:
    from kubernetes_asyncio.client import exceptions

    error: Exception = getattr(exceptions, kind)(text)
    return error


def verbs_of(verbs: Iterable[Verb]) -> list[Verb]:
    for verb in verbs:
        if verb not in VERBS:
            raise ValueError(f"verb is {verb!r}: it must be one of {', '.join(VERBS)}")
    return list(verbs)


def name_in(body: Any) -> str | None:
    metadata = body.get("metadata") if isinstance(body, dict) else None
    return metadata.get("name") if isinstance(metadata, dict) else None


def timeouts(kwargs: Mapping[str, Any]) -> Timeouts:
    """``_request_timeout`` as kubernetes_asyncio reads it: total, (connect, read), or aiohttp's own."""
    timeout: Any = kwargs.get("_request_timeout")
    if isinstance(timeout, tuple):
        return None, timeout[1]
    if hasattr(timeout, "sock_read"):  # aiohttp.ClientTimeout
        return timeout.total, timeout.sock_read
    return timeout or None, None


def dry(kwargs: Mapping[str, Any]) -> bool:
    value = kwargs.get("dry_run")
    if value not in (None, "All"):
        text = f'Unsupported value: []string{{"{value}"}}: supported values: "All"'
        raise _status.api_error(422, f'CreateOptions.meta.k8s.io "" is invalid: dryRun: {text}')
    return value == "All"


def number(kwargs: Mapping[str, Any], field: str) -> int | None:
    value = kwargs.get(field)
    if value is not None and not re.fullmatch(r"[+-]?[0-9]+", str(value)):
        raise _status.bad_request(f'strconv.ParseInt: parsing "{value}": invalid syntax')
    return None if value is None else int(value)


def revision(kwargs: Mapping[str, Any]) -> int | None:
    value = kwargs.get("resource_version")
    if value and not re.fullmatch(r"[0-9]+", str(value)):
        text = (
            f'resourceVersion: Invalid value: "{value}": strconv.ParseUint: parsing "{value}": invalid syntax'
        )
        if kwargs.get("watch"):
            raise _status.api_error(500, text, reason="")
        raise _status.bad_request(f"invalid resource version: {text}")
    return int(value) if value else None


def parsed(text: str) -> Any:
    """The value that kubernetes_asyncio returns for a watch whose body it reads to its end."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def resources(kinds: Sequence[Kind], version: str) -> Any:
    verbs = ["delete", "deletecollection", "get", "list", "patch", "create", "update", "watch"]
    resource, found = kubernetes("V1APIResource"), []
    for of in kinds:
        names = {"singular_name": of.kind.lower(), "short_names": [of.short]}
        common = {"namespaced": True, "kind": of.kind}
        found.append(resource(name=of.plural, verbs=verbs, **names, **common))
        if "status" in of.schema.fields:
            own = ["get", "patch", "update"]
            found.append(resource(name=f"{of.plural}/status", singular_name="", verbs=own, **common))
    return kubernetes("V1APIResourceList")(
        api_version="v1",
        kind="APIResourceList",
        group_version=f"{kinds[0].group}/{version}",
        resources=found,
    )
