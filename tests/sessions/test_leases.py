"""Leases: from birth or not at all, and renewed for as long as the session lives."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest

from prodisco_sandbox import SandboxUnavailableError
from prodisco_sandbox._cluster.manifest import GROUP, PLURAL
from prodisco_sandbox._cluster.metadata import lease_time, name
from prodisco_sandbox._sessions.leases import PROBE, Leases
from prodisco_sandbox.testing import FakeCustomObjectsApi, api_error
from tests.support.managers import LoopTimeApi, PlainApi, managed, now, settle

pytestmark = pytest.mark.looptime

FOR_EVER: dict[str, Any] = {"session_idle_timeout": 1e6}


def renewals(api: FakeCustomObjectsApi, of: str | None = None) -> list[float]:
    """When leases were renewed."""
    return [
        round(r.time, 3)
        for r in api.requests
        if r.verb == "patch" and r.name != PROBE and of in (None, r.name)
    ]


def lease_of(sandbox: dict[str, Any]) -> str | None:
    time: str | None = sandbox["spec"].get("shutdownTime")
    if time is not None:
        assert sandbox["spec"]["shutdownPolicy"] == "Delete", "the default would keep it"
    return time


async def test_every_sandbox_has_its_lease_from_birth_after_one_probe() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        await asyncio.sleep(100)
        await asyncio.gather(*(manager.get_client(f"s{i}") for i in range(5)))
        bodies = [r.body for r in api.requests if r.verb == "create"]
        assert [lease_of(body) for body in bodies] == [lease_time(100, 1800)] * 5
        assert [r.name for r in api.requests if r.verb == "patch"] == [PROBE]
        assert len(api.objects) == 5


async def test_a_lease_is_renewed_at_half_time_exactly() -> None:
    async with LoopTimeApi(auto_ready=5.0) as api, managed(api, **FOR_EVER) as manager:
        await manager.get_client("s")
        await asyncio.sleep(3000)
        assert renewals(api) == [900, 1800, 2700]
        [sandbox] = api.objects
        assert lease_of(sandbox) == lease_time(2700, 1800)
        [*_, last] = [r for r in api.requests if r.verb == "patch"]
        assert last.body == {
            "metadata": {"uid": sandbox["metadata"]["uid"]},
            "spec": {"shutdownTime": lease_time(2700, 1800), "shutdownPolicy": "Delete"},
        }


async def test_a_sandbox_that_is_still_not_ready_keeps_its_lease_too() -> None:
    async with LoopTimeApi(auto_ready=100.0) as api, managed(api, lease_duration=60.0) as manager:
        await manager.get_client("s")
        assert renewals(api) == [30, 60, 90]


async def test_a_renewal_that_fails_is_repeated_until_it_succeeds() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api, **FOR_EVER) as manager:
        await manager.get_client("s")
        await asyncio.sleep(800)
        with api.faults.add("patch", error=503):
            await asyncio.sleep(200)
            assert renewals(api) == [900, 901, 903, 907, 915, 931, 961, 991]
        await asyncio.sleep(1000)
        assert renewals(api)[8:] == [1021, 1921]
        assert manager.stats().lost == 0


async def test_a_short_lease_is_repeated_soon_enough() -> None:
    async with (
        LoopTimeApi(auto_ready=True) as api,
        managed(api, lease_duration=8.0, **FOR_EVER) as manager,
    ):
        await manager.get_client("s")
        api.faults.add("patch", error=503, times=3)
        await asyncio.sleep(7.9)
        assert renewals(api) == [4, 5, 6, 7]


async def test_a_renewal_that_hangs_is_given_up_and_repeated() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api, **FOR_EVER) as manager:
        await manager.get_client("s")
        api.faults.add("patch", latency=math.inf, times=1)
        await asyncio.sleep(1000)
        assert renewals(api) == [900, 910], "the next try is due one second after the first began"


async def test_renewing_ends_with_the_session() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api, **FOR_EVER) as manager:
        await manager.get_client("a")
        await manager.get_client("b")
        await asyncio.sleep(500)
        await manager.on_session_closed("a")
        await asyncio.sleep(1000)
        assert renewals(api) == [900]
        assert renewals(api, of=manager.sandbox_name("b")) == [900]


async def test_a_renewal_under_way_when_its_session_closes_is_the_last() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api, **FOR_EVER) as manager:
        await manager.get_client("s")
        with api.faults.add("patch", hold=True) as gate:
            await gate.reached(timeout=1000)
            await manager.on_session_closed("s")
        await asyncio.sleep(3000)
        assert renewals(api) == [900]
        assert manager.stats().lost == 0


async def test_a_sandbox_that_comes_while_the_renewer_sleeps_is_renewed_in_time() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api, **FOR_EVER) as manager:
        await manager.on_session_closed("nobody")  # Starts it, with nothing to renew.
        await asyncio.sleep(5000)
        await manager.get_client("a")
        await asyncio.sleep(100)
        await manager.get_client("b")
        await asyncio.sleep(850)
        assert renewals(api) == [5900]
        await asyncio.sleep(100)
        assert renewals(api) == [5900, 6000]


async def test_ten_are_renewed_at_a_time() -> None:
    async with (
        LoopTimeApi(auto_ready=True) as api,
        managed(api, max_sessions=25, **FOR_EVER) as manager,
    ):
        await asyncio.gather(*(manager.get_client(f"s{i}") for i in range(25)))
        api.faults.add("patch", latency=2.0)
        await asyncio.sleep(950)
        assert renewals(api) == [900] * 10 + [902] * 10 + [904] * 5


async def test_who_may_not_patch_runs_without_leases_and_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api, **FOR_EVER) as manager:
        api.forbid("patch")
        for i in range(3):
            await manager.get_client(f"s{i}")
        await asyncio.sleep(1000)
        await manager.get_client("later")
        assert [lease_of(o) for o in api.objects] == [None] * 4
        assert [r.name for r in api.requests if r.verb == "patch"] == [PROBE, PROBE]
        [record] = [r for r in caplog.records if "leases_off" in r.message]
        assert 'verbs ["patch"]' in record.message


async def test_leases_come_on_once_patching_is_allowed() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api, **FOR_EVER) as manager:
        api.forbid("patch")
        await manager.get_client("a")
        api.allow()
        await manager.get_client("b")
        await asyncio.sleep(301)
        await manager.get_client("c")
        leases = {name(o): lease_of(o) for o in api.objects}
        assert [leases[manager.sandbox_name(s)] for s in "abc"] == [None, None, lease_time(now(), 1800)]
        await asyncio.sleep(950)
        assert renewals(api) == [now() - 50]


async def test_once_patching_has_been_allowed_leases_stay_on() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api, **FOR_EVER) as manager:
        await manager.get_client("a")
        api.forbid("patch")
        await manager.get_client("b")
        await asyncio.sleep(1000)
        api.allow()
        await asyncio.sleep(100)
        assert all(lease_of(o) and str(lease_of(o)) > lease_time(now(), 900) for o in api.objects)


async def test_an_api_that_cannot_patch_gets_no_leases() -> None:
    api = PlainApi()
    async with managed(api, **FOR_EVER) as manager:
        await manager.get_client("s")
        [sandbox] = api.objects.values()
        assert lease_of(sandbox) is None


async def test_leases_can_be_turned_off() -> None:
    async with (
        LoopTimeApi(auto_ready=True) as api,
        managed(api, lease_duration=None, **FOR_EVER) as manager,
    ):
        await manager.get_client("s")
        await asyncio.sleep(5000)
        assert api.count("patch") == 0
        assert lease_of(api.objects[0]) is None


async def test_a_probe_that_fails_for_a_while_is_repeated_within_the_deadline() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api, ready_timeout=20.0) as manager:
        fault = api.faults.add("patch", error=503)
        asyncio.get_running_loop().call_later(10, fault.remove)
        await manager.get_client("s")
        assert 10 <= now() <= 15
        assert lease_of(api.objects[0])


async def test_a_probe_without_an_answer_creates_nothing() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api, ready_timeout=20.0) as manager:
        api.faults.add("patch", error=503)
        with pytest.raises(SandboxUnavailableError):
            await manager.get_client("s")
        assert now() <= 20
        assert api.count("create") == 0


async def test_the_lease_of_somebody_elses_sandbox_is_not_renewed() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api, **FOR_EVER) as manager:
        await manager.get_client("s")
        await asyncio.sleep(890)
        [ours] = api.objects
        api.silence_watches()
        api.delete_now(name(ours))
        body = {**ours, "metadata": {k: ours["metadata"][k] for k in ("name", "namespace", "labels")}}
        await api.create_namespaced_custom_object(GROUP, "v1beta1", "prodisco", PLURAL, body)
        await asyncio.sleep(11)
        assert manager.stats().lost == 1
        assert lease_of(api.objects[0]) == lease_of(ours)
        assert len(renewals(api)) == 1
        await asyncio.sleep(60)
        assert len(renewals(api)) == 1


async def test_a_renewal_notices_that_its_sandbox_is_gone() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api, **FOR_EVER) as manager:
        await manager.get_client("s")
        await asyncio.sleep(890)
        api.silence_watches()
        api.delete_now(manager.sandbox_name("s"))
        await asyncio.sleep(11)
        assert manager.stats().lost == 1
        assert api.count("delete") == 0


@pytest.mark.parametrize("error", [404, 409])
async def test_a_renewal_that_is_refused_without_cause_is_not_the_last(error: int) -> None:
    # Under contention a patch may end in 409, and a server that starts answers anything.
    async with LoopTimeApi(auto_ready=True) as api, managed(api, **FOR_EVER) as manager:
        client = await manager.get_client("s")
        api.faults.add("patch", error=error, times=1)
        await asyncio.sleep(950)
        assert renewals(api) == [900, 901]
        assert await manager.get_client("s") is client
        await asyncio.sleep(900)
        assert renewals(api) == [900, 901, 1801]


async def test_a_failed_probe_that_nobody_waited_for_is_forgotten() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        with api.faults.add("patch", error=422, hold=True) as gate:
            waiting = asyncio.create_task(manager.get_client("s"))
            await gate.reached()
            await manager.on_session_closed("s")
            gate.release()
            await settle()
        assert (await asyncio.gather(waiting, return_exceptions=True))[0] is not None
        await manager.get_client("s")


async def test_the_lease_of_a_create_that_is_repeated_runs_from_the_last_try() -> None:
    async with (
        LoopTimeApi(auto_ready=True) as api,
        managed(api, lease_duration=60.0) as manager,
    ):
        api.faults.add("create", error=api_error(429, retry_after=40), times=2)
        await manager.get_client("s")
        leases = [r.body["spec"]["shutdownTime"] for r in api.requests if r.verb == "create"]
        assert leases == [lease_time(at, 60) for at in (0, 40, 80)]


async def test_a_probe_that_meets_a_conflict_was_allowed() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        api.faults.add("patch", error=409, name=PROBE, times=1)
        await manager.get_client("s")
        assert api.objects[0]["spec"]["shutdownTime"] == lease_time(0, 1800)


async def test_after_a_success_a_failure_is_repeated_soon_again() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api, **FOR_EVER) as manager:
        await manager.get_client("s")
        api.faults.add("patch", error=503, times=3)
        await asyncio.sleep(1000)
        assert renewals(api) == [900, 901, 903, 907]
        api.faults.add("patch", error=503, times=1)
        await asyncio.sleep(900)
        assert renewals(api)[4:] == [1807, 1808]


async def test_the_next_renewal_is_due_half_the_time_after_the_last_began() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api, **FOR_EVER) as manager:
        await manager.get_client("s")
        api.faults.add("patch", latency=5.0)
        await asyncio.sleep(2750)
        assert renewals(api) == [900, 1800, 2700]


async def test_a_session_that_ends_before_its_turn_is_not_renewed() -> None:
    async with (
        LoopTimeApi(auto_ready=True) as api,
        managed(api, max_sessions=11, **FOR_EVER) as manager,
    ):
        for i in range(11):
            await manager.get_client(f"s{i}")
        last = manager.sandbox_name("s10")
        api.faults.add("patch", latency=2.0)
        await asyncio.sleep(901)
        await manager.on_session_closed("s10")
        await asyncio.sleep(10)
        assert (len(renewals(api)), renewals(api, of=last)) == (10, [])


async def test_nothing_is_kept_of_a_session_whose_renewal_failed() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api, **FOR_EVER) as manager:
        await manager.get_client("s")
        api.faults.add("patch", error=503)
        await asyncio.sleep(905)
        await manager.on_session_closed("s")
        # What is kept in memory shows nowhere else.
        assert manager._engine is not None
        leases = manager._engine.parts.leases
        assert isinstance(leases, Leases)
        assert (leases._due, leases._failures) == ({}, {})
