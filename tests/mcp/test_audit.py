"""What the log says of each call of the tool."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from mcp import Client

from prodisco_sandbox import SandboxFailedError
from prodisco_sandbox.results import ExecutionChunk, ExecutionOutcome, ExecutionState
from prodisco_sandbox.testing import NEVER
from tests.support.mcp_server import call, events, refused, rig, run
from tests.support.patience import PATIENCE, until

CODE = "print('the-c0de-itself')"


async def test_every_call_is_logged_with_its_outcome(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "prodisco_sandbox")

    def outcome(success: bool, state: ExecutionState) -> list[ExecutionChunk]:
        return [ExecutionChunk("e1", "result", result=ExecutionOutcome(success, state))]

    async with (
        rig(auth=False, principal=lambda ctx: "ann") as r,
        Client(r.server, mode="2026-07-28") as client,
    ):
        expected: list[tuple[str | None, str]] = []

        async def see(mode: str | None, is_now: str) -> dict[str, Any]:
            expected.append((mode, is_now))
            logged = events(caplog, "sandbox_call")
            assert [(pairs["mode"], pairs["outcome"]) for pairs in logged] == expected
            pairs = logged[-1]
            assert set(pairs) == {"event", "principal", "sandbox", "mode", "outcome", "duration"}
            assert pairs["principal"] == "ann"
            assert 0 <= pairs["duration"] < PATIENCE
            return pairs

        r.sandbox.script("ExecuteStream", outcome(True, ExecutionState.COMPLETED))
        handle = (await run(client, CODE))["sandbox"]
        (sandbox,) = r.api.objects
        assert (await see("execute", "ok"))["sandbox"] == sandbox["metadata"]["name"]
        r.sandbox.script("ExecuteStream", outcome(False, ExecutionState.FAILED))
        await call(client, CODE, sandbox=handle)
        await see("execute", "failed")
        r.sandbox.script("ExecuteStream", outcome(False, ExecutionState.TIMEOUT))
        await call(client, CODE, sandbox=handle, mode="stream")
        await see("stream", "error")
        await call(client, CODE, mode="frobnicate")
        await see(None, "invalid")
        await call(client, CODE, sandbox="sbx_" + "A" * 43)
        assert (await see("execute", "refused"))["sandbox"] is None
        await call(client, mode="status", execution_id="e1")
        await see("status", "refused")
        other = (await call(client, CODE)).structured_content["sandbox"]
        named = await see("execute", "error")
        await run(client, mode="close", sandbox=other)
        assert (await see("close", "ok"))["sandbox"] == named["sandbox"] != sandbox["metadata"]["name"]
        await call(client, mode="close")
        await see("close", "refused")
        r.sandbox.script("ExecuteStream", [NEVER])
        leaving = asyncio.create_task(call(client, CODE, sandbox=handle))
        await r.sandbox.wait_for_call("ExecuteStream", count=5)
        leaving.cancel()
        await asyncio.wait([leaving])
        await until(lambda: len(events(caplog, "sandbox_call")) == len(expected) + 1)
        await see("execute", "cancelled")
        await r.tools.drain(PATIENCE)
        await call(client, CODE, sandbox=handle)
        await see("execute", "refused")
    for secret in (handle, "c0de"):
        assert secret not in caplog.text


async def test_a_call_that_gets_no_sandbox_is_logged(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", "prodisco_sandbox")
    async with rig() as r, Client(r.server, mode="legacy") as client:

        def fail(session_id: str | None = None, **options: Any) -> Any:
            raise SandboxFailedError("no sandbox today")

        monkeypatch.setattr(r.manager, "session", fail)
        await refused(client, CODE)

        def crash(session_id: str | None = None, **options: Any) -> Any:
            raise RuntimeError("a defect")

        monkeypatch.setattr(r.manager, "session", crash)
        await refused(client, CODE)
    assert [pairs["outcome"] for pairs in events(caplog, "sandbox_call")] == ["no_sandbox", "error"]
