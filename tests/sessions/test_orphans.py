"""cleanup_orphaned_sandboxes: what it deletes, and above all what it does not."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from prodisco_sandbox import (
    SandboxConflictError,
    SandboxManagerClosedError,
    SandboxPermissionError,
    SandboxUnavailableError,
)
from prodisco_sandbox._cluster.manifest import GROUP, PLURAL, SANDBOX
from prodisco_sandbox._cluster.metadata import name
from prodisco_sandbox.testing import FakeCustomObjectsApi, Request, api_error
from tests.support.managers import LoopTimeApi, PlainApi, alive, left_behind, managed, now, settle

pytestmark = pytest.mark.looptime


async def test_managers_with_another_value_of_managed_by_see_nothing_of_each_other() -> None:
    async with LoopTimeApi(auto_ready=True) as api:
        async with managed(api, managed_by="ours") as ours, managed(api, instance_id="they") as theirs:
            await ours.get_client("a")
            await theirs.get_client("b")
            assert await theirs.cleanup_orphaned_sandboxes(all_instances=True) == 0
            assert await ours.cleanup_orphaned_sandboxes(all_instances=True) == 0
            assert len(alive(api)) == 2
            with pytest.raises(SandboxConflictError):
                await theirs.get_client("a")
        assert api.objects == []


async def test_managed_by_goes_with_every_selector_and_recognises_its_own() -> None:
    async with LoopTimeApi(auto_ready=True) as api:
        async with (
            managed(api, managed_by="ours") as first,
            managed(api, instance_id="two", managed_by="ours") as second,
        ):
            api.faults.add("create", lost=True, times=1)
            await first.get_client("s")  # found by a get
            await second.get_client("s")  # adopted
            await second.cleanup_orphaned_sandboxes()
            api.cut_watches(api_error(410))
            await settle()
            assert len(api.objects) == 1
        assert api.objects == []
        selectors = {
            r.options["label_selector"].split(",")[0] for r in api.requests if "label_selector" in r.options
        }
        assert selectors == {"prodisco.dev/managed-by=ours"}


async def test_what_an_earlier_life_of_this_manager_left_is_deleted() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        await left_behind(api, "a", lease=3600)
        await left_behind(api, "b", ready=False)
        await manager.get_client("mine")
        assert await manager.cleanup_orphaned_sandboxes() == 2
        assert alive(api) == [manager.sandbox_name("mine")]
        assert await manager.cleanup_orphaned_sandboxes() == 0


async def test_siblings_that_live_are_spared_and_those_whose_lease_has_lapsed_are_not() -> None:
    # The original deleted the live Sandboxes of a sibling server.
    async with LoopTimeApi() as api, managed(api) as manager:
        await left_behind(api, "live", instance="sibling", lease=now() + 60)
        await left_behind(api, "without a lease", instance="sibling")
        await left_behind(api, "lapsed", instance="sibling", lease=now() - 60)
        assert await manager.cleanup_orphaned_sandboxes() == 1
        assert set(alive(api)) == {SANDBOX.name("live"), SANDBOX.name("without a lease")}
        await asyncio.sleep(62)
        assert await manager.cleanup_orphaned_sandboxes() == 1
        assert alive(api) == [SANDBOX.name("without a lease")]


async def test_all_instances_spares_only_what_is_in_the_table() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        await left_behind(api, "live", instance="sibling", lease=now() + 60)
        await left_behind(api, "unlabelled", instance=None)
        body = {
            "apiVersion": f"{GROUP}/v1beta1",
            "kind": "Sandbox",
            "metadata": {"name": "somebody-elses"},
            "spec": {"podTemplate": {"spec": {"containers": [{"name": "c", "image": "i"}]}}},
        }
        await api.create_namespaced_custom_object(GROUP, "v1beta1", "prodisco", PLURAL, body)
        await manager.get_client("mine")
        assert await manager.cleanup_orphaned_sandboxes(all_instances=True) == 2
        assert set(alive(api)) == {manager.sandbox_name("mine"), "somebody-elses"}


async def test_sessions_in_any_state_are_spared() -> None:
    async with (
        LoopTimeApi(auto_ready=lambda o: name(o) != SANDBOX.name("creating")) as api,
        managed(api) as manager,
    ):
        ready = await manager.get_client("ready")
        creating = asyncio.create_task(manager.get_client("creating"))
        await manager.get_client("closing")
        with api.faults.add("delete", hold=True) as gate:
            closing = asyncio.create_task(manager.on_session_closed("closing"))
            await gate.reached()
            assert await manager.cleanup_orphaned_sandboxes(all_instances=True) == 0
            assert api.count("delete") == 1
        await closing
        assert await manager.get_client("ready") is ready
        assert len(alive(api)) == 2
        await manager.on_session_closed("creating")
        await asyncio.gather(creating, return_exceptions=True)


async def test_what_is_being_deleted_already_is_not_counted() -> None:
    async with LoopTimeApi() as api, managed(api) as manager:
        api.linger_deletes = True
        await left_behind(api, "a")
        assert await manager.cleanup_orphaned_sandboxes() == 1
        assert await manager.cleanup_orphaned_sandboxes() == 0
        assert api.count("delete") == 1
        api.finish_deletes()


async def test_a_session_that_is_created_during_the_clean_up_is_spared() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        with api.faults.add("list", hold=True, times=1) as gate:
            cleaning = asyncio.create_task(manager.cleanup_orphaned_sandboxes(all_instances=True))
            await gate.reached()
            client = await manager.get_client("s")
        assert await cleaning == 0
        assert await manager.get_client("s") is client
        assert len(alive(api)) == 1


async def test_an_orphan_that_a_session_adopts_during_the_clean_up_is_spared() -> None:
    async with LoopTimeApi() as api, managed(api) as manager:
        orphan = await left_behind(api, "s")
        with api.faults.add("list", hold=True, after=True, times=1) as gate:
            cleaning = asyncio.create_task(manager.cleanup_orphaned_sandboxes())
            await gate.reached()
            client = await manager.get_client("s")
        assert await cleaning == 0
        assert client.sandbox is not None
        assert client.sandbox.uid == orphan["metadata"]["uid"]
        assert await manager.get_client("s") is client


async def test_an_orphan_that_a_session_adopts_while_its_delete_is_on_its_way_is_spared() -> None:
    async with LoopTimeApi() as api, managed(api) as manager:
        await left_behind(api, "s")
        with api.faults.add("delete", hold=True, times=1) as gate:
            cleaning = asyncio.create_task(manager.cleanup_orphaned_sandboxes())
            await gate.reached()
            client = await manager.get_client("s")
        assert await cleaning == 0
        await settle()
        assert await manager.get_client("s") is client
        assert manager.stats().lost == 0


async def test_a_lease_that_is_renewed_during_the_clean_up_saves_its_sandbox() -> None:
    async with LoopTimeApi() as api, managed(api) as manager:
        lapsed = await left_behind(api, "s", instance="sibling", lease=now() - 60)
        with api.faults.add("list", hold=True, after=True, times=1) as gate:
            cleaning = asyncio.create_task(manager.cleanup_orphaned_sandboxes())
            await gate.reached()
            await api.patch_namespaced_custom_object(
                GROUP, "v1beta1", "prodisco", PLURAL, name(lapsed),
                {"spec": {"shutdownTime": "2100-01-01T00:00:00Z"}},
                _content_type="application/merge-patch+json",
            )  # fmt: skip
        assert await cleaning == 0
        assert len(alive(api)) == 1


async def test_an_orphan_whose_status_changes_meanwhile_is_deleted_all_the_same() -> None:
    async with LoopTimeApi() as api, managed(api) as manager:
        orphan = await left_behind(api, "s")
        with api.faults.add("list", hold=True, after=True, times=1) as gate:
            cleaning = asyncio.create_task(manager.cleanup_orphaned_sandboxes())
            await gate.reached()
            api.set_condition(name(orphan), "Ready", "False")
        assert await cleaning == 1
        assert api.objects == []


async def test_lists_are_read_page_by_page() -> None:
    async with LoopTimeApi() as api, managed(api) as manager:
        for i in range(7):
            await left_behind(api, f"s{i}", ready=False)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("prodisco_sandbox._cluster.requests.PAGE", 3)
            assert await manager.cleanup_orphaned_sandboxes() == 7
        assert api.count("list") == 3
        assert api.objects == []
        assert await manager.cleanup_orphaned_sandboxes() == 0
        assert [r.options["limit"] for r in api.requests if r.verb == "list"] == [3, 3, 3, 500]


def expire_once(api: FakeCustomObjectsApi) -> Any:
    """Lets the continue token of the second page expire while it is on its way."""

    def expire(request: Request) -> float:
        api.set_condition(SANDBOX.name("s0"), "Ready", "False")
        api.compact()
        return 0.0

    return api.faults.add("list", latency=expire, when=lambda r: "_continue" in r.options, times=1)


async def test_a_continue_token_that_expires_begins_the_list_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prodisco_sandbox._cluster.requests.PAGE", 2)
    async with LoopTimeApi() as api, managed(api) as manager:
        for i in range(5):
            await left_behind(api, f"s{i}", ready=False)
        expire_once(api)
        assert await manager.cleanup_orphaned_sandboxes() == 5
        assert api.count("list") == 2 + 3


async def test_a_list_that_never_comes_to_its_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prodisco_sandbox._cluster.requests.PAGE", 2)
    async with LoopTimeApi() as api, managed(api) as manager:
        for i in range(3):
            await left_behind(api, f"s{i}", ready=False)
        api.faults.add("list", error=410, when=lambda r: "_continue" in r.options)
        with pytest.raises(SandboxUnavailableError, match="too old"):
            await manager.cleanup_orphaned_sandboxes()
        assert (api.count("list"), api.count("delete")) == (6, 0)


async def test_transient_errors_are_retried_until_ready_timeout() -> None:
    async with LoopTimeApi() as api, managed(api, ready_timeout=20.0) as manager:
        for i in range(3):
            await left_behind(api, f"s{i}", ready=False)
        api.faults.add("*", error=503, times=6)
        assert await manager.cleanup_orphaned_sandboxes() == 3
        await left_behind(api, "s4", ready=False)
        api.faults.add("delete", error=503)
        begun = now()
        with pytest.raises(SandboxUnavailableError):
            await manager.cleanup_orphaned_sandboxes()
        assert now() - begun <= 20.0
        api.faults.clear()
        assert await manager.cleanup_orphaned_sandboxes() == 1


async def test_a_clean_up_that_hangs_ends_all_the_same() -> None:
    async with LoopTimeApi() as api, managed(api, ready_timeout=15.0) as manager:
        for i in range(70):
            await left_behind(api, f"s{i}", ready=False)
        api.faults.add("delete", latency=float("inf"))
        with pytest.raises(SandboxUnavailableError):
            await manager.cleanup_orphaned_sandboxes()
        assert now() <= 15.0 + 10.0


async def test_missing_permissions_are_named_and_the_rest_is_deleted() -> None:
    async with LoopTimeApi() as api, managed(api) as manager:
        await left_behind(api, "a", ready=False)
        await left_behind(api, "b", ready=False)
        api.faults.add("delete", error=403, name=SANDBOX.name("a"))
        with pytest.raises(SandboxPermissionError, match=r'verbs \["delete"\]'):
            await manager.cleanup_orphaned_sandboxes()
        assert alive(api) == [SANDBOX.name("a")]
        api.forbid("list")
        await asyncio.sleep(0)
    async with LoopTimeApi() as api, managed(api) as manager:
        api.forbid("list")
        with pytest.raises(SandboxPermissionError, match=r'verbs \["list"\]'):
            await manager.cleanup_orphaned_sandboxes()


async def test_twenty_are_deleted_at_a_time() -> None:
    async with LoopTimeApi() as api, managed(api) as manager:
        for i in range(50):
            await left_behind(api, f"s{i}", ready=False)
        api.faults.add("delete", latency=1.0)
        assert await manager.cleanup_orphaned_sandboxes() == 50
        assert now() == pytest.approx(3.0, abs=1e-3)


async def test_the_end_of_a_session_does_not_wait_for_a_clean_up_that_hangs() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        await manager.get_client("mine")
        for i in range(30):
            await left_behind(api, f"s{i}", ready=False)
        mine = manager.sandbox_name("mine")
        with api.faults.add("delete", hold=True, when=lambda r: r.name != mine) as gate:
            cleaning = asyncio.create_task(manager.cleanup_orphaned_sandboxes())
            await gate.reached(20)
            await manager.on_session_closed("mine")
            assert now() == pytest.approx(0.0, abs=1e-3)
        assert await cleaning == 30


async def test_a_clean_up_that_is_cancelled_stops() -> None:
    async with LoopTimeApi() as api, managed(api) as manager:
        for i in range(30):
            await left_behind(api, f"s{i}", ready=False)
        with api.faults.add("delete", hold=True) as gate:
            cleaning = asyncio.create_task(manager.cleanup_orphaned_sandboxes())
            await gate.reached(20)
            cleaning.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cleaning
            await settle()
            assert gate.held == 0
        assert len(alive(api)) == 30
        assert await manager.cleanup_orphaned_sandboxes() == 30


async def test_shutdown_ends_a_clean_up() -> None:
    async with LoopTimeApi() as api:
        async with managed(api) as manager:
            await left_behind(api, "a")
            gate = api.faults.add("delete", hold=True)
            cleaning = asyncio.create_task(manager.cleanup_orphaned_sandboxes())
            await gate.reached()
        with pytest.raises(SandboxManagerClosedError):
            await cleaning
        with pytest.raises(SandboxManagerClosedError):
            await manager.cleanup_orphaned_sandboxes()


async def test_objects_without_uids_are_deleted_too() -> None:
    api = PlainApi()
    async with managed(api) as manager:
        await manager.get_client("s")
        [made] = api.objects.values()
        copy = {**made, "metadata": {**made["metadata"], "name": "left"}}
        api.objects["left"] = copy
        assert await manager.cleanup_orphaned_sandboxes() == 1
        assert list(api.objects) == [manager.sandbox_name("s")]
    assert api.objects == {}


async def test_an_orphan_that_changes_each_time_is_left() -> None:
    async with LoopTimeApi() as api, managed(api) as manager:
        await left_behind(api, "s")
        # Bounded, since a clean-up that goes on for ever would not let the test end either.
        api.faults.add("delete", error=409, times=10)
        assert await manager.cleanup_orphaned_sandboxes() == 0
        assert (len(alive(api)), api.count("delete")) == (1, 3)
