"""The API server's checks of an object: names, labels and its definition's schema."""

from __future__ import annotations

import datetime as dt
import functools
import re
from collections.abc import Iterator
from typing import Any

from .._cluster.metadata import Object
from ._kinds import Kind, Schema
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
_TYPED = (
    r'struct { APIVersion string "json:\"apiVersion,omitempty\""; Kind string "json:\"kind,omitempty\"" }'
)


@functools.lru_cache(maxsize=256)
def label_value_error(value: str) -> str | None:
    """The error in a label value; None if it is valid."""
    if len(value) > 63:
        return f'Invalid value: "{value}": must be no more than 63 characters'
    if value and not _LABEL.fullmatch(value):
        return f'Invalid value: "{value}": {_LABEL_RULE}'
    return None


def check_type(of: Kind, body: Any, version: str) -> None:
    """Checks that a body to create or replace is of that version, with a metadata dict.

    Raises:
        ApiException: 400, 422 or 500, as the API server has it.
    """
    if not isinstance(body, dict):
        raise bad_request(f"the object provided is unrecognized (must be of type {of.kind})")
    unusable = f'{of.kind} in version "{version}" cannot be handled as a {of.kind}'
    if not body.get("kind"):
        raise bad_request(f"{unusable}: Object 'Kind' is missing")
    expected = f"{of.group}/{version}"
    if body.get("apiVersion") != expected:
        raise bad_request(
            f"the API version in the data ({body.get('apiVersion', '')})"
            f" does not match the expected API version ({expected})"
        )
    if field := _undecodable(body):
        raise bad_request(f"{unusable}: {field}")


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


def check_patched(of: Kind, body: Any) -> None:
    """Checks that a patched object can still be read as one.

    Raises:
        ApiException: 422.
    """
    if not isinstance(body, dict) or _undecodable(body):
        raise invalid(of, "", [("FieldValueInvalid", "patch", f"Invalid value: {body!r}: cannot be handled")])


def _undecodable(body: Object) -> str | None:
    metadata = body.get("metadata") or {}
    if not isinstance(metadata, dict):
        return "metadata"
    labels = metadata.get("labels") or {}
    if not isinstance(labels, dict) or not all(isinstance(value, str) for value in labels.values()):
        return "metadata.labels"
    return None


def check_object(of: Kind, obj: Object) -> None:
    """Checks metadata and spec as they would be stored.

    Raises:
        ApiException: 422 with all causes.
    """
    stored = {key: value for key, value in obj.items() if key != "status"}
    if causes := [*_metadata_causes(obj["metadata"]), *_causes("", stored, of.schema)]:
        raise invalid(of, obj["metadata"].get("name", ""), causes)


def check_status(of: Kind, obj: Object) -> None:
    """Checks the status as it would be stored.

    Raises:
        ApiException: 422 with all causes.
    """
    status = obj.get("status")
    if status is not None and (causes := list(_causes("status", status, of.schema.fields["status"]))):
        raise invalid(of, obj["metadata"]["name"], causes)


def with_defaults(value: Any, schema: Schema) -> Any:
    """A value with the schema's defaults where it has none."""
    if isinstance(value, list) and schema.items is not None:
        return [with_defaults(item, schema.items) for item in value]
    if not isinstance(value, dict):
        return value
    found = dict(value)
    for name, field in schema.fields.items():
        if found.get(name) is not None:
            found[name] = with_defaults(found[name], field)
        elif field.default is not None:
            found[name] = field.default
    return found


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


def _causes(path: str, value: Any, schema: Schema) -> Iterator[Cause]:
    """What is wrong with a value; where types are wrong, nothing else is looked at."""
    found = list(_value_causes(path, value, schema))
    wrong = [cause for cause in found if cause[0] == "FieldValueTypeInvalid"]
    yield from wrong or found


def _value_causes(path: str, value: Any, schema: Schema) -> Iterator[Cause]:
    if type(value) is not schema.type and not (schema.type is dict and isinstance(value, dict)):
        yield _wrong_type(path, value, schema.type)
        return
    if schema.values and value not in schema.values:
        yield _unsupported(path, value, *schema.values)
    if schema.date:
        yield from _date_causes(path, value)
    if schema.least is not None:
        yield from _least_causes(path, value, schema.least)
    if isinstance(value, list) and schema.items is not None:
        for index, item in enumerate(value):
            yield from _value_causes(f"{path}[{index}]", item, schema.items)
    for name in schema.required:
        if value.get(name) is None:
            yield "FieldValueRequired", f"{path}.{name}".lstrip("."), "Required value"
    for name, field in schema.fields.items():
        if value.get(name) is not None:
            yield from _value_causes(f"{path}.{name}".lstrip("."), value[name], field)


def _least_causes(path: str, value: Any, least: int) -> Iterator[Cause]:
    size, rule = value, f"should be greater than or equal to {least}"
    if isinstance(value, str):
        size, rule, value = len(value), f"should be at least {least} chars long", f'"{value}"'
    if size < least:
        yield "FieldValueInvalid", path, f"Invalid value: {value}: {path} in body {rule}"


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
