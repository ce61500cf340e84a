"""Calls of the older protocols whose connection drops: resumed by their clients, or ended."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest
from mcp.client import streamable_http
from mcp_types import JSONRPCNotification, JSONRPCResponse

from prodisco_sandbox.mcp import _resuming
from prodisco_sandbox.mcp._resuming import Event, Kept, Link, SessionEvents
from prodisco_sandbox.results import ExecutionChunk, ExecutionOutcome, ExecutionState
from prodisco_sandbox.testing import NEVER
from tests.support.mcp_server import (
    Rig,
    connect,
    headers,
    open_session,
    rig,
    run,
    served_by_the_program,
    tool_call,
)
from tests.support.patience import PATIENCE, until

BEGUN = ExecutionChunk("e1", "output", "begun ")
RESULT = ExecutionChunk("e1", "result", result=ExecutionOutcome(True, ExecutionState.COMPLETED))
CALL = {
    "jsonrpc": "2.0",
    "id": 7,
    "method": "tools/call",
    "params": {"name": "run_sandbox", "arguments": {"code": "1", "timeout_ms": 60_000}},
}


class Proxy:
    """A network between clients and the server, whose connections can break."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner, outer = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers |= {writer, outer}
        for source, target in ((reader, outer), (inner, writer)):
            task = asyncio.create_task(self._pass(source, target), name="proxy")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 16):
                target.write(data)
                await target.drain()
        target.close()

    def drop(self) -> None:
        """Breaks all connections that there are."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def aclose(self) -> None:
        self.drop()
        if self._tasks:
            await asyncio.wait(self._tasks)


@asynccontextmanager
async def behind_a_network(**options: Any) -> AsyncIterator[tuple[Rig, str, Proxy]]:
    """The program's server; gives its URL through a proxy."""
    async with rig(**options) as r, served_by_the_program(r.server, r.tools) as url:
        proxy = Proxy(int(httpx2.URL(url).port or 0))
        listener = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
        try:
            yield r, f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/mcp", proxy
        finally:
            listener.close()
            await proxy.aclose()


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDK's client reconnects after a second by default."""
    assert hasattr(streamable_http, "DEFAULT_RECONNECTION_DELAY_MS")
    monkeypatch.setattr(streamable_http, "DEFAULT_RECONNECTION_DELAY_MS", 50)


def script(r: Rig) -> asyncio.Event:
    """Scripts an execution that ends when the event is set."""
    release = asyncio.Event()

    async def slow(_: object) -> AsyncIterator[ExecutionChunk]:
        yield BEGUN
        await release.wait()
        yield ExecutionChunk("e1", "output", "and ended")
        yield RESULT

    r.sandbox.script("ExecuteStream", slow)
    return release


def executions(r: Rig) -> list[str]:
    return [call.rpc for call in r.sandbox.calls if call.rpc == "ExecuteStream"]


async def test_the_sdk_s_client_resumes_a_call() -> None:
    async with behind_a_network() as (r, url, proxy), connect(url, "legacy") as client:
        release = script(r)
        running = asyncio.create_task(run(client, ""))
        stream = await r.sandbox.wait_for_call("ExecuteStream")
        for _ in range(2):  # The SDK gives up at the third.
            proxy.drop()
            # Longer than it takes the client to come back.
            await asyncio.wait({running}, timeout=0.3)
        assert not running.done()
        release.set()
        assert (await running)["output"] == "begun and ended"
        await stream.ended.wait()
        assert len(executions(r)) == 1


async def test_a_result_of_a_call_that_ended_meanwhile_is_kept() -> None:
    async with behind_a_network() as (r, url, _), open_session(url) as session:
        release = script(r)
        event = await begin_and_drop(url, session)
        release.set()
        async with asyncio.timeout(PATIENCE):
            await r.tools._quiet.wait()
        answers = await resume(url, session, event)
        assert [answer["id"] for answer in answers] == [7]
        assert answers[0]["result"]["structuredContent"]["output"] == "begun and ended"


