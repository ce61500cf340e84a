"""Patches as the API server applies them: JSON merge patch (RFC 7386), JSON patch (RFC 6902)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .._cluster.metadata import Object
from ._status import api_error, unreadable

MERGE_PATCH = "application/merge-patch+json"
JSON_PATCH = "application/json-patch+json"
APPLY_PATCH = "application/apply-patch+yaml"


def content_type(given: str | None) -> str:
    """The content type that kubernetes_asyncio sends: the caller's, or JSON patch for
    whatever body there is, a dict too, which the API server then refuses."""
    return JSON_PATCH if given is None else given


def check_content_type(kind: str) -> None:
    """Checks that there is such a patch.

    Raises:
        ApiException: 415.
        NotImplementedError: A server-side apply.
    """
    if kind == APPLY_PATCH:
        raise NotImplementedError("FakeCustomObjectsApi does no server-side apply: send a merge patch")
    if kind not in (MERGE_PATCH, JSON_PATCH):
        raise api_error(
            415,
            "the body of the request was in an unknown format - accepted media types include:"
            f" {JSON_PATCH}, {MERGE_PATCH}, {APPLY_PATCH}",
            reason="UnsupportedMediaType",
        )


def patched(sandbox: Object, patch: Any, kind: str) -> Any:
    """The patched copy of an object.

    Raises:
        ApiException: 400 or 422, as the API server has it.
    """
    return (_merge_patched if kind == MERGE_PATCH else _json_patched)(sandbox, patch)


def _merge_patched(sandbox: Object, patch: Any) -> Any:
    if not isinstance(patch, dict):
        raise _undecodable(patch, "map[string]interface {}")
    return _merged(sandbox, patch)


def _merged(target: Any, patch: Any) -> Any:
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = _merged(result.get(key), value)
    return result


def _json_patched(sandbox: Object, patch: Any) -> Any:
    if not isinstance(patch, list):
        raise _undecodable(patch, "[]handlers.jsonPatchOp")
    for operation in patch:
        if not isinstance(operation, dict):
            raise _undecodable(operation, "handlers.jsonPatchOp")
    root: Any = {"": sandbox}
    try:
        for operation in patch:
            root = _operated(root, operation)
    except (LookupError, TypeError, ValueError):
        raise api_error(422, details={}) from None
    return root[""]


def _undecodable(value: object, kind: str) -> Any:
    return unreadable("error decoding patch: ", value, f"value of type {kind}")


def _operated(root: Any, operation: Object) -> Any:
    name, path = operation["op"], operation["path"]
    if name == "test":
        if _value(root, path) != operation["value"]:
            raise ValueError(path)
        return root
    if name == "add":
        return _set(root, path, operation["value"], insert=True)
    if name == "replace":
        _value(root, path)
        return _set(root, path, operation["value"], insert=False)
    if name == "remove":
        return _removed(root, path)
    value = _value(root, operation["from"])
    if name == "move":
        root = _removed(root, operation["from"])
    elif name != "copy":
        raise ValueError(name)
    return _set(root, path, value, insert=True)


def _keys(path: str) -> list[str]:
    return [part.replace("~1", "/").replace("~0", "~") for part in path.split("/")]


def _value(root: Any, path: str) -> Any:
    for key in _keys(path):
        root = root[int(key) if isinstance(root, list) else key]
    return root


def _set(root: Any, path: str, value: Any, *, insert: bool) -> Any:
    def change(parent: Any, key: str) -> None:
        if isinstance(parent, dict):
            parent[key] = value
        elif insert:
            parent.insert(len(parent) if key == "-" else _index(key, len(parent)), value)
        else:
            parent[_index(key, len(parent) - 1)] = value

    return _changed(root, _keys(path), change)


def _removed(root: Any, path: str) -> Any:
    def change(parent: Any, key: str) -> None:
        del parent[key if isinstance(parent, dict) else _index(key, len(parent) - 1)]

    return _changed(root, _keys(path), change)


def _changed(value: Any, keys: list[str], change: Callable[[Any, str], None]) -> Any:
    """A copy of `value` along the way of the keys, with the change made at its end."""
    fresh = value.copy()
    if len(keys) == 1:
        change(fresh, keys[0])
    else:
        key = int(keys[0]) if isinstance(fresh, list) else keys[0]
        fresh[key] = _changed(fresh[key], keys[1:], change)
    return fresh


def _index(key: str, last: int) -> int:
    index = int(key)
    if not 0 <= index <= last:
        raise IndexError(key)
    return index
