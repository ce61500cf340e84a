"""A namespace of an API server, fake or real, and what the tests of both ask of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest
from kubernetes_asyncio.client import ApiException

from tests.support.patience import PATIENCE

GROUP, PLURAL = "agents.x-k8s.io", "sandboxes"
MERGE = "application/merge-patch+json"
QUOTA = f"count/{PLURAL}.{GROUP}"

Object = dict[str, Any]
Event = tuple[float, str, Object]
"""Seconds since the watch began, kind, object."""


@dataclass
class Cluster:
    """A namespace of an API server, fake or real, and what comes from it without managedFields.

    Attributes:
        compact: Makes etcd forget older versions.
        forget: Makes the server forget them, in its cache too.
        current: Whether it answers as Kubernetes 1.37 does, and not as 1.20. The fake does.
        keeps_snapshots: Whether its cache serves lists at versions that etcd has forgotten.
        extensions: Whether the definitions of claims and pools are installed.
    """

    api: Any
    nobody: Any
    namespace: str
    compact: Callable[[], Awaitable[object]]
    limit: Callable[[int], Awaitable[object]]
    serve: Callable[[tuple[str, ...]], Awaitable[object]]
    forget: Callable[[], Awaitable[object]]
    current: bool = True
    keeps_snapshots: bool = False
    extensions: bool = True

    def _at(self, version: str) -> tuple[str, str, str, str]:
        return GROUP, version, self.namespace, PLURAL

    async def create(self, body: Any, version: str = "v1beta1", **kwargs: Any) -> Any:
        return lean(await self.api.create_namespaced_custom_object(*self._at(version), body, **kwargs))

    async def get(self, name: str, version: str = "v1beta1", **kwargs: Any) -> Any:
        return lean(await self.api.get_namespaced_custom_object(*self._at(version), name, **kwargs))

    async def list_(self, version: str = "v1beta1", **kwargs: Any) -> Any:
        return lean(await self.api.list_namespaced_custom_object(*self._at(version), **kwargs))

    async def names(self, **kwargs: Any) -> list[str]:
        return [item["metadata"]["name"] for item in (await self.list_(**kwargs))["items"]]

    async def patch(self, name: str, body: Any, version: str = "v1beta1", **kwargs: Any) -> Any:
        kwargs.setdefault("_content_type", MERGE)
        return lean(await self.api.patch_namespaced_custom_object(*self._at(version), name, body, **kwargs))

    async def patch_status(self, name: str, body: Any, **kwargs: Any) -> Any:
        kwargs.setdefault("_content_type", MERGE)
        at = self._at("v1beta1")
        return lean(await self.api.patch_namespaced_custom_object_status(*at, name, body, **kwargs))

    async def replace(self, name: str, body: Any, **kwargs: Any) -> Any:
        return lean(
            await self.api.replace_namespaced_custom_object(*self._at("v1beta1"), name, body, **kwargs)
        )

    async def delete(self, name: str, version: str = "v1beta1", **kwargs: Any) -> Any:
        return lean(await self.api.delete_namespaced_custom_object(*self._at(version), name, **kwargs))

    @contextlib.asynccontextmanager
    async def watch(
        self, version: str = "v1beta1", *, seconds: int = 20, **kwargs: Any
    ) -> AsyncIterator[Any]:
        response = await self.list_(
            version, watch=True, _preload_content=False, timeout_seconds=seconds, **kwargs
        )
        try:
            yield response
        finally:
            response.close()


def body(name: str | None, *, version: str = "v1beta1", **metadata: Any) -> Object:
    container = {"name": "sandbox", "image": "image"}
    return {
        "apiVersion": f"{GROUP}/{version}",
        "kind": "Sandbox",
        "metadata": {"name": name, **metadata},
        "spec": {"podTemplate": {"spec": {"containers": [container]}}},
    }


def lean(answer: Any) -> Any:
    """Without metadata.managedFields, which the fake does not keep."""
    if isinstance(answer, dict):
        for item in (answer, *answer.get("items", ())):
            item.get("metadata", {}).pop("managedFields", None)
    return answer


async def refusal(answer: Awaitable[Any], status: int) -> Object:
    """The Status of a refusal with that HTTP status."""
    with pytest.raises(ApiException) as caught:
        await answer
    assert caught.value.status == status, caught.value.body
    assert caught.value.headers["content-type"] == "application/json"
    found: Object = json.loads(caught.value.body)
    assert (found["kind"], found["apiVersion"], found["status"]) == ("Status", "v1", "Failure")
    assert found["code"] == status
    return found


async def events(response: Any, count: int) -> list[tuple[str, Object]]:
    found = []
    for _ in range(count):
        async with asyncio.timeout(PATIENCE):
            event = json.loads(await response.content.readline())
        found.append((event["type"], lean(event["object"])))
    return found


@contextlib.asynccontextmanager
async def watched(api: Any, at: tuple[str, str, str, str]) -> AsyncIterator[list[Event]]:
    """What a client's watch of these objects sees meanwhile."""
    seen: list[Event] = []
    since = (await api.list_namespaced_custom_object(*at))["metadata"]["resourceVersion"]
    response = await api.list_namespaced_custom_object(
        *at, watch=True, resource_version=since, _preload_content=False
    )
    begun = time.monotonic()

    async def read() -> None:
        while line := await response.content.readline():
            event = json.loads(line)
            seen.append((time.monotonic() - begun, event["type"], event["object"]))

    reading = asyncio.create_task(read(), name="watched")
    try:
        yield seen
    finally:
        reading.cancel()
        await asyncio.wait([reading])
        response.close()
