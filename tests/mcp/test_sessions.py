"""Which sandbox is it? Sessions, handles, principals, and what is refused."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import anyio
import pytest
from mcp import Client
from mcp.server import MCPServer
from mcp.server.mcpserver import Context

from prodisco_sandbox import SandboxClient, SandboxManager, SandboxManagerConfig
from prodisco_sandbox.mcp import (
    _identity,
    _progress,
    _sandboxes,
    add_sandbox_tools,
    sandbox_lifespan,
    session_key,
)
from prodisco_sandbox.results import ExecutionChunk, ExecutionOutcome, ExecutionState
from prodisco_sandbox.testing import NEVER, FakeSandboxServer, FakeStatus
from tests.support.fake_servers import broken
from tests.support.mcp_server import (
    ERAS,
    Rig,
    call,
    connect,
    open_session,
    over_http,
    refused,
    rig,
    run,
    text_of,
    tool_call,
)
from tests.support.patience import PATIENCE, put_forward, until

MODERN = "2026-07-28"
DONE = ExecutionChunk("e1", "result", result=ExecutionOutcome(True, ExecutionState.COMPLETED))


# Sessions up to 2025-11-25


async def test_a_session_over_http_has_one_sandbox_which_ends_with_it() -> None:
    async with rig() as r, over_http(r.server) as url:
        async with connect(url, "legacy") as one, connect(url, "legacy") as two:
            for client in (one, two, one):
                assert "sandbox" not in await run(client, ""), "no handle: the session says it"
            assert r.manager.stats().created == 2
        await until(lambda: not r.api.objects)
        assert r.manager.stats().reaped == 0


async def test_a_connection_on_a_duplex_transport_is_a_session() -> None:
    async with rig() as r, Client(r.server, mode="legacy") as one:
        async with Client(r.server, mode="legacy") as two:
            for client in (one, two, one):
                assert "sandbox" not in await run(client, "")
            assert r.manager.stats().created == 2
        await until(lambda: len(r.api.objects) == 1)
        await run(one, "")
        assert r.manager.stats().created == 2


async def test_a_session_that_ends_while_its_sandbox_is_made_leaves_none() -> None:
    async with rig() as r, over_http(r.server) as url:
        r.api.faults.add("create", latency=0.2, times=1)
        async with connect(url, "legacy") as client, anyio.create_task_group() as tasks:
            tasks.start_soon(call, client, "")
            await r.api.until(lambda: r.api.count("create"))
            tasks.cancel_scope.cancel()
        await until(lambda: r.manager.stats().closing == 0 and not r.manager.stats().creating)
        assert r.api.objects == []


# One client


async def test_a_process_with_one_client_has_a_default_sandbox() -> None:
    async with (
        rig(session_key=_identity.one_client()) as r,
        Client(r.server, mode=MODERN) as one,
        Client(r.server, mode=MODERN) as two,
    ):
        for client in (one, two, one):
            assert "sandbox" not in await run(client, ""), "no handle is needed"
        assert r.manager.stats().created == 1
        own = (await run(two, "", sandbox="New"))["sandbox"]
        assert (await run(one, "", sandbox=own))["sandbox"] == own
        assert r.manager.stats().created == 2
        assert "handle" in await refused(one, mode="list", sandbox="new")
        assert r.manager.stats().created == 2


async def test_a_session_can_have_a_sandbox_with_a_handle_besides_its_own() -> None:
    async with rig() as r, Client(r.server, mode="legacy") as client:
        assert "sandbox" not in await run(client, "")
        assert "sandbox" in await run(client, "", sandbox="new")
        assert r.manager.stats().created == 2


@pytest.mark.parametrize("wanted", [False, True])
async def test_gateways_can_route_by_the_handle_if_it_is_wanted(wanted: bool) -> None:
    seen: list[str | None] = []

    def spied(ctx: Context[Any, Any]) -> None:
        seen.append((ctx.headers or {}).get("mcp-param-sandbox"))

    async with (
        rig(sandbox_header=wanted, principal=spied) as r,
        over_http(r.server) as url,
        connect(url, MODERN) as client,
    ):
        for tool in (await client.list_tools()).tools:
            assert ("x-mcp-header" in tool.input_schema["properties"]["sandbox"]) == wanted
        handle = (await run(client, ""))["sandbox"]
        assert (await run(client, "", sandbox=handle))["sandbox"] == handle
        assert seen[-1] == (handle if wanted else None)


# Spoofed headers


@pytest.mark.parametrize(("era", "stateless"), [("legacy", True), (MODERN, True), (MODERN, False)], ids=str)
async def test_a_session_id_that_is_only_a_header_leads_to_nobodys_sandbox(era: str, stateless: bool) -> None:
    seen: list[str | None] = []

    def spied(ctx: Context[Any, Any]) -> str | None:
        # The header reaches the tool, which is why it must not be believed.
        assert ctx.headers is not None
        seen.append(ctx.headers.get("mcp-session-id"))
        return session_key(ctx)

    async with rig(session_key=spied) as r, over_http(r.server, stateless_http=stateless) as url:
        victim = "0123456789abcdef0123456789abcdef"
        if not stateless:
            async with open_session(url) as victim:
                await tool_call(url, victim)
                await spoof(url, era, victim)
        else:
            await spoof(url, era, victim)
            await spoof(url, era, victim)
        assert seen[-1] == victim
        assert r.manager.stats().created == 2, "each call had a sandbox of its own"


async def spoof(url: str, era: str, session_id: str) -> None:
    async with connect(url, era, mcp_session_id=session_id) as mallory:
        assert "sandbox" in await run(mallory, ""), "a handle, for it has no session"


async def test_the_header_of_another_session_counts_for_nothing() -> None:
    """The SDK finds the connection by the header; here it is as if it did not."""

    class Headers(dict[str, str]):
        pass

    async with rig() as r, Client(r.server, mode="legacy") as client:
        keys: list[str | None] = []

        async def probe(ctx: Context[Any, Any]) -> str:
            connection = ctx.request_context.session._connection
            connection.session_id = "own"
            for shown in ("own", "other", "", None):
                headers = {} if shown is None else {"mcp-session-id": shown}
                ctx.request_context.request = type("Request", (), {"headers": headers})()
                keys.append(session_key(ctx))
            return "ok"

        r.server.add_tool(probe)
        await client.call_tool("probe", {})
        assert keys[0] is not None
        assert keys[1:] == [None, None, None]
        assert "own" not in keys[0], "the id itself stays where it is"


async def test_should_the_sdk_hide_its_connections_everybody_gets_handles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_identity, "Connection", type("Other", (), {}))
    async with rig() as r, Client(r.server, mode="legacy") as client:
        handle = (await run(client, ""))["sandbox"]
        assert (await run(client, "", sandbox=handle))["sandbox"] == handle


# Handles, from 2026-07-28


async def test_a_handle_leads_back_to_its_sandbox_and_none_to_a_new_one() -> None:
    async with rig() as r, over_http(r.server) as url:
        async with connect(url, MODERN) as client:
            first = (await run(client, ""))["sandbox"]
            second = (await run(client, "", sandbox=""))["sandbox"]
            assert first != second
            assert (await run(client, "", sandbox=first))["sandbox"] == first
        # The bearer of a handle is whoever shows it, where nobody is authenticated.
        async with connect(url, MODERN) as other:
            assert (await run(other, "", sandbox=first))["sandbox"] == first
        assert r.manager.stats().created == 2
        await asyncio.sleep(0.1)
        assert len(r.api.objects) == 2, "the end of a request, or of a client, closes nothing"


@pytest.mark.parametrize("mode", ["status", "cancel", "list"])
async def test_a_question_about_executions_needs_a_handle(mode: str) -> None:
    async with rig() as r, Client(r.server, mode=MODERN) as client:
        assert "needs `sandbox`" in await refused(client, mode=mode, execution_id="e1")
        assert r.manager.stats().created == 0


async def test_forged_foreign_and_old_handles_are_refused_alike() -> None:
    async with rig() as before, Client(before.server, mode=MODERN) as client:
        old = (await run(client, ""))["sandbox"]
    async with rig(auth=True) as r, over_http(r.server) as url:
        async with connect(url, MODERN, token="alice") as alice, connect(url, MODERN, token="bob") as bob:
            hers = (await run(alice, ""))["sandbox"]
            texts = {
                await refused(bob, "", sandbox=handle)
                for handle in (hers, old, "sbx_" + "A" * 43, "sbx_", "default", hers[:-2], "\N{OWL}")
            }
            assert len(texts) == 1, "nothing shows that hers exists"
            assert "mistyped, not yours, or from before the server was restarted" in texts.pop()
            assert (await run(alice, "", sandbox=hers))["sandbox"] == hers
        assert r.manager.stats().created == 1


async def test_a_session_is_bound_to_who_opened_it() -> None:
    async with rig(auth=True) as r, over_http(r.server) as url:
        async with open_session(url, token="alice") as session_id:
            assert (await tool_call(url, session_id, token="alice")).status_code == 200
            assert (await tool_call(url, session_id, token="bob")).status_code == 404
        assert r.manager.stats().created == 1


async def test_an_author_may_say_who_asks() -> None:
    who = "alice"
    async with rig(principal=lambda ctx: who) as r, over_http(r.server) as url:
        async with connect(url, "legacy") as session, connect(url, MODERN) as client:
            await run(session, "")
            handle = (await run(client, ""))["sandbox"]
            who = "bob"
            await run(session, "")
            assert r.manager.stats().created == 3, "a session is its principal's alone"
            assert "not yours" in await refused(client, "", sandbox=handle)
        await until(lambda: len(r.api.objects) == 1)


async def test_a_secret_makes_handles_valid_after_a_restart_with_a_word_of_warning() -> None:
    secret = "kept in the environment"
    async with rig(handle_secret=secret) as r, Client(r.server, mode=MODERN) as client:
        handle = (await run(client, ""))["sandbox"]
    async with rig(handle_secret=secret) as r, Client(r.server, mode=MODERN) as client:
        result = await run(client, "", sandbox=handle)
        assert "may be a new, empty sandbox" in result["note"]
        assert "note" not in await run(client, "", sandbox=handle), "said once"


# A cap for each principal


async def test_one_caller_cannot_take_all_slots() -> None:
    async with rig(auth=True, settings={"max_sessions": 5}) as r, over_http(r.server) as url:
        async with connect(url, MODERN, token="alice") as alice, connect(url, MODERN, token="bob") as bob:
            # At once: the cap is counted before anything is awaited.
            results = await asyncio.gather(*(call(alice, "") for _ in range(5)))
            handles = [(r.structured_content or {}).get("sandbox") for r in results if not r.is_error]
            assert len(handles) == 2, "half of the slots"
            errors = {text_of(result) for result in results if result.is_error}
            assert "You have 2 sandboxes" in errors.pop()
            assert not errors
            await run(alice, "", sandbox=handles[0])
            await run(bob, "")
            # A session counts like a handle; it is the same person.
            async with connect(url, "legacy", token="alice") as session:
                assert "You have 2 sandboxes" in await refused(session, "")
                for key in r.manager.sessions:
                    await r.manager.on_session_closed(key)
                await run(session, "")
        assert r.manager.stats().created == 4


async def test_callers_who_cannot_be_told_apart_share_all_slots() -> None:
    async with rig(settings={"max_sessions": 3}) as r, Client(r.server, mode=MODERN) as client:
        for _ in range(3):
            await run(client, "")
        text = await refused(client, "")
        assert "All sandboxes are taken" in text
        assert "try again" in text
        assert r.manager.stats().created == 3


# What the model is told about its sandbox


@pytest.mark.parametrize("era", ERAS)
async def test_who_comes_back_after_a_reap_is_told_once_that_the_files_are_gone(
    era: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"session_idle_timeout": 600.0, "idle_check_interval": 60.0}
    async with rig(settings=settings) as r, Client(r.server, mode=era) as client:
        known = {"sandbox": handle} if (handle := (await run(client, "")).get("sandbox")) else {}
        (key,) = r.manager.sessions
        put_forward(monkeypatch, 700.0)
        await until(lambda: r.manager.stats().reaped == 1 and not r.api.objects)
        r.sandbox.script("ExecuteTest", NEVER)
        async with r.manager.session(key):  # Made again, and not reaped any more.
            async with anyio.create_task_group() as tasks:  # Cancelled before it could be told.
                tasks.start_soon(lambda: run(client, "", mode="test", tests="x", **known))
                await r.sandbox.wait_for_call("ExecuteTest")
                tasks.cancel_scope.cancel()
            result = await run(client, "", **known)
            assert "This is a new sandbox" in result["note"]
            assert "gone" in result["note"]
            assert "note" not in await run(client, "", **known)
        assert r.manager.stats().recreated == 1


async def restart_in_place(r: Rig, key: str) -> None:
    """The session's server is another one, in the same sandbox."""
    await r.sandbox.kill()
    await r.sandbox.start()
    await broken(await r.manager.get_client(key))


