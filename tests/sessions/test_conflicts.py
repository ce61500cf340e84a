"""A name that is taken: adoption after a restart, incarnations, and Sandboxes of others."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from prodisco_sandbox import (
    SandboxConflictError,
    SandboxError,
    SandboxFailedError,
    SandboxRef,
    SandboxUnavailableError,
)
from prodisco_sandbox._cluster.manifest import GROUP, PLURAL, SANDBOX
from prodisco_sandbox._cluster.metadata import LABEL_INSTANCE, LABEL_SESSION, instance, lease_time, name, uid
from prodisco_sandbox.testing import FakeCustomObjectsApi, api_error
from tests.support.managers import (
    Clients,
    LoopTimeApi,
    PlainApi,
    StubClient,
    alive,
    conditions,
    left_behind,
    managed,
    now,
    settle,
    uids,
)

pytestmark = pytest.mark.looptime


async def create_as_others(api: FakeCustomObjectsApi, taken: str, **labels: str) -> None:
    spec = {"podTemplate": {"spec": {"containers": [{"name": "c", "image": "i"}]}}}
    metadata = {"name": taken, "labels": labels}
    body = {"apiVersion": f"{GROUP}/v1beta1", "kind": "Sandbox", "metadata": metadata, "spec": spec}
    await api.create_namespaced_custom_object(GROUP, "v1beta1", "prodisco", PLURAL, body)


# Adoption


@pytest.mark.parametrize("before", ["me", "another", None])
async def test_the_sandbox_of_an_earlier_process_is_adopted(before: str | None) -> None:
    async with LoopTimeApi() as api:
        async with managed(api) as manager:
            left = await left_behind(api, "s", instance=before)
            client = await manager.get_client("s")
            assert client.sandbox == SandboxRef(name(left), left["metadata"]["uid"], 0)
            assert instance(api.objects[0]) == "me"
            assert (api.count("create"), api.count("patch")) == (1, 2), "theirs; a probe, and the claim"
            assert manager.stats().created == 0
        assert api.objects == [], "it is the manager's own now"


async def test_an_adoption_claims_under_the_version_it_has_seen_and_sets_the_lease() -> None:
    async with LoopTimeApi() as api, managed(api, session_idle_timeout=1e6) as manager:
        await asyncio.sleep(50)
        left = await left_behind(api, "s", instance="another", lease=60)
        await manager.get_client("s")
        [claim] = [r for r in api.requests if r.verb == "patch" and r.name == name(left)]
        assert claim.body["metadata"] == {
            "uid": left["metadata"]["uid"],
            "resourceVersion": left["metadata"]["resourceVersion"],
            "labels": {LABEL_INSTANCE: "me"},
        }
        assert api.objects[0]["spec"]["shutdownTime"] == lease_time(50, 1800)
        assert api.objects[0]["spec"]["shutdownPolicy"] == "Delete"
        await asyncio.sleep(910)
        assert api.objects[0]["spec"]["shutdownTime"] == lease_time(950, 1800)


async def test_an_adopted_lease_that_nobody_would_renew_is_taken_away() -> None:
    async with LoopTimeApi() as api, managed(api, lease_duration=None) as manager:
        await left_behind(api, "s", lease=60)
        await manager.get_client("s")
        assert "shutdownTime" not in api.objects[0]["spec"]


async def test_an_adopted_sandbox_that_is_not_ready_is_waited_for() -> None:
    async with LoopTimeApi() as api, managed(api, ready_poll_interval=30.0) as manager:
        left = await left_behind(api, "s", instance="another", ready=False)
        waiting = asyncio.create_task(manager.get_client("s"))
        await asyncio.sleep(7)
        api.set_ready(name(left))
        await waiting
        assert now() == pytest.approx(7.0, abs=1e-3), "the watch sees what has been claimed"


async def test_what_will_never_be_ready_is_deleted_and_made_again_instead() -> None:
    def the_second(sandbox: dict[str, Any]) -> bool:
        return api.count("create") > 1

    async with LoopTimeApi(auto_ready=the_second) as api, managed(api) as manager:
        left = await left_behind(api, "s", ready=False)
        api.set_status(name(left), conditions("PodFailed"))
        client = await manager.get_client("s")
        assert client.sandbox is not None
        assert client.sandbox.uid != left["metadata"]["uid"]
        assert uids(api) == {client.sandbox.uid}
        assert manager.stats().created == 1


async def test_a_live_sandbox_of_a_later_incarnation_is_found_by_its_label() -> None:
    async with LoopTimeApi() as api:
        async with managed(api) as manager:
            api.linger_deletes = True
            await left_behind(api, "s")
            await api.delete_namespaced_custom_object(GROUP, "v1beta1", "prodisco", PLURAL, SANDBOX.name("s"))
            live = await left_behind(api, "s", incarnation=2)
            client = await manager.get_client("s")
            assert client.sandbox == SandboxRef(SANDBOX.name("s", 2), live["metadata"]["uid"], 2)
            assert manager.sandbox_name("s") == SANDBOX.name("s", 2)
            api.finish_deletes()
        assert api.objects == []


async def test_of_several_the_newest_is_adopted() -> None:
    clock = 1000.0
    async with LoopTimeApi(now=lambda: clock) as api, managed(api) as manager:
        await left_behind(api, "s")
        clock = 2000.0
        newest = await left_behind(api, "s", incarnation=1)
        clock = 1500.0
        await left_behind(api, "s", incarnation=2)
        client = await manager.get_client("s")
        assert client.sandbox is not None
        assert client.sandbox.uid == newest["metadata"]["uid"]


async def test_a_sandbox_that_changes_while_it_is_adopted_is_looked_at_again() -> None:
    async with LoopTimeApi() as api, managed(api) as manager:
        left = await left_behind(api, "s", instance="another")
        with api.faults.add("patch", hold=True, name=name(left), times=1) as gate:
            waiting = asyncio.create_task(manager.get_client("s"))
            await gate.reached()
            api.set_condition(name(left), "Ready", "True", message="changed")
        client = await waiting
        assert client.sandbox is not None
        assert client.sandbox.uid == left["metadata"]["uid"]
        assert api.count("patch", name(left)) == 2


async def test_a_sandbox_that_vanishes_while_it_is_adopted_is_made_anew() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        left = await left_behind(api, "s", instance="another")
        with api.faults.add("patch", hold=True, name=name(left), times=1) as gate:
            waiting = asyncio.create_task(manager.get_client("s"))
            await gate.reached()
            api.delete_now(name(left))
        client = await waiting
        assert client.sandbox is not None
        assert uids(api) == {client.sandbox.uid}
        assert client.sandbox.uid != left["metadata"]["uid"]


async def test_the_last_claimer_wins_and_the_loser_deletes_nothing() -> None:
    async with LoopTimeApi(auto_ready=True) as api:
        async with managed(api, instance_id="first") as first, managed(api, instance_id="second") as second:
            before = await first.get_client("s")
            after = await second.get_client("s")
            assert after.sandbox == before.sandbox
            await settle()
            assert first.stats().lost == 1
            assert first.stats().ready == 0
            assert api.count("delete") == 0
            assert await second.get_client("s") is after
            await first.on_session_closed("s")
            assert len(alive(api)) == 1
        assert api.objects == []


async def test_the_loser_may_claim_it_back() -> None:
    async with (
        LoopTimeApi(auto_ready=True) as api,
        managed(api, instance_id="first") as first,
        managed(api, instance_id="second") as second,
    ):
        before = await first.get_client("s")
        await second.get_client("s")
        await settle()
        again = await first.get_client("s")
        assert again is not before
        assert again.sandbox == before.sandbox
        await settle()
        assert (first.stats().ready, second.stats().ready) == (1, 0)
        assert len(alive(api)) == 1


async def test_a_loser_that_only_polls_checks_the_label_before_it_deletes() -> None:
    async with LoopTimeApi(auto_ready=True) as api:
        api.faults.add("watch", error=405)
        async with managed(api, instance_id="first") as first, managed(api, instance_id="second") as second:
            await first.get_client("s")
            client = await second.get_client("s")
            await first.on_session_closed("s")
            assert api.count("delete") == 0
            assert await second.get_client("s") is client
        assert api.objects == []


async def test_a_loser_that_only_polls_notices_at_the_reapers_tick() -> None:
    async with LoopTimeApi(auto_ready=True) as api:
        api.faults.add("watch", error=405)
        async with managed(api, instance_id="first") as first, managed(api, instance_id="second") as second:
            await first.get_client("s")
            await second.get_client("s")
            await asyncio.sleep(61)
            assert (first.stats().lost, second.stats().lost) == (1, 0)
            assert len(alive(api)) == 1


async def test_who_may_not_patch_adopts_without_a_claim(caplog: pytest.LogCaptureFixture) -> None:
    async with LoopTimeApi() as api:
        api.forbid("patch")
        async with managed(api, ready_timeout=20.0) as manager:
            left = await left_behind(api, "s", instance="another", ready=False)
            asyncio.get_running_loop().call_later(5.5, api.set_ready, name(left))
            client = await manager.get_client("s")
            assert now() == pytest.approx(6.0, abs=1e-3), "its watch does not see it: it is read every second"
            assert client.sandbox is not None
            assert client.sandbox.uid == left["metadata"]["uid"]
            assert instance(api.objects[0]) == "another"
            assert any("sandbox_not_claimed" in r.message for r in caplog.records)
            await asyncio.sleep(30)
            reads = api.count("get")
            api.cut_watches(api_error(410))
            await asyncio.sleep(5)
            assert api.count("list") > 2
            assert await manager.get_client("s") is client
            assert api.count("get") == reads, "its absence from the list means nothing"
            await manager.on_session_closed("s")
        assert api.objects == []


async def test_a_claim_whose_answer_is_lost_is_made_again() -> None:
    async with LoopTimeApi() as api, managed(api) as manager:
        left = await left_behind(api, "s", instance="another")
        api.faults.add("patch", lost=True, name=name(left), times=2)
        client = await manager.get_client("s")
        assert client.sandbox is not None
        assert client.sandbox.uid == left["metadata"]["uid"]
        assert 0.1 < now() < 0.4, "with a pause each time"


async def test_an_adoption_that_fails_does_not_delete_what_was_not_claimed() -> None:
    async with LoopTimeApi() as api, managed(api, ready_timeout=20.0) as manager:
        left = await left_behind(api, "s", instance="another")
        fault = api.faults.add("patch", error=503, name=name(left))
        with pytest.raises(SandboxUnavailableError):
            await manager.get_client("s")
        assert now() <= 20
        await asyncio.sleep(30)
        assert (alive(api), api.count("delete"), manager.stats().closing) == ([name(left)], 0, 0)
        fault.remove()
        client = await manager.get_client("s")
        assert client.sandbox is not None
        assert client.sandbox.uid == left["metadata"]["uid"]


async def test_closing_while_the_claim_is_on_its_way_deletes_what_it_claims() -> None:
    async with LoopTimeApi() as api:
        for lost in (False, True):
            async with managed(api) as manager:
                left = await left_behind(api, "s", instance="another")
                with api.faults.add("patch", hold=True, lost=lost, name=name(left), times=1) as gate:
                    waiting = asyncio.create_task(manager.get_client("s"))
                    await gate.reached()
                    closing = asyncio.create_task(manager.on_session_closed("s"))
                    with pytest.raises(SandboxError, match="closed"):
                        await waiting
                    await settle()
                    assert not closing.done()
                await closing
                assert api.objects == []


# Incarnations


async def test_a_name_that_is_still_being_deleted_is_left_for_the_next() -> None:
    async with LoopTimeApi(auto_ready=True) as api:
        async with managed(api, max_sessions=1) as manager:
            api.linger_deletes = True
            refs = []
            for incarnation in range(3):
                client = await manager.get_client("s")
                refs.append(client.sandbox)
                assert client.sandbox is not None
                assert client.sandbox.incarnation == incarnation
                assert manager.sandbox_name("s") == SANDBOX.name("s", incarnation)
                await manager.on_session_closed("s")
            assert now() == pytest.approx(0.0, abs=1e-3), "no waiting, and the slot is free"
            assert len(set(refs)) == 3
            assert alive(api) == []
            assert manager.sandbox_name("s") == SANDBOX.name("s", 3), "their pods may not be gone yet"
            api.finish_deletes()
            await asyncio.sleep(10)
            assert manager.sandbox_name("s") == SANDBOX.name("s")
            client = await manager.get_client("s")
            assert client.sandbox is not None
            assert client.sandbox.incarnation == 0
        assert api.objects == []


async def test_a_name_that_becomes_free_meanwhile_is_used() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        api.linger_deletes = True
        await left_behind(api, "s")
        await api.delete_namespaced_custom_object(GROUP, "v1beta1", "prodisco", PLURAL, SANDBOX.name("s"))
        with api.faults.add("get", hold=True, times=1) as gate:
            waiting = asyncio.create_task(manager.get_client("s"))
            await gate.reached()
            api.finish_deletes()
        client = await waiting
        assert client.sandbox is not None
        assert client.sandbox.incarnation == 0


# Others


@pytest.mark.parametrize("labels", [{}, {LABEL_SESSION: "0" * 40}, {LABEL_INSTANCE: "me"}])
async def test_a_name_that_is_taken_by_others_is_a_conflict_and_theirs_is_left_alone(
    labels: dict[str, str],
) -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api, max_sessions=1) as manager:
        await create_as_others(api, SANDBOX.name("s"), **labels)
        [theirs] = api.objects
        with pytest.raises(SandboxConflictError, match="taken by a Sandbox that is not this session's") as e:
            await manager.get_client("s")
        assert e.value.status == 409
        assert e.value.__cause__ is not None
        await settle()
        assert api.count("delete") == api.count("patch", SANDBOX.name("s")) == 0
        assert uid(api.objects[0]) == uid(theirs)
        await manager.get_client("t")  # The slot is free.


async def test_a_create_without_an_answer_does_not_take_what_others_have_there() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        labels = {LABEL_INSTANCE: "me", LABEL_SESSION: "0" * 40}
        await create_as_others(api, SANDBOX.name("s"), **labels)
        api.faults.add("create", error=503, times=1)
        with pytest.raises(SandboxConflictError):
            await manager.get_client("s")
        await settle()
        assert (len(api.objects), api.count("delete"), manager.stats().closing) == (1, 0, 0)


async def test_closing_a_create_without_an_answer_does_not_delete_what_others_have_there() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        labels = {LABEL_INSTANCE: "me", LABEL_SESSION: "0" * 40}
        await create_as_others(api, SANDBOX.name("s"), **labels)
        with api.faults.add("create", error=503, hold=True) as gate:
            waiting = asyncio.create_task(manager.get_client("s"))
            await gate.reached()
            closing = asyncio.create_task(manager.on_session_closed("s"))
            await settle()
        await closing
        await asyncio.gather(waiting, return_exceptions=True)
        assert (len(api.objects), api.count("delete"), manager.stats().closing) == (1, 0, 0)


async def test_the_live_sandbox_of_another_session_is_never_adopted() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        other = await manager.get_client("other")
        await create_as_others(api, SANDBOX.name("s"))
        with pytest.raises(SandboxConflictError):
            await manager.get_client("s")
        assert await manager.get_client("other") is other
        assert len(api.objects) == 2


async def test_a_name_that_is_always_taken_and_never_there_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("prodisco_sandbox._sessions.obtain.INCARNATIONS", 5)
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        api.faults.add("create", error=api_error(409, "already exists", reason="AlreadyExists"))
        with pytest.raises(SandboxConflictError, match=r"no free name .* after 5 tries"):
            await manager.get_client("s")
        assert api.count("create") == 5


async def test_a_plain_fake_is_adopted_from_too() -> None:
    api = PlainApi()
    async with managed(api) as first:
        await first.get_client("s")
        async with managed(api) as second:
            await second.get_client("s")
            assert api.calls.count("create") == 1
            assert len(api.objects) == 1
    assert api.objects == {}


async def test_a_sandbox_that_is_claimed_while_it_is_made_fails_its_creation() -> None:
    async with (
        LoopTimeApi() as api,
        managed(api, instance_id="first") as first,
        managed(api, instance_id="second") as second,
    ):
        losing = asyncio.create_task(first.get_client("s"))
        await api.until(lambda: api.objects)
        winning = asyncio.create_task(second.get_client("s"))
        with pytest.raises(SandboxFailedError, match="claimed by another manager"):
            await losing
        api.set_ready(SANDBOX.name("s"))
        await winning
        assert api.count("delete") == 0


# A manager that loses its Sandbox to another while it closes the session


class Slow(StubClient):
    """Takes three seconds to close."""

    async def close(self) -> None:
        await asyncio.sleep(3)
        self.closed = True


def by_a(request: Any) -> bool:
    """Whether it is the list, or the watch, of manager a."""
    return "instance=a" in str(request.options.get("label_selector"))


async def test_a_delete_that_is_repeated_spares_what_another_manager_claimed() -> None:
    async with (
        LoopTimeApi(auto_ready=True) as api,
        managed(api, instance_id="a") as a,
        managed(api, instance_id="b") as b,
    ):
        await a.get_client("s")
        api.faults.add("delete", error=503, times=2)
        await a.on_session_closed("s")
        client = await b.get_client("s")
        await asyncio.sleep(30)
        assert alive(api) == [b.sandbox_name("s")]
        assert await b.get_client("s") is client


async def test_a_sandbox_claimed_while_its_client_is_closed_is_spared() -> None:
    async with (
        LoopTimeApi(auto_ready=True) as api,
        managed(api, Clients(Slow), instance_id="a") as a,
        managed(api, instance_id="b") as b,
    ):
        await a.get_client("s")
        closing = asyncio.create_task(a.on_session_closed("s"))
        await asyncio.sleep(1)
        client = await b.get_client("s")
        await closing
        assert alive(api) == [b.sandbox_name("s")]
        assert await b.get_client("s") is client


async def test_a_sandbox_claimed_while_the_watch_is_broken_is_not_deleted() -> None:
    async with (
        LoopTimeApi(auto_ready=True) as api,
        managed(api, instance_id="a") as a,
        managed(api, instance_id="b") as b,
    ):
        await a.get_client("s")
        await asyncio.sleep(1)
        api.cut_watches(ConnectionResetError("reset"))
        api.faults.add("watch", error=503)
        api.faults.add("list", error=503, when=by_a)
        await asyncio.sleep(5)
        await b.get_client("s")
        await asyncio.sleep(60)
        await a.on_session_closed("s")
        assert alive(api) == [b.sandbox_name("s")]


async def test_a_sandbox_of_the_session_that_appears_between_list_and_get_is_no_conflict() -> None:
    async with (
        LoopTimeApi(auto_ready=True) as api,
        managed(api, instance_id="a") as a,
        managed(api, instance_id="b") as b,
    ):
        api.linger_deletes = True
        await a.get_client("s")
        await a.on_session_closed("s")
        api.linger_deletes = False
        await asyncio.sleep(10)  # Then it would use the name again.

        def by_session(request: Any) -> bool:
            return "session" in str(request.options.get("label_selector"))

        with api.faults.add("list", hold=True, after=True, when=by_session) as gate:
            waiting = asyncio.create_task(b.get_client("s"))
            await gate.reached()
            api.finish_deletes()
            theirs = await a.get_client("s")
        client = await waiting
        assert client.sandbox is not None
        assert theirs.sandbox is not None
        assert client.sandbox.uid == theirs.sandbox.uid


async def test_a_create_without_an_answer_claims_what_another_manager_has_there() -> None:
    async with (
        LoopTimeApi(auto_ready=True) as api,
        managed(api, instance_id="first") as first,
        managed(api, instance_id="second") as second,
    ):
        before = await first.get_client("s")
        api.faults.add("create", error=503, times=1)
        after = await second.get_client("s")
        assert after.sandbox == before.sandbox
        assert instance(api.objects[0]) == "second"
        await settle()
        assert (first.stats().lost, second.stats().created) == (1, 0)


async def test_what_will_never_be_ready_is_deleted_by_its_uid() -> None:
    async with LoopTimeApi() as api, managed(api) as manager:
        left = await left_behind(api, "s", ready=False)
        api.set_status(name(left), conditions("PodFailed"))
        with api.faults.add("delete", hold=True, times=1) as gate:
            waiting = asyncio.create_task(manager.get_client("s"))
            await gate.reached()
            api.delete_now(name(left))
            await create_as_others(api, name(left))
        await api.until(lambda: len(api.objects) == 2)
        assert set(alive(api)) == {name(left), manager.sandbox_name("s")}, "theirs is left alone"
        api.set_ready(manager.sandbox_name("s"))
        await waiting


async def test_what_is_ours_already_needs_no_claim_to_be_watched() -> None:
    async with LoopTimeApi() as api, managed(api) as manager:
        api.forbid("patch")
        left = await left_behind(api, "s", ready=False)
        asyncio.get_running_loop().call_later(5.5, api.set_ready, name(left))
        await manager.get_client("s")
        assert now() == pytest.approx(5.5, abs=1e-3)
        assert api.count("get") == 0


async def test_what_was_adopted_without_a_claim_is_deleted_by_who_only_polls_too() -> None:
    async with LoopTimeApi() as api, managed(api) as manager:
        api.forbid("patch", "watch")
        await left_behind(api, "s", instance="another")
        await manager.get_client("s")
        await manager.on_session_closed("s")
        assert api.objects == []


async def test_a_sandbox_claimed_before_the_first_list_is_not_deleted() -> None:
    async with (
        LoopTimeApi(auto_ready=True) as api,
        managed(api, instance_id="a") as a,
        managed(api, instance_id="b") as b,
    ):
        await left_behind(api, "s")

        api.faults.add("list", latency=5.0, times=1, when=by_a)
        await a.get_client("s")
        client = await b.get_client("s")
        assert now() < 5
        await a.on_session_closed("s")
        assert alive(api) == [b.sandbox_name("s")]
        assert await b.get_client("s") is client


async def test_a_sandbox_claimed_in_a_gap_of_the_watch_while_its_client_is_closed_is_spared() -> None:
    async with (
        LoopTimeApi(auto_ready=True) as api,
        managed(api, Clients(Slow), instance_id="a") as a,
        managed(api, instance_id="b") as b,
    ):
        await a.get_client("other")
        await a.get_client("s")
        await asyncio.sleep(1)
        closing = asyncio.create_task(a.on_session_closed("s"))
        await asyncio.sleep(0.1)

        gap = api.faults.add("watch", error=503, when=by_a)
        api.cut_watches()
        await asyncio.sleep(0.3)
        client = await b.get_client("s")
        api.compact()  # The watch lists anew, and then hears of something else.
        gap.remove()
        await asyncio.sleep(1.5)
        api.set_condition(a.sandbox_name("other"), "Extra", "True")
        await closing
        assert b.sandbox_name("s") in alive(api)
        assert await b.get_client("s") is client
