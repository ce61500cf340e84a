"""Every way in which a manager meets a failure: it is logged once, with what is known of it, and counted."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import prodisco_sandbox
from prodisco_sandbox import (
    SandboxCapacityError,
    SandboxConflictError,
    SandboxError,
    SandboxFailedError,
    SandboxManager,
    SandboxManagerClosedError,
    SandboxManagerConfig,
    SandboxPermissionError,
    SandboxTimeoutError,
    SandboxUnavailableError,
)
from prodisco_sandbox._cluster.credentials import OwnClient
from prodisco_sandbox._cluster.manifest import GROUP, PLURAL, SANDBOX
from prodisco_sandbox._cluster.metadata import session_hash
from prodisco_sandbox.testing import FakeCustomObjectsApi, api_error
from tests.support.managers import (
    Clients,
    LoopTimeApi,
    StubClient,
    conditions,
    left_behind,
    now,
    settle,
    suspend,
)

pytestmark = pytest.mark.looptime

MARK = "alices-secret-5f3a9c"
SESSION = f"\n../{MARK}\x00{{}}%s'\"é\ud800"
"""A session id that would show wherever it were written."""
OTHER = f"{MARK}-too"


class Brittle(StubClient):
    async def close(self) -> None:
        raise ConnectionResetError("reset by peer")


class Stumbling(StubClient):
    """A client that fails the first time that it is asked how busy it is, and is always busy."""

    asked = 0

    @property
    def in_flight(self) -> int:
        self.asked += 1
        if self.asked == 1:
            raise ZeroDivisionError
        return 1


@dataclass
class World:
    """A manager, what is around it, and the errors that its callers got."""

    api: FakeCustomObjectsApi
    clients: Clients
    config: SandboxManagerConfig
    manager: SandboxManager
    errors: list[BaseException] = field(default_factory=list)

    async def fails(self, call: Awaitable[Any], kind: type[BaseException]) -> None:
        with pytest.raises(kind) as caught:
            await call
        self.errors.append(caught.value)

    def sandbox(self) -> str:
        return self.manager.sandbox_name(SESSION)


@asynccontextmanager
async def world(
    make: Callable[[str], StubClient] = StubClient,
    auto_ready: Any = True,
    behind: float = 0.0,
    **settings: Any,
) -> AsyncIterator[World]:
    """A world whose API server's clock is so many seconds behind the manager's."""
    async with LoopTimeApi(auto_ready=auto_ready, now=lambda: now() - behind) as api:
        clients = Clients(make)
        loop = asyncio.get_running_loop()
        config = SandboxManagerConfig(**{"mode": "multi", "instance_id": "me", **settings})
        manager = SandboxManager(config, custom_objects_api=api, client_factory=clients, wall_clock=loop.time)
        try:
            yield World(api, clients, config, manager)
        finally:
            await manager.shutdown()


@dataclass(frozen=True)
class Failure:
    """One way to fail.

    Attributes:
        happens: Makes it happen.
        event: What is logged of it.
        times: How often.
        has: The keys that the event must have.
        also: What else must be logged because of it.
        counts: The other figures of stats() that must be so afterwards.
        settings: Of the world that it happens in.
    """

    happens: Callable[[World], Awaitable[None]]
    event: str
    has: str
    times: int = 1
    also: frozenset[str] = frozenset()
    counts: dict[str, int] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


FAILURES: list[Failure] = []


def failure(
    event: str,
    has: str,
    *,
    times: int = 1,
    also: str = "",
    counts: dict[str, int] | None = None,
    **settings: Any,
) -> Callable[[Callable[[World], Awaitable[None]]], None]:
    def register(happens: Callable[[World], Awaitable[None]]) -> None:
        FAILURES.append(Failure(happens, event, has, times, frozenset(also.split()), counts or {}, settings))

    return register


# Creation


@failure("sandbox_failed", "sandbox reason duration", counts={"failed": 1})
async def a_sandbox_is_refused(w: World) -> None:
    w.api.faults.add("create", error=422)
    await w.fails(w.manager.get_client(SESSION), SandboxFailedError)


@failure("sandbox_failed", "sandbox reason duration", counts={"failed": 1})
async def creating_is_not_allowed(w: World) -> None:
    w.api.forbid("create")
    await w.fails(w.manager.get_client(SESSION), SandboxPermissionError)


class LoggedOut(OwnClient):
    """A connection of the manager's own that finds no new credentials."""

    def __init__(self) -> None:
        pass

    async def renew_credentials(self) -> None:
        raise SandboxUnavailableError("log in first")


