"""Events are counted whether they are logged or not, and know nothing of the caller."""

from __future__ import annotations

from collections import Counter
from contextvars import ContextVar

import pytest
import structlog

import prodisco_sandbox
from prodisco_sandbox import SandboxError, SandboxManagerConfig
from prodisco_sandbox._log import get_logger
from tests.support.managers import Clients, LoopTimeApi, StubClient, managed

from .test_failures import SESSION, events, world

pytestmark = pytest.mark.looptime


async def test_what_is_too_low_to_be_logged_is_counted_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("ERROR", "prodisco_sandbox")
    counts: Counter[str] = Counter()
    log = get_logger("manager", counts)
    log.info("sandbox_ready")
    log.warning("sandbox_lost")
    log.error("shutdown_incomplete")
    assert counts == {"sandbox_ready": 1, "sandbox_lost": 1, "shutdown_incomplete": 1}
    assert [event["event"] for event in events(caplog)] == ["shutdown_incomplete"]


async def test_what_stats_gives_out_is_a_copy() -> None:
    async with world() as w:
        await w.manager.get_client(SESSION)
        before = w.manager.stats()
        await w.manager.on_session_closed(SESSION)
        assert before.events == {"sandbox_created": 1, "sandbox_ready": 1}
        assert w.manager.stats().events["sandbox_closed"] == 1
        hash(before)


async def test_single_mode_has_nothing_to_count() -> None:
    manager = prodisco_sandbox.SandboxManager(SandboxManagerConfig(mode="single"))
    assert manager.stats().events == {}


async def test_two_managers_count_for_themselves() -> None:
    async with world() as one:
        await one.manager.get_client(SESSION)
        async with managed(one.api, instance_id="other") as other:
            assert other.stats().events == {}


async def test_work_for_a_session_carries_no_context_variables_of_its_callers() -> None:
    request = ContextVar("request", default="none")
    seen: list[str] = []

    class Factory(Clients):
        def __call__(self, target: str) -> StubClient:
            seen.append(request.get())
            return super().__call__(target)

    logged: list[structlog.typing.EventDict] = []

    def keep(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        logged.append(event)
        raise structlog.DropEvent

    request.set("first")
    structlog.configure(processors=[structlog.contextvars.merge_contextvars, keep])
    try:
        with structlog.contextvars.bound_contextvars(request="first"):
            async with LoopTimeApi(auto_ready=1.0) as api, managed(api, Factory()) as manager:
                await manager.get_client("s")
                await manager.on_session_closed("s")
    finally:
        structlog.reset_defaults()
    assert seen == ["none"]
    assert {"sandbox_created", "sandbox_ready", "sandbox_deleted"} <= {event["event"] for event in logged}
    assert [event["event"] for event in logged if "request" in event] == []


async def test_a_processor_of_events_that_fails_holds_no_slot() -> None:
    def fails(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        if event["event"] == "sandbox_ready":
            raise ZeroDivisionError
        raise structlog.DropEvent

    structlog.configure(processors=[fails])
    try:
        async with LoopTimeApi(auto_ready=True) as api, managed(api, max_sessions=1) as manager:
            with pytest.raises(SandboxError, match="ZeroDivisionError"):
                await manager.get_client("s")
            await manager.on_session_closed("s")
            assert (manager.stats().ready, manager.stats().closing, api.objects) == (0, 0, [])
    finally:
        structlog.reset_defaults()