async def begin_and_drop(url: str, session: str, *, token: str | None = None) -> str:
    """Begins a call and drops its connection; gives the id of its stream's first event."""
    async with (
        httpx2.AsyncClient(timeout=PATIENCE) as http,
        http.stream("POST", url, json=CALL, headers=headers(session, token)) as answer,
    ):
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if line.startswith("id: "):
                return line.removeprefix("id: ")
    raise AssertionError("there was no event")


@asynccontextmanager
async def resuming(url: str, session: str, event: str, *, token: str | None = None) -> AsyncIterator[Any]:
    """The response to a request that resumes a stream."""
    given = {**headers(session, token), "Last-Event-ID": event}
    async with (
        httpx2.AsyncClient(timeout=PATIENCE) as http,
        http.stream("GET", url, headers=given) as answer,
    ):
        yield answer


async def resume(url: str, session: str, event: str, **options: Any) -> list[dict[str, Any]]:
    """What comes on a stream that is resumed, until its end or an answer."""
    found: list[dict[str, Any]] = []
    async with resuming(url, session, event, **options) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                found.append(json.loads(line.removeprefix("data: ")))
                if "id" in found[-1]:
                    break
    return found


async def test_a_call_that_nobody_resumes_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_resuming, "RESUME_WITHIN", 0.3)
    async with behind_a_network() as (r, url, _), open_session(url) as session:
        r.sandbox.script("ExecuteStream", [BEGUN, NEVER])
        loop = asyncio.get_running_loop()
        begun = loop.time()
        event = await begin_and_drop(url, session)
        stream = await r.sandbox.wait_for_call("ExecuteStream")
        async with asyncio.timeout(PATIENCE):
            await stream.ended.wait()
            assert stream.outcome == "cancelled"
            assert loop.time() - begun >= 0.3
            await r.tools._quiet.wait()
        # A client that comes too late is told, and its session goes on.
        [answer] = await resume(url, session, event)
        assert "The connection was lost" in json.dumps(answer)
        r.sandbox.script("ExecuteStream", [RESULT])
        assert (await tool_call(url, session)).status_code == 200


async def test_a_client_that_drops_again_has_as_long_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_resuming, "RESUME_WITHIN", 0.5)
    async with behind_a_network() as (r, url, _), open_session(url) as session:
        r.sandbox.script("ExecuteStream", [BEGUN, NEVER])
        event = await begin_and_drop(url, session)
        stream = await r.sandbox.wait_for_call("ExecuteStream")
        async with resuming(url, session, event) as answer:
            assert answer.status_code == 200
            # Longer than the call would last without it.
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.8):
                    await stream.ended.wait()
        async with asyncio.timeout(PATIENCE):
            await stream.ended.wait()
        assert stream.outcome == "cancelled"


async def test_a_server_that_closes_does_not_wait_for_a_client_that_dropped() -> None:
    async with behind_a_network() as (r, url, _):
        r.sandbox.script("ExecuteStream", [BEGUN, NEVER])
        async with httpx2.AsyncClient(timeout=PATIENCE) as http:
            opened = await http.post(url, json=INITIALIZE, headers=headers(None, None))
        await begin_and_drop(url, opened.headers["mcp-session-id"])
        stream = await r.sandbox.wait_for_call("ExecuteStream")
        loop = asyncio.get_running_loop()
        begun = loop.time()
    async with asyncio.timeout(PATIENCE):
        await stream.ended.wait()
    assert stream.outcome == "cancelled"
    assert loop.time() - begun < PATIENCE


INITIALIZE = {
    "jsonrpc": "2.0",
    "id": 0,
    "method": "initialize",
    "params": {
        "protocolVersion": "2025-11-25",
        "capabilities": {},
        "clientInfo": {"name": "test", "version": "0"},
    },
}


async def test_sessions_do_not_see_each_other_s_streams() -> None:
    """All of them name their calls 7."""
    async with behind_a_network() as (r, url, _), open_session(url) as one, open_session(url) as two:
        release = script(r)
        events = [await begin_and_drop(url, session) for session in (one, two)]
        await until(lambda: len(executions(r)) == 2)
        release.set()
        async with asyncio.timeout(PATIENCE):
            await r.tools._quiet.wait()
        for session, event in zip((one, two), events, strict=True):
            assert len(await resume(url, session, event)) == 1
        async with open_session(url) as three:
            [answer] = await resume(url, three, events[0])
            assert "The stream is not kept" in answer["error"]["message"]