@failure("credentials_not_renewed", "reason", also="sandbox_failed", counts={"failed": 1})
async def credentials_are_revoked(w: World) -> None:
    w.api.api_client = LoggedOut()  # type: ignore[attr-defined]
    w.api.faults.add("create", error=401)
    await w.fails(w.manager.get_client(SESSION), SandboxUnavailableError)


@failure("sandbox_failed", "sandbox reason duration", counts={"failed": 1})
async def there_is_a_quota(w: World) -> None:
    w.api.quota = 0
    await w.fails(w.manager.get_client(SESSION), SandboxCapacityError)


@failure("sandbox_failed", "sandbox reason duration", counts={"failed": 1, "created": 1}, auto_ready=False)
async def a_sandbox_is_never_ready(w: World) -> None:
    await w.fails(w.manager.get_client(SESSION), SandboxTimeoutError)


@failure(
    "sandbox_failed",
    "sandbox reason duration",
    also="sandbox_replaced",
    counts={"failed": 1, "created": 2},
    auto_ready=lambda _: conditions("PodFailed", "exit code 1"),
)
async def pods_fail(w: World) -> None:
    await w.fails(w.manager.get_client(SESSION), SandboxFailedError)


@failure(
    "sandbox_replaced", "sandbox reason", counts={"failed": 0, "created": 2, "ready": 1}, auto_ready=False
)
async def a_pod_fails(w: World) -> None:
    waiting = asyncio.create_task(w.manager.get_client(SESSION))
    await w.api.until(lambda: w.api.objects)
    w.api.set_status(w.sandbox(), conditions("PodFailed", "exit code 1"))
    await w.api.until(lambda: w.api.count("create") == 2 and w.api.objects)
    w.api.set_ready(w.sandbox())
    await waiting


@failure("sandbox_failed", "sandbox reason duration", counts={"failed": 1, "created": 1}, auto_ready=False)
async def others_delete_it_while_it_is_made(w: World) -> None:
    waiting = asyncio.create_task(w.manager.get_client(SESSION))
    await asyncio.sleep(1)
    w.api.delete_now(w.sandbox())
    await w.fails(waiting, SandboxFailedError)


@failure(
    "sandbox_failed",
    "sandbox reason duration",
    counts={"failed": 1, "created": 1},
    make=lambda target: StubClient(target, healthy=False),
)
async def a_server_is_never_healthy(w: World) -> None:
    await w.fails(w.manager.get_client(SESSION), SandboxTimeoutError)


@failure("sandbox_failed", "sandbox reason duration", counts={"failed": 1})
async def the_name_is_taken(w: World) -> None:
    body = SANDBOX.body(w.config, "v1beta1", w.sandbox(), session_hash("somebody else's"))
    await w.api.create_namespaced_custom_object(GROUP, "v1beta1", "prodisco", PLURAL, body)
    await w.fails(w.manager.get_client(SESSION), SandboxConflictError)


@failure("sandbox_failed", "sandbox reason duration", counts={"failed": 1})
async def the_api_object_is_broken(w: World) -> None:
    w.api.faults.add("create", error=ZeroDivisionError)
    await w.fails(w.manager.get_client(SESSION), SandboxError)


@failure("sandbox_not_claimed", "sandbox reason", also="leases_off")
async def adopting_is_not_allowed(w: World) -> None:
    w.api.forbid("patch")
    await left_behind(w.api, SESSION, instance="another")
    await w.manager.get_client(SESSION)


