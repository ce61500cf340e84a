"""The one watch of a manager: what it hears, what breaks it, and how it comes back."""

from __future__ import annotations

import asyncio
import itertools
import math
from typing import Any

import aiohttp
import pytest

from prodisco_sandbox import SandboxFailedError
from prodisco_sandbox._cluster.manifest import GROUP, PLURAL, SANDBOX
from prodisco_sandbox._cluster.metadata import name
from prodisco_sandbox.testing import FakeCustomObjectsApi, Watch, api_error
from tests.support.counts import full
from tests.support.managers import LoopTimeApi, conditions, left_behind, managed, now, settle

pytestmark = pytest.mark.looptime

SLOW: dict[str, Any] = {"ready_poll_interval": 30.0}


@pytest.fixture(autouse=True)
def _no_jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("random.random", lambda: 1.0)


def times(api: FakeCustomObjectsApi, verb: str) -> list[float]:
    return [round(r.time, 3) for r in api.requests if r.verb == verb]


async def only_watch(api: FakeCustomObjectsApi) -> Watch:
    await api.until(lambda: api.watches)
    [watch] = api.watches
    return watch


# What it hears


async def test_readiness_is_heard_and_not_polled_for() -> None:
    async with LoopTimeApi(auto_ready=12.345) as api, managed(api, **SLOW) as manager:
        await manager.get_client("s")
        assert now() == pytest.approx(12.345, abs=1e-6)
        assert (api.count("get"), api.count("list"), api.count("watch")) == (0, 1, 1)


async def test_the_watch_asks_for_what_it_needs() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        await manager.get_client("s")
        [listed] = [r for r in api.requests if r.verb == "list"]
        [watched] = [r for r in api.requests if r.verb == "watch"]
        selector = "prodisco.dev/managed-by=mcp-server,prodisco.dev/instance=me"
        assert selector.startswith(listed.options["label_selector"]), "the first is for what others left, too"
        assert watched.options["label_selector"] == selector
        assert watched.options["allow_watch_bookmarks"] is True
        assert watched.options["timeout_seconds"] == 120
        assert watched.options["resource_version"] == "97", "from the list on"
        assert watched.options["_request_timeout"] == (10.0, 130.0)
        assert all(r.options["_request_timeout"] == 10.0 for r in api.requests if r is not watched)


@pytest.mark.unmeasured
async def test_five_hundred_sessions_open_one_watch_and_sixteen_connections() -> None:
    number = full(500, quick=100)
    async with (
        LoopTimeApi(auto_ready=1.0) as api,
        managed(api, max_sessions=number, **SLOW) as manager,
    ):
        api.faults.add("create", latency=1.0)
        await asyncio.gather(*(manager.get_client(f"s{i}") for i in range(number)))
        assert (api.count("watch"), api.count("list"), api.count("get")) == (1, 1, 0)
        assert now() == pytest.approx(math.ceil(number / 16) + 1.0, abs=0.01), "sixteen creates at a time"


async def test_what_happens_between_the_list_and_the_watch_is_not_missed() -> None:
    async with LoopTimeApi() as api, managed(api, **SLOW) as manager:
        with api.faults.add("watch", hold=True) as gate:
            waiting = asyncio.create_task(manager.get_client("s"))
            await gate.reached()
            await api.until(lambda: api.objects)
            api.set_ready(manager.sandbox_name("s"))
            await asyncio.sleep(3)
            assert not waiting.done()
        await waiting
        assert now() == pytest.approx(3.0, abs=1e-3)


async def test_what_happens_before_the_list_is_seen_in_it() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api, **SLOW) as manager:
        with api.faults.add("list", hold=True) as gate:
            waiting = asyncio.create_task(manager.get_client("s"))
            await gate.reached()
            await asyncio.sleep(3)
            assert not waiting.done()
        await waiting
        assert now() == pytest.approx(3.0, abs=1e-3)


async def test_an_event_that_comes_before_the_answer_of_the_create_counts() -> None:
    async with LoopTimeApi() as api, managed(api, **SLOW) as manager:
        with api.faults.add("create", hold=True, after=True) as gate:
            waiting = asyncio.create_task(manager.get_client("s"))
            await gate.reached()
            api.set_ready(SANDBOX.name("s"))
            await asyncio.sleep(2)
        await waiting
        assert now() == pytest.approx(2.0, abs=1e-3)


