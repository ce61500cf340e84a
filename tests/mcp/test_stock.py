"""The tool with the stock Node server behind it, which is not like the reference server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from mcp import Client

from prodisco_sandbox import (
    SandboxCapacityError,
    SandboxClient,
    SandboxError,
    SandboxManager,
    SandboxTimeoutError,
    SandboxUnavailableError,
)
from prodisco_sandbox._grpc.failures import about_size
from prodisco_sandbox.config import SandboxManagerConfig
from prodisco_sandbox.mcp import _texts
from prodisco_sandbox.mcp._language import Language, language_of
from prodisco_sandbox.results import ExecutionState
from prodisco_sandbox.testing import FakeCustomObjectsApi
from tests.support.mcp_server import call, make_server, refused, run, text_of
from tests.support.stock import BLOCKED, StockServer


@asynccontextmanager
async def stock(language: str = "TypeScript") -> AsyncIterator[tuple[StockServer, SandboxManager, Client]]:
    async with StockServer() as server, FakeCustomObjectsApi(auto_ready=True) as api:
        config = SandboxManagerConfig(mode="multi", endpoint=lambda _: server.target)
        manager = SandboxManager(config, custom_objects_api=api)
        async with Client(make_server(manager, language=language, max_output=10)[0], mode="legacy") as client:
            yield server, manager, client
        await manager.shutdown()


async def test_the_rest_of_a_cut_stream_is_said_to_be_lost_when_status_does_not_have_it() -> None:
    async with stock() as (_, _, client):
        cut = await run(client, "print 0123456789abcdef")
        assert (cut["output"], cut["truncated"], cut["output_offset"]) == ("0123456789", True, 10)
        assert "mode 'status'" in cut["note"]
        assert "file" not in cut["note"]
        status = await run(client, mode="status", execution_id="e1", output_offset=10)
        assert status["output"] == ""
        assert "rest of the output is lost" in status["note"]
        assert "print less" in status["note"]
        assert "truncated" not in status
        assert "note" not in await run(client, mode="status", execution_id="e1"), "nothing was promised"


async def test_a_request_over_the_servers_limit_is_no_broken_and_no_busy_sandbox() -> None:
    async with stock() as (server, manager, client):
        await run(client, "1")
        error = await refused(client, "#" * 5_000_000)
        assert "too large for the sandbox, which takes messages of at most 4 MiB" in error
        assert "Nothing was run" in error
        assert (await run(client, "2"))["success"]
        assert server.executed == ["1", "2"]
        assert manager.stats().created == 1
        async with SandboxClient(server.target) as direct:
            suspects = []
            direct.on_suspect = lambda: suspects.append(1)
            with pytest.raises(
                SandboxError, match=r"5,000,005 bytes is over the size limit of 4 MiB"
            ) as caught:
                await direct.execute_test(tests="#" * 5_000_000)
            assert not isinstance(caught.value, SandboxCapacityError)
            assert caught.value.status == "RESOURCE_EXHAUSTED"
            assert suspects == []


async def test_what_the_server_blocks_is_told_in_its_words() -> None:
    async with stock() as (_, _, client):
        result = await run(client, "blocked")
        assert (result["success"], result["state"], result["error"]) == (False, "FAILED", BLOCKED)
        answer = await call(client, "blocked call")
        assert answer.is_error
        assert BLOCKED in text_of(answer)


async def test_fields_and_states_of_a_newer_server_are_ignored() -> None:
    async with stock() as (server, _, client):
        assert (await run(client, "print hello"))["output"] == "hello"
        assert (await run(client, mode="list"))["executions"][0]["state"] == "UNKNOWN_9"
        report = await run(client, mode="test", tests='test("adds", () => assert.is(2, 1 + 1))')
        assert (report["summary"]["passed"], report["tests"][0]["name"]) == (1, "adds")
        async with SandboxClient(server.target) as direct:
            assert (await direct.health_check()).healthy
            (info,) = await direct.list_executions()
            assert (info.state, info.state.is_final) == (9, True)
            status = await direct.get_execution("e1")
            assert (status.state, status.result is not None) == (ExecutionState.COMPLETED, True)


async def described(language: str) -> str:
    async with stock(language) as (_, _, client):
        (tool, *_) = (await client.list_tools()).tools
        assert tool.description is not None
        return tool.description


async def test_the_description_is_true_of_the_language() -> None:
    python, typescript = await described("Python 3.12"), await described("TypeScript")
    for word in (
        "Python 3.12 code",
        "new process",
        "Files in the working directory",
        "test_*",
        "plain assert",
    ):
        assert word in python
    for word in (
        "TypeScript code",
        "one VM",
        "no files",
        'test("name", fn)',
        "global `assert`",
        "console.log",
    ):
        assert word in typescript
    for word in ("new process", "working directory", "files are gone"):
        assert word not in typescript
    other = await described("Ruby")
    assert "depends on the server" in other
    for word in ("new process", "working directory", "VM", "test_*"):
        assert word not in other


def test_no_text_speaks_of_files_where_there_are_none() -> None:
    typescript, python = language_of("TypeScript"), language_of("Python")
    errors = [
        SandboxError("x", status="DEADLINE_EXCEEDED"),
        SandboxTimeoutError("x"),
        SandboxUnavailableError("x"),
    ]

    def texts(language: Language) -> list[str]:
        return [
            _texts.description(language, 600),
            _texts.description(language, 600, 7200),
            _texts.unknown_handle(language),
            _texts.replaced(language),
            _texts.restarted(language),
            _texts.maybe_replaced(language),
            _texts.replaced(language, evicted=True),
            _texts.restarted(language, evicted=True),
            _texts.closed(language),
            _texts.timed_out(1000, 120_000, language),
            _texts.rest(1, "e1", 1, 1, language),
            _texts.lost(language),
            *(_texts.failed_call(error, "execute", language) for error in errors),
        ]

    for text in texts(typescript)[2:]:
        assert "file" not in text.lower()
        assert text.endswith(".")
    assert sum("file" in text.lower() for text in texts(python)) >= 14


@pytest.mark.parametrize(
    ("details", "text"),
    [
        (
            "Received message larger than max (5000005 vs 4194304)",
            "5,000,005 bytes is over the size limit of 4 MiB",
        ),
        ("SERVER: Received message larger than max (9 vs. 8388608)", "limit of 8 MiB of this server's"),
        ("grpc: received message larger than max (5000005 vs. 4194304)", "limit of 4 MiB of this server's"),
        ("gRPC message exceeds maximum size 4194304: 5000005", "5,000,005 bytes is over"),
        ("SERVER: Received message larger than max (66000005 vs. 67108864)", "64 MiB of this server's"),
        (
            "CLIENT: Received message larger than max (70000007 vs. 67108864)",
            "over the size limit of 64 MiB: CLIENT",
        ),
        ("Sent message larger than max (67108870 vs. 67108864)", "over the size limit of 64 MiB: Sent"),
    ],
)
def test_whose_limit_a_message_was_over_is_read_from_grpcs_words(details: str, text: str) -> None:
    assert text in str(about_size(details))


def test_a_busy_server_is_not_about_size() -> None:
    assert about_size("too many executions wait") is None
