"""Connections over HTTP: what they may cost."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
import pytest

from prodisco_sandbox.mcp import _connections
from prodisco_sandbox.mcp._connections import Complaints, Escaped, raise_descriptors
from prodisco_sandbox.results import ExecutionChunk, ExecutionOutcome, ExecutionState
from tests.support.mcp_server import (
    ERAS,
    Rig,
    connect,
    headers,
    rig,
    run,
    served_by_the_program,
)
from tests.support.patience import PATIENCE, until
from tests.support.ports import free_ports


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[Rig, str]]:
    """The program's server; gives the URL."""
    async with rig() as r, served_by_the_program(r.server, r.tools) as url:
        yield r, url


@pytest.mark.parametrize("era", ERAS)
async def test_a_call_whose_connection_stays_is_answered(era: str) -> None:
    async with serving() as (_, url), connect(url, era) as client:
        for _ in range(2):
            assert (await run(client, ""))["success"]


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"POST /mcp HTTP/1.1\r\nHost: loc",
        b"POST /mcp HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{",
    ],
)
async def test_a_request_that_does_not_come_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(_connections, "REQUEST_TIMEOUT", 0.2)
    async with serving() as (_, url):
        host, port = httpx2.URL(url).host, httpx2.URL(url).port
        reader, writer = await asyncio.open_connection(host, port)
        loop = asyncio.get_running_loop()
        begun = loop.time()
        writer.write(sent)
        async with asyncio.timeout(PATIENCE):
            await reader.read()
        assert loop.time() - begun > 0.1
        writer.close()


async def test_a_request_that_trickles_in_has_no_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_connections, "REQUEST_TIMEOUT", 0.3)
    async with serving() as (_, url):
        reader, writer = await asyncio.open_connection(httpx2.URL(url).host, httpx2.URL(url).port)
        ended = asyncio.create_task(reader.read())
        writer.write(b"GET /healthz HTTP/1.1\r\n")
        async with asyncio.timeout(PATIENCE):
            while not ended.done():
                writer.write(b"a: b\r\n")
                await asyncio.wait({ended}, timeout=0.05)
        if ended.exception() is None:  # It may be reset, for what it has sent since was not read.
            assert b"200" not in ended.result()
        writer.close()


async def test_a_call_may_take_longer_than_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as (r, url), connect(url, "legacy") as client:
        monkeypatch.setattr(_connections, "REQUEST_TIMEOUT", 0.5)
        release = asyncio.Event()

        async def slow(_: object) -> AsyncIterator[ExecutionChunk]:
            await release.wait()
            yield ExecutionChunk("e1", "output", "late")
            yield ExecutionChunk("e1", "result", result=ExecutionOutcome(True, ExecutionState.COMPLETED))

        r.sandbox.script("ExecuteStream", slow)
        asyncio.get_running_loop().call_later(1.0, release.set)
        assert (await run(client, ""))["output"] == "late"


async def test_a_body_above_the_limit_is_answered_with_a_sentence() -> None:
    async with serving() as (_, url), httpx2.AsyncClient(timeout=PATIENCE) as http:
        answer = await http.post(url, content=b"x" * (5 << 20), headers=headers(None, None))
        assert answer.status_code == 413
        assert "over the limit of 4 MiB" in answer.text