SUSPENDS = {"on_idle": "suspend", "workspace_storage": "1Gi"}


@pytest.mark.parametrize("era", ERAS)
async def test_who_comes_back_after_a_suspension_is_told_once_what_was_kept(
    era: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rig(settings=SUSPENDS) as r, Client(r.server, mode=era) as client:
        known = {"sandbox": handle} if (handle := (await run(client, "")).get("sandbox")) else {}
        (key,) = r.manager.sessions
        put_forward(monkeypatch, 700.0)
        await until(lambda: r.manager.stats().suspended == 1)
        async with r.manager.session(key):
            note = (await run(client, "", **known))["note"]
            assert "The sandbox was restarted" in note
            assert "Files in the working directory were kept; other files, processes" in note
            assert "gone" not in note
            assert "note" not in await run(client, "", **known)
        assert (r.manager.stats().resumed, r.manager.stats().recreated) == (1, 0)


@pytest.mark.parametrize("settings", [{}, {"workspace_storage": "1Gi"}, SUSPENDS])
async def test_files_are_said_to_be_kept_only_where_they_are(settings: dict[str, Any]) -> None:
    async with rig(settings=settings) as r, Client(r.server, mode=MODERN) as client:
        handle = (await run(client, ""))["sandbox"]
        (key,) = r.manager.sessions
        (sandbox,) = r.api.objects
        r.api.delete_now(sandbox["metadata"]["name"])
        await until(lambda: not r.manager.has_session(key))
        assert "This is a new sandbox" in (await run(client, "", sandbox=handle))["note"]
        await restart_in_place(r, key)
        note = (await run(client, "", sandbox=handle))["note"]
        assert ("Files in the working directory were kept" in note) == bool(settings)
        assert ("This is a new sandbox" in note) == (not settings)


async def test_that_files_are_gone_is_said_even_if_the_next_ones_were_kept() -> None:
    async with rig(settings=SUSPENDS) as r, Client(r.server, mode=MODERN) as client:
        handle = (await run(client, ""))["sandbox"]
        (key,) = r.manager.sessions
        await r.manager.on_session_closed(key)
        r.sandbox.script("ExecuteTest", NEVER)
        async with anyio.create_task_group() as tasks:  # Cancelled before it could be told.
            tasks.start_soon(lambda: run(client, "", mode="test", tests="x", sandbox=handle))
            await r.sandbox.wait_for_call("ExecuteTest")
            tasks.cancel_scope.cancel()
        await restart_in_place(r, key)
        assert "This is a new sandbox" in (await run(client, "", sandbox=handle))["note"]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, "The sandbox is closed after 10 minutes without use, and its files are gone then."),
        (
            {**SUSPENDS, "session_idle_timeout": 60.0},
            "The sandbox is suspended after 60 seconds without use: files in the working directory are kept"
            " for 24 hours then, nothing else is.",
        ),
        ({**SUSPENDS, "suspended_for": 3600.0}, " are kept for 60 minutes then"),
        ({"workspace_storage": "1Gi"}, " and its files are gone then."),
        (
            {"when_full": "evict"},
            " after 10 minutes without use, or 30 seconds if others need its place, and its files are gone",
        ),
        ({"on_idle": "suspend", "pod_template_spec": {"spec": {}}}, " and its files are gone then."),
    ],
)
async def test_the_description_says_what_becomes_of_files(settings: dict[str, Any], text: str) -> None:
    async with rig(settings=settings) as r, Client(r.server, mode=MODERN) as client:
        (tool, *_) = (await client.list_tools()).tools
        assert tool.description is not None
        assert text in tool.description