async def test_a_death_that_comes_before_the_answer_of_the_create_counts() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api, **SLOW) as manager:
        with api.faults.add("create", hold=True, after=True) as gate:
            waiting = asyncio.create_task(manager.get_client("s"))
            await gate.reached()
            await settle()
            api.delete_now(SANDBOX.name("s"))
            await asyncio.sleep(2)
        with pytest.raises(SandboxFailedError, match="deleted"):
            await waiting
        assert now() == pytest.approx(2.0, abs=1e-3)


async def test_events_of_an_older_object_of_the_name_are_ignored() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        old = await left_behind(api, "s")
        api.delete_now(name(old))
        client = await manager.get_client("s")
        watch = await only_watch(api)
        watch.send("MODIFIED", {**old, "status": conditions("PodFailed")})
        watch.send("DELETED", old)
        await settle()
        assert await manager.get_client("s") is client
        assert (manager.stats().lost, api.count("get")) == (0, 0)


async def test_events_of_an_older_object_do_not_end_a_creation() -> None:
    async with LoopTimeApi() as api, managed(api, **SLOW) as manager:
        old = await left_behind(api, "s")
        api.delete_now(name(old))
        with api.faults.add("create", hold=True, after=True, times=1) as gate:
            waiting = asyncio.create_task(manager.get_client("s"))
            await gate.reached()
            watch = await only_watch(api)
            watch.send("MODIFIED", {**old, "status": conditions("PodFailed")})
            watch.send("DELETED", old)
            await settle()
        await settle()
        watch.send("DELETED", old)
        await asyncio.sleep(1)
        assert not waiting.done()
        api.set_ready(SANDBOX.name("s"))
        await waiting
        assert now() == pytest.approx(1.0, abs=1e-3)


async def test_events_of_sandboxes_of_no_session_are_ignored() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        await manager.get_client("s")
        other = await left_behind(api, "other")
        api.delete_now(name(other))
        await settle()
        assert manager.stats().lost == 0


async def test_a_creating_session_that_hears_nothing_for_15_seconds_is_read() -> None:
    async with LoopTimeApi() as api, managed(api, **SLOW) as manager:
        waiting = asyncio.create_task(manager.get_client("s"))
        await only_watch(api)
        api.silence_watches()
        await asyncio.sleep(20)
        assert times(api, "get") == [15]
        api.set_ready(manager.sandbox_name("s"))
        await waiting
        assert now() == pytest.approx(30.0, abs=1e-3)


# How it lives


async def test_it_ends_when_there_are_no_sessions_and_starts_again_with_the_next() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        await manager.on_session_closed("nobody")
        await asyncio.sleep(10)
        assert api.requests == [], "not before there is a session"
        await manager.get_client("s")
        await manager.on_session_closed("s")
        await asyncio.sleep(61)
        assert api.watches == []
        await asyncio.sleep(3600)
        assert api.count("watch") == 1
        await manager.get_client("s")
        await only_watch(api)
        assert (api.count("watch"), api.count("list")) == (2, 2)
        await asyncio.sleep(100)
        assert len(api.watches) == 1


async def test_the_servers_end_of_a_watch_is_no_fault() -> None:
    async with (
        LoopTimeApi(auto_ready=True) as api,
        managed(api, session_idle_timeout=1e6) as manager,
    ):
        await manager.get_client("s")
        await asyncio.sleep(600)
        assert times(api, "watch") == [0, 120, 240, 360, 480, 600]
        assert api.count("list") == 1, "it goes on from where it was"
        api.delete_now(manager.sandbox_name("s"))
        await settle()
        assert manager.stats().lost == 1


async def test_bookmarks_move_it_on_past_a_compaction() -> None:
    async with (
        LoopTimeApi(auto_ready=True, bookmark_interval=30.0) as api,
        managed(api, session_idle_timeout=1e6) as manager,
    ):
        await manager.get_client("s")
        for i in range(3):
            await left_behind(api, f"other{i}", instance="another")
        await asyncio.sleep(31)
        api.compact()
        api.cut_watches()
        await asyncio.sleep(1)
        assert (api.count("watch"), api.count("list")) == (2, 1)


