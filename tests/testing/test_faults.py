"""The faults of FakeCustomObjectsApi: errors, delays, gates, and answers that get lost."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import aiohttp
import pytest
from kubernetes_asyncio.client import ApiException

from prodisco_sandbox.testing import FakeCustomObjectsApi, api_error, plain_error
from tests.support.api import GROUP, body
from tests.support.fake_api import AT, create, delete, get, now, opened, status_of

pytestmark = pytest.mark.looptime


@pytest.fixture
async def api() -> Any:
    async with FakeCustomObjectsApi() as api:
        yield api


async def test_a_status_comes_as_the_real_client_raises_it(api: FakeCustomObjectsApi) -> None:
    api.faults.add("create", error=503, times=2)
    for _ in range(2):
        with pytest.raises(ApiException) as caught:
            await create(api)
        assert (caught.value.status, caught.value.reason) == (503, "Service Unavailable")
        assert json.loads(caught.value.body)["reason"] == "ServiceUnavailable"
    await create(api)
    assert api.count("create") == 3


async def test_too_many_requests_is_plain_text(api: FakeCustomObjectsApi) -> None:
    api.faults.add("get", error=429)
    with pytest.raises(ApiException) as caught:
        await get(api)
    assert caught.value.body == "Too many requests, please try again later.\n"
    assert caught.value.headers["retry-after"] == "1"


async def test_statuses_are_made_to_measure(api: FakeCustomObjectsApi) -> None:
    api.faults.add("get", error=api_error(429, "slow down", reason="TooManyRequests", retry_after=7))
    with pytest.raises(ApiException) as caught:
        await get(api)
    assert caught.value.headers["Retry-After"] == "7"
    found = json.loads(caught.value.body)
    assert (found["message"], found["details"]) == ("slow down", {"retryAfterSeconds": 7})
    api.faults.clear()
    api.faults.add("get", error=plain_error(502, "Bad gateway"))
    assert await status_of(get(api)) == 502
    assert api_error(599).reason == ""


@pytest.mark.parametrize(
    "error",
    [
        aiohttp.ServerDisconnectedError,
        aiohttp.ClientConnectionError("refused"),
        TimeoutError,
        asyncio.CancelledError,
    ],
    ids=repr,
)
async def test_connections_break(api: FakeCustomObjectsApi, error: Any) -> None:
    api.faults.add("*", error=error)
    kind = error if isinstance(error, type) else type(error)
    raised = []
    for call in (create(api), get(api), api.get_api_resources(GROUP, "v1beta1"), opened(api)):
        with pytest.raises(kind) as caught:
            await call
        raised.append(caught.value)
    assert len({id(e) for e in raised}) == 4  # each caller has one of its own
    assert api.objects == []


async def test_faults_meet_requests_in_order(api: FakeCustomObjectsApi) -> None:
    api.faults.add("create", lost=True, times=1)
    api.faults.add("create", error=503, times=1)
    api.faults.add("*", latency=2.0)
    with pytest.raises(aiohttp.ServerDisconnectedError):
        await create(api)
    assert now() == 0.0
    assert await status_of(create(api)) == 503
    assert await status_of(create(api)) == 409
    assert now() == 2.0


async def test_faults_choose_their_requests(api: FakeCustomObjectsApi) -> None:
    named = api.faults.add("create", error=500, name="a")
    asked = api.faults.add("create", error=501, when=lambda request: request.body["spec"] == {})
    await create(api, "b")
    assert await status_of(create(api, "a")) == 500
    empty = {**body("c"), "spec": {}}
    assert await status_of(api.create_namespaced_custom_object(*AT, empty)) == 501
    assert (named.hits, asked.hits) == (1, 1)
    assert list(api.faults) == [named, asked]
    named.remove()
    named.remove()
    await create(api, "a")


async def test_a_lost_answer_was_carried_out(api: FakeCustomObjectsApi) -> None:
    with api.faults.add("create", lost=True), pytest.raises(aiohttp.ServerDisconnectedError):
        await create(api)
    assert await status_of(create(api)) == 409
    with api.faults.add("delete", lost=True, error=TimeoutError), pytest.raises(TimeoutError):
        await delete(api)
    assert api.objects == []


async def test_latency_is_on_the_loops_clock(api: FakeCustomObjectsApi) -> None:
    api.faults.add("create", latency=3.0)
    api.faults.add("create", latency=lambda request: 2.0 if request.name == "a" else 0.0, after=True)
    task = asyncio.create_task(create(api))
    await asyncio.sleep(2.9)
    assert api.get("a") is None
    await asyncio.sleep(0.2)
    assert api.get("a") is not None
    assert not task.done()
    await task
    assert now() == 5.0
    await create(api, "b")
    assert now() == 8.0


async def test_a_request_that_never_answers_ends_with_its_timeout(api: FakeCustomObjectsApi) -> None:
    api.faults.add("get", latency=math.inf)
    for timeout in (4.0, aiohttp.ClientTimeout(total=4.0)):
        before = now()
        with pytest.raises(TimeoutError):
            await get(api, _request_timeout=timeout)
        assert now() - before == 4.0
    task = asyncio.create_task(get(api, _request_timeout=(1, None)))
    await asyncio.sleep(1000)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    api.faults.clear()
    api.faults.add("create", latency=math.inf, after=True)
    with pytest.raises(TimeoutError):
        await create(api, _request_timeout=1)
    assert api.get("a") is not None


async def test_a_gate_holds_requests(api: FakeCustomObjectsApi) -> None:
    with api.faults.add("create", hold=True) as gate:
        tasks = [asyncio.create_task(create(api, name)) for name in "abc"]
        await gate.reached(3)
        assert (gate.held, api.objects) == (3, [])
        tasks[2].cancel()
        await asyncio.wait(tasks[2:])
        gate.release()
        await asyncio.gather(*tasks[:2])
        assert gate.held == 0
        await create(api, "d")
    assert [sandbox["metadata"]["name"] for sandbox in api.objects] == ["a", "b", "d"]


async def test_a_gate_holds_answers(api: FakeCustomObjectsApi) -> None:
    gate = api.faults.add("create", hold=True, after=True)
    task = asyncio.create_task(create(api))
    await gate.reached()
    assert api.get("a") is not None
    assert not task.done()
    gate.remove()
    assert (await task)["metadata"]["name"] == "a"


async def test_a_gate_can_fail_what_it_held(api: FakeCustomObjectsApi) -> None:
    gate = api.faults.add("create", hold=True, lost=True)
    task = asyncio.create_task(create(api))
    await gate.reached()
    gate.release()
    with pytest.raises(aiohttp.ServerDisconnectedError):
        await task
    assert api.get("a") is not None


async def test_nothing_reaches_a_gate_in_time(api: FakeCustomObjectsApi) -> None:
    gate = api.faults.add("create", hold=True)
    with pytest.raises(TimeoutError):
        await gate.reached(timeout=5)
    assert now() == 5.0
    task = asyncio.create_task(create(api))
    await gate.reached()  # the waiter that gave up is forgotten
    gate.release()
    await task


async def test_a_request_given_up_does_not_land(api: FakeCustomObjectsApi) -> None:
    api.faults.add("create", latency=5.0)
    with pytest.raises(TimeoutError):
        await create(api, _request_timeout=1)
    await asyncio.sleep(10)
    assert api.objects == []


async def test_a_request_given_up_lands_later(api: FakeCustomObjectsApi) -> None:
    api.faults.add("create", latency=5.0, lands=True)
    for _ in range(2):  # the second meets a 409, which nobody hears
        with pytest.raises(TimeoutError):
            await create(api, _request_timeout=1)
    await asyncio.sleep(2.9)
    assert api.objects == []
    await asyncio.sleep(0.2)
    assert len(api.objects) == 1
    await asyncio.sleep(10)
    assert len(api.objects) == 1


async def test_a_request_held_and_given_up_lands_on_release(api: FakeCustomObjectsApi) -> None:
    gate = api.faults.add("*", hold=True, lands=True)
    tasks = [asyncio.create_task(call) for call in (create(api), opened(api))]
    await gate.reached(2)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert api.objects == []
    gate.release()
    assert len(api.objects) == 1
    assert api.watches == []  # nobody is there to read it


async def test_closing_forgets_a_request_held_and_given_up() -> None:
    api = FakeCustomObjectsApi()
    gate = api.faults.add("create", hold=True, lands=True)
    task = asyncio.create_task(create(api))
    await gate.reached()
    task.cancel()
    await asyncio.wait([task])
    await api.aclose()
    assert api.objects == []


async def test_what_is_wrong_with_a_fault(api: FakeCustomObjectsApi) -> None:
    for wrong, text in (
        ({"verb": "post"}, "verb is 'post'"),
        ({"times": 0}, "times is 0"),
        ({"latency": -1.0}, "latency is -1.0"),
        ({"latency": math.nan}, "latency is nan"),
        ({"lost": True, "lands": True}, "lands goes with"),
    ):
        arguments: dict[str, Any] = {"verb": "create", **wrong}
        with pytest.raises(ValueError, match=text):
            api.faults.add(arguments.pop("verb"), **arguments)
    assert list(api.faults) == []


async def test_races_show(api: FakeCustomObjectsApi) -> None:
    """Each call yields before the operation, and between it and the answer."""
    task = asyncio.create_task(create(api))
    await asyncio.sleep(0)
    assert api.objects == []
    await asyncio.sleep(0)
    assert len(api.objects) == 1
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