async def test_an_error_tells_it_too() -> None:
    async with rig() as r, Client(r.server, mode=MODERN) as client:
        handle = (await run(client, ""))["sandbox"]
        (key,) = r.manager.sessions
        await r.manager.on_session_closed(key)
        r.sandbox.script("ExecuteStream", [ExecutionChunk("e1", "result", result=timeout())])
        result = await call(client, "", sandbox=handle)
        assert result.is_error
        assert result.structured_content is not None
        assert "This is a new sandbox" in result.structured_content["note"]
        assert result.structured_content["sandbox"] == handle


def timeout() -> ExecutionOutcome:
    return ExecutionOutcome(False, ExecutionState.TIMEOUT, "timed out")


async def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sandboxes, "REMEMBERED", 0)
    async with rig(settings={"max_sessions": 1}) as r, Client(r.server, mode=MODERN) as client:
        for _ in range(2):
            handle = (await run(client, ""))["sandbox"]
            await r.manager.on_session_closed(r.manager.sessions[0])
        sandboxes = r.tools._sandboxes
        assert len(sandboxes._memories) == 1, "of handles that may never come back"
        assert "This is a new sandbox" in (await run(client, "", sandbox=handle))["note"]


# Sandboxes that nobody could come back to


async def test_a_sandbox_whose_handle_nobody_got_is_closed() -> None:
    async with rig() as r, over_http(r.server) as url, connect(url, MODERN) as client:
        r.sandbox.script("ExecuteStream", [ExecutionChunk("e1", "output", "begun"), NEVER])
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(call, client, "...")
            await r.sandbox.wait_for_call("ExecuteStream")
            tasks.cancel_scope.cancel()
        await until(lambda: not r.api.objects)
        assert r.manager.stats().ready == 0


