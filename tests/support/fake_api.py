"""Short names for the requests of FakeCustomObjectsApi."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import pytest
from kubernetes_asyncio.client import ApiException

from prodisco_sandbox.testing import FakeCustomObjectsApi
from tests.support.api import GROUP, MERGE, PLURAL, body

AT = (GROUP, "v1beta1", "n", PLURAL)


def now() -> float:
    return asyncio.get_running_loop().time()


async def create(api: FakeCustomObjectsApi, name: str = "a", *, labels: Any = None, **kwargs: Any) -> Any:
    given = body(name) if labels is None else body(name, labels=labels)
    return await api.create_namespaced_custom_object(*AT, given, **kwargs)


async def get(api: FakeCustomObjectsApi, name: str = "a", **kwargs: Any) -> Any:
    return await api.get_namespaced_custom_object(*AT, name, **kwargs)


async def delete(api: FakeCustomObjectsApi, name: str = "a", **kwargs: Any) -> Any:
    return await api.delete_namespaced_custom_object(*AT, name, **kwargs)


async def patch(api: FakeCustomObjectsApi, change: Any, name: str = "a", **kwargs: Any) -> Any:
    return await api.patch_namespaced_custom_object(*AT, name, change, _content_type=MERGE, **kwargs)


async def opened(api: FakeCustomObjectsApi, **kwargs: Any) -> Any:
    return await api.list_namespaced_custom_object(*AT, watch=True, _preload_content=False, **kwargs)


async def status_of(answer: Awaitable[Any]) -> int:
    with pytest.raises(ApiException) as caught:
        await answer
    return int(caught.value.status)
