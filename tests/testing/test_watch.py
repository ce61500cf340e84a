"""The watches of FakeCustomObjectsApi: how they end, break and fall silent."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from kubernetes_asyncio import watch
from kubernetes_asyncio.client import ApiException

from prodisco_sandbox.testing import FakeCustomObjectsApi, Watch, api_error
from tests.support.api import GROUP, MERGE, PLURAL, body
from tests.support.counts import full
from tests.support.fake_api import AT, create, now, opened

pytestmark = pytest.mark.looptime


@pytest.fixture
async def api() -> AsyncIterator[FakeCustomObjectsApi]:
    async with FakeCustomObjectsApi() as api:
        yield api


async def event(response: Any) -> tuple[str, str]:
    found = json.loads(await response.content.readline())
    return found["type"], found["object"]["metadata"].get("name", "")


async def test_it_ends_after_its_timeout(api: FakeCustomObjectsApi) -> None:
    response = await opened(api, timeout_seconds=300)
    assert len(api.watches) == 1
    assert await response.content.readline() == b""
    assert now() == 300.0
    assert api.watches == []
    assert response.content.at_eof()
    assert await response.content.readline() == b""
    unlimited = await opened(api)
    assert await unlimited.content.readline() == b""
    assert now() == 300.0 + 1800.0


async def test_bookmarks_come_once_a_minute_and_before_the_end(api: FakeCustomObjectsApi) -> None:
    response = await opened(api, timeout_seconds=150, allow_watch_bookmarks=True)
    times = []
    while line := await response.content.readline():
        found = json.loads(line)
        assert found["type"] == "BOOKMARK"
        assert found["object"]["metadata"] == {"resourceVersion": api.resource_version}
        times.append(now())
    assert times == [60.0, 120.0, 148.0]
    assert now() == 150.0
    silent = await opened(api, timeout_seconds=150)
    assert await silent.content.readline() == b""


async def test_a_bookmark_on_demand(api: FakeCustomObjectsApi) -> None:
    response = await opened(api)
    api.watches[0].send_bookmark()
    assert await event(response) == ("BOOKMARK", "")
    response.close()


async def test_the_history_is_bounded() -> None:
    async with FakeCustomObjectsApi(history=3) as api:
        versions = [(await create(api, name))["metadata"]["resourceVersion"] for name in "abcde"]
        response = await opened(api, resource_version=versions[1])
        assert [await event(response) for _ in range(3)] == [("ADDED", name) for name in "cde"]
        response.close()
        late = await opened(api, resource_version=versions[0])
        found = json.loads(await late.content.readline())
        assert (found["type"], found["object"]["code"]) == ("ERROR", 410)
        assert await late.content.readline() == b""
        assert [request.verb for request in api.requests] == ["create", "watch", "watch"]
        assert api.count("create") == 5


async def test_a_compaction_leaves_open_watches_alone(api: FakeCustomObjectsApi) -> None:
    response = await opened(api, resource_version=api.resource_version)
    await create(api)
    api.compact()
    await create(api, "b")
    assert [await event(response) for _ in range(2)] == [("ADDED", "a"), ("ADDED", "b")]
    response.close()
    fresh = await opened(api, resource_version=api.resource_version)
    await create(api, "c")
    assert await event(fresh) == ("ADDED", "c")
    fresh.close()


async def test_all_are_cut(api: FakeCustomObjectsApi) -> None:
    await create(api)
    responses = [await opened(api) for _ in range(2)]
    api.cut_watches()
    for response in responses:
        assert await event(response) == ("ADDED", "a")
        assert await response.content.readline() == b""
    assert api.watches == []


async def test_a_broken_one_loses_what_was_not_read(api: FakeCustomObjectsApi) -> None:
    await create(api)
    response = await opened(api)
    api.cut_watches(aiohttp.ClientPayloadError("Response payload is not completed"))
    for _ in range(2):
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.content.readline()
    with pytest.raises(aiohttp.ClientPayloadError):
        await response.read()


async def test_it_breaks_while_it_is_read(api: FakeCustomObjectsApi) -> None:
    response = await opened(api)
    reading = asyncio.create_task(response.content.readline())
    await asyncio.sleep(1)
    api.cut_watches(aiohttp.ServerDisconnectedError())
    with pytest.raises(aiohttp.ServerDisconnectedError):
        await reading


async def test_an_error_event_ends_it(api: FakeCustomObjectsApi) -> None:
    response = await opened(api)
    api.cut_watches(api_error(410))
    found = json.loads(await response.content.readline())
    assert (found["type"], found["object"]["reason"]) == ("ERROR", "Expired")
    assert await response.content.readline() == b""


async def test_a_silent_one_says_nothing_not_even_its_end(api: FakeCustomObjectsApi) -> None:
    response = await opened(api, timeout_seconds=10, allow_watch_bookmarks=True)
    api.silence_watches()
    await create(api)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1000):
            await response.content.readline()
    assert len(api.watches) == 1  # the client still holds it
    sound = await opened(api)
    assert await event(sound) == ("ADDED", "a")
    sound.close()
    response.close()
    assert api.watches == []


async def test_the_clients_own_timeouts(api: FakeCustomObjectsApi) -> None:
    total = await opened(api, _request_timeout=5)
    quiet = await opened(api, _request_timeout=(1, 4))
    api.silence_watches()
    with pytest.raises(aiohttp.ServerTimeoutError):
        await quiet.content.readline()
    assert now() == 4.0
    with pytest.raises(TimeoutError):
        await total.content.readline()
    assert now() == 5.0
    total.close()
    quiet.close()


async def test_a_refusal_with_429_is_a_line_of_text(api: FakeCustomObjectsApi) -> None:
    """As kubernetes_asyncio's Watch has it: no exception, but an event that is a string."""
    api.faults.add("watch", error=429, times=1)
    async with watch.Watch() as stream:
        events = stream.stream(api.list_namespaced_custom_object, *AT, timeout_seconds=5)
        found = [item async for item in events]
    assert found == ["Too many requests, please try again later.\n"]
    response = await opened(api)
    api.watches[0].feed(b"upstream connect error\n")
    assert await response.content.readline() == b"upstream connect error\n"
    response.close()