async def test_a_caller_who_goes_while_the_last_output_is_sent_leaves_no_sandbox(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sending = anyio.Event()

    async def report_progress(*_: object, **__: object) -> None:
        sending.set()
        await anyio.sleep_forever()

    monkeypatch.setattr(Context, "report_progress", report_progress)
    monkeypatch.setattr(_progress, "FLUSH_TIMEOUT", 60.0)
    async with rig() as r, over_http(r.server) as url, connect(url, MODERN) as client:
        r.sandbox.script("ExecuteStream", [ExecutionChunk("e1", "output", "begun"), DONE])
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(call, client, "...")
            stream = await r.sandbox.wait_for_call("ExecuteStream")
            await stream.ended.wait()
            await sending.wait()
            await anyio.sleep(0.1)
            tasks.cancel_scope.cancel()
        await until(lambda: not r.api.objects)


async def test_a_sandbox_that_could_not_be_had_leaves_no_trace() -> None:
    async with rig() as r, Client(r.server, mode=MODERN) as client:
        r.api.faults.add("create", error=403, times=1)
        text = await refused(client, "")
        assert "operator has to look into its log" in text
        assert r.api.objects == []
        assert "sandbox" in await run(client, "")


# Cancellation


async def cancelled_once_it_prints(client: Client, **known: str) -> None:
    """Calls the tool, and cancels it when output has come, and with it the execution's id."""
    printed = anyio.Event()

    async def on_progress(progress: float, total: float | None, message: str | None) -> None:
        printed.set()

    async def talk() -> None:
        await client.call_tool("run_sandbox", {"code": "...", **known}, progress_callback=on_progress)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(talk)
        with anyio.fail_after(PATIENCE):
            await printed.wait()
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize("era", ERAS)
@pytest.mark.parametrize("transport", ["memory", "http"])
async def test_a_cancelled_call_cancels_the_execution(era: str, transport: str) -> None:
    async with rig() as r, over_http(r.server) as url:
        client_context = Client(r.server, mode=era) if transport == "memory" else connect(url, era)
        async with client_context as client:
            known = {"sandbox": handle} if (handle := (await run(client, "")).get("sandbox")) else {}
            r.sandbox.script("ExecuteStream", [ExecutionChunk("e1", "output", "begun"), NEVER])
            await cancelled_once_it_prints(client, **known)
            stream = await r.sandbox.wait_for_call("ExecuteStream", count=2)
            cancel = await r.sandbox.wait_for_call("CancelExecution")
            assert cancel.request.execution_id == "e1"
            async with asyncio.timeout(PATIENCE):
                await stream.ended.wait()
            assert stream.outcome == "cancelled"
            r.sandbox.script("ExecuteStream", [DONE])
            assert "note" not in await run(client, "", **known), "the sandbox is the same"


async def test_a_cancel_that_comes_too_late_does_no_harm(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "prodisco_sandbox.mcp")
    async with rig() as r, Client(r.server, mode="legacy") as client:
        r.sandbox.script("CancelExecution", FakeStatus("NOT_FOUND"))
        r.sandbox.script("ExecuteStream", [ExecutionChunk("e1", "output", "begun"), NEVER], [DONE])
        await cancelled_once_it_prints(client)
        await r.sandbox.wait_for_call("CancelExecution")
        await until(lambda: "cancel_failed" in caplog.text)
        assert (await run(client, ""))["success"]


async def test_a_cancelled_wait_leaves_the_execution_alone() -> None:
    async with rig() as r, Client(r.server, mode="legacy") as client:
        r.sandbox.script("GetExecution", NEVER)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: call(client, mode="status", execution_id="e1", wait=True))
            waiting = await r.sandbox.wait_for_call("GetExecution")
            tasks.cancel_scope.cancel()
        async with asyncio.timeout(PATIENCE):
            await waiting.ended.wait()
        assert [call.rpc for call in r.sandbox.calls if call.rpc not in ("Check", "GetExecution")] == []


