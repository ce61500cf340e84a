"""Kubeconfig files: merged as kubectl merges them, and checked with errors that name the file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml
from kubernetes_asyncio.config.kube_config import ConfigNode

_NOBODY = "\0"
_LISTS = ("clusters", "contexts", "users")


class KubeconfigError(Exception):
    """The message names the file and what is wrong with it, and holds no secret."""


def read_kubeconfig(files: str, context: str | None) -> dict[str, Any]:
    """Merges kubeconfig files as kubectl does, and checks that the context is whole.

    `files` are paths, separated by colons; those that do not exist are passed over. The answer is the
    merged file, with `context`, or else its own, as current-context.
    """
    merged: dict[str, Any] = {"current-context": context, **{kind: {} for kind in _LISTS}}
    paths = existing(files)
    if not paths:
        raise KubeconfigError("there is no kubeconfig file")
    for path in paths:
        content = _parsed(path)
        merged["current-context"] = merged["current-context"] or content.get("current-context")
        for kind in _LISTS:
            for item in _items(path, kind, content):
                # Paths in it are relative to its file.
                merged[kind].setdefault(item["name"], ConfigNode(f"{path}/{kind}", item, str(path)))
    where, name = ", ".join(map(str, paths)), merged["current-context"]
    if not any(merged.values()):
        raise KubeconfigError(f"{where} is empty: it needs {', '.join(_LISTS)} and current-context")
    if not name:
        raise KubeconfigError(f"{where} has no current-context: kubectl config use-context NAME sets it")
    chosen = _named(merged, "contexts", name, where)
    cluster = chosen.get("cluster")
    if not cluster:
        raise KubeconfigError(f"{where} has a context {name!r} without a cluster")
    if not isinstance(_named(merged, "clusters", cluster, where).get("server"), str):
        raise KubeconfigError(f"{where} has a cluster {cluster!r} without a server")
    if user := chosen.get("user"):
        _named(merged, "users", user, where)
    else:  # kubernetes_asyncio has no words for nobody.
        chosen["user"] = _NOBODY
        merged["users"][_NOBODY] = {"name": _NOBODY, "user": {}}
    return {**merged, **{kind: list(merged[kind].values()) for kind in _LISTS}}


def existing(files: str) -> list[Path]:
    # Asked as kubectl asks: a pipe will do (KUBECONFIG=<(...)).
    paths = (os.path.expanduser(file) for file in files.split(os.pathsep) if file)  # noqa: PTH111
    return [Path(path) for path in paths if os.path.exists(path)]  # noqa: PTH110


def _parsed(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_bytes())
    except OSError as e:
        raise KubeconfigError(f"{path} cannot be read: {e.strerror}") from e
    except (yaml.YAMLError, RecursionError) as e:
        mark = getattr(e, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark else ""
        raise KubeconfigError(
            f"{path} is no YAML{line}: {getattr(e, 'problem', None) or type(e).__name__}"
        ) from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise KubeconfigError(
            f"{path} holds {type(content).__name__}, not a mapping with {', '.join(_LISTS)}"
        )
    return content


def _items(path: Path, kind: str, content: dict[str, Any]) -> list[dict[str, Any]]:
    items = content.get(kind) or []
    key = kind.removesuffix("s")
    if not isinstance(items, list):
        raise KubeconfigError(f"{path} has {kind} that is no list")
    for item in items:
        named = isinstance(item, dict) and isinstance(item.get("name"), str)
        if not named or not isinstance(item.get(key) or {}, dict):
            raise KubeconfigError(
                f"{path} has an entry of {kind} without a name, or whose {key} is no mapping"
            )
    return items


def _named(merged: dict[str, Any], kind: str, name: object, where: str) -> dict[str, Any]:
    """The mapping of an entry."""
    if not isinstance(name, str) or name not in merged[kind]:
        known = ", ".join(map(repr, merged[kind])) or "none"
        raise KubeconfigError(f"{where} has no {kind.removesuffix('s')} {name!r} (it has {known})")
    item: dict[str, dict[str, Any]] = merged[kind][name].value
    key = kind.removesuffix("s")
    item[key] = item.get(key) or {}
    return item[key]
