"""Sessions that are suspended, and resumed, by the real controller."""

from __future__ import annotations

import datetime as dt
import time
from typing import Any

import pytest

from prodisco_sandbox import SandboxFailedError, SandboxManager, SandboxRef
from prodisco_sandbox._cluster.manifest import SANDBOX
from tests.support.controller import ControlledNamespace, condition
from tests.support.envtest import MERGE_PATCH, Object
from tests.support.patience import PATIENCE, until

from .test_fates import ref
from .test_life import another_machine, output

pytestmark = pytest.mark.controller

NAME = SANDBOX.name("session")
KEEPS: dict[str, Any] = {"on_idle": "suspend", "workspace_storage": "1Gi"}
SUSPENDS = KEEPS | {"session_idle_timeout": 0.2, "idle_check_interval": 0.1}


async def use(manager: SandboxManager) -> SandboxRef:
    """Runs code in the session, and tells on which machine."""
    async with manager.session("session") as client:
        assert await output(client, "print(6 * 7)") == "42"
        return ref(client)


async def volumes(cluster: ControlledNamespace) -> dict[str, str]:
    """The names and uids of volumes that nobody has asked to delete."""
    found = await cluster.core.list_namespaced_persistent_volume_claim(cluster.name)
    return {v.metadata.name: v.metadata.uid for v in found.items if not v.metadata.deletion_timestamp}


async def has_no_volumes(cluster: ControlledNamespace) -> bool:
    return not (await cluster.core.list_namespaced_persistent_volume_claim(cluster.name)).items


def modes(events: list[tuple[float, str, Object]]) -> list[tuple[str, str | None]]:
    """Each operatingMode that was asked for, and what Suspended said at that moment."""
    changes: list[tuple[str, str | None]] = []
    for _, _, seen in events:
        mode = seen["spec"]["operatingMode"]
        if not changes or changes[-1][0] != mode:
            changes.append((mode, condition(seen, "Suspended").get("status")))
    return changes


async def test_an_idle_session_is_suspended_and_its_next_use_resumes_it(cluster: ControlledNamespace) -> None:
    async with cluster.managed(**SUSPENDS) as manager, cluster.watched() as events:
        first, kept = await use(manager), await volumes(cluster)
        assert list(kept) == [f"workspace-{NAME}"]
        await until(lambda: cluster.is_suspended(NAME))
        assert await cluster.pods(NAME) == []
        assert await volumes(cluster) == kept
        assert (manager.stats().suspended, manager.stats().closing) == (1, 0)
        async with manager.session("session") as client:
            second = ref(client)
            assert await output(client, "print(6 * 7)") == "42"
            assert (second.name, second.uid, second == first) == (NAME, first.uid, False)
            assert await volumes(cluster) == kept
            # One patch to suspend it, one to resume it, and one that asks whether leases are possible.
            await until(lambda: cluster.requests()["patch"] == 3)
            requests = cluster.requests()
            assert requests.pop("list") in (1, 2), "a tick lists too while the watch is opened"
            assert requests == {"create": 1, "watch": 1, "patch": 3}
        # Started while its pod is there, it would report that pod as ready.
        assert modes(events)[1:] == [("Suspended", "False"), ("Running", "True")]
        assert (manager.stats().created, manager.stats().resumed, manager.stats().lost) == (1, 1, 0)


async def test_a_session_makes_room_for_another_and_comes_back_to_its_volume(
    cluster: ControlledNamespace,
) -> None:
    evicts: dict[str, Any] = {
        "max_sessions": 1,
        "when_full": "evict",
        "evict_after": 0.1,
        "capacity_timeout": PATIENCE,
    }
    async with cluster.managed(**KEEPS, **evicts) as manager:
        first, kept = await use(manager), await volumes(cluster)
        await manager.get_client("another")
        second = await use(manager)
        assert (second.uid, second.after_eviction, second == first) == (first.uid, True, False)
        assert (await volumes(cluster)).items() > kept.items()
        assert (manager.stats().evicted, manager.stats().resumed) == (2, 1)


async def test_a_call_while_it_is_being_suspended_resumes_it(cluster: ControlledNamespace) -> None:
    async with cluster.managed(**SUSPENDS) as manager, cluster.watched() as events:
        first = await use(manager)
        await until(lambda: modes(events)[-1][0] == "Suspended")
        second = await use(manager)
        assert (second.name, second.uid, second == first) == (NAME, first.uid, False)
        assert modes(events)[1:3] == [("Suspended", "False"), ("Running", "True")]
        assert (manager.stats().created, manager.stats().failed) == (1, 0)