# Policies, single mode, life


async def test_an_author_may_say_which_sandbox_it_is() -> None:
    async with rig(session_key=lambda ctx: "everybody") as r:
        async with Client(r.server, mode=MODERN) as one, Client(r.server, mode="legacy") as two:
            for client in (one, two):
                assert "sandbox" not in await run(client, "")
            assert (await r.manager.get_client("everybody")).in_flight == 0
        await asyncio.sleep(0.05)
        assert r.manager.stats().created == 1


async def test_a_session_of_an_authors_policy_outlives_its_connections() -> None:
    async with rig(session_key=lambda ctx: "everybody") as r, Client(r.server, mode="legacy") as keeper:
        async with Client(r.server, mode="legacy") as client:
            await run(client, "")
        await run(keeper, "")
        assert r.manager.stats().created == 1


async def test_in_single_mode_all_share_one_sandbox_without_handles() -> None:
    async with FakeSandboxServer() as sandbox:
        config = SandboxManagerConfig.from_env(
            {"SANDBOX_TCP_PORT": sandbox.target.rpartition(":")[2]}, mode="single"
        )
        manager = SandboxManager(config)
        server = MCPServer("test", lifespan=sandbox_lifespan(manager))
        add_sandbox_tools(server, manager)
        async with Client(server, mode=MODERN) as client:
            assert not {"sandbox", "note"} & (await run(client, "", sandbox="made up")).keys()
            await run(client, mode="list")


