"""SandboxResources: what is asked of the API server, how often, and what its answers mean."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest
from kubernetes_asyncio.client import ApiException

from prodisco_sandbox import (
    SandboxError,
    SandboxPermissionError,
    SandboxUnavailableError,
)
from prodisco_sandbox._aio.pacing import backoff
from prodisco_sandbox._cluster.api_errors import (
    AlreadyExistsError,
    ExpiredError,
    NotFoundError,
    PreconditionError,
    RetryableError,
    UnexpectedError,
    UnsupportedError,
)
from prodisco_sandbox._cluster.metadata import managed_selector, name
from prodisco_sandbox._cluster.requests import SandboxResources
from prodisco_sandbox._cluster.watch import SandboxWatch
from prodisco_sandbox.testing import Watch, api_error, plain_error
from tests.support.managers import PlainApi, left_behind, now, settle
from tests.support.resources import body, cluster, settings

pytestmark = pytest.mark.looptime


# Requests


async def test_a_create_is_sent_once_whatever_happens() -> None:
    async with cluster() as (api, resources):
        for error in (500, 503, aiohttp.ServerDisconnectedError, TimeoutError):
            with api.faults.add("create", error=error), pytest.raises(RetryableError) as caught:
                await resources.create(body())
            assert caught.value.ambiguous
        with api.faults.add("create", error=429), pytest.raises(RetryableError) as caught:
            await resources.create(body())
        assert not caught.value.ambiguous
        assert api.count("create") == 5
        created = await resources.create(body())
        assert created is not None
        with pytest.raises(AlreadyExistsError):
            await resources.create(body())


async def test_what_failed_before_it_was_sent_is_not_ambiguous() -> None:
    async with cluster() as (api, resources):
        for error in (503, aiohttp.ServerDisconnectedError, RuntimeError):
            fault = api.faults.add("discovery", error=error)
            with fault, pytest.raises(SandboxError) as caught:
                await resources.create(body())
            assert isinstance(caught.value, RetryableError | UnexpectedError)
            assert not caught.value.ambiguous
        assert api.count("create") == 0


async def test_a_get_gives_the_object_or_none() -> None:
    async with cluster() as (api, resources):
        left = await left_behind(api, "s")
        assert await resources.get(name(left)) == left
        assert await resources.get("none") is None


async def test_a_list_gives_what_matches_and_the_version() -> None:
    async with cluster() as (api, resources):
        mine = await left_behind(api, "a")
        await left_behind(api, "b", instance="another")
        found, version = await resources.list(managed_selector(instance="me"))
        assert (found, version) == ([mine], api.resource_version)


async def test_a_delete_takes_the_object_of_that_uid_only() -> None:
    async with cluster() as (api, resources):
        left = await left_behind(api, "s")
        assert not await resources.delete("none", "uid")
        assert not await resources.delete(name(left), "another uid")
        assert not await resources.delete(name(left), left["metadata"]["uid"], version="1")
        assert len(api.objects) == 1
        assert await resources.delete(name(left), left["metadata"]["uid"])
        assert api.objects == []
        assert api.requests[-1].body == {"preconditions": {"uid": left["metadata"]["uid"]}}


async def test_a_patch_goes_out_as_merge_patch_and_tells_why_it_was_refused() -> None:
    async with cluster() as (api, resources):
        left = await left_behind(api, "s")
        patched = await resources.patch(name(left), {"metadata": {"labels": {"a": "b"}}})
        assert patched is not None
        assert patched["metadata"]["labels"]["a"] == "b"
        assert api.requests[-1].options["_content_type"] == "application/merge-patch+json"
        with pytest.raises(PreconditionError):
            await resources.patch(name(left), {"metadata": {"uid": "another"}})
        with pytest.raises(PreconditionError):
            await resources.patch(name(left), {"metadata": {"resourceVersion": "1"}})
        with pytest.raises(NotFoundError):
            await resources.patch("none", {})


@pytest.mark.parametrize("answer", [None, "text", ["list"]])
async def test_an_answer_that_is_no_object_is_no_answer(answer: Any) -> None:
    class Odd(PlainApi):
        async def get_namespaced_custom_object(self, *_: Any) -> Any:
            return answer

        async def list_namespaced_custom_object(self, *_: Any) -> Any:
            return answer

    resources = SandboxResources(settings(), Odd())
    for asking in (resources.get("x"), resources.list("a=b")):
        with pytest.raises(RetryableError, match=f"with {type(answer).__name__}"):
            await asking


async def test_a_plain_fake_is_asked_for_no_more_than_it_takes() -> None:
    api = PlainApi()
    resources = SandboxResources(settings(), api)
    created = await resources.create(body("a", "v1alpha1"))
    assert created is None, "without a uid it is not known"
    assert (await resources.get("a") or {})["metadata"]["name"] == "a"
    api.objects["foreign"] = {"metadata": {"name": "foreign"}}
    found, version = await resources.list(managed_selector(instance="me"))
    assert ([name(o) for o in found], version) == (["a"], "")
    with pytest.raises(UnsupportedError, match="no patch_namespaced_custom_object"):
        await resources.patch("a", {})
    with pytest.raises(UnsupportedError, match="cannot watch"):
        await anext(resources.watch("a=b", ""))
    assert await resources.delete("a", None)
    assert not await resources.delete("a", None)


# Retries


async def test_requests_with_a_deadline_are_repeated_with_growing_pauses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("random.random", lambda: 1.0)
    async with cluster() as (api, resources):
        api.faults.add("get", error=503)
        with pytest.raises(RetryableError):
            await resources.get("x", deadline=now() + 20)
        assert [round(r.time, 1) for r in api.requests if r.verb == "get"] == [
            0, 0.1, 0.3, 0.7, 1.5, 3.1, 6.3, 11.3, 16.3
        ]  # fmt: skip
        assert now() < 20, "what would be repeated at the deadline is not waited for"


async def test_requests_without_a_deadline_are_not_repeated() -> None:
    async with cluster() as (api, resources):
        api.faults.add("get", error=503)
        with pytest.raises(RetryableError):
            await resources.get("x")
        assert api.count("get") == 1


@pytest.mark.parametrize("error", [400, 401, 403, 405, 409, 410, 413, 422])
async def test_other_refusals_are_never_repeated(error: int) -> None:
    async with cluster() as (api, resources):
        api.faults.add("get", error=error)
        with pytest.raises(SandboxError):
            await resources.get("x", deadline=now() + 60)
        assert api.count("get") == 1


async def test_retry_after_beats_the_backoff() -> None:
    async with cluster() as (api, resources):
        left = await left_behind(api, "s")
        api.faults.add("get", error=api_error(429, retry_after=3), times=2)
        assert await resources.get(name(left), deadline=now() + 60) == left
        assert now() == pytest.approx(6.0, abs=1e-3)


async def test_a_request_that_is_never_answered_takes_ten_seconds() -> None:
    async with cluster() as (api, resources):
        for verb, ask in (
            ("get", lambda: resources.get("x")),
            ("list", lambda: resources.list("a=b")),
            ("create", lambda: resources.create(body())),
            ("delete", lambda: resources.delete("x", "uid")),
            ("patch", lambda: resources.patch("x", {})),
            ("watch", lambda: anext(resources.watch("a=b", ""))),
        ):
            begun = now()
            with (
                api.faults.add(verb, latency=math.inf),  # type: ignore[arg-type]
                pytest.raises(RetryableError, match=f"did not answer a {verb} within 10 s"),
            ):
                await ask()
            assert now() - begun == pytest.approx(10.0, abs=1e-3)


async def test_waiting_for_a_turn_is_no_part_of_a_requests_time() -> None:
    async with cluster() as (api, resources):
        api.faults.add("get", latency=6.0)
        found = await asyncio.gather(*(resources.get("x") for _ in range(120)))
        assert found == [None] * 120
        assert now() == pytest.approx(18.0, abs=1e-3), "fifty at a time"


def test_backoff_grows_to_its_bound_and_has_jitter() -> None:
    for attempt, bound in ((0, 0.1), (1, 0.2), (5, 3.2), (6, 5.0), (1000, 5.0)):
        pauses = [backoff(attempt) for _ in range(100)]
        assert bound / 2 <= min(pauses) < max(pauses) <= bound


# 403 from a server that starts


async def test_a_refusal_counts_once_it_has_lasted_ten_seconds_unless_it_always_was_one() -> None:
    async with cluster() as (api, resources):
        api.forbid("get", "list")
        with pytest.raises(SandboxPermissionError):
            await resources.get("x", deadline=now() + 60)
        assert now() == 0, "it has never worked"
        api.allow()
        assert await resources.get("x") is None  # 404: who may not ask is not told
        api.forbid("get", "list")
        with pytest.raises(SandboxPermissionError):
            await resources.get("x", deadline=now() + 60)
        assert 10 <= now() <= 15.1
        with pytest.raises(SandboxPermissionError):
            await resources.list("a=b")
        begun = now()
        with pytest.raises(SandboxPermissionError):
            await resources.get("x", deadline=now() + 60)
        assert now() == begun, "it is refused for good until it works again"
        api.allow()
        assert await resources.get("x") is None
        api.forbid("get")
        with pytest.raises(RetryableError) as caught:
            await resources.get("x")
        assert not caught.value.ambiguous


# The watch


async def events(resources: SandboxResources, version: str = "") -> list[tuple[str, str | None]]:
    found = []
    async with contextlib.aclosing(resources.watch(managed_selector(instance="me"), version)) as stream:
        async for kind, sandbox in stream:
            found.append((kind, (sandbox.get("metadata") or {}).get("name")))
    return found


async def test_a_watch_gives_events_until_the_server_ends_it() -> None:
    async with cluster() as (api, resources):
        watching = asyncio.create_task(events(resources, api.resource_version))
        await api.until(lambda: api.watches)
        left = name(await left_behind(api, "s"))
        await left_behind(api, "other", instance="another")
        api.delete_now(left)
        api.watches[0].send_bookmark()
        await settle()
        api.cut_watches()
        # The controller may write the status more than once.
        assert [event for event, _ in itertools.groupby(await watching)] == [
            ("OPEN", None), ("ADDED", left), ("MODIFIED", left), ("DELETED", left), ("BOOKMARK", None)
        ]  # fmt: skip
        assert api.watches == []


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (403, SandboxPermissionError),
        (405, UnsupportedError),
        (410, ExpiredError),
        (429, RetryableError),
        (500, RetryableError),
        (plain_error(503, "no upstream"), RetryableError),
    ],
)
async def test_a_watch_that_is_refused_says_why(error: Any, kind: type[SandboxError]) -> None:
    async with cluster() as (api, resources):
        for _ in range(2):  # The same the second time: a response is no success yet.
            with api.faults.add("watch", error=error), pytest.raises(kind) as caught:
                await events(resources)
            assert isinstance(caught.value.__cause__, ApiException)
        assert api.watches == []


async def test_a_watch_of_a_version_that_has_gone_finds_the_new_one() -> None:
    async with cluster(versions=["v1alpha1"]) as (api, resources):
        assert await resources.api_version() == "v1alpha1"
        api.versions = ["v1beta1"]
        watching = asyncio.create_task(events(resources))
        await api.until(lambda: api.watches)
        assert api.watches[0].version == "v1beta1"
        api.cut_watches()
        assert await watching == [("OPEN", None)]


async def test_error_events_are_errors() -> None:
    async with cluster() as (api, resources):
        for error, kind in ((api_error(410), ExpiredError), (api_error(500), RetryableError)):
            watching = asyncio.create_task(events(resources))
            await api.until(lambda: api.watches)
            api.cut_watches(error)
            with pytest.raises(kind):
                await watching


async def test_a_stream_that_breaks_or_falls_silent_is_an_error() -> None:
    async with cluster() as (api, resources):
        breakings: list[Callable[[Watch], None]] = [
            lambda watch: watch.cut(aiohttp.ClientPayloadError("cut")),
            lambda watch: watch.feed(b"Too many requests\n"),
            lambda watch: watch.silence(),
        ]
        for breaking in breakings:
            watching = asyncio.create_task(events(resources))
            await api.until(lambda: api.watches)
            breaking(api.watches[0])
            with pytest.raises(RetryableError, match="watch"):
                await watching
            assert api.watches == []
        assert now() == pytest.approx(130.0, abs=0.01)


async def test_an_api_that_answers_a_watch_with_a_list_cannot_watch() -> None:
    class Deaf(PlainApi):
        async def list_namespaced_custom_object(self, *_: Any, **__: Any) -> Any:
            return {"items": []}

    with pytest.raises(UnsupportedError, match="does not stream"):
        await anext(SandboxResources(settings(), Deaf()).watch("a=b", ""))


async def test_a_watch_that_is_refused_for_days_is_still_asked_for_every_five_minutes() -> None:
    class Listener:
        def synced(self, sandboxes: list[Any], since: float) -> None: ...
        def changed(self, sandbox: Any) -> None: ...
        def deleted(self, sandbox: Any) -> None: ...
        def down(self) -> None: ...

    async with cluster() as (api, resources):
        api.faults.add("list", error=405)
        watching = asyncio.create_task(SandboxWatch(resources, "a=b", Listener()).run())
        await asyncio.sleep(4 * 24 * 3600)
        watching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await watching
        tries = [request.time for request in api.requests if request.verb == "list"]
        assert len(tries) > 1_100
        assert all(299 < later - earlier < 301 for earlier, later in itertools.pairwise(tries[10:]))


async def test_leaving_a_watch_closes_its_connection() -> None:
    async with cluster() as (api, resources):
        stream = resources.watch("a=b", "")
        assert await anext(stream) == ("OPEN", {})
        assert len(api.watches) == 1
        await stream.aclose()
        assert api.watches == []


# The connection


class Opened(PlainApi):
    """An API object as the kube config gives it, which has to be closed."""

    def __init__(self) -> None:
        super().__init__()
        self.closed = 0
        self.api_client = self

    async def close(self) -> None:
        self.closed += 1


async def test_a_connection_is_opened_once_and_closed_and_one_that_was_given_is_not() -> None:
    made: list[Opened] = []

    async def open_api() -> Opened:
        await asyncio.sleep(1)
        made.append(Opened())
        return made[-1]

    resources = SandboxResources(settings(), open_api=open_api)
    await asyncio.gather(*(resources.get("x") for _ in range(5)))
    await resources.aclose()
    assert [api.closed for api in made] == [1]

    given = Opened()
    resources = SandboxResources(settings(), given)
    await resources.get("x")
    await resources.aclose()
    assert given.closed == 0
    assert len(made) == 1


async def test_a_configuration_that_hangs_is_given_up_after_30_seconds() -> None:
    async def open_api() -> None:
        await asyncio.sleep(3600)

    resources = SandboxResources(settings(), open_api=open_api)
    with pytest.raises(SandboxUnavailableError, match="not been loaded within 30 s"):
        await resources.create(body())
    assert now() == pytest.approx(30.0, abs=1e-3)
    await resources.aclose()


async def test_requests_under_way_when_the_connection_closes_are_told() -> None:
    async def open_api() -> None:
        await asyncio.sleep(3600)

    resources = SandboxResources(settings(), open_api=open_api)
    asking = asyncio.create_task(resources.get("x"))
    await asyncio.sleep(1)
    await resources.aclose()
    with pytest.raises(SandboxUnavailableError, match="cut off"):
        await asking


async def test_a_silent_stream_is_cut_although_the_api_object_has_no_timeout_for_it() -> None:
    async with cluster() as (api, resources):
        asked = api.list_namespaced_custom_object

        async def without_timeout(*args: Any, _request_timeout: object = None, **kwargs: Any) -> Any:
            return await asked(*args, **kwargs)

        api.list_namespaced_custom_object = without_timeout  # type: ignore[method-assign]
        watching = asyncio.create_task(events(resources))
        await api.until(lambda: api.watches)
        api.silence_watches()
        async with asyncio.timeout(200):
            with pytest.raises(RetryableError, match="the watch broke: TimeoutError"):
                await watching
        assert now() == pytest.approx(130.0, abs=0.01)
        assert api.watches == []


async def test_a_refused_watch_closes_its_connection() -> None:
    async with cluster() as (api, resources):
        asked, answers = api.list_namespaced_custom_object, []

        async def noted(*args: Any, **kwargs: Any) -> Any:
            answers.append(await asked(*args, **kwargs))
            return answers[-1]

        api.list_namespaced_custom_object = noted  # type: ignore[method-assign]
        api.forbid("watch")
        with pytest.raises(SandboxPermissionError):
            await events(resources)
        assert [(answer.status, answer.closed) for answer in answers] == [(403, True)]
