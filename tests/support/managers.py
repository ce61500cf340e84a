"""What the manager's tests share: a client without a socket, and managers on the fake API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from copy import deepcopy
from typing import Any

from kubernetes_asyncio.client import ApiException

from prodisco_sandbox import SandboxClient, SandboxError, SandboxManager, SandboxManagerConfig
from prodisco_sandbox._cluster.manifest import GROUP, PLURAL, SANDBOX
from prodisco_sandbox._cluster.metadata import LABEL_INSTANCE, lease_time, session_hash, uid
from prodisco_sandbox.testing import FakeCustomObjectsApi


class LoopTimeApi(FakeCustomObjectsApi):
    """The fake, with the loop's clock as its wall clock, as the managers here have: leases would be long
    over by any other. Pods end at once, except where a test says how long that takes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"now": now, "pod_termination": 0.0, **options})


class StubClient(SandboxClient):
    """A client without a socket: healthy, busy and last used as the test says."""

    def __init__(self, target: str, *, healthy: bool = True) -> None:
        super().__init__(target)
        self.healthy = healthy
        self.calls = 0
        self.used_at = 0.0
        self.health_checks = 0
        self.closed = False

    @property
    def in_flight(self) -> int:
        return self.calls

    @property
    def last_used(self) -> float:
        return self.used_at

    async def wait_for_healthy(self, timeout: float) -> bool:
        self.health_checks += 1
        if not self.healthy:
            await asyncio.sleep(timeout)
        await asyncio.sleep(0)
        if self.closed:
            self._connection.health_error = SandboxError(f"the client of {self.target} is closed")
            return False
        return self.healthy

    async def close(self) -> None:
        await super().close()
        await asyncio.sleep(0)
        self.closed = True

    async def begin(self, lasts: float) -> None:
        """What a call that may last so long does before it is sent."""
        fence = self._connection.fence
        assert fence is not None
        assert fence.admit is not None
        if (admission := fence.admit(lasts)) is not None:
            await admission

    def fail(self) -> None:
        """As if a call had met a broken connection."""
        assert self.on_suspect is not None
        self.on_suspect()


class Clients:
    """A client_factory that remembers what it made."""

    def __init__(self, make: Callable[[str], StubClient] = StubClient) -> None:
        self.made: list[StubClient] = []
        self.make = make

    def __call__(self, target: str) -> StubClient:
        self.made.append(self.make(target))
        return self.made[-1]


@asynccontextmanager
async def managed(
    api: Any, clients: Callable[[str], SandboxClient] | None = None, **settings: Any
) -> AsyncIterator[SandboxManager]:
    """A manager in multi mode that must leave nothing behind."""
    config = SandboxManagerConfig(**{"mode": "multi", "instance_id": "me", **settings})
    async with SandboxManager(
        config,
        custom_objects_api=api,
        client_factory=clients or Clients(),
        wall_clock=lambda: asyncio.get_running_loop().time(),
    ) as manager:
        yield manager
    stats = manager.stats()
    assert (stats.queued, stats.creating, stats.ready, stats.closing, stats.waiting) == (0, 0, 0, 0, 0)


def alive(api: FakeCustomObjectsApi) -> list[str]:
    """Names of the Sandboxes that are not being deleted."""
    return [o["metadata"]["name"] for o in api.objects if "deletionTimestamp" not in o["metadata"]]


def uids(api: FakeCustomObjectsApi) -> set[str | None]:
    return {uid(sandbox) for sandbox in api.objects}


def conditions(
    reason: str, message: str = "", *, kind: str = "Ready", status: str = "False"
) -> dict[str, Any]:
    """A status with one condition."""
    return {
        "conditions": [
            {
                "type": kind,
                "status": status,
                "reason": reason,
                "message": message,
                "lastTransitionTime": "2026-01-01T00:00:00Z",
            }
        ]
    }