async def test_with_other_credentials_nothing_is_resumed_or_prolonged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_resuming, "RESUME_WITHIN", 0.3)
    async with behind_a_network(auth=True) as (r, url, _), open_session(url, token="ann") as session:
        r.sandbox.script("ExecuteStream", [BEGUN, NEVER])
        event = await begin_and_drop(url, session, token="ann")
        stream = await r.sandbox.wait_for_call("ExecuteStream")
        async with asyncio.timeout(PATIENCE):
            while not stream.ended.is_set():
                async with resuming(url, session, event, token="bob") as answer:
                    assert answer.status_code == 404
        assert stream.outcome == "cancelled"


async def test_an_unknown_event_is_answered() -> None:
    async with behind_a_network() as (_, url, _), open_session(url) as session:
        for event_id in ("x", "37", "37-x", "5f-1", "99999999-1"):
            [answer] = await resume(url, session, event_id)
            assert "The stream is not kept" in answer["error"]["message"]


async def test_a_call_of_a_server_without_sessions_ends_at_once() -> None:
    link = Link(0.0)
    ended = asyncio.Event()
    with link.ends(ended.set):
        with link.connected():
            await asyncio.sleep(0)
            assert not ended.is_set()
        async with asyncio.timeout(PATIENCE):
            await ended.wait()


async def test_a_call_that_has_ended_is_not_ended_later() -> None:
    link = Link(0.0)
    ended = asyncio.Event()
    with link.ends(ended.set):
        pass
    with link.connected():
        pass
    for _ in range(3):
        await asyncio.sleep(0)
    assert not ended.is_set()


# What is kept


def event(session: SessionEvents, number: int, size: int = 1) -> Event:
    return Event(session, "7", number, f"m{number}", size)


def numbers(kept: Kept, session: SessionEvents, after: int = 0) -> list[int]:
    return [found.number for found in kept.after(session, "7", after)]


def test_the_oldest_messages_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_resuming, "MOST_EVENTS", 3)
    monkeypatch.setattr(_resuming, "MOST_BYTES", 100)
    kept = Kept()
    one, two = SessionEvents(kept), SessionEvents(kept)
    for number in range(1, 6):
        kept.add(event(one, number))
    assert (numbers(kept, one), numbers(kept, one, 4), numbers(kept, two)) == ([3, 4, 5], [5], [])
    kept.add(event(two, 1, size=99))
    assert (numbers(kept, one), numbers(kept, two)) == ([5], [1])
    kept.add(event(two, 2, size=101))
    assert (numbers(kept, one), numbers(kept, two)) == ([], [])
    kept.add(event(one, 6))
    assert numbers(kept, one) == [6]


def test_messages_are_not_kept_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Kept()
    session = SessionEvents(kept)
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    kept.add(Event(session, "7", 1, "m", 1, at=now))
    now += _resuming.KEPT_FOR
    assert numbers(kept, session) == [1]
    now += 1
    assert numbers(kept, session) == []
    kept.add(Event(session, "7", 2, "m", 1, at=now))
    assert len(kept._events) == 1


async def test_what_comes_after_the_last_event_is_sent_again() -> None:
    session = SessionEvents(Kept())
    primed = await session.store_event("7", None)
    note = JSONRPCNotification(jsonrpc="2.0", method="notifications/progress", params={"progress": 1})
    noted = await session.store_event("7", note)
    await session.store_event("8", note)
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    assert await session.replay_events_after(primed, send) == "7"
    assert [(message.message, message.event_id) for message in sent] == [(note, noted)]
    answered = await session.store_event("7", JSONRPCResponse(jsonrpc="2.0", id=7, result={}))
    sent.clear()
    assert await session.replay_events_after(noted, send) is None
    assert [message.event_id for message in sent] == [answered]