@failure("session_refused", "sandbox reason duration", max_sessions=1)
async def all_slots_are_taken(w: World) -> None:
    await w.manager.get_client(OTHER)
    await w.fails(w.manager.get_client(SESSION), SandboxCapacityError)


@failure("session_refused", "sandbox reason duration", max_sessions=1, capacity_timeout=5.0)
async def no_slot_comes_free_in_time(w: World) -> None:
    await w.manager.get_client(OTHER)
    await w.fails(w.manager.get_client(SESSION), SandboxCapacityError)


# Requests


@failure("request_retried", "verb sandbox attempt pause reason", times=2, counts={"created": 1})
async def the_api_server_is_busy(w: World) -> None:
    w.api.faults.add("create", error=api_error(429, retry_after=3), times=2)
    await w.manager.get_client(SESSION)
    assert now() >= 6


@failure("request_retried", "verb sandbox attempt pause reason", also="sandbox_suspect")
async def a_read_fails_once(w: World) -> None:
    client = await w.manager.get_client(SESSION)
    assert isinstance(client, StubClient)
    client.fail()
    w.api.faults.add("get", error=503, times=1)
    assert await w.manager.get_client(SESSION) is client


@failure("request_retried", "verb attempt pause reason")
async def a_list_fails_once(w: World) -> None:
    w.api.faults.add("list", error=503, times=1)
    assert await w.manager.cleanup_orphaned_sandboxes() == 0


@failure("watch_broken", "reason attempt pause")
async def the_watch_breaks(w: World) -> None:
    await w.manager.get_client(SESSION)
    w.api.cut_watches(ConnectionResetError("reset by peer"))
    await asyncio.sleep(1)


@failure("watch_broken", "reason attempt pause")
async def the_watch_is_too_old(w: World) -> None:
    await w.manager.get_client(SESSION)
    w.api.compact()
    w.api.cut_watches()
    await asyncio.sleep(1)


@failure("watch_refused", "reason instead")
async def watching_is_not_allowed(w: World) -> None:
    w.api.forbid("watch")
    await w.manager.get_client(SESSION)
    await settle()


@failure("sandbox_sweep_failed", "reason", also="watch_refused")
async def the_sweep_fails(w: World) -> None:
    w.api.forbid("watch")
    await w.manager.get_client(SESSION)
    await asyncio.sleep(55)
    w.api.faults.add("list", error=503, times=1)
    await asyncio.sleep(6)


@failure("leases_off", "reason")
async def patching_is_not_allowed(w: World) -> None:
    w.api.forbid("patch")
    await w.manager.get_client(SESSION)


@failure("lease_renewal_failed", "sandbox attempt reason", times=2, lease_duration=60.0)
async def a_lease_cannot_be_renewed(w: World) -> None:
    await w.manager.get_client(SESSION)
    w.api.faults.add("patch", error=503, times=2)
    await asyncio.sleep(40)


# Death


@failure("sandbox_lost", "sandbox reason duration", counts={"lost": 1})
async def others_delete_it(w: World) -> None:
    await w.manager.get_client(SESSION)
    await asyncio.sleep(1)
    w.api.delete_now(w.sandbox())
    await asyncio.sleep(1)


@failure("sandbox_machine_lost", "sandbox reason", counts={"lost": 1, "ready": 1})
async def a_pod_dies(w: World) -> None:
    await w.manager.get_client(SESSION)
    w.api.set_status(w.sandbox(), conditions("PodFailed", "OOMKilled"))
    await asyncio.sleep(1)


@failure(
    "sandbox_gone", "sandbox reason duration", counts={"lost": 1, "ready": 0}, also="sandbox_machine_lost"
)
async def a_sandbox_goes_after_its_pod(w: World) -> None:
    await w.manager.get_client(SESSION)
    w.api.set_status(w.sandbox(), conditions("PodFailed", "OOMKilled"))
    await asyncio.sleep(1)
    w.api.delete_now(w.sandbox())
    await asyncio.sleep(1)


