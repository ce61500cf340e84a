"""The API server's checks of a Sandbox: names, labels, and the parts of the schema that
mistakes are likely to violate."""

from __future__ import annotations

import datetime as dt
import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from .._cluster.manifest import GROUP, KIND
from .._cluster.metadata import Object
from ._status import Cause, bad_request, invalid, unreadable

_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_LABEL = re.compile(r"([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]")
_DATE_TIME = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)")

_SUBDOMAIN_RULE = (
    "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.',"
    " and must start and end with an alphanumeric character"
)
_LABEL_RULE = (
    "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.',"
    " and must start and end with an alphanumeric character"
)
_KEY_RULE = (
    "name part must consist of alphanumeric characters, '-', '_' or '.',"
    " and must start and end with an alphanumeric character"
)

_GO_TYPES = {dict: "object", list: "array", str: "string", bool: "boolean", int: "integer", float: "number"}
# The path to a Sandbox's required fields.
_REQUIRED = (("spec", dict), ("podTemplate", dict), ("spec", dict), ("containers", list))
_SPEC = {"service": bool, "shutdownTime": str, "shutdownPolicy": str, "operatingMode": str}
_STATUS = {"conditions": list, "podIPs": list, "serviceFQDN": str}
_TYPED = (
    r'struct { APIVersion string "json:\"apiVersion,omitempty\""; Kind string "json:\"kind,omitempty\"" }'
)
_CONDITION_FIELDS = ("lastTransitionTime", "message", "reason", "status", "type")


@functools.lru_cache(maxsize=256)
def label_value_error(value: str) -> str | None:
    """The error in a label value; None if it is valid."""
    if len(value) > 63:
        return f'Invalid value: "{value}": must be no more than 63 characters'
    if value and not _LABEL.fullmatch(value):
        return f'Invalid value: "{value}": {_LABEL_RULE}'
    return None


def check_type(body: Any, version: str) -> None:
    """Checks that a body to create or replace is a Sandbox of that version, with a metadata dict.

    Raises:
        ApiException: 400, 422 or 500, as the API server has it.
    """
    if not isinstance(body, dict):
        raise bad_request(f"the object provided is unrecognized (must be of type {KIND})")
    if not body.get("kind"):
        raise bad_request(
            f"{KIND} in version \"{version}\" cannot be handled as a {KIND}: Object 'Kind' is missing"
        )
    expected = f"{GROUP}/{version}"
    if body.get("apiVersion") != expected:
        raise bad_request(
            f"the API version in the data ({body.get('apiVersion', '')})"
            f" does not match the expected API version ({expected})"
        )
    if field := _undecodable(body):
        raise bad_request(f'{KIND} in version "{version}" cannot be handled as a {KIND}: {field}')


def check_delete_options(options: Any) -> None:
    """Checks the body of a deletion.

    Raises:
        ApiException: 400.
    """
    if not isinstance(options, dict):
        raise unreadable("couldn't get version/kind; json parse error: ", options, f"value of type {_TYPED}")
    wanted = options.get("preconditions")
    if wanted is not None and not isinstance(wanted, dict):
        raise unreadable("", wanted, "struct field DeleteOptions.preconditions of type v1.Preconditions")
    for field, kind in (("uid", "types.UID"), ("resourceVersion", "string")):
        value = (wanted or {}).get(field)
        if value is not None and not isinstance(value, str):
            raise unreadable("", value, f"struct field Preconditions.preconditions.{field} of type {kind}")


def check_patched(body: Any) -> None:
    """Checks that a patched object can still be read as one.

    Raises:
        ApiException: 422.
    """
    if not isinstance(body, dict) or _undecodable(body):
        raise invalid("", [("FieldValueInvalid", "patch", f"Invalid value: {body!r}: cannot be handled")])


def _undecodable(body: Object) -> str | None:
    metadata = body.get("metadata") or {}
    if not isinstance(metadata, dict):
        return "metadata"
    labels = metadata.get("labels") or {}
    if not isinstance(labels, dict) or not all(isinstance(value, str) for value in labels.values()):
        return "metadata.labels"
    return None


def check_sandbox(sandbox: Object) -> None:
    """Checks metadata and spec as they would be stored.

    Raises:
        ApiException: 422 with all causes.
    """
    if causes := [*_metadata_causes(sandbox["metadata"]), *_spec_causes(sandbox)]:
        raise invalid(sandbox["metadata"].get("name", ""), causes)


def check_status(sandbox: Object) -> None:
    """Checks the status as it would be stored.

    Raises:
        ApiException: 422 with all causes.
    """
    if causes := list(_status_causes(sandbox.get("status"))):
        raise invalid(sandbox["metadata"]["name"], causes)