@pytest.mark.parametrize(
    "error",
    [aiohttp.ClientPayloadError("cut"), ConnectionResetError(), api_error(500), api_error(503), None],
)
async def test_a_watch_that_breaks_goes_on_from_where_it_was(error: BaseException | None) -> None:
    async with LoopTimeApi() as api, managed(api, **SLOW) as manager:
        waiting = asyncio.create_task(manager.get_client("s"))
        await only_watch(api)
        await asyncio.sleep(5)
        api.cut_watches(error)
        api.set_ready(manager.sandbox_name("s"))
        await waiting
        assert now() <= 5.1 + 1e-3
        assert (api.count("list"), api.count("watch"), api.count("get")) == (1, 2, 0)


@pytest.mark.parametrize("line", [b"Too many requests, please try again later.\n", b'{"type":\n', b"[]\n"])
async def test_a_line_that_is_no_event_breaks_the_watch_and_nothing_else(line: bytes) -> None:
    async with LoopTimeApi() as api, managed(api, **SLOW) as manager:
        waiting = asyncio.create_task(manager.get_client("s"))
        (await only_watch(api)).feed(line)
        await asyncio.sleep(1)
        assert len(api.watches) == 1
        api.set_ready(manager.sandbox_name("s"))
        await waiting
        assert now() == pytest.approx(1.0, abs=1e-3)
        assert api.count("watch") == 2