@failure("sandbox_lost", "sandbox reason duration", counts={"lost": 1}, also="sandbox_suspect")
async def a_server_stops_answering(w: World) -> None:
    client = await w.manager.get_client(SESSION)
    assert isinstance(client, StubClient)
    client.healthy = False
    client.fail()
    await w.fails(w.manager.get_client(SESSION), SandboxTimeoutError)


@failure("sandbox_suspect", "sandbox reason")
async def a_call_fails(w: World) -> None:
    client = await w.manager.get_client(SESSION)
    assert isinstance(client, StubClient)
    client.fail()


@failure("sandbox_suspect", "sandbox reason")
async def the_controller_doubts_it(w: World) -> None:
    await w.manager.get_client(SESSION)
    w.api.set_condition(w.sandbox(), "Ready", "False", "DependenciesNotReady")
    await asyncio.sleep(1)


@failure("sandbox_check_failed", "sandbox reason duration", also="sandbox_suspect request_retried")
async def a_suspect_cannot_be_checked(w: World) -> None:
    client = await w.manager.get_client(SESSION)
    assert isinstance(client, StubClient)
    client.fail()
    w.api.faults.add("get", error=503)
    await w.fails(w.manager.get_client(SESSION), SandboxUnavailableError)
    w.api.faults.clear()


@failure(
    "sandbox_pod_replaced",
    "sandbox incarnation",
    counts={"created": 1, "recreated": 1},
    also="sandbox_suspect",
)
async def a_pod_is_replaced(w: World) -> None:
    await w.manager.get_client(SESSION)
    w.api.set_ready(w.sandbox())
    await asyncio.sleep(1)
    await w.manager.get_client(SESSION)


@failure(
    "sandbox_mode_changed",
    "sandbox mode",
    counts={"lost": 1, "ready": 1},
    also="sandbox_machine_lost sandbox_check_failed",
)
async def it_was_suspended_and_does_not_come_back(w: World) -> None:
    await w.manager.get_client(SESSION)
    await suspend(w.api, w.sandbox())
    await asyncio.sleep(1)
    await w.fails(w.manager.get_client(SESSION), SandboxTimeoutError)


@failure("sandbox_kept", "sandbox reason", counts={"failed": 1}, also="sandbox_failed")
async def it_stays_suspended(w: World) -> None:
    await left_behind(w.api, SESSION, instance="another")
    await suspend(w.api, w.sandbox(), gone=False)
    await w.fails(w.manager.get_client(SESSION), SandboxTimeoutError)


@failure("sandbox_not_looked_for", "sandbox reason", also="watch_broken", times=1)
async def the_first_list_fails(w: World) -> None:
    w.api.faults.add("list", error=503, times=2)
    await w.manager.get_client(SESSION)


@failure("sandbox_kind_changed", "sandboxes reason", warm_pool="python")
async def sandboxes_are_left_from_before_the_pool(w: World) -> None:
    await left_behind(w.api, OTHER)
    w.api.add_warm_pool("python")
    await w.manager.get_client(SESSION)
    await settle()


@failure("sandbox_kind_not_checked", "reason", warm_pool="python")
async def the_role_is_for_claims_alone(w: World) -> None:
    w.api.add_warm_pool("python")
    w.api.faults.add("list", error=api_error(403), when=lambda r: r.plural == PLURAL)
    await w.manager.get_client(SESSION)
    await settle()


# The end


@failure(
    "sandbox_suspend_failed",
    "sandbox attempt reason duration",
    times=2,
    counts={"suspended": 1, "delete_retries": 0},
    on_idle="suspend",
    workspace_storage="1Gi",
)
async def a_suspension_fails(w: World) -> None:
    await w.manager.get_client(SESSION)
    w.api.faults.add("patch", error=503, times=2, name=w.sandbox())
    await asyncio.sleep(680)
    await w.manager.on_session_closed(SESSION)


@failure("sandbox_delete_failed", "sandbox attempt reason duration", times=2, counts={"delete_retries": 2})
async def a_delete_fails(w: World) -> None:
    await w.manager.get_client(SESSION)
    w.api.faults.add("delete", error=503, times=2)
    await w.manager.on_session_closed(SESSION)
    await asyncio.sleep(5)
    assert w.api.objects == []