def _metadata_causes(metadata: Object) -> Iterator[Cause]:
    name = metadata.get("name") or ""
    if not name:
        yield "FieldValueRequired", "metadata.name", "Required value: name or generateName is required"
    elif problem := _name_error(name):
        yield "FieldValueInvalid", "metadata.name", problem
    for key, value in (metadata.get("labels") or {}).items():
        if problem := label_key_error(key) or label_value_error(value):
            yield "FieldValueInvalid", "metadata.labels", problem


@functools.lru_cache(maxsize=256)
def _name_error(name: str) -> str | None:
    if len(name) > 253:
        return f'Invalid value: "{name}": must be no more than 253 characters'
    return None if _SUBDOMAIN.fullmatch(name) else f'Invalid value: "{name}": {_SUBDOMAIN_RULE}'


@functools.lru_cache(maxsize=256)
def label_key_error(key: str) -> str | None:
    prefix, slash, part = key.rpartition("/")
    if len(part) <= 63 and _LABEL.fullmatch(part) and (not slash or _SUBDOMAIN.fullmatch(prefix)):
        return None
    return f'Invalid value: "{key}": {_KEY_RULE}'


def _spec_causes(sandbox: Object) -> Iterator[Cause]:
    path = ""
    value: Any = sandbox
    for key, kind in _REQUIRED:
        path, value = f"{path}.{key}".lstrip("."), value.get(key)
        if value is None:
            yield "FieldValueRequired", path, "Required value"
            return
        if not isinstance(value, kind):
            yield _wrong_type(path, value, kind)
            return
    spec = sandbox["spec"]
    if wrong := list(_type_causes("spec", spec, _SPEC)):
        yield from wrong
        return
    yield from _date_causes("spec.shutdownTime", spec.get("shutdownTime"))
    if (policy := spec.get("shutdownPolicy")) not in (None, "Delete", "Retain"):
        yield _unsupported("spec.shutdownPolicy", policy, "Delete", "Retain")
    if (mode := spec.get("operatingMode")) not in (None, "Running", "Suspended"):
        yield _unsupported("spec.operatingMode", mode, "Running", "Suspended")


def _status_causes(status: Any) -> Iterator[Cause]:
    if status is not None and not isinstance(status, dict):
        yield _wrong_type("status", status, dict)
        return
    if wrong := list(_type_causes("status", status or {}, _STATUS)):
        yield from wrong
        return
    for index, condition in enumerate((status or {}).get("conditions") or ()):
        yield from _condition_causes(f"status.conditions[{index}]", condition)


def _type_causes(parent: str, values: Object, kinds: Mapping[str, type]) -> Iterator[Cause]:
    for field, kind in kinds.items():
        value = values.get(field)
        if value is not None and not isinstance(value, kind):
            yield _wrong_type(f"{parent}.{field}", value, kind)


def _condition_causes(path: str, condition: Any) -> Iterator[Cause]:
    if not isinstance(condition, dict):
        yield _wrong_type(path, condition, dict)
        return
    for field in _CONDITION_FIELDS:
        if condition.get(field) is None:
            yield "FieldValueRequired", f"{path}.{field}", "Required value"
        elif not isinstance(condition[field], str):
            yield _wrong_type(f"{path}.{field}", condition[field], str)
    if condition.get("status", "True") not in ("True", "False", "Unknown"):
        yield _unsupported(f"{path}.status", condition["status"], "True", "False", "Unknown")
    if condition.get("reason") == "":
        rule = f"{path}.reason in body should be at least 1 chars long"
        yield "FieldValueInvalid", f"{path}.reason", f'Invalid value: "": {rule}'
    yield from _date_causes(f"{path}.lastTransitionTime", condition.get("lastTransitionTime"))


def _date_causes(path: str, value: Any) -> Iterator[Cause]:
    if isinstance(value, str) and not _is_date_time(value):
        rule = f'{path} in body must be of type date-time: "{value}"'
        yield "FieldValueInvalid", path, f'Invalid value: "{value}": {rule}'


def _is_date_time(text: str) -> bool:
    try:
        dt.datetime.fromisoformat(text)
    except ValueError:
        return False
    return _DATE_TIME.fullmatch(text) is not None


def _wrong_type(path: str, value: object, kind: type) -> Cause:
    got = _GO_TYPES.get(type(value), "null")
    rule = f'{path} in body must be of type {_GO_TYPES[kind]}: "{got}"'
    return "FieldValueTypeInvalid", path, f'Invalid value: "{got}": {rule}'


def _unsupported(path: str, value: object, *supported: str) -> Cause:
    values = ", ".join(f'"{text}"' for text in supported)
    return "FieldValueNotSupported", path, f'Unsupported value: "{value}": supported values: {values}'
