"""One script for every controller of Sandboxes, and what a client's watch sees of it.

Here FakeCustomObjectsApi and LocalCluster play it; in tests/controller the real controller.
"""

from __future__ import annotations

import contextlib
import datetime as dt
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from prodisco_sandbox import SandboxManagerConfig
from prodisco_sandbox._cluster.manifest import SANDBOX
from prodisco_sandbox._cluster.metadata import session_hash
from prodisco_sandbox.local import LocalCluster
from prodisco_sandbox.testing import FakeCustomObjectsApi
from tests.support.api import GROUP, MERGE, PLURAL, Event, watched
from tests.support.local import STUB, stub
from tests.support.patience import until

Object = dict[str, Any]

NAME, OTHER = "sandbox-20a4fd8c486f34b044fef0130e71a55d", "sandbox-20a4fd8c486f34b044fef0130e71a55e"

UP = "Suspended=False/NotSuspended"
WAITS = "Ready=False/DependenciesNotReady"
CREATED = f"{UP} PodScheduled=Unknown/PodSchedulingUnknown {WAITS}"
SCHEDULED = f"{UP} PodScheduled=True/PodScheduled {WAITS}"
READY = f"{UP} PodScheduled=True/PodScheduled Ready=True/DependenciesReady"
FAILED = f"{UP} PodScheduled=True/PodScheduled Ready=False/PodFailed Finished=True/PodFailed"
ENDED = f"{UP} PodScheduled=True/PodScheduled Ready=False/PodSucceeded Finished=True/PodSucceeded"
ENDING = "Suspended=False/PodTerminating PodScheduled=True/PodScheduled Ready=False/SandboxSuspended"
SUSPENDED = "Suspended=True/PodTerminated Ready=False/SandboxSuspended"
# PodScheduled was away, and comes back at the end.
RESUMED = "Suspended=False/NotSuspended Ready={} PodScheduled={}"
RESUMED_CREATED = RESUMED.format("False/DependenciesNotReady", "Unknown/PodSchedulingUnknown")
RESUMED_SCHEDULED = RESUMED.format("False/DependenciesNotReady", "True/PodScheduled")
RESUMED_READY = RESUMED.format("True/DependenciesReady", "True/PodScheduled")
HELD = f"{UP} PodScheduled=Unknown/PodSchedulingUnknown Ready=False/ReconcilerError"
EXPIRED = f"{UP} Ready=False/SandboxExpired"

PENDING = "Pod exists with phase: Pending; Service Exists"
SUSPENDING = "Pod is terminating. Sandbox is suspending"
GONE = "Pod has been terminated. Sandbox is suspended"
TEXTS = {
    "NotSuspended": {"Sandbox is not suspended"},
    "PodTerminating": {SUSPENDING},
    "PodTerminated": {GONE},
    "PodScheduled": {""},
    "PodSchedulingUnknown": {
        "Pod has not reported a PodScheduled condition yet",
        "Pod state is unknown. Pod scheduling cannot be determined",
    },
    "DependenciesNotReady": {PENDING},
    "DependenciesReady": {"Pod is Ready; Service Exists"},
    "SandboxSuspended": {"Sandbox is suspending", "Sandbox is suspended"},
    "SandboxExpired": {"Sandbox has expired"},
    "PodSucceeded": {"Pod completed successfully"},
    "PodFailed": {"Pod failed"},
}


@dataclass(frozen=True)
class Maybe:
    """A state that may pass between two looks of the real controller, and only it may miss it."""

    state: str


@dataclass
class World:
    """A controller at work, and what its user can do to it.

    Attributes:
        api: A CustomObjectsApi.
        config: Of the manager whose Sandboxes it runs.
        delete_pod: Deletes a pod; it ends with status 0.
        fail_pod: Ends a pod by itself.
        name: The Sandbox's.
        is_real: Whether it is the real one, which may miss what is `Maybe`.
        tells_how: Whether its PodFailed says more than the real one's.
        events: What the watch has seen so far.
    """

    api: Any
    config: SandboxManagerConfig
    delete_pod: Callable[[str], Awaitable[object]]
    fail_pod: Callable[[str], Awaitable[object]]
    name: str = NAME
    is_real: bool = False
    tells_how: bool = False
    events: list[Event] = field(default_factory=list)

    @property
    def at(self) -> tuple[str, str, str, str]:
        return GROUP, "v1beta1", self.config.namespace, PLURAL

    async def create(self, **spec: Any) -> None:
        body = SANDBOX.body(self.config, "v1beta1", self.name, session_hash("session"))
        body["spec"] |= spec
        await self.api.create_namespaced_custom_object(*self.at, body)

    async def patch(self, **spec: Any) -> None:
        body = {"spec": spec}
        await self.api.patch_namespaced_custom_object(*self.at, self.name, body, _content_type=MERGE)

    async def delete(self) -> None:
        await self.api.delete_namespaced_custom_object(*self.at, self.name)

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Follows a client's watch meanwhile."""
        async with watched(self.api, self.at) as self.events:
            yield

    def states(self, since: int) -> list[str]:
        """The states that the watch has seen since then, repeated ones folded."""
        found = [self.shown(kind, seen) for _, kind, seen in self.events[max(0, since - 1) :]]
        folded = [state for state, before in zip(found, ["", *found], strict=False) if state != before]
        return folded[1:] if since else folded

    async def step(self, action: Awaitable[object], *expected: str | Maybe) -> None:
        """Takes one step of the script, and compares what comes of it."""
        since = len(self.events)
        await action
        if expected:
            with contextlib.suppress(AssertionError):
                await until(lambda: self.states(since)[-1:] == [expected[-1]])
        seen = self.states(since)
        assert follows(seen, list(expected), self.is_real), "\n".join(["this was seen:", *seen])
        for _, _, sandbox in self.events[since:]:
            self.check_texts(sandbox)
        if self.is_real:
            return  # It may write from a status that it saw before its last write, times and all.
        for (_, _, before), (_, kind, after) in zip(
            self.events[since:], self.events[since + 1 :], strict=False
        ):
            if kind == "MODIFIED" and before["metadata"]["uid"] == after["metadata"]["uid"]:
                check_times(before, after)

    def shown(self, kind: str, obj: Object) -> str:
        return shown(kind, obj)

    def check_texts(self, sandbox: Object) -> None:
        for found in (sandbox.get("status") or {}).get("conditions") or ():
            text = found["message"]
            if found["reason"] == "ReconcilerError":
                owner = f"is owned by Sandbox/{self.name} (UID: "
                assert text.startswith(
                    (f'Error seen: pod "{self.name}" {owner}', f'Error seen: service "{self.name}" {owner}')
                )
            elif found["reason"] != "PodFailed" or not self.tells_how:
                assert text in TEXTS[found["reason"]], found