def test_the_soft_limit_of_descriptors_is_raised() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = min(before[1], _connections.MOST_DESCRIPTORS) if before[1] > 0 else _connections.MOST_DESCRIPTORS
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        raise_descriptors()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (most, before[1])
        raise_descriptors()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (most, before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


async def test_too_few_descriptors_are_a_line_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    loop = asyncio.get_running_loop()
    error = OSError(24, os.strerror(24))
    complaints = Complaints()
    for _ in range(1000):
        complaints(loop, {"message": "socket.accept() out of system resource", "exception": error})
    assert [record.getMessage() for record in caplog.records] == [
        f"too few descriptors for all connections: {error}"
    ]
    complaints(loop, {"message": "something else"})
    assert caplog.records[-1].getMessage() == "something else"


def test_control_characters_are_escaped_in_the_log() -> None:
    formatter = Escaped("%(levelname)s %(message)s")
    try:
        raise ValueError("a\x1b[31mb")
    except ValueError as error:
        record = logging.LogRecord("mcp.server", 30, "", 0, "Host: %s", ("a\nERROR forged\x1b[2J\x85",), None)
        record.exc_info = (ValueError, error, error.__traceback__)
    text = formatter.format(record)
    assert text.startswith("WARNING Host: a\\x0aERROR forged\\x1b[2J\\x85\nTraceback")
    assert "\x1b" not in text


@pytest.mark.slow
@pytest.mark.parametrize("limit", [256, 4096])
async def test_idle_connections_stop_nobody_and_fill_no_log(tmp_path: Path, limit: int) -> None:
    """Two thousand of them, to the program, whose soft limit of descriptors is 256."""
    [port] = free_ports(1)
    program = f"{sys.executable} -m prodisco_sandbox.mcp --local --warm 0 --transport http --port {port}"
    log = tmp_path / "log"
    with log.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            *("sh", "-c", f"ulimit -Sn 256 && ulimit -Hn {limit} && exec {program}"), stderr=file
        )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192) if hard > 0 else 8192, hard))
    url = f"http://127.0.0.1:{port}"
    writers: list[asyncio.StreamWriter] = []

    async def is_healthy() -> bool:
        async with httpx2.AsyncClient(timeout=PATIENCE) as http:
            return (await http.get(f"{url}/healthz")).text == "ok\n"

    async def open_some(sent: bytes) -> None:
        for _ in range(100):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writers.append(writer)
            writer.write(sent)

    try:
        async with asyncio.timeout(PATIENCE):
            await until(lambda: "listening on" in log.read_text() or process.returncode is not None)
        assert process.returncode is None, log.read_text()
        for _ in range(5):
            await asyncio.gather(*map(open_some, (b"", b"POST /mcp HTTP/1.1\r\n", b"", b"GET /he")))
            async with asyncio.timeout(PATIENCE):
                assert await is_healthy()
        assert len(writers) == 2000
        async with connect(f"{url}/mcp", "legacy") as client:
            assert len((await client.list_tools()).tools) == 4
        assert "Traceback" not in log.read_text()
        assert log.stat().st_size < 2000, log.read_text()
    finally:
        for writer in writers:
            writer.transport.abort()
        if process.returncode is None:
            process.kill()
        await process.wait()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_the_longest_wait_for_a_request_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_connections, "most_connections", lambda: 3)
    async with serving() as (r, url), connect(url, "legacy") as client:
        release = asyncio.Event()

        async def slow(_: object) -> AsyncIterator[ExecutionChunk]:
            await release.wait()
            yield ExecutionChunk("e1", "result", result=ExecutionOutcome(True, ExecutionState.COMPLETED))

        r.sandbox.script("ExecuteStream", slow)
        running = asyncio.create_task(run(client, ""))
        await r.sandbox.wait_for_call("ExecuteStream")
        host, port = str(httpx2.URL(url).host), httpx2.URL(url).port
        readers = []
        writers = []
        for _ in range(3):
            reader, writer = await asyncio.open_connection(host, port)
            readers.append(asyncio.create_task(reader.read()))
            writers.append(writer)
            async with httpx2.AsyncClient(timeout=PATIENCE) as http:
                assert (await http.get(url.replace("/mcp", "/healthz"))).status_code == 200
        async with asyncio.timeout(PATIENCE):
            await asyncio.wait({readers[0]})
        # What is under way is nobody's room.
        release.set()
        assert (await running)["success"]
        for writer in writers:
            writer.transport.abort()
        await asyncio.wait(readers)


def test_some_descriptors_are_not_for_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    for soft, most in ((256, 64), (1024, 256), (4096, 3072), (65_536, 64_512), (-1, 65_536)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, found=soft: (found, -1))
        assert _connections.most_connections() == most