class PlainApi:
    """A fake such as people write: create, get, list and delete, and neither uids nor watches."""

    def __init__(self, status: dict[str, Any] | None = None) -> None:
        self.objects: dict[str, dict[str, Any]] = {}
        self.calls: list[str] = []
        self.status = status

    async def _called(self, verb: str, name: str | None = None) -> None:
        self.calls.append(verb)
        await asyncio.sleep(0)
        if name is not None and name not in self.objects:
            raise ApiException(status=404)

    async def create_namespaced_custom_object(
        self, group: str, version: str, namespace: str, plural: str, body: Any
    ) -> Any:
        await self._called("create")
        name = body["metadata"]["name"]
        if name in self.objects:
            raise ApiException(status=409)
        status = self.status if self.status is not None else {"serviceFQDN": f"{name}.{namespace}.svc"}
        self.objects[name] = {**deepcopy(body), "status": status}
        return deepcopy(self.objects[name])

    async def get_namespaced_custom_object(
        self, group: str, version: str, namespace: str, plural: str, name: str
    ) -> Any:
        await self._called("get", name)
        return deepcopy(self.objects[name])

    async def list_namespaced_custom_object(
        self, group: str, version: str, namespace: str, plural: str
    ) -> Any:
        await self._called("list")
        return {"items": deepcopy(list(self.objects.values()))}

    async def delete_namespaced_custom_object(
        self, group: str, version: str, namespace: str, plural: str, name: str
    ) -> Any:
        await self._called("delete", name)
        del self.objects[name]
        return {"status": "Success"}


async def left_behind(
    api: FakeCustomObjectsApi,
    session_id: str,
    *,
    incarnation: int = 0,
    instance: str | None = "me",
    lease: float | None = None,
    ready: bool = True,
) -> dict[str, Any]:
    """Makes the Sandbox that a manager of an earlier time would have left; returns it."""
    config = SandboxManagerConfig(mode="multi", instance_id=instance or "nobody")
    name = SANDBOX.name(session_id, incarnation)
    until = None if lease is None else lease_time(lease, 0)
    body = SANDBOX.body(config, "v1beta1", name, session_hash(session_id), until)
    if instance is None:
        del body["metadata"]["labels"][LABEL_INSTANCE]
    await api.create_namespaced_custom_object(GROUP, "v1beta1", "prodisco", PLURAL, body)
    if ready:
        api.set_ready(name)
    made = api.get(name)
    assert made is not None
    return made


async def change_spec(api: FakeCustomObjectsApi, taken: str, **spec: Any) -> None:
    """As somebody with kubectl does."""
    kind = {"_content_type": "application/merge-patch+json"}
    await api.patch_namespaced_custom_object(
        GROUP, "v1beta1", "prodisco", PLURAL, taken, {"spec": spec}, **kind
    )


async def suspend(api: FakeCustomObjectsApi, taken: str, *, gone: bool = True) -> None:
    """Somebody suspends a Sandbox; `gone`: its pod has ended, too."""
    await change_spec(api, taken, operatingMode="Suspended")
    report_suspended(api, taken, gone=gone)


def report_suspended(api: FakeCustomObjectsApi, taken: str, *, gone: bool = True) -> None:
    """What the controller writes of a Sandbox that is to be suspended."""
    found = api.get(taken)
    assert found is not None
    seen = {"observedGeneration": found["metadata"]["generation"]}
    suspended = ("True", "PodTerminated") if gone else ("False", "PodTerminating")
    [first] = conditions(suspended[1], kind="Suspended", status=suspended[0])["conditions"]
    [second] = conditions("SandboxSuspended")["conditions"]
    ips = {} if gone else {"podIPs": (found.get("status") or {}).get("podIPs")}
    api.set_status(taken, {"conditions": [first | seen, second | seen], **ips})


def now() -> float:
    return asyncio.get_running_loop().time()


async def settle() -> None:
    """Lets everything run that needs no time."""
    for _ in range(50):
        await asyncio.sleep(0)