@failure("client_close_failed", "sandbox reason", make=Brittle)
async def a_client_does_not_close(w: World) -> None:
    await w.manager.get_client(SESSION)
    await w.manager.on_session_closed(SESSION)


@failure(
    "shutdown_incomplete",
    "sandboxes tasks duration",
    also="sandbox_delete_failed",
    counts={"delete_retries": 2, "closing": 0},
)
async def shutdown_may_not_delete(w: World) -> None:
    await w.manager.get_client(SESSION)
    w.api.forbid("delete")
    waiting = asyncio.create_task(w.manager.get_client(OTHER))
    await asyncio.sleep(0)
    await w.manager.shutdown()
    await w.fails(waiting, SandboxManagerClosedError)


@failure("orphan_deleted", "sandbox uid instance")
async def an_orphan_is_found(w: World) -> None:
    await left_behind(w.api, SESSION)
    assert await w.manager.cleanup_orphaned_sandboxes() == 1


@failure("task_failed", "task", make=Stumbling)
async def the_reaper_breaks(w: World) -> None:
    await w.manager.get_client(SESSION)
    await asyncio.sleep(750)
    (client,) = w.clients.made
    assert isinstance(client, Stumbling)
    assert client.asked > 1, "it looks again"
    assert w.manager.stats().ready == 1


@failure("deadline_not_moved", "sandbox reason", also="request_retried", shared=True, instance_id="group")
async def a_deadline_stays(w: World) -> None:
    async with w.manager.session(SESSION):
        await asyncio.sleep(1)
        with w.api.faults.add("patch", error=503, times=None):
            await asyncio.sleep(320)


@failure("clocks_apart", "ahead clock_skew", shared=True, instance_id="group", clock_skew=10.0, behind=60.0)
async def the_clocks_are_apart(w: World) -> None:
    await w.manager.get_client(SESSION)


# What is said of them


GOOD = {
    "sandbox_created",
    "sandbox_recreated",
    "sandbox_ready",
    "sandbox_started_warm",
    "sandbox_started_cold",
    "sandbox_adopted",
    "sandbox_attached",
    "sandbox_detached",
    "lapsed_deleted",
    "eviction_failed",
    "sandbox_suspended",
    "sandbox_resumed",
    "sandbox_evicted",
    "sandbox_reaped",
    "sandbox_closed",
    "sandbox_deleted",
    "watch_restored",
    "credentials_renewed",
    "task_ended",
}
"""What is logged although nothing has gone wrong."""


def events(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [record.__dict__["sandbox"] for record in caplog.records if "sandbox" in record.__dict__]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: failure.happens.__name__)
async def test_a_failure_is_logged_and_counted(failure: Failure, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "prodisco_sandbox")
    async with world(**failure.settings) as w:
        await failure.happens(w)
        stats = w.manager.stats()
        told = events(caplog)
        seen = Counter(event["event"] for event in told)
        assert set(seen) - GOOD == {failure.event} | failure.also
        assert seen[failure.event] == failure.times
        assert stats.events == seen
        for event in told:
            if event["event"] == failure.event:
                assert set(failure.has.split()) <= event.keys(), event
                assert event.get("reason", "-"), "a failure has its reason"
        attempts = [
            event["attempt"] for event in told if event["event"] == failure.event and "attempt" in event
        ]
        assert attempts == list(range(1, len(attempts) + 1))
        assert {name: getattr(stats, name) for name in failure.counts} == failure.counts
        w.api.allow("create", "delete", "patch", "watch")


def test_every_event_is_walked() -> None:
    found = set()
    source = Path(prodisco_sandbox.__file__).parent
    for path in [*source.glob("*.py"), *source.glob("_*/*.py")]:
        found |= set(
            re.findall(
                r"log\.(?:debug|info|warning|error|exception|log)\((?:level, )?\s*\"(\w+)\"", path.read_text()
            )
        )
    assert found == GOOD | {failure.event for failure in FAILURES}