def shown(kind: str, sandbox: Object) -> str:
    """An event as one line: the conditions in their order, and whether the pod has addresses."""
    if kind == "DELETED":
        return kind
    metadata, status = sandbox["metadata"], sandbox.get("status") or {}
    conditions = status.get("conditions") or ()
    parts = [f"{c['type']}={c['status']}/{c['reason']}" for c in conditions]
    if "podIPs" in status:
        parts.append("+ip")
    if any(c["type"] == "Ready" and c["observedGeneration"] != metadata["generation"] for c in conditions):
        parts.append("older")  # The controller has not seen the newest spec.
    if "deletionTimestamp" in metadata:
        parts.append("deleting")
    return " ".join(parts) or "new"


def follows(seen: list[str], expected: list[str | Maybe], may_miss: bool) -> bool:
    """Whether that is what was to be seen."""
    if not expected:
        return not seen
    first, rest = expected[0], expected[1:]
    if isinstance(first, Maybe):
        skipped = may_miss and follows(seen, rest, may_miss)
        return skipped or (seen[:1] == [first.state] and follows(seen[1:], rest, may_miss))
    return seen[:1] == [first] and follows(seen[1:], rest, may_miss)


def check_times(before: Object, after: Object) -> None:
    """A condition has a new time only with a new status."""
    was = {c["type"]: c for c in (before.get("status") or {}).get("conditions") or ()}
    for found in (after.get("status") or {}).get("conditions") or ():
        old = was.get(found["type"])
        if old is not None and old["status"] == found["status"]:
            assert found["lastTransitionTime"] == old["lastTransitionTime"], (old, found)


def just_over() -> str:
    return (dt.datetime.now(dt.UTC) - dt.timedelta(seconds=1)).strftime("%Y-%m-%dT%H:%M:%SZ")


async def play(world: World) -> None:
    """The script: every way in which a pod comes and goes while its Sandbox is there."""
    async with world.watched():
        await world.step(world.create(), "new", CREATED, Maybe(SCHEDULED), f"{READY} +ip")
        await world.step(
            world.delete_pod(world.name), Maybe(f"{ENDED} +ip"), CREATED, Maybe(SCHEDULED), f"{READY} +ip"
        )
        await world.step(world.fail_pod(world.name), f"{FAILED} +ip")
        await world.step(world.delete_pod(world.name), CREATED, Maybe(SCHEDULED), f"{READY} +ip")
        await world.step(
            world.patch(operatingMode="Suspended"),
            f"{READY} +ip older",
            f"{ENDING} +ip",
            Maybe(f"{ENDING} Finished=True/PodSucceeded +ip"),
            SUSPENDED,
        )
        await world.step(
            world.patch(operatingMode="Running"),
            f"{SUSPENDED} older",
            RESUMED_CREATED,
            Maybe(RESUMED_SCHEDULED),
            f"{RESUMED_READY} +ip",
        )
        await world.step(world.delete(), "DELETED")
        await world.step(world.create(), "new", HELD, CREATED, Maybe(SCHEDULED), f"{READY} +ip")
        await world.step(
            world.patch(shutdownTime=just_over(), shutdownPolicy="Delete"),
            f"{READY} +ip older",
            f"{EXPIRED} +ip",
            "DELETED",
        )
        world.name = OTHER
        await world.step(world.create(), "new", CREATED, Maybe(SCHEDULED), f"{READY} +ip")
        await world.step(
            world.patch(shutdownTime=just_over()), f"{READY} +ip older", f"{EXPIRED} +ip", EXPIRED
        )
        await world.step(world.patch(shutdownPolicy="Delete"), f"{EXPIRED} older", "DELETED")


@pytest.mark.looptime
async def test_the_fake_api() -> None:
    async with FakeCustomObjectsApi(auto_ready=1.0) as api:

        async def delete_pod(name: str) -> None:
            api.delete_pod(name)

        async def fail_pod(name: str) -> None:
            api.fail_pod(name)

        await play(World(api, SandboxManagerConfig(mode="multi"), delete_pod, fail_pod))


async def test_a_local_cluster(tmp_path: Path) -> None:
    script = STUB.replace("echo", "trap 'exit 0' TERM\necho", 1)
    async with LocalCluster(python=stub(tmp_path, script)) as cluster:

        async def delete_pod(name: str) -> None:
            cluster.delete_pod(name)

        async def fail_pod(name: str) -> None:
            cluster.kill(name)

        api = cluster.custom_objects_api
        await play(World(api, cluster.config(), delete_pod, fail_pod, tells_how=True))
