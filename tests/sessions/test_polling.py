"""A plain fake, with create, get, list and delete alone, is enough to run the manager."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest
from kubernetes_asyncio.client import ApiException

from prodisco_sandbox import (
    SandboxConflictError,
    SandboxError,
    SandboxFailedError,
    SandboxTimeoutError,
    SandboxUnavailableError,
)
from prodisco_sandbox._cluster.manifest import SANDBOX
from tests.support.managers import Clients, PlainApi, StubClient, conditions, managed, now, settle

pytestmark = pytest.mark.looptime


class Timed(PlainApi):
    """A plain fake that notes when it is called."""

    def __init__(self, status: dict[str, Any] | None = None) -> None:
        super().__init__(status)
        self.reads: list[float] = []

    async def get_namespaced_custom_object(self, *args: Any) -> Any:
        self.reads.append(round(now(), 3))
        return await super().get_namespaced_custom_object(*args)

    def become(self, status: dict[str, Any]) -> None:
        for sandbox in self.objects.values():
            sandbox["status"] = status


async def test_a_whole_life_on_a_plain_fake(caplog: pytest.LogCaptureFixture) -> None:
    api, clients = PlainApi(), Clients()
    async with managed(api, clients) as manager:
        first = await manager.get_client("a")
        second = await manager.get_client("b")
        assert clients.made == [first, second]
        assert first.target == f"{SANDBOX.name('a')}.prodisco.svc:50051"
        assert first.sandbox is not None
        assert (first.sandbox.name, first.sandbox.uid) == (SANDBOX.name("a"), "")
        assert await manager.get_client("a") is first
        await manager.on_session_closed("a")
        assert list(api.objects) == [SANDBOX.name("b")]
        assert clients.made[0].closed
        again = await manager.get_client("a")
        assert again is not first
        assert manager.stats().created == 3
        await asyncio.sleep(700)
        assert manager.stats().reaped == 2
        assert api.objects == {}
        await manager.get_client("c")
    assert api.objects == {}
    for event in ("watch_refused", "leases_off"):
        assert len([r for r in caplog.records if event in r.message]) == 1, "it is said once"


async def test_it_is_read_at_the_interval() -> None:
    api = Timed(status={})
    async with managed(api, ready_poll_interval=2.5) as manager:
        asyncio.get_running_loop().call_later(9, api.become, {"serviceFQDN": "x.svc"})
        client = await manager.get_client("s")
        assert client.target == "x.svc:50051"
        assert api.reads == [0, 0, 2.5, 5, 7.5, 10]


async def test_while_the_server_is_not_healthy_the_sandbox_is_read_too() -> None:
    api, clients = Timed(), Clients(lambda target: StubClient(target, healthy=False))
    async with managed(api, clients, ready_poll_interval=3.0) as manager:
        waiting = asyncio.create_task(manager.get_client("s"))
        for attempt in range(2):  # Its Sandbox is replaced once.
            await asyncio.sleep(8)
            api.become(conditions("PodFailed"))
            begun = now()
            while api.calls.count("delete") <= attempt:
                await asyncio.sleep(0.1)
            assert now() - begun < 3.0 + 1.1
        with pytest.raises(SandboxFailedError, match="PodFailed"):
            await waiting
    assert api.objects == {}


async def test_a_sandbox_that_vanishes_while_it_is_made_is_a_failure() -> None:
    api = Timed(status={})
    async with managed(api) as manager:
        asyncio.get_running_loop().call_later(4.5, api.objects.clear)
        with pytest.raises(SandboxFailedError, match="has been deleted"):
            await manager.get_client("s")
        assert now() == pytest.approx(5.0, abs=1e-3)
        assert "delete" not in api.calls


async def test_the_deadline_holds() -> None:
    api = Timed(status={})
    async with managed(api, ready_timeout=7.5) as manager:
        with pytest.raises(SandboxTimeoutError, match="no status yet"):
            await manager.get_client("s")
        assert now() == pytest.approx(7.5, abs=1e-3)
    assert api.objects == {}


@pytest.mark.parametrize("answer", [None, {}, {"metadata": {}}, "created"])
async def test_a_create_need_not_answer_with_the_object(answer: Any) -> None:
    class Curt(PlainApi):
        async def create_namespaced_custom_object(self, *args: Any) -> Any:
            await super().create_namespaced_custom_object(*args)
            return answer

    api = Curt()
    async with managed(api) as manager:
        await manager.get_client("s")
        assert api.calls.count("create") == 1
        assert len(api.objects) == 1
    assert api.objects == {}


async def test_extra_arguments_may_be_taken_and_ignored() -> None:
    class Open(PlainApi):
        async def list_namespaced_custom_object(self, *args: Any, **kwargs: Any) -> Any:
            return await super().list_namespaced_custom_object(*args[:4])

        async def delete_namespaced_custom_object(self, *args: Any, **kwargs: Any) -> Any:
            assert kwargs["_request_timeout"] == 10.0
            return await super().delete_namespaced_custom_object(*args)

    api = Open(status={})
    async with managed(api) as manager:
        waiting = asyncio.create_task(manager.get_client("s"))
        await asyncio.sleep(1.5)
        for sandbox in api.objects.values():
            sandbox["status"] = {"serviceFQDN": "x.svc"}
        await waiting
        assert now() == pytest.approx(2.0, abs=1e-3)
    assert api.objects == {}


async def test_a_plain_409_of_a_foreign_object_is_a_conflict() -> None:
    api = PlainApi()
    api.objects[SANDBOX.name("s")] = {"metadata": {"name": SANDBOX.name("s")}, "status": {}}
    async with managed(api) as manager:
        with pytest.raises(SandboxConflictError):
            await manager.get_client("s")
        await settle()
        assert manager.stats().closing == 0
    assert len(api.objects) == 1


VERBS = ["create", "get", "list", "delete"]


def failing(verb: str, error: BaseException, *, after: bool) -> PlainApi:
    """A plain fake that raises once in one of its methods."""
    api = PlainApi()
    method = f"{verb}_namespaced_custom_object"
    original = getattr(api, method)
    raised: list[bool] = []

    async def fail(group: str, version: str, namespace: str, plural: str, *args: Any) -> Any:
        if after:
            answer = await original(group, version, namespace, plural, *args)
        if not raised:
            raised.append(True)
            raise error
        return answer if after else await original(group, version, namespace, plural, *args)

    setattr(api, method, fail)
    return api


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("verb", VERBS)
async def test_whatever_a_fake_raises_leaves_nothing_and_keeps_its_cause(verb: str, after: bool) -> None:
    boom = RuntimeError("boom")
    api = failing(verb, boom, after=after)
    async with managed(api) as manager:
        if verb in ("create", "get"):
            with pytest.raises(SandboxError, match="boom") as caught:
                await manager.get_client("s")
            assert caught.value.__cause__ is boom
        else:
            await manager.get_client("s")
        await manager.on_session_closed("s")
        await asyncio.sleep(1)
        assert api.objects == {}
        await manager.get_client("s")
    assert api.objects == {}


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("verb", VERBS)
async def test_what_may_pass_passes(verb: str, after: bool) -> None:
    api = failing(verb, ApiException(status=503), after=after)
    async with managed(api) as manager:
        await manager.get_client("s")
        assert len(api.objects) == 1
        await manager.on_session_closed("s")
        await asyncio.sleep(1)
        assert api.objects == {}


@pytest.mark.parametrize("verb", VERBS)
async def test_a_fake_that_never_answers_holds_nothing_for_ever(verb: str) -> None:
    api = PlainApi()
    method = f"{verb}_namespaced_custom_object"
    original = getattr(api, method)

    async def hang(group: str, version: str, namespace: str, plural: str, *args: Any) -> Any:
        await asyncio.sleep(math.inf)

    async with managed(api, ready_timeout=25.0) as manager:
        setattr(api, method, hang)
        if verb in ("create", "get"):
            with pytest.raises((SandboxTimeoutError, SandboxUnavailableError)):
                await manager.get_client("s")
            assert now() <= 25.0 + 1e-3
        else:
            await manager.get_client("s")
        begun = now()
        await manager.on_session_closed("s")
        assert now() - begun <= 10.0 + 10.0 + 1e-3
        setattr(api, method, original)
    assert api.objects == {}


async def test_text_with_a_404_is_a_404() -> None:
    class Wordy(PlainApi):
        async def delete_namespaced_custom_object(self, *args: Any) -> Any:
            await super().delete_namespaced_custom_object(*args)
            gone = ApiException(status=404, reason="Not Found")
            gone.body = "gone already"
            raise gone

    api = Wordy()
    async with managed(api) as manager:
        await manager.get_client("s")
        await manager.on_session_closed("s")
        assert (manager.stats().closing, manager.stats().delete_retries) == (0, 0)