async def test_a_lifespan_is_counted() -> None:
    async with rig() as r:
        lifespan = sandbox_lifespan(r.manager)
        async with lifespan(r.server) as manager:
            async with lifespan(r.server):
                await manager.get_client("s")
            assert manager.stats().ready == 1, "the first is still in it"
        assert manager.stats().ready == 0
        assert r.api.objects == []


async def test_a_server_that_drains_takes_no_calls_and_waits_for_those_it_has() -> None:
    async with rig() as r, Client(r.server, mode="legacy") as client:
        go_on = asyncio.Event()
        r.sandbox.script("ExecuteStream", [go_on, DONE])
        last = asyncio.create_task(run(client, ""))
        await r.sandbox.wait_for_call("ExecuteStream")
        assert not await r.tools.drain(0.01)
        assert "shutting down" in await refused(client, "")
        draining = asyncio.create_task(r.tools.drain(PATIENCE))
        await asyncio.sleep(0)
        assert not draining.done()
        go_on.set()
        assert await draining
        assert (await last)["success"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_per_principal": 0}, "max_per_principal is 0"),
        ({"max_output": -1}, "max_output is -1"),
        ({"max_output": "5"}, "max_output is '5'"),
        ({"handle_secret": "short"}, "handle_secret is too short"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], text: str) -> None:
    manager = SandboxManager(SandboxManagerConfig(mode="single"))
    with pytest.raises(ValueError, match=text):
        add_sandbox_tools(MCPServer("test"), manager, **options)