async def test_lines_come_in_parts(api: FakeCustomObjectsApi) -> None:
    response = await opened(api)
    (handle,) = api.watches
    assert isinstance(handle, Watch)
    handle.feed(b'{"type":')
    reading = asyncio.create_task(response.content.readline())
    await asyncio.sleep(1)
    assert not reading.done()
    handle.feed(b'"X"}\n{"ty')
    assert await reading == b'{"type":"X"}\n'
    handle.cut()
    assert await response.content.readline() == b'{"ty'
    assert await response.content.readline() == b""


async def test_a_cancelled_reader_loses_nothing(api: FakeCustomObjectsApi) -> None:
    response = await opened(api)
    reading = asyncio.create_task(response.content.readline())
    await asyncio.sleep(1)
    reading.cancel()
    await create(api)
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert await event(response) == ("ADDED", "a")
    response.close()


async def test_two_readers_at_once_are_a_mistake(api: FakeCustomObjectsApi) -> None:
    response = await opened(api)
    reading = asyncio.create_task(response.content.readline())
    await asyncio.sleep(1)
    with pytest.raises(RuntimeError, match="already waiting"):
        await response.content.readline()
    response.close()
    with pytest.raises(aiohttp.ClientConnectionError, match="Connection closed"):
        await reading


@pytest.mark.parametrize("how", ["close", "release"])
async def test_a_closed_one_is_forgotten(api: FakeCustomObjectsApi, how: str) -> None:
    response = await opened(api)
    getattr(response, how)()
    assert response.closed
    assert api.watches == []
    await create(api)
    with pytest.raises(aiohttp.ClientConnectionError):
        await response.content.readline()
    getattr(response, how)()


async def test_what_opens_and_fails_leaves_none_behind(api: FakeCustomObjectsApi) -> None:
    with api.faults.add("watch", lost=True), pytest.raises(aiohttp.ServerDisconnectedError):
        await opened(api)
    gate = api.faults.add("watch", hold=True, after=True)
    task = asyncio.create_task(opened(api))
    await gate.reached()
    assert len(api.watches) == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert api.watches == []


async def test_a_refused_one_is_a_response(api: FakeCustomObjectsApi) -> None:
    api.forbid("watch")
    response = await opened(api)
    assert (response.status, response.reason) == (403, "Forbidden")
    assert response.headers["content-type"] == "application/json"
    async with watch.Watch() as stream:
        with pytest.raises(ApiException) as caught:
            async for _ in stream.stream(api.list_namespaced_custom_object, *AT):
                pass
    assert caught.value.status == 403
    await api.list_namespaced_custom_object(*AT)


async def test_namespaces_are_apart(api: FakeCustomObjectsApi) -> None:
    response = await opened(api)
    other = (GROUP, "v1beta1", "other", PLURAL)
    await api.create_namespaced_custom_object(*other, body("x"))
    await create(api)
    assert await event(response) == ("ADDED", "a")
    response.close()


@pytest.mark.unmeasured
async def test_a_thousand_sandboxes_and_one_watch() -> None:
    number = full(1000, quick=200)
    async with FakeCustomObjectsApi(auto_ready=True) as api:
        response = await opened(api, label_selector="x=1")
        names = [f"s-{n}" for n in range(number)]
        await asyncio.gather(*(create(api, name, labels={"x": "1"}) for name in names))
        patch = {"metadata": {"labels": {"x": "2"}}}
        for name in names[::2]:
            await api.patch_namespaced_custom_object(*AT, name, patch, _content_type=MERGE)
        await asyncio.gather(*(api.delete_namespaced_custom_object(*AT, name) for name in names[1::2]))
        seen: dict[str, list[str]] = {name: [] for name in names}
        deleted = 0
        while deleted < number:
            kind, name = await event(response)
            seen[name].append(kind)
            deleted += kind == "DELETED"
        # The annotation, and a status each for the pod that is made, scheduled and ready.
        assert set(map(tuple, seen.values())) == {("ADDED", *4 * ["MODIFIED"], "DELETED")}
        assert len(api.objects) == number // 2
        response.close()


@pytest.mark.unmeasured
async def test_the_last_bookmark_is_the_last_whatever_the_clock_shows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A timer may fire a moment early, and in virtual time that moment does not pass."""
    async with FakeCustomObjectsApi(bookmark_interval=0.7) as api:
        sent: list[float] = []
        send = Watch.send_bookmark

        def counted(watch: Watch) -> None:
            sent.append(now())
            if len(sent) > 50:
                watch.cut()  # else it might never end
            send(watch)

        monkeypatch.setattr(Watch, "send_bookmark", counted)
        for step in range(300):
            await asyncio.sleep(0.001 * step + 1e-6)
            options = {"timeout_seconds": 5, "allow_watch_bookmarks": True, "_preload_content": False}
            response = await api.list_namespaced_custom_object(
                GROUP, "v1beta1", "prodisco", PLURAL, watch=True, **options
            )
            sent.clear()
            await asyncio.sleep(5.1)
            assert len(sent) <= 6, (step, sent)
            response.close()
