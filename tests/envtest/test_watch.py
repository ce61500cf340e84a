"""What the shared watch tells of living sessions, and how it goes on when it is cut."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest
from kubernetes_asyncio.client import ApiException

from prodisco_sandbox import SandboxManagerConfig
from prodisco_sandbox._cluster import requests as kubernetes
from prodisco_sandbox._cluster.manifest import SANDBOX
from tests.support.envtest import (
    GROUP,
    PLURAL,
    VERSIONS,
    AuditedServer,
    Controller,
    Definitions,
    Gate,
    Namespace,
    Wrapped,
    controlled,
    made_namespace,
    ready,
)
from tests.support.managers import conditions
from tests.support.patience import until

pytestmark = pytest.mark.envtest


async def test_a_sandbox_deleted_with_kubectl_is_replaced(
    namespace: Namespace, controller: Controller
) -> None:
    async with namespace.managed() as manager:
        first = await manager.get_client("session")
        await namespace.kubectl("delete", "sandbox", manager.sandbox_name("session"))
        await until(lambda: manager.stats().lost == 1, "its deletion to be noticed")
        await until(lambda: first.closed, "its client to be closed")  # type: ignore[attr-defined]
        second = await manager.get_client("session")
        assert first.sandbox is not None
        assert second.sandbox is not None
        assert second.sandbox.uid != first.sandbox.uid
        assert manager.stats().recreated == 1
    assert not await namespace.list()


ENDED = [
    conditions("PodFailed", "Pod failed: OOMKilled"),
    conditions("PodSucceeded", kind="Finished", status="True"),
]


@pytest.mark.parametrize("ended", ENDED, ids=["PodFailed", "PodSucceeded"])
async def test_a_pod_that_has_ended_is_noticed_and_replaced_by_the_next_use(
    namespace: Namespace, controller: Controller, ended: dict[str, Any]
) -> None:
    async with namespace.managed() as manager:
        first = await manager.get_client("session")
        await namespace.patch_status(manager.sandbox_name("session"), ended)
        await until(lambda: manager.stats().lost == 1, "the condition to be noticed")
        assert len(await namespace.list()) == 1, "that says nothing of the Sandbox"
        assert await manager.get_client("session") is not first
        assert len(await namespace.list()) == 1
    assert not await namespace.list()


async def test_a_replaced_pod_gets_a_new_client(namespace: Namespace, controller: Controller) -> None:
    async with namespace.managed() as manager:
        first = await manager.get_client("session")
        name = manager.sandbox_name("session")
        status = ready(await namespace.get(name)) | {"podIPs": ["10.9.9.9"]}
        await namespace.patch_status(name, status)

        async def replaced() -> bool:
            return await manager.get_client("session") is not first

        await until(replaced, "a client of the new pod")
        second = await manager.get_client("session")
        assert first.sandbox is not None
        assert second.sandbox is not None
        assert second.sandbox.uid == first.sandbox.uid
        assert second.sandbox != first.sandbox
        assert (manager.stats().created, manager.stats().recreated) == (1, 1)


_numbers = itertools.count(1)


@pytest.fixture
async def uncached(uncached_server: AuditedServer) -> AsyncIterator[Namespace]:
    Definitions(uncached_server).use(VERSIONS)
    async with made_namespace(uncached_server, f"uncached-{next(_numbers)}", VERSIONS[0]) as namespace:
        yield namespace


async def test_a_compaction_cuts_the_watch_and_nothing_is_missed(
    uncached: Namespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "prodisco_sandbox.watch")
    gate = Gate(uncached.manager_api)
    async with (
        controlled(uncached),
        uncached.managed(api=gate) as manager,
    ):
        ids = [f"session-{i}" for i in range(4)]
        names = [manager.sandbox_name(session) for session in ids]
        before = [await manager.get_client(session) for session in ids]
        gate.close()
        await until(lambda: gate.waiting, "the watch's end")
        await uncached.delete(names[0])
        await uncached.patch_status(names[1], ENDED[0])
        await asyncio.to_thread(uncached.server.compact)
        assert manager.stats().lost == 0
        gate.open()
        await until(lambda: manager.stats().lost == 2, "the fresh list")
        assert "watch_broken reason='expired'" in caplog.text
        after = [await manager.get_client(session) for session in ids]
        assert after[2:] == before[2:]
        assert after[0] is not before[0]
        assert after[1] is not before[1]
        # And the watch goes on from there.
        await uncached.delete(names[2])
        await until(lambda: manager.stats().lost == 3, "the watch to be back")
    assert not await uncached.list()


async def test_a_list_whose_pages_expire_begins_again(
    uncached: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A newer server's cache would serve the other pages after all."""
    namespace = uncached
    monkeypatch.setattr(kubernetes, "PAGE", 4)
    config = SandboxManagerConfig(mode="multi", namespace=namespace.name, instance_id="before")
    for i in range(10):
        body = SANDBOX.body(config, namespace.version, f"orphan-{i}", f"{i:040}")
        await namespace.api.create_namespaced_custom_object(
            GROUP, namespace.version, namespace.name, PLURAL, body
        )
    pages = Compacting(namespace)
    async with namespace.managed(api=pages, instance_id="before") as manager:
        assert await manager.cleanup_orphaned_sandboxes() == 10
    assert pages.refused == 1
    assert not await namespace.list()


class Compacting(Wrapped):
    """Compacts etcd's history after the first page of the first list."""

    def __init__(self, namespace: Namespace) -> None:
        super().__init__(namespace.manager_api)
        self.refused = 0
        self._namespace = namespace
        self._pages = 0

    async def list_namespaced_custom_object(self, *args: Any, **kwargs: Any) -> Any:
        try:
            page = await self._api.list_namespaced_custom_object(*args, **kwargs)
        except ApiException as e:
            self.refused += e.status == 410
            raise
        self._pages += 1
        if self._pages == 1:
            # A version is kept until there is a newer one.
            await self._namespace.kubectl("create", "configmap", "newer")
            await asyncio.to_thread(self._namespace.server.compact)
        return page
