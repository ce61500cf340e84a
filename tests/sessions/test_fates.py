"""A Sandbox whose pod has ended, or that is suspended: what becomes of it, and of what it holds."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from prodisco_sandbox import (
    SandboxCapacityError,
    SandboxError,
    SandboxFailedError,
    SandboxTimeoutError,
)
from prodisco_sandbox._cluster.manifest import GROUP, PLURAL, SANDBOX
from prodisco_sandbox._cluster.metadata import lease_time
from prodisco_sandbox.testing import FakeCustomObjectsApi
from tests.support.managers import (
    Clients,
    LoopTimeApi,
    StubClient,
    alive,
    change_spec,
    conditions,
    left_behind,
    managed,
    now,
    report_suspended,
    settle,
    suspend,
)

pytestmark = pytest.mark.looptime

VOLUMES = [{"metadata": {"name": "workspace"}, "spec": {"accessModes": ["ReadWriteOnce"]}}]


def report_finished(api: FakeCustomObjectsApi, name: str, reason: str = "PodSucceeded") -> None:
    """What the controller writes of a pod that has ended, or is ending because it is deleted."""
    found = api.get(name)
    assert found is not None
    seen = {"observedGeneration": found["metadata"]["generation"]}
    told = [
        *conditions("NotSuspended", kind="Suspended")["conditions"],
        *conditions(reason)["conditions"],
        *conditions(reason, kind="Finished", status="True")["conditions"],
    ]
    ips = (found.get("status") or {}).get("podIPs") or ["10.0.0.1"]
    api.set_status(name, {"conditions": [condition | seen for condition in told], "podIPs": ips})


def uid_of(client: Any) -> str:
    return str(client.sandbox.uid)


def modes(api: FakeCustomObjectsApi) -> list[str]:
    """What the manager has patched operatingMode to."""
    bodies = [r.body for r in api.requests if r.verb == "patch" and "metadata" in r.body]
    return [body["spec"]["operatingMode"] for body in bodies if "operatingMode" in (body.get("spec") or {})]


def report_ready(api: FakeCustomObjectsApi, name: str, ip: str, *, generation: int | None = None) -> None:
    found = api.get(name)
    assert found is not None
    seen = found["metadata"]["generation"] if generation is None else generation
    [ready] = conditions("DependenciesReady", status="True")["conditions"]
    api.set_status(name, {"conditions": [ready | {"observedGeneration": seen}], "podIPs": [ip]})


# A pod that is deleted, as a drained node does it: Finished for a moment, then another pod


async def test_a_passing_finished_deletes_nothing_and_the_next_use_meets_the_new_pod() -> None:
    clients = Clients()
    async with LoopTimeApi(auto_ready=True) as api, managed(api, clients) as manager:
        old = await manager.get_client("s")
        name = manager.sandbox_name("s")
        report_finished(api, name)
        await settle()
        assert clients.made[0].closed, "the machine is dead at once"
        await asyncio.sleep(0.7)
        api.set_status(name, conditions("DependenciesNotReady"))
        await asyncio.sleep(1)
        report_ready(api, name, "10.0.0.2")
        new = await manager.get_client("s")
        assert api.count("delete") == 0
        assert (uid_of(new), new.sandbox == old.sandbox) == (uid_of(old), False)
        assert new.target == "10.0.0.2:50051"
        stats = manager.stats()
        assert (stats.created, stats.lost, stats.recreated) == (1, 1, 1)


async def test_the_same_address_after_a_death_is_another_machine() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        name = manager.sandbox_name("s")
        old = await manager.get_client("s")
        ips = api.objects[0]["status"]["podIPs"]
        report_finished(api, name)
        await settle()
        report_ready(api, name, ips[0])
        new = await manager.get_client("s")
        assert (new is old, new.sandbox == old.sandbox) == (False, False)


async def test_the_address_of_a_finished_pod_is_no_target() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        client = await manager.get_client("s")
        name = manager.sandbox_name("s")
        await change_spec(api, name, volumeClaimTemplates=VOLUMES)
        report_finished(api, name)
        waiting = asyncio.create_task(manager.get_client("s"))
        await asyncio.sleep(1)
        assert not waiting.done()
        report_suspended(api, name)
        await settle()
        report_ready(api, name, "10.0.0.9")
        assert await waiting is not client


async def test_a_session_whose_pod_has_ended_and_that_nobody_wants_is_reaped() -> None:
    async with (
        LoopTimeApi(auto_ready=True) as api,
        managed(api, session_idle_timeout=50.0, idle_check_interval=10.0) as manager,
    ):
        await manager.get_client("s")
        report_finished(api, manager.sandbox_name("s"))
        await asyncio.sleep(40)
        assert len(api.objects) == 1
        await asyncio.sleep(30)
        assert (api.objects, manager.stats().reaped) == ([], 1)


async def test_a_pod_that_ends_while_it_is_connected_to_is_replaced_once() -> None:
    clients = Clients(lambda target: StubClient(target, healthy=False))
    async with LoopTimeApi(auto_ready=True) as api, managed(api, clients) as manager:
        waiting = asyncio.create_task(manager.get_client("s"))
        for _ in range(2):
            await asyncio.sleep(3)
            [name] = alive(api)
            api.set_status(name, conditions("PodFailed", "exit code 1"))
        with pytest.raises(SandboxFailedError, match=r"PodFailed: exit code 1"):
            await waiting
        await settle()
        assert (api.count("create"), api.objects) == (2, [])


async def test_a_close_while_a_spent_sandbox_is_replaced_leaves_nothing() -> None:
    failing = LoopTimeApi(auto_ready=lambda _: conditions("PodFailed"))
    async with failing as api, managed(api) as manager:
        with api.faults.add("delete", hold=True) as gate:
            waiting = asyncio.create_task(manager.get_client("s"))
            await gate.reached()
            closing = asyncio.create_task(manager.on_session_closed("s"))
            await settle()
        await closing
        with pytest.raises(SandboxError, match="closed"):
            await waiting
        assert (api.objects, api.count("create")) == ([], 1)


# Volumes: what outlives a pod is never deleted because the pod is gone


async def test_a_sandbox_with_volumes_is_restarted_by_its_next_use() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        old = await manager.get_client("s")
        name = manager.sandbox_name("s")
        await change_spec(api, name, volumeClaimTemplates=VOLUMES)
        report_finished(api, name)
        await asyncio.sleep(30)
        assert modes(api) == [], "no timers: its next use decides"
        waiting = asyncio.create_task(manager.get_client("s"))
        await asyncio.sleep(1)
        assert modes(api) == ["Suspended"]
        report_suspended(api, name, gone=False)
        await asyncio.sleep(1)
        assert modes(api) == ["Suspended"], "0.5.6 would report the dying pod as ready"
        report_suspended(api, name)
        await asyncio.sleep(1)
        assert modes(api) == ["Suspended", "Running"]
        report_ready(api, name, "10.0.0.1", generation=1)
        await asyncio.sleep(1)
        assert not waiting.done(), "that was seen before the manager's own patch"
        report_ready(api, name, "10.0.0.1")
        new = await waiting
        assert (uid_of(new), new.sandbox == old.sandbox) == (uid_of(old), False)
        assert api.count("delete") == 0


async def test_a_restart_that_fails_keeps_the_volumes() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api, ready_timeout=40.0) as manager:
        await manager.get_client("s")
        name = manager.sandbox_name("s")
        await change_spec(api, name, volumeClaimTemplates=VOLUMES)
        report_finished(api, name)
        for _ in range(2):
            waiting = asyncio.create_task(manager.get_client("s"))
            await asyncio.sleep(1)
            report_suspended(api, name)
            await settle()
            report_finished(api, name)
            with pytest.raises(SandboxFailedError, match="also after a restart"):
                await waiting
        assert (api.count("delete"), modes(api)) == (0, ["Suspended", "Running"] * 2)


async def test_a_claim_that_is_never_answered_does_not_cost_its_volumes() -> None:
    async with LoopTimeApi() as api:
        async with managed(api, ready_timeout=20.0, idle_check_interval=5.0) as manager:
            left = await left_behind(api, "s", instance="another")
            await change_spec(api, left["metadata"]["name"], volumeClaimTemplates=VOLUMES)
            api.faults.add("patch", lost=True, name=left["metadata"]["name"])
            with pytest.raises(SandboxError):
                await manager.get_client("s")
            assert manager.stats().events["sandbox_kept"] == 1
            await asyncio.sleep(120)
        assert (alive(api), api.count("delete")) == ([left["metadata"]["name"]], 0)


async def test_an_unreachable_server_does_not_cost_its_volumes() -> None:
    clients = Clients()
    async with (
        LoopTimeApi(auto_ready=True) as api,
        managed(api, clients, ready_timeout=40.0) as manager,
    ):
        old = await manager.get_client("s")
        name = manager.sandbox_name("s")
        await change_spec(api, name, volumeClaimTemplates=VOLUMES)
        clients.made[0].healthy = False
        clients.made[0].fail()
        with pytest.raises(SandboxTimeoutError):
            await manager.get_client("s")
        await settle()
        assert (manager.stats().ready, api.count("delete"), alive(api)) == (1, 0, [name])
        clients.made[0].healthy = True
        assert uid_of(await manager.get_client("s")) == uid_of(old)
        assert (api.count("create"), manager.stats().lost) == (1, 0)


async def test_a_dead_sandbox_with_volumes_is_adopted_and_restarted() -> None:
    async with LoopTimeApi() as api, managed(api) as manager:
        left = await left_behind(api, "s", ready=False)
        name = left["metadata"]["name"]
        await change_spec(api, name, volumeClaimTemplates=VOLUMES)
        report_finished(api, name, "PodFailed")
        waiting = asyncio.create_task(manager.get_client("s"))
        await asyncio.sleep(1)
        report_suspended(api, name)
        await settle()
        report_ready(api, name, "10.0.0.4")
        assert uid_of(await waiting) == left["metadata"]["uid"]
        assert api.count("delete") == 0


async def test_closing_deletes_volumes_too() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        await manager.get_client("s")
        name = manager.sandbox_name("s")
        await change_spec(api, name, volumeClaimTemplates=VOLUMES)
        report_finished(api, name)
        waiting = asyncio.create_task(manager.get_client("s"))
        await asyncio.sleep(1)
        await manager.on_session_closed("s")
        assert api.objects == []
        with pytest.raises(SandboxError, match="closed"):
            await waiting


# Suspended by somebody else


async def test_a_suspended_sandbox_is_resumed_by_its_next_use() -> None:
    clients = Clients()
    async with LoopTimeApi(auto_ready=True) as api, managed(api, clients) as manager:
        old = await manager.get_client("s")
        name = manager.sandbox_name("s")
        await suspend(api, name, gone=False)
        await settle()
        assert clients.made[0].closed
        waiting = asyncio.create_task(manager.get_client("s"))
        await asyncio.sleep(20)
        assert modes(api) == [], "not before the pod is gone"
        report_suspended(api, name)
        await asyncio.sleep(1)
        assert modes(api) == ["Running"]
        report_ready(api, name, "10.0.0.7")
        new = await waiting
        assert (uid_of(new), new.sandbox == old.sandbox) == (uid_of(old), False)
        assert api.count("delete") == 0


async def test_a_sandbox_that_stays_suspended_is_never_deleted_for_it() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api, ready_timeout=30.0) as manager:
        old = await manager.get_client("s")
        name = manager.sandbox_name("s")
        await suspend(api, name, gone=False)
        with pytest.raises(SandboxTimeoutError, match="SandboxSuspended"):
            await manager.get_client("s")
        await settle()
        assert (alive(api), api.count("delete")) == ([name], 0)
        waiting = asyncio.create_task(manager.get_client("s"))
        await asyncio.sleep(1)
        report_suspended(api, name)
        await settle()
        report_ready(api, name, "10.0.0.7")
        assert uid_of(await waiting) == uid_of(old)


async def test_without_leave_to_patch_an_error_says_that_it_is_suspended() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        api.forbid("patch")
        old = await manager.get_client("s")
        name = manager.sandbox_name("s")
        api.allow("patch")
        await suspend(api, name)
        api.forbid("patch")
        with pytest.raises(SandboxFailedError, match=r"is suspended, and the manager may not patch it"):
            await manager.get_client("s")
        api.allow("patch")
        await change_spec(api, name, operatingMode="Running")
        report_ready(api, name, "10.0.0.7")
        assert uid_of(await manager.get_client("s")) == uid_of(old)
        assert api.count("delete") == 0


async def test_a_suspended_sandbox_of_an_earlier_process_is_resumed() -> None:
    async with LoopTimeApi() as api, managed(api) as manager:
        left = await left_behind(api, "s")
        await suspend(api, left["metadata"]["name"])
        waiting = asyncio.create_task(manager.get_client("s"))
        await asyncio.sleep(1)
        assert modes(api) == ["Running"]
        report_ready(api, left["metadata"]["name"], "10.0.0.7")
        assert uid_of(await waiting) == left["metadata"]["uid"]


async def test_what_something_else_suspends_each_time_is_given_up_and_kept() -> None:
    class Stubborn(LoopTimeApi):
        async def patch_namespaced_custom_object(self, *args: Any, **kwargs: Any) -> Any:
            patched = await super().patch_namespaced_custom_object(*args, **kwargs)
            if (args[5].get("spec") or {}).get("operatingMode") == "Running":
                await suspend(self, args[4])
                return self.get(args[4])
            return patched

    async with Stubborn(auto_ready=True) as api, managed(api) as manager:
        await manager.get_client("s")
        name = manager.sandbox_name("s")
        await suspend(api, name)
        with pytest.raises(SandboxFailedError, match="suspended again each time"):
            await manager.get_client("s")
        assert modes(api) == ["Running"] * 3
        assert (now() < 1.0, api.count("delete"), manager.stats().ready) == (True, 0, 1)


async def test_a_started_sandbox_whose_pod_finds_no_place_is_kept() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api, ready_timeout=30.0) as manager:
        old = await manager.get_client("s")
        name = manager.sandbox_name("s")
        await suspend(api, name)
        with pytest.raises(SandboxTimeoutError):
            await manager.get_client("s")
        await settle()
        assert (api.count("delete"), manager.stats().ready) == (0, 1)
        report_ready(api, name, "10.0.0.7")
        assert uid_of(await manager.get_client("s")) == uid_of(old)


async def test_a_session_that_was_in_use_when_its_machine_went_is_not_idle() -> None:
    clients = Clients()
    async with (
        LoopTimeApi(auto_ready=True) as api,
        managed(api, clients, session_idle_timeout=50.0, idle_check_interval=1.0) as manager,
    ):
        await manager.get_client("s")
        [client] = clients.made
        client.calls = 1
        await asyncio.sleep(200)
        report_finished(api, manager.sandbox_name("s"))
        await asyncio.sleep(40)
        assert (manager.stats().reaped, len(api.objects)) == (0, 1)
        await asyncio.sleep(20)
        assert manager.stats().reaped == 1


async def test_an_adoption_that_is_not_answered_in_time_deletes_no_volumes() -> None:
    async with LoopTimeApi() as api, managed(api, ready_timeout=25.0) as manager:
        left = await left_behind(api, "s")
        name = left["metadata"]["name"]
        await change_spec(api, name, volumeClaimTemplates=VOLUMES)
        api.faults.add("patch", latency=9.0, when=lambda r: r.name == name)
        api.faults.add("list", latency=9.9, times=2)
        with pytest.raises(SandboxError):
            await manager.get_client("s")
        await asyncio.sleep(20)
        assert (alive(api), api.count("delete")) == ([name], 0)
        api.faults.clear()
        waiting = asyncio.create_task(manager.get_client("s"))
        await asyncio.sleep(1)
        assert uid_of(await waiting) == left["metadata"]["uid"]


async def test_what_has_changed_since_it_was_taken_for_spent_is_not_deleted() -> None:
    async with (
        LoopTimeApi(auto_ready=True) as api,
        managed(api, instance_id="first") as first,
        managed(api, instance_id="second") as second,
    ):
        theirs = await first.get_client("s")
        name = first.sandbox_name("s")
        report_finished(api, name)
        with api.faults.add("delete", hold=True, times=1) as gate:
            waiting = asyncio.create_task(second.get_client("s"))
            await gate.reached()
            report_ready(api, name, "10.0.0.9")
            assert uid_of(await first.get_client("s")) == uid_of(theirs)
        assert uid_of(await waiting) == uid_of(theirs)
        assert len(alive(api)) == 1


async def test_what_was_not_deleted_as_spent_keeps_its_lease() -> None:
    async with LoopTimeApi() as api, managed(api, session_idle_timeout=1e6) as manager:
        name = manager.sandbox_name("s")
        waiting = asyncio.create_task(manager.get_client("s"))
        await api.until(lambda: alive(api))
        with api.faults.add("delete", hold=True, times=1) as gate:
            report_finished(api, name)
            await gate.reached()
            report_ready(api, name, "10.0.0.9")
        client = await waiting
        assert manager.stats().created == 1
        await asyncio.sleep(3000)
        [sandbox] = api.objects
        assert sandbox["spec"]["shutdownTime"] > lease_time(now(), 0)
        assert await manager.get_client("s") is client


async def test_a_stand_in_that_returns_nothing_for_a_patch_is_asked_once() -> None:
    class Silent(LoopTimeApi):
        async def patch_namespaced_custom_object(self, *args: Any, **kwargs: Any) -> Any:
            await super().patch_namespaced_custom_object(*args, **kwargs)

    async with Silent(auto_ready=True) as api, managed(api) as manager:
        await manager.get_client("s")
        name = manager.sandbox_name("s")
        await suspend(api, name)
        api.silence_watches()
        waiting = asyncio.create_task(manager.get_client("s"))
        await asyncio.sleep(5)
        assert modes(api) == ["Running"]
        report_ready(api, name, "10.0.0.7")
        await waiting
        assert modes(api) == ["Running"]


async def test_what_vanishes_while_it_is_resumed_is_made_anew() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        old = await manager.get_client("s")
        await suspend(api, manager.sandbox_name("s"))
        with api.faults.add("patch", hold=True) as gate:
            waiting = asyncio.create_task(manager.get_client("s"))
            await gate.reached()
            api.silence_watches()
            api.delete_now(manager.sandbox_name("s"))
        assert uid_of(await waiting) != uid_of(old)


# Its own time is over


async def test_expired_with_its_time_still_to_come_is_waited_for() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        client = await manager.get_client("s")
        name = manager.sandbox_name("s")
        api.set_status(name, conditions("SandboxExpired") | {"podIPs": api.objects[0]["status"]["podIPs"]})
        waiting = asyncio.create_task(manager.get_client("s"))
        await asyncio.sleep(5)
        assert (api.count("delete"), waiting.done()) == (0, False)
        report_ready(api, name, api.objects[0]["status"]["podIPs"][0])
        assert await waiting is client


async def test_expired_with_its_time_past_is_the_end() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        await asyncio.sleep(100)
        old = await manager.get_client("s")
        name = manager.sandbox_name("s")
        await change_spec(api, name, shutdownTime=lease_time(now(), -10))
        api.set_status(name, conditions("SandboxExpired"))
        await settle()
        assert (manager.stats().ready, manager.stats().lost, api.objects) == (0, 1, [])
        assert uid_of(await manager.get_client("s")) != uid_of(old)


# What will never come is said soon; what may come is waited for

POD_SECURITY = 'Error seen: pods "s" is forbidden: violates PodSecurity "restricted:latest": runAsNonRoot'
OWNED = 'Error seen: pod "s" is owned by Sandbox/s (UID: 1), not by sandbox "s"'


@pytest.mark.parametrize(
    ("reason", "message", "error"),
    [
        ("ReconcilerError", POD_SECURITY, SandboxFailedError),
        ("MultiplePods", "multiple pods found for the sandbox", SandboxFailedError),
        ("ReconcilerError", 'Error seen: pods "s" is forbidden: exceeded quota: q', SandboxCapacityError),
    ],
)
async def test_a_refused_pod_is_an_error_after_a_few_readings(
    reason: str, message: str, error: type[SandboxError]
) -> None:
    refusing = LoopTimeApi(auto_ready=lambda _: conditions(reason, message))
    async with refusing as api, managed(api) as manager:
        with pytest.raises(error, match=message[-20:]):
            await manager.get_client("s")
        assert 2.0 <= now() < 2.1
        assert api.count("get") == 2, "read anew before it is believed"
        await settle()
        assert api.objects == []


async def test_a_refusal_that_passes_is_no_error() -> None:
    def refused(_: Any) -> dict[str, Any]:
        return conditions("ReconcilerError", POD_SECURITY)

    async with LoopTimeApi(auto_ready=refused) as api, managed(api) as manager:
        waiting = asyncio.create_task(manager.get_client("s"))
        await asyncio.sleep(1.5)
        api.set_status(manager.sandbox_name("s"), conditions("DependenciesNotReady"))
        await asyncio.sleep(1)
        api.set_status(manager.sandbox_name("s"), conditions("ReconcilerError", POD_SECURITY))
        await asyncio.sleep(1.5)
        api.set_ready(manager.sandbox_name("s"))
        await waiting


@pytest.mark.parametrize("message", ["Error seen: etcdserver: request timed out", "Error seen: conflict"])
async def test_other_errors_of_the_controller_are_waited_for(message: str) -> None:
    failing = LoopTimeApi(auto_ready=lambda _: conditions("ReconcilerError", message))
    async with failing as api, managed(api) as manager:
        waiting = asyncio.create_task(manager.get_client("s"))
        await asyncio.sleep(60)
        api.set_ready(manager.sandbox_name("s"))
        await waiting


async def test_a_name_that_its_last_pod_still_holds_is_exchanged_once() -> None:
    refusing = LoopTimeApi(auto_ready=lambda _: conditions("ReconcilerError", OWNED))
    async with refusing as api, managed(api) as manager:
        waiting = asyncio.create_task(manager.get_client("s"))
        await asyncio.sleep(10)
        assert alive(api) == [SANDBOX.name("s", 1)], "and that one is waited for"
        api.set_ready(SANDBOX.name("s", 1))
        client = await waiting
        assert client.sandbox is not None
        assert client.sandbox.name == manager.sandbox_name("s") == SANDBOX.name("s", 1)


async def test_a_session_that_comes_back_does_not_wait_for_its_old_name() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        names = []
        for _ in range(3):
            await manager.get_client("s")
            names.append(manager.sandbox_name("s"))
            await manager.on_session_closed("s")
        await asyncio.sleep(10)
        await manager.get_client("s")
        assert [*names, manager.sandbox_name("s")] == [SANDBOX.name("s", i) for i in (0, 1, 2, 0)]


# A Sandbox under another name than the first is not abandoned after a restart


async def test_a_live_sandbox_of_a_later_incarnation_is_found_before_one_is_created() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        live = await left_behind(api, "s", incarnation=1, instance="another")
        assert uid_of(await manager.get_client("s")) == live["metadata"]["uid"]
        assert (api.count("create"), len(api.objects)) == (1, 1), "theirs"
        await manager.get_client("other")
        assert api.count("list") == 2, "a survey, and one look for the session that had one"


async def test_a_survey_that_fails_is_made_up_for_by_a_look() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        live = await left_behind(api, "s", incarnation=1, instance="another")
        api.faults.add("list", error=503, times=1)
        assert uid_of(await manager.get_client("s")) == live["metadata"]["uid"]


async def test_a_sandbox_that_another_manager_has_claimed_is_found_again_by_its_label() -> None:
    async with (
        LoopTimeApi(auto_ready=True) as api,
        managed(api, instance_id="first") as first,
        managed(api, instance_id="second") as second,
    ):
        await first.get_client("s")
        await first.on_session_closed("s")
        mine = await first.get_client("s")
        assert first.sandbox_name("s") == SANDBOX.name("s", 1)
        await asyncio.sleep(20)
        await second.get_client("s")
        assert len(alive(api)) == 1, "its survey has found it"
        await settle()
        assert uid_of(await first.get_client("s")) == uid_of(mine)
        assert len(alive(api)) == 1


async def delete_as_others(api: FakeCustomObjectsApi, taken: str) -> None:
    await api.delete_namespaced_custom_object(GROUP, "v1beta1", "prodisco", PLURAL, taken)


async def test_what_others_are_deleting_is_no_reason_to_look() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        api.linger_deletes = True
        left = await left_behind(api, "s", instance="another", incarnation=3)
        await delete_as_others(api, left["metadata"]["name"])
        await manager.get_client("s")
        assert api.count("list") == 1
        api.finish_deletes()
