"""Four ways to get from a session to a healthy sandbox: the library's, and three others."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Protocol

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from kubernetes_asyncio.watch import Watch

from prodisco_sandbox import SandboxManager, SandboxManagerConfig
from prodisco_sandbox._cluster import metadata
from prodisco_sandbox._cluster.claim import resource_for

from .clusters import Access

HEALTH_TIMEOUT = 5.0


class Contender(Protocol):
    """Makes and ends sessions; a session is known by its name."""

    async def open(self, session: str) -> None:
        """Creates a Sandbox and returns once its server has answered that it is healthy."""

    async def close(self, session: str) -> None:
        """Closes the connection and deletes the Sandbox."""

    def sandbox(self, session: str) -> str:
        """The name of its Sandbox."""


class Library:
    """This library."""

    def __init__(self, manager: SandboxManager) -> None:
        self.manager = manager

    async def open(self, session: str) -> None:
        await self.manager.get_client(session)

    async def close(self, session: str) -> None:
        await self.manager.on_session_closed(session)

    def sandbox(self, session: str) -> str:
        return self.manager.sandbox_name(session)


@asynccontextmanager
async def library(access: Access, **settings: Any) -> AsyncIterator[Library]:
    config = SandboxManagerConfig(
        **{
            "mode": "multi",
            "namespace": access.namespace,
            "sandbox_port": access.sandbox_port,
            "max_sessions": 10_000,
            "shutdown_timeout": 120.0,
            **settings,
        }
    )
    async with SandboxManager(config, custom_objects_api=access.api) as manager:
        yield Library(manager)


class _Bare:
    """What the others share: the calls themselves. The body is the library's own."""

    def __init__(self, access: Access, warm_pool: str | None = None) -> None:
        self._api = access.api
        self._port = access.sandbox_port
        self._config = SandboxManagerConfig(mode="multi", namespace=access.namespace, warm_pool=warm_pool)
        self._resource = resource_for(self._config)
        self._version = self._resource.versions[0]
        self._at = (self._resource.group, self._version, access.namespace, self._resource.plural)
        self._channels: dict[str, grpc.aio.Channel] = {}

    def sandbox(self, session: str) -> str:
        return self._resource.name(session)

    async def _create(self, name: str, session: str) -> None:
        which = (self._version, name, metadata.session_hash(session))
        body = self._resource.body(self._config, *which, requested=time.time())
        await self._api.create_namespaced_custom_object(*self._at, body)

    async def _connect(self, session: str, address: str) -> None:
        channel = self._channels[session] = grpc.aio.insecure_channel(f"{address}:{self._port}")
        check = health_pb2_grpc.HealthStub(channel).Check
        answer = await check(health_pb2.HealthCheckRequest(), timeout=HEALTH_TIMEOUT)
        if answer.status != health_pb2.HealthCheckResponse.SERVING:
            raise RuntimeError("the sandbox is not healthy")

    async def close(self, session: str) -> None:
        await self._channels.pop(session).close(None)
        name = self.sandbox(session)
        await self._api.delete_namespaced_custom_object(*self._at, name, body={})


class Floor(_Bare):
    """The calls that nobody can avoid: a create, one watch for all, a connection, a health check."""

    def __init__(self, access: Access, warm_pool: str | None = None) -> None:
        super().__init__(access, warm_pool)
        self._ready: dict[str, asyncio.Future[str]] = {}

    async def open(self, session: str) -> None:
        name = self.sandbox(session)
        ready = self._ready[name] = asyncio.get_running_loop().create_future()
        await self._create(name, session)
        await self._connect(session, await ready)

    async def follow(self, version: str) -> None:
        while True:  # A server ends the watch of a client that is too busy to read it.
            response = await self._api.list_namespaced_custom_object(
                *self._at, watch=True, resource_version=version, _preload_content=False
            )
            try:
                while line := await response.content.readline():
                    version = self._seen(json.loads(line)["object"]) or version
            finally:
                response.close()

    def _seen(self, sandbox: dict[str, Any]) -> str | None:
        metadata = sandbox["metadata"]
        if address := ready_address(sandbox):
            ready = self._ready.pop(metadata["name"], None)
            if ready is not None:
                ready.set_result(address)
        version: str | None = metadata.get("resourceVersion")
        return version


def ready_address(obj: dict[str, Any]) -> str | None:
    """The pod's address, once the Sandbox or SandboxClaim is ready."""
    status = obj.get("status") or {}
    ips, conditions = (status.get("sandbox") or status).get("podIPs"), status.get("conditions") or ()
    if ips and any(c["type"] == "Ready" and c["status"] == "True" for c in conditions):
        return str(ips[0])
    return None


@asynccontextmanager
async def floor(access: Access, warm_pool: str | None = None) -> AsyncIterator[Floor]:
    contender = Floor(access, warm_pool)
    listed = await access.api.list_namespaced_custom_object(*contender._at)
    task = asyncio.create_task(contender.follow(listed["metadata"]["resourceVersion"]))
    try:
        yield contender
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


class Polling(_Bare):
    """As the library's predecessor did: a get each second, then health each 100 ms."""

    async def open(self, session: str) -> None:
        name = self.sandbox(session)
        await self._create(name, session)
        while True:
            found = await self._api.get_namespaced_custom_object(*self._at, name)
            if address := ready_address(found):
                break
            await asyncio.sleep(1.0)
        while True:
            try:
                return await self._connect(session, address)
            except grpc.aio.AioRpcError:
                await self._channels.pop(session).close(None)
                await asyncio.sleep(0.1)


@asynccontextmanager
async def polling(access: Access) -> AsyncIterator[Polling]:
    yield Polling(access)


class WatchPerSession(_Bare):
    """As other SDKs do: a `Watch` of kubernetes_asyncio for each creation."""

    async def open(self, session: str) -> None:
        name = self.sandbox(session)
        await self._create(name, session)
        address = None
        async with Watch() as watch:
            async for event in watch.stream(
                self._api.list_namespaced_custom_object,
                *self._at,
                field_selector=f"metadata.name={name}",
            ):
                if address := ready_address(event["object"]):
                    break
        if address is None:
            raise RuntimeError("the watch has ended before the sandbox was ready")
        await self._connect(session, address)


@asynccontextmanager
async def watch_per_session(access: Access) -> AsyncIterator[WatchPerSession]:
    yield WatchPerSession(access)