async def test_a_close_of_a_suspended_session_deletes_it_with_its_volume(
    cluster: ControlledNamespace,
) -> None:
    async with cluster.managed(**SUSPENDS) as manager:
        first = await use(manager)
        await until(lambda: cluster.is_suspended(NAME))
        await manager.on_session_closed("session")
        assert await cluster.find(NAME) is None
        second = await use(manager)  # The old volume may still be there.
        assert second.uid != first.uid
        assert list(await volumes(cluster)) == [f"workspace-{second.name}"]
        assert (manager.stats().created, manager.stats().resumed, manager.stats().failed) == (2, 0, 0)


async def test_somebody_else_resumes_and_suspends_it(cluster: ControlledNamespace) -> None:
    async with cluster.managed(**SUSPENDS) as manager:
        first = await use(manager)
        await until(lambda: cluster.is_suspended(NAME))
        await cluster.patch(NAME, {"operatingMode": "Running"})
        async with manager.session("session") as client:
            second = ref(client)
            assert (second.uid, second == first) == (first.uid, False)
            await cluster.suspend(NAME)
            client = await another_machine(manager, client)
            assert (ref(client).uid, ref(client) == second) == (first.uid, False)
            assert await output(client, "print(6 * 7)") == "42"
            assert (manager.stats().created, manager.stats().failed) == (1, 0)


async def test_one_that_somebody_else_suspended_is_suspended_again_and_resumes(
    cluster: ControlledNamespace,
) -> None:
    # Then only its deadline changes: the controller must still say that it has seen the change.
    async with cluster.managed(**SUSPENDS) as manager:
        async with manager.session("session") as client:
            first = ref(client)
            await cluster.suspend(NAME)
            await until(lambda: cluster.is_suspended(NAME))
        await until(lambda: manager.stats().suspended == 1)
        second = await use(manager)
        assert (second.uid, second == first) == (first.uid, False)


async def test_the_deadline_deletes_what_nobody_comes_back_to(cluster: ControlledNamespace) -> None:
    async with cluster.managed(**SUSPENDS, suspended_for=1.0) as manager, cluster.watched() as events:
        first = await use(manager)
        await until(lambda: any(kind == "DELETED" for _, kind, _ in events))
        *_, (_, _, last) = events
        assert last["spec"]["operatingMode"] == "Suspended"
        assert time.time() >= dt.datetime.fromisoformat(last["spec"]["shutdownTime"]).timestamp()
        await until(lambda: has_no_volumes(cluster))
        assert (await use(manager)).uid != first.uid
        assert (manager.stats().created, manager.stats().resumed) == (2, 0)


async def test_a_killed_manager_s_suspended_session_is_resumed_by_its_successor(
    cluster: ControlledNamespace,
) -> None:
    async with cluster.killed("session", **SUSPENDS, instance_id="fixed"):
        left = await cluster.get(NAME)
        await until(lambda: cluster.is_suspended(NAME))
    async with cluster.managed(**KEEPS, instance_id="fixed") as manager:
        assert (await use(manager)).uid == left["metadata"]["uid"]
        assert (manager.stats().created, manager.stats().resumed) == (0, 1)


async def test_a_shutdown_suspends_what_the_next_manager_resumes(cluster: ControlledNamespace) -> None:
    settings = KEEPS | {"instance_id": "fixed"}
    async with cluster.managed(**settings) as manager:
        first = await use(manager)
    assert (await cluster.get(NAME))["spec"]["operatingMode"] == "Suspended"
    async with cluster.managed(**settings) as manager:
        second = await use(manager)
        assert (second.name, second.uid, second == first) == (NAME, first.uid, False)
        assert (manager.stats().created, manager.stats().resumed) == (0, 1)


async def test_a_resume_that_fails_suspends_again(cluster: ControlledNamespace) -> None:
    async def enforce(level: str) -> None:
        labels = {"metadata": {"labels": {"pod-security.kubernetes.io/enforce": level}}}
        await cluster.core.patch_namespace(cluster.name, labels, _content_type=MERGE_PATCH)

    async with cluster.managed(**SUSPENDS) as manager:
        first, kept = await use(manager), await volumes(cluster)
        await until(lambda: cluster.is_suspended(NAME))
        await enforce("restricted")
        with pytest.raises(SandboxFailedError, match="violates PodSecurity"):
            await manager.get_client("session")
        await until(lambda: cluster.is_suspended(NAME))
        await enforce("privileged")
        assert (await use(manager)).uid == first.uid
        assert await volumes(cluster) == kept
        assert (manager.stats().created, manager.stats().failed, manager.stats().resumed) == (1, 1, 1)
