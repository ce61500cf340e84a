"""Plain fakes of CustomObjectsApi, so that the rest of the wing speaks to one kind of API.

A test's fake may have only create, get, list and delete, without the keywords and the answers
that are not needed for those. kubernetes_asyncio's own object passes through unchanged.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import Any

from . import metadata
from .api_errors import UnsupportedError
from .metadata import Object


class CustomObjects:
    """A CustomObjectsApi, plain or real; `can_discover`: it can be asked for the API versions."""

    def __init__(self, api: Any) -> None:
        self._api = api
        self._keywords: dict[str, frozenset[str] | None] = {}
        self.can_discover = callable(getattr(api, "get_api_resources", None))

    @property
    def client(self) -> Any | None:
        """Its ApiClient; None for a stand-in that opens no connections."""
        return getattr(self._api, "api_client", None)

    async def call(self, method: str, *args: object, **options: object) -> Any:
        """Calls a method without the options that it does not take; `UnsupportedError`: it cannot do that."""
        bound = getattr(self._api, method, None)
        if bound is None:
            raise UnsupportedError(f"this CustomObjectsApi has no {method}")
        if method not in self._keywords:
            parameters = inspect.signature(bound).parameters.values()
            open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
            self._keywords[method] = None if open_ended else frozenset(p.name for p in parameters)
        names = self._keywords[method]
        if names is not None:
            if "watch" in options and "watch" not in names:
                raise UnsupportedError("this CustomObjectsApi cannot watch")
            options = {key: value for key, value in options.items() if key in names}
        return await bound(*args, **options)


def created(answer: Any) -> Object | None:
    """The object that a create returned; None where it has no uid, or there is none."""
    return answer if isinstance(answer, dict) and metadata.uid(answer) else None


def page(answer: Object, selector: str) -> tuple[list[Object], str, str | None]:
    """Items, resourceVersion and continue token of a list; a plain fake ignores the selector."""
    items = [item for item in answer.get("items") or () if metadata.matches(item, selector)]
    about = answer.get("metadata") or {}
    return items, str(about.get("resourceVersion") or ""), about.get("continue") or None


def served(answer: Any) -> set[str] | None:
    """The plurals in an answer to discovery; None where it does not tell."""
    resources = getattr(answer, "resources", None)
    if not isinstance(resources, list):
        return None
    return {str(getattr(resource, "name", None)) for resource in resources}


def line_reader(response: Any) -> Callable[[], Awaitable[bytes]]:
    """What reads the next line of a watch; `UnsupportedError`: the API object has answered with a list."""
    readline = getattr(getattr(response, "content", None), "readline", None)
    if not inspect.iscoroutinefunction(readline):
        raise UnsupportedError("this CustomObjectsApi does not stream: it cannot watch")
    reader: Callable[[], Awaitable[bytes]] = readline
    return reader