async def test_pauses_grow_while_the_watch_fails_and_begin_anew_after_a_success(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with LoopTimeApi() as api, managed(api, ready_timeout=1000.0) as manager:
        waiting = asyncio.create_task(manager.get_client("s"))
        with api.faults.add("watch", error=503):
            await asyncio.sleep(20)
        assert times(api, "watch") == [0, 0.1, 0.3, 0.7, 1.5, 3.1, 6.3, 11.3, 16.3]
        [warning] = [record for record in caplog.records if record.levelname == "WARNING"]
        assert "watch_broken" in warning.getMessage()
        assert "attempt=3" in warning.getMessage(), "said once, and not of a mere hiccup"
        await asyncio.sleep(5)
        api.set_ready(manager.sandbox_name("s"))
        await waiting
        begun = now()
        api.cut_watches(ConnectionResetError())
        await only_watch(api)
        assert now() - begun == pytest.approx(0.1, abs=1e-3)


async def test_a_server_that_ends_each_watch_at_once_is_not_asked_in_a_tight_loop() -> None:
    async with LoopTimeApi() as api, managed(api, ready_timeout=1000.0) as manager:
        waiting = asyncio.create_task(manager.get_client("s"))

        async def cut() -> None:
            while True:
                (await only_watch(api)).cut()

        cutting = asyncio.create_task(cut())
        await asyncio.sleep(60)
        cutting.cancel()
        assert api.count("watch") < 25
        await manager.on_session_closed("s")
        await asyncio.gather(waiting, cutting, return_exceptions=True)


# Too old a version


async def test_an_expired_version_begins_with_a_fresh_list() -> None:
    async with LoopTimeApi() as api, managed(api, **SLOW) as manager:
        waiting = asyncio.create_task(manager.get_client("s"))
        await only_watch(api)
        await api.until(lambda: api.objects)
        api.cut_watches()
        api.set_ready(manager.sandbox_name("s"))
        api.compact()
        await waiting
        assert now() <= 1.0
        assert (api.count("list"), api.count("get")) == (2, 0)


async def test_a_list_after_a_cut_finds_what_has_vanished() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        await manager.get_client("gone")
        kept = await manager.get_client("kept")
        api.cut_watches()
        api.delete_now(manager.sandbox_name("gone"))
        api.compact()
        await asyncio.sleep(1)
        assert (manager.stats().lost, manager.stats().ready) == (1, 1)
        assert await manager.get_client("kept") is kept
        assert api.count("delete") == 0


async def test_a_list_after_a_cut_finds_what_has_come_to_its_end() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        await manager.get_client("s")
        api.cut_watches()
        api.set_status(manager.sandbox_name("s"), conditions("PodFailed"))
        api.compact()
        await asyncio.sleep(1)
        assert manager.stats().lost == 1
        assert api.count("delete") == 0


async def test_a_list_that_may_be_older_than_a_session_makes_it_be_looked_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("prodisco_sandbox._sessions.connect.WATCHED_INTERVAL", 1.0)
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        await manager.get_client("a")
        with api.faults.add("list", hold=True, after=True) as gate:
            api.cut_watches(api_error(410))
            await gate.reached()
            client = await manager.get_client("b")
            reads = api.count("get")
            api.faults.add("watch", hold=True)
        await settle()
        assert (api.count("list"), api.count("watch")) == (2, 2)
        assert await manager.get_client("b") is client
        assert api.count("get") == reads + 1
        assert manager.stats().lost == 0
        api.faults.clear()


async def test_a_server_that_says_410_every_time_is_not_hammered() -> None:
    async with LoopTimeApi() as api, managed(api, ready_timeout=1000.0) as manager:
        api.faults.add("watch", error=410)
        waiting = asyncio.create_task(manager.get_client("s"))
        await asyncio.sleep(60)
        assert api.count("list") < 25
        api.set_ready(manager.sandbox_name("s"))
        await waiting
        assert now() <= 65.1


# Silence


async def test_a_watch_that_has_fallen_silent_is_cut_and_nothing_is_missed() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        await manager.get_client("s")
        begun = now()
        api.silence_watches()
        api.delete_now(manager.sandbox_name("s"))
        await asyncio.sleep(129)
        assert manager.stats().lost == 0
        await asyncio.sleep(2)
        assert manager.stats().lost == 1
        assert times(api, "watch")[-1] - begun == pytest.approx(130.1, abs=0.01)


async def test_a_watch_request_that_is_never_answered_is_given_up() -> None:
    async with LoopTimeApi() as api, managed(api, **SLOW) as manager:
        api.faults.add("watch", latency=math.inf, times=1)
        waiting = asyncio.create_task(manager.get_client("s"))
        await asyncio.sleep(11)
        api.set_ready(manager.sandbox_name("s"))
        await waiting
        assert now() == pytest.approx(11.0, abs=1e-3)
        assert times(api, "watch") == [0, 10.1]


# Refusal


async def test_a_refused_watch_is_said_once_and_tried_again_after_10_seconds_doubling_to_300(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "prodisco_sandbox.watch")
    async with (
        LoopTimeApi(auto_ready=2.5) as api,
        managed(api, session_idle_timeout=1e6) as manager,
    ):
        api.forbid("watch")
        await manager.get_client("a")
        assert now() == pytest.approx(3.0, abs=1e-3), "read every second"
        await asyncio.sleep(1600)
        pauses = [round(b - a, 3) for a, b in itertools.pairwise(times(api, "watch"))]
        assert pauses == [10, 20, 40, 80, 160, 300, 300, 300, 300]
        [record] = [r for r in caplog.records if "watch_refused" in r.message]
        assert 'verbs ["watch"]' in record.message
        assert "polling" in record.message
        api.allow()
        await asyncio.sleep(300)
        assert len(api.watches) == 1
        assert [r.message for r in caplog.records if "watch_restored" in r.message]
        reads = api.count("get")
        begun = now()
        await manager.get_client("b")
        assert now() - begun == pytest.approx(2.5, abs=1e-3)
        assert api.count("get") == reads


async def test_a_refusal_after_a_restoration_begins_with_10_seconds_again() -> None:
    async with (
        LoopTimeApi(auto_ready=True) as api,
        managed(api, session_idle_timeout=1e6) as manager,
    ):
        api.forbid("watch")
        await manager.get_client("a")
        await asyncio.sleep(100)
        api.allow()
        await asyncio.sleep(100)
        assert len(api.watches) == 1
        before = api.count("watch")
        api.forbid("watch")
        api.cut_watches()
        await asyncio.sleep(60)
        # What has been allowed before is believed to be refused after ten seconds only.
        tries = times(api, "watch")[before:]
        refused = next(i for i, (a, b) in enumerate(itertools.pairwise(tries)) if b - a > 6)
        assert tries[refused] - tries[0] >= 10
        assert tries[refused + 1] - tries[refused] == pytest.approx(10.0, abs=1e-3)


async def test_a_session_under_way_is_polled_from_the_refusal_on() -> None:
    async with LoopTimeApi(auto_ready=12.2) as api, managed(api, ready_poll_interval=0.5) as manager:
        await manager.get_client("first")
        await only_watch(api)
        api.forbid("watch")
        waiting = asyncio.create_task(manager.get_client("s"))
        await settle()
        api.cut_watches()
        await waiting
        # The refusal counts after ten seconds; from then on it is read twice a second.
        assert now() == pytest.approx(24.4, abs=0.6)
        assert api.count("get") >= 2


async def test_a_refused_list_is_a_refusal_too() -> None:
    async with LoopTimeApi(auto_ready=2.5) as api, managed(api) as manager:
        api.forbid("list")
        await manager.get_client("s")
        assert now() == pytest.approx(3.0, abs=1e-3)
        assert api.count("watch") == 0


async def test_an_endless_failure_of_the_list_leaves_creations_to_their_reads() -> None:
    async with LoopTimeApi(auto_ready=2.5) as api, managed(api) as manager:
        api.faults.add("list", error=500)
        await manager.get_client("s")
        assert now() == pytest.approx(15.0, abs=1e-3)


async def test_while_the_watch_is_broken_a_death_is_noticed_at_the_reapers_tick() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        client = await manager.get_client("s")
        api.faults.add("watch", error=504)
        api.cut_watches()
        await asyncio.sleep(1)
        api.delete_now(manager.sandbox_name("s"))
        await asyncio.sleep(60)
        assert await manager.get_client("s") is not client


async def test_an_adopted_sandbox_that_vanishes_before_the_first_list_is_missed() -> None:
    async with LoopTimeApi(auto_ready=True) as api:
        await left_behind(api, "s")
        async with managed(api) as manager:

            def of_the_watch(request: Any) -> bool:
                return "=me" in str(request.options.get("label_selector"))

            api.faults.add("list", latency=5.0, times=1, when=of_the_watch)
            client = await manager.get_client("s")
            assert now() < 5
            await asyncio.sleep(1)
            api.delete_now(manager.sandbox_name("s"))
            await asyncio.sleep(10)
            assert await manager.get_client("s") is not client


async def test_a_list_after_a_cut_finds_that_another_object_has_the_name() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        await manager.get_client("s")
        [ours] = api.objects
        api.cut_watches()
        api.delete_now(name(ours))
        metadata = {key: ours["metadata"][key] for key in ("name", "namespace", "labels")}
        body = {**ours, "metadata": metadata}
        await api.create_namespaced_custom_object(GROUP, "v1beta1", "prodisco", PLURAL, body)
        api.compact()
        await asyncio.sleep(1)
        assert (manager.stats().lost, manager.stats().ready) == (1, 0)
        assert (len(api.objects), api.count("delete")) == (1, 0), "it is not ours"


async def test_a_refused_watch_keeps_its_pauses_while_sessions_come_and_go() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        api.forbid("watch")
        for _ in range(3):
            await manager.get_client("s")
            await manager.on_session_closed("s")
            await asyncio.sleep(61)
        assert times(api, "watch") == [0, 10, 30, 70, 150]


async def test_a_creating_session_that_hears_something_is_not_read_for_another_15_seconds() -> None:
    async with LoopTimeApi() as api, managed(api, ready_poll_interval=30.0) as manager:
        waiting = asyncio.create_task(manager.get_client("s"))
        await asyncio.sleep(10)
        api.set_condition(manager.sandbox_name("s"), "Ready", "False", "DependenciesNotReady")
        await asyncio.sleep(14)
        assert api.count("get") == 0
        await asyncio.sleep(2)
        assert times(api, "get") == [25]
        api.set_ready(manager.sandbox_name("s"))
        await waiting
