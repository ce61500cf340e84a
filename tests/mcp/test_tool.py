"""The tool's modes, over a scripted sandbox: what is asked, and what is answered."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from mcp import Client
from mcp.server.mcpserver import Context

from prodisco_sandbox import (
    SandboxCapacityError,
    SandboxConflictError,
    SandboxError,
    SandboxFailedError,
    SandboxManagerClosedError,
    SandboxPermissionError,
    SandboxTimeoutError,
    SandboxUnavailableError,
)
from prodisco_sandbox.mcp import _environment, _progress, _serve, _texts
from prodisco_sandbox.results import (
    CacheEntry,
    CancelResult,
    ExecutionChunk,
    ExecutionInfo,
    ExecutionOutcome,
    ExecutionResult,
    ExecutionState,
    ExecutionStatus,
    StartedExecution,
    TestReport,
    TestResult,
    TestSummary,
)
from prodisco_sandbox.testing import NEVER, FakeStatus
from tests.support.mcp_server import Rig, call, connect, in_one_task, over_http, refused, rig, run, text_of
from tests.support.patience import PATIENCE

DONE = ExecutionOutcome(success=True, state=ExecutionState.COMPLETED, execution_time_ms=7)


def out(text: str) -> ExecutionChunk:
    return ExecutionChunk("e1", "output", text)


def err(text: str) -> ExecutionChunk:
    return ExecutionChunk("e1", "error_output", text)


def end(outcome: ExecutionOutcome = DONE) -> ExecutionChunk:
    return ExecutionChunk("e1", "result", result=outcome)


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """All progress is sent before the result, however long it takes to send it."""
    monkeypatch.setattr(_progress, "FLUSH_TIMEOUT", PATIENCE)


@pytest_asyncio.fixture
async def r() -> AsyncIterator[Rig]:
    async with rig(max_output=10) as r:
        yield r


@pytest_asyncio.fixture
async def client(r: Rig) -> AsyncIterator[Client]:
    """One with a session, so that results are free of handles."""
    async with in_one_task(Client(r.server, mode="legacy")) as client:
        yield client


async def test_the_schema_says_what_there_is(client: Client) -> None:
    (tool, *_) = (await client.list_tools()).tools
    properties = tool.input_schema["properties"]
    assert tool.name == "run_sandbox"
    assert "required" not in tool.input_schema
    assert set(properties) == {
        "mode",
        "code",
        "cached",
        "timeout_ms",
        "execution_id",
        "wait",
        "output_offset",
        "error_output_offset",
        "states",
        "limit",
        "include_completed_within_ms",
        "tests",
        "sandbox",
    }
    assert properties["timeout_ms"]["maximum"] == 120_000
    assert properties["code"]["type"] == "string"
    assert properties["mode"]["enum"] == [
        *("execute", "stream", "async", "status", "cancel", "list", "test", "close"),
    ]
    assert tool.output_schema is not None
    assert tool.output_schema["properties"]["output"]["type"] == "string"
    assert tool.description is not None
    for word in (
        *("Python", "variables and imports do not stay", "as long as the sandbox lives", "10 minutes"),
        "Only what is printed comes back, and there is no input",
    ):
        assert word in tool.description
    assert tool.annotations is not None
    assert tool.annotations.destructive_hint
    assert not tool.annotations.read_only_hint


@pytest.mark.parametrize("era", ["legacy", "auto"])
async def test_the_program_offers_tools_alone_and_says_what_they_are_for(era: str) -> None:
    async with (
        rig() as r,
        over_http(_serve.make_server(r.manager, file_tools=False)[0]) as url,
        connect(url, era) as client,
    ):
        assert client.server_capabilities.tools is not None
        assert client.server_capabilities.prompts is None
        assert client.server_capabilities.resources is None
        assert "run_sandbox runs code" in (client.instructions or "")


async def test_advice_is_in_structured_content_too(client: Client) -> None:
    result = await call(client, mode="status", frob=1)
    assert result.is_error
    assert result.structured_content == {"note": text_of(result)}
    assert "no such parameter: `frob`" in text_of(result)


async def test_a_timeout_above_the_limit_is_taken_as_the_limit_with_a_note(r: Rig, client: Client) -> None:
    r.sandbox.script("ExecuteStream", [end()])
    assert "`timeout_ms` was taken as 120000" in (await run(client, "1", timeout_ms=600_000))["note"]
    assert (await r.sandbox.wait_for_call("ExecuteStream")).request.timeout_ms == 120_000


async def test_what_a_script_is_called_comes_without_an_empty_description(r: Rig, client: Client) -> None:
    r.sandbox.script("ExecuteStream", [end(ExecutionOutcome(True, cached=CacheEntry("script-1", "")))])
    assert (await run(client, "1"))["cached"] == {"name": "script-1"}


# What a sandbox has

FOUND = {"python": "3.12.1", "packages": ["numpy", "pandas"], "network": True, "pip": True}


@pytest.mark.parametrize(
    ("found", "end_of_it"),
    [
        ({}, "installs a package for later executions."),
        ({"network": False}, "They have no network, so nothing can be installed."),
        ({"pip": False, "network": None}, "Nothing can be installed with pip."),
    ],
)
async def test_the_model_is_told_what_a_sandbox_has(found: dict[str, Any], end_of_it: str) -> None:
    async with rig(learn_environment=True) as r, Client(r.server, mode="legacy") as client:
        r.sandbox.script("ExecuteStream", [end()])
        r.sandbox.script("Execute", ExecutionResult(True, json.dumps(FOUND | found)))
        own = ExecutionInfo("e1", ExecutionState.COMPLETED, code_preview=f"{_environment.MARK}\nimport json")
        r.sandbox.script("ListExecutions", [own])
        note = (await run(client, ""))["note"]
        assert note.startswith("Sandboxes have Python 3.12.1 with numpy, pandas; importlib.metadata lists")
        assert note.endswith(end_of_it)
        assert "note" not in await run(client, ""), "said once"
        tool = (await client.list_tools()).tools[0]
        assert (tool.description or "").endswith(note)
        assert (await run(client, mode="list"))["executions"] == [], "the model has not asked for it"
        assert [call.rpc for call in r.sandbox.calls].count("Execute") == 1


@pytest.mark.parametrize(
    "answer", [FakeStatus("INTERNAL"), ExecutionResult(True, "{}"), ExecutionResult(False)]
)
async def test_a_sandbox_that_does_not_say_what_it_has_is_asked_a_few_times_only(answer: object) -> None:
    async with rig(learn_environment=True) as r, Client(r.server, mode="legacy") as client:
        r.sandbox.script("ExecuteStream", [end()])
        r.sandbox.script("Execute", answer)
        for _ in range(5):
            assert "note" not in await run(client, "")
        assert [call.rpc for call in r.sandbox.calls].count("Execute") == 3


# execute and stream


async def test_execute_returns_both_outputs_in_the_order_of_their_coming(r: Rig, client: Client) -> None:
    entry = CacheEntry("script-1", "adds")
    r.sandbox.script(
        "ExecuteStream",
        [
            out("1\n"),
            err("oh\n"),
            out("2\n"),
            end(ExecutionOutcome(True, ExecutionState.COMPLETED, None, 7, entry)),
        ],
    )
    assert await run(client, "print(1)", timeout_ms=2500) == {
        "success": True,
        "state": "COMPLETED",
        "execution_id": "e1",
        "output": "1\noh\n2\n",
        "execution_time_ms": 7,
        "cached": {"name": "script-1", "description": "adds"},
    }
    request = (await r.sandbox.wait_for_call("ExecuteStream")).request
    assert (request.code, request.timeout_ms) == ("print(1)", 2500)


async def test_stream_returns_them_apart(r: Rig, client: Client) -> None:
    r.sandbox.script("ExecuteStream", [out("1\n"), err("oh\n"), out("2\n"), end()])
    result = await run(client, cached="script-1", mode="stream")
    assert (result["output"], result["error_output"]) == ("1\n2\n", "oh\n")
    request = (await r.sandbox.wait_for_call("ExecuteStream")).request
    assert (request.cached, request.HasField("timeout_ms")) == ("script-1", False)


@pytest.mark.parametrize("code", ["", "[1, 2]", '{"a": 1}', "null", "12", '"text"'])
async def test_code_arrives_as_it_is(r: Rig, client: Client, code: str) -> None:
    r.sandbox.script("ExecuteStream", [end()])
    await run(client, code, mode=None, cached="", execution_id="", timeout_ms=None, states=None, wait=None)
    assert (await r.sandbox.wait_for_call("ExecuteStream")).request.code == code


async def test_a_script_that_fails_is_a_result(r: Rig, client: Client) -> None:
    failed = ExecutionOutcome(False, ExecutionState.FAILED, "ValueError: no\n" + "x" * 20_000 + " the end")
    r.sandbox.script("ExecuteStream", [end(failed)])
    result = await run(client, "raise ValueError")
    assert (result["success"], result["state"]) == (False, "FAILED")
    assert result["error"].startswith("ValueError: no\nxxx")
    assert result["error"].endswith("xxx the end")
    assert "characters left out" in result["error"]
    assert len(result["error"]) < 8_100


async def test_a_script_that_timed_out_is_an_error_with_what_it_printed(r: Rig, client: Client) -> None:
    late = ExecutionOutcome(False, ExecutionState.TIMEOUT, "timed out after 2000 ms")
    r.sandbox.script("ExecuteStream", [out("so far"), end(late)])
    result = await call(client, "while True: pass", timeout_ms=2000)
    assert result.is_error
    text = text_of(result)
    assert "longer than 2,000 ms" in text
    assert "`timeout_ms` (at most 120,000)" in text
    assert result.structured_content is not None
    assert result.structured_content["output"] == "so far"
    assert "timeout_ms" not in await refused(client, "while True: pass", timeout_ms=120_000)


async def test_huge_output_is_cut_and_the_note_leads_to_the_rest(r: Rig, client: Client) -> None:
    r.sandbox.script("ExecuteStream", [out("abcdef"), err("ERR"), out("ghijkl"), err("OR"), out("m"), end()])
    result = await run(client, "...")
    assert (result["output"], result["truncated"]) == ("abcdefERRg", True)
    assert (result["output_offset"], result["error_output_offset"]) == (7, 3)
    assert "8 more characters" in result["note"]
    assert "'status', execution_id 'e1', output_offset 7, error_output_offset 3" in result["note"]

    # A server whose units are its own: the tool never sends it an offset.
    whole = ExecutionStatus(
        "e1", ExecutionState.COMPLETED, "abcdefghijklm", "ERROR", output_length=99, result=DONE
    )
    r.sandbox.script("GetExecution", whole)
    rest = await run(client, mode="status", execution_id="e1", output_offset=7, error_output_offset=3)
    assert (rest["output"], rest["error_output"]) == ("hijklm", "OR")
    assert (rest["output_offset"], rest["error_output_offset"]) == (13, 5)
    assert "truncated" not in rest
    assert (await r.sandbox.wait_for_call("GetExecution")).request.output_offset == 0


async def test_each_of_two_outputs_is_cut_by_itself(r: Rig, client: Client) -> None:
    r.sandbox.script("ExecuteStream", [out("o" * 9), err("e" * 11), end()])
    result = await run(client, "...", mode="stream")
    assert (result["output"], result["error_output"]) == ("o" * 9, "e" * 10)
    assert (result["output_offset"], result["error_output_offset"]) == (9, 10)
    assert "1 more characters" in result["note"]


async def test_an_output_that_is_just_not_too_long_is_whole(r: Rig, client: Client) -> None:
    r.sandbox.script("ExecuteStream", [out("0123456789"), end()])
    result = await run(client, "...")
    assert result["output"] == "0123456789"
    assert not result.keys() & {"truncated", "note", "output_offset"}


# async, status, cancel, list


async def test_async_starts_and_status_follows(r: Rig, client: Client) -> None:
    r.sandbox.script("ExecuteAsync", StartedExecution("e1", ExecutionState.PENDING))
    assert await run(client, "x", mode="async") == {"execution_id": "e1", "state": "PENDING"}
    r.sandbox.script("GetExecution", ExecutionStatus("e1", ExecutionState.RUNNING, "0123", ""))
    first = await run(client, mode="status", execution_id="e1")
    assert (first["output"], first["output_offset"], first["state"]) == ("0123", 4, "RUNNING")
    r.sandbox.script(
        "GetExecution", ExecutionStatus("e1", ExecutionState.COMPLETED, "0123456", "", result=DONE)
    )
    then = await run(client, mode="status", execution_id="e1", output_offset=first["output_offset"])
    assert (then["output"], then["success"]) == ("456", True)


async def test_status_waits_for_the_end(r: Rig, client: Client) -> None:
    ended = asyncio.Event()

    async def answer(request: Any) -> ExecutionStatus:
        await ended.wait()
        return ExecutionStatus("e1", ExecutionState.FAILED, result=ExecutionOutcome(False))

    r.sandbox.script("GetExecution", answer)
    waiting = asyncio.create_task(run(client, mode="status", execution_id="e1", wait=True))
    assert (await r.sandbox.wait_for_call("GetExecution")).request.wait
    ended.set()
    assert (await waiting)["state"] == "FAILED"


async def test_status_waits_no_longer_than_it_is_told_and_that_is_no_error(r: Rig, client: Client) -> None:
    running = ExecutionStatus("e1", ExecutionState.RUNNING, "so far")
    r.sandbox.script("GetExecution", lambda request: NEVER if request.wait else running)
    result = await run(client, mode="status", execution_id="e1", wait=True, timeout_ms=50)
    assert (result["state"], result["output"]) == ("RUNNING", "so far")
    r.sandbox.script("ExecuteStream", [end()])
    await run(client, "1")
    assert [call.rpc for call in r.sandbox.calls].count("Check") == 1, "nobody doubts the sandbox for it"


async def test_cancel_says_what_became_of_it(r: Rig, client: Client) -> None:
    r.sandbox.script("CancelExecution", CancelResult(False, ExecutionState.COMPLETED, "it had ended"))
    assert await run(client, mode="cancel", execution_id="e1") == {
        "success": False,
        "state": "COMPLETED",
        "execution_id": "e1",
        "error": "it had ended",
    }


async def test_list_gives_the_newest_whatever_the_server_does_with_a_limit(r: Rig, client: Client) -> None:
    states = ExecutionState.RUNNING, ExecutionState.FAILED
    r.sandbox.script(
        "ListExecutions",
        lambda request: tuple(ExecutionInfo(f"e{n}", states[n % 2], started_at_ms=n) for n in range(30)),
    )
    result = await run(
        client, mode="list", limit=2, states=["RUNNING", "FAILED"], include_completed_within_ms=5000
    )
    assert [execution["execution_id"] for execution in result["executions"]] == ["e29", "e28"]
    request = (await r.sandbox.wait_for_call("ListExecutions")).request
    assert (list(request.states), request.limit, request.include_completed_within_ms) == ([2, 4], 0, 5000)
    assert len((await run(client, mode="list"))["executions"]) == 20


# test


async def test_tests_are_reported_those_that_failed_first(r: Rig, client: Client) -> None:
    tests = tuple(TestResult(f"t{n}", n != 249, "no" if n == 249 else None, n) for n in range(250))
    r.sandbox.script(
        "ExecuteTest",
        TestReport(False, TestSummary(250, 249, 1, 0), tests, "printed, and a lot", execution_time_ms=3),
    )
    result = await run(client, "def f(): ...", mode="test", tests="def test(): ...", timeout_ms=9000)
    assert result["tests"][0] == {"name": "t249", "passed": False, "error": "no", "duration_ms": 249}
    assert len(result["tests"]) == 200
    assert result["summary"] == {"total": 250, "passed": 249, "failed": 1, "skipped": 0}
    assert (result["output"], result["success"]) == ("printed, a", False)
    assert "Only 200 of 250 tests" in result["note"]
    assert "8 more characters" in result["note"]
    request = (await r.sandbox.wait_for_call("ExecuteTest")).request
    assert (request.code, request.tests, request.timeout_ms) == ("def f(): ...", "def test(): ...", 9000)


async def test_a_report_is_no_longer_than_other_results(r: Rig, client: Client) -> None:
    tests = tuple(TestResult("t" * 5_000, False, "e" * 5_000, 1) for _ in range(250))
    r.sandbox.script("ExecuteTest", TestReport(False, TestSummary(250, 0, 250, 0), tests, ""))
    result = await run(client, mode="test", tests="...")
    assert len(result["tests"]) == 200, "which ones failed is said of all of them"
    assert result["tests"][0]["error"].startswith("eee"), "of one at least it is said why"
    assert sum(len(test.get("error", "")) for test in result["tests"]) < 2_100
    assert max(len(test["name"]) for test in result["tests"]) < 300
    assert "The errors of 199 more tests are left out" in result["note"]


# What is wrong with a call


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "Mode 'execute' needs `code`, or `cached`"),
        ({"mode": "async", "cached": ""}, "Mode 'async' needs `code`, or `cached`"),
        ({"code": "1", "cached": "a"}, "Both `code` and `cached`"),
        ({"mode": "status"}, "needs `execution_id`"),
        ({"mode": "cancel", "execution_id": ""}, "needs `execution_id`"),
        ({"mode": "test", "code": "1"}, "needs `tests`"),
        ({"code": "1", "timeout_ms": 2**53}, "less than or equal to 120000"),
        ({"mode": "run"}, "'execute', 'stream'"),
        ({"mode": "list", "states": ["GONE"]}, "'PENDING', 'RUNNING'"),
        ({"mode": "status", "execution_id": "e1", "output_offset": -1}, "greater than or equal to 0"),
        ({"mode": "list", "include_completed_within_ms": 1_700_000_000_000}, "less than or equal to"),
        ({"mode": "list", "include_completed_within_ms": 10**400}, "less than or equal to"),
        ({"mode": "status", "execution_id": "e" * 10_000}, "at most 255 characters"),
        ({"mode": "async", "cached": "c" * 10_000}, "at most 255 characters"),
    ],
)
async def test_a_wrong_call_says_what_would_be_right_and_costs_no_sandbox(
    r: Rig, client: Client, arguments: dict[str, Any], text: str
) -> None:
    assert text in await refused(client, **arguments)
    assert r.manager.stats().created == 0


@pytest.mark.parametrize(
    ("rpc", "status", "arguments", "text"),
    [
        (
            "GetExecution",
            FakeStatus("NOT_FOUND"),
            {"mode": "status", "execution_id": "x"},
            "Mode 'list' shows",
        ),
        ("ExecuteTest", FakeStatus("UNIMPLEMENTED"), {"mode": "test", "tests": "x"}, "does not offer"),
        (
            "ExecuteAsync",
            FakeStatus("INVALID_ARGUMENT", "no cached script is named 'x'"),
            {"mode": "async", "cached": "x"},
            "refused the call: no cached script is named 'x'",
        ),
        ("ExecuteStream", FakeStatus("RESOURCE_EXHAUSTED"), {"code": "x"}, "busy: too many executions"),
        ("ExecuteStream", FakeStatus("DEADLINE_EXCEEDED"), {"code": "x"}, "no answer in time"),
        ("ExecuteStream", FakeStatus("UNAVAILABLE"), {"code": "x"}, "lost during the call"),
        ("ExecuteStream", FakeStatus("INTERNAL", "stack"), {"code": "x"}, "failed in an unexpected way"),
    ],
)
async def test_a_failure_tells_the_model_what_to_do_and_nothing_about_the_cluster(
    r: Rig, client: Client, rpc: str, status: FakeStatus, arguments: dict[str, Any], text: str
) -> None:
    r.sandbox.script(rpc, status)
    error = await refused(client, **arguments)
    assert text in error
    assert r.sandbox.target not in error


async def test_what_the_client_refuses_to_send_is_explained(r: Rig) -> None:
    async with Client(r.server, mode="2026-07-28") as client:
        result = await call(client, "print('\ud800')")
        assert result.is_error
        assert "code" in text_of(result)
        assert result.structured_content is not None
        assert result.structured_content.keys() == {"sandbox", "note"}, "it is there, and can be used"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (SandboxManagerClosedError, "shutting down"),
        (SandboxCapacityError, "All sandboxes are taken"),
        (SandboxTimeoutError, "not ready in time"),
        (SandboxUnavailableError, "cannot be reached"),
        (SandboxPermissionError, "operator"),
        (SandboxFailedError, "operator"),
        (SandboxConflictError, "No sandbox could be made"),
    ],
)
def test_why_there_is_no_sandbox_is_said_without_details(error: type[SandboxError], text: str) -> None:
    said = _texts.no_sandbox(error("10.0.0.7 in namespace prodisco"))
    assert text in said
    assert "Nothing was run" in said
    assert "10.0.0.7" not in said


# Progress


async def test_output_is_reported_while_it_comes(r: Rig, client: Client) -> None:
    go_on = asyncio.Event()
    r.sandbox.script("ExecuteStream", [out("first"), go_on, err("second"), end()])
    seen: list[tuple[float, str | None]] = []
    arrived = asyncio.Event()

    async def on_progress(progress: float, total: float | None, message: str | None) -> None:
        seen.append((progress, message))
        arrived.set()

    calling = asyncio.create_task(
        client.call_tool("run_sandbox", {"code": "x"}, progress_callback=on_progress)
    )
    async with asyncio.timeout(PATIENCE):
        await arrived.wait()
    assert seen[0][1] == "first"
    assert not calling.done(), "the script goes on"
    go_on.set()
    result = await calling
    assert [message for _, message in seen] == ["first", "second"], "all of it before the result"
    assert seen[0][0] < seen[1][0]
    assert not result.is_error


async def test_a_great_deal_of_progress_is_shortened(r: Rig, client: Client) -> None:
    r.sandbox.script("ExecuteStream", [out("x" * 6000), end()])
    seen = await progress_of(client)
    assert seen == ["x" * 4000 + "\n[... 2,000 characters left out ...]\n"]


async def test_a_client_that_does_not_read_does_not_hold_up_the_script(
    r: Rig, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck = asyncio.Event()

    async def report_progress(*_: object, **__: object) -> None:
        await stuck.wait()

    monkeypatch.setattr(Context, "report_progress", report_progress)
    monkeypatch.setattr(_progress, "FLUSH_TIMEOUT", 0.05)
    r.sandbox.script("ExecuteStream", [out("x"), out("y"), end()])
    async with asyncio.timeout(PATIENCE):
        assert await progress_of(client) == []


async def test_a_silent_script_shows_that_it_lives(
    r: Rig, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_progress, "HEARTBEAT", 0.05)
    monkeypatch.setattr(_progress, "INTERVAL", 0.01)
    quiet = asyncio.Event()
    r.sandbox.script("ExecuteStream", [quiet, end()])
    seen: list[str | None] = []

    async def on_progress(progress: float, total: float | None, message: str | None) -> None:
        seen.append(message)
        if message == "[running]":
            quiet.set()

    async with asyncio.timeout(PATIENCE):
        await client.call_tool("run_sandbox", {"code": "x"}, progress_callback=on_progress)
    assert "[running]" in seen
    assert set(seen) <= {"[running]", "[waiting for a sandbox]"}


async def progress_of(client: Client) -> list[str | None]:
    seen: list[str | None] = []

    async def on_progress(progress: float, total: float | None, message: str | None) -> None:
        seen.append(message)

    await client.call_tool("run_sandbox", {"code": "x"}, progress_callback=on_progress)
    return seen