async def test_handles_and_session_ids_are_in_no_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "prodisco_sandbox")
    caplog.set_level(logging.INFO, "mcp")
    async with (
        rig() as r,
        over_http(r.server) as url,
        connect(url, MODERN) as client,
        open_session(url) as session_id,
    ):
        handle = (await run(client, ""))["sandbox"]
        await refused(client, "", sandbox=handle[:-3] + "AAA")
        await tool_call(url, session_id)
        r.sandbox.script("ExecuteStream", [ExecutionChunk("e1", "result", result=timeout())])
        await refused(client, "", sandbox=handle)
    log = "\n".join(record.getMessage() for record in caplog.records if "streamable_http" not in record.name)
    assert "sandbox_ready" in log
    assert handle[4:30] not in log
    assert session_id not in log


CALLS = {"execute": "ExecuteStream", "async": "ExecuteAsync", "test": "ExecuteTest"}


@pytest.mark.parametrize("mode", CALLS)
@pytest.mark.parametrize("era", ERAS)
async def test_a_call_to_a_machine_that_was_restarted_in_place_is_repeated_with_the_note(
    era: str, mode: str
) -> None:
    arguments = {"mode": mode, "tests": "x"} if mode == "test" else {"mode": mode}
    async with rig() as r, Client(r.server, mode=era) as client:
        known = {"sandbox": handle} if (handle := (await run(client, "")).get("sandbox")) else {}
        (key,) = r.manager.sessions
        await restart_in_place(r, key)
        r.sandbox.calls.clear()
        result = await run(client, "", **arguments, **known)
        assert "This is a new sandbox" in result["note"]
        assert [call.rpc for call in r.sandbox.calls].count(CALLS[mode]) == 1
        assert "note" not in await run(client, "", **known)
        assert r.manager.stats().recreated == 1


async def test_a_first_call_whose_machine_is_replaced_at_once_leaves_no_sandbox_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with rig() as r, Client(r.server, mode=MODERN) as client:
        execute = SandboxClient.execute_stream
        restarts = 0

        def restarted_first(self: SandboxClient, **arguments: Any) -> Any:
            nonlocal restarts
            fence = self._connection.fence
            assert fence is not None
            if not restarts:
                restarts += 1
                fence.boot_id = "0" * 32  # As if it had met another machine before.
            return execute(self, **arguments)

        monkeypatch.setattr(SandboxClient, "execute_stream", restarted_first)
        handle = (await run(client, ""))["sandbox"]
        assert (restarts, len(r.api.objects)) == (1, 1)
        await run(client, "", sandbox=handle)
        assert r.manager.stats().created == 1


async def test_where_there_is_no_new_machine_the_model_hears_that_nothing_was_run() -> None:
    async with rig(settings={"ready_timeout": 1.0}) as r, Client(r.server, mode=MODERN) as client:
        handle = (await run(client, ""))["sandbox"]
        (key,) = r.manager.sessions
        fence = (await r.manager.get_client(key))._connection.fence
        assert fence is not None
        fence.boot_id = "0" * 32
        r.sandbox.set_serving(False)
        text = await refused(client, "", sandbox=handle)
        assert "not ready in time. Nothing was run" in text
        assert [call.rpc for call in r.sandbox.calls].count("ExecuteStream") == 1
