"""Something happens at every single step of every path, and the promises still hold.

Each scenario runs on the fake API without time passing, so that the loop's iterations are
its steps. It is run again and again, and at its n-th step, for all n, it is interrupted.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import pytest

from prodisco_sandbox import SandboxError, SandboxManager, SandboxManagerConfig
from prodisco_sandbox._cluster.metadata import LABEL_SESSION, is_deleting, labels
from prodisco_sandbox.testing import FakeCustomObjectsApi
from tests.support.counts import count, full
from tests.support.managers import Clients, LoopTimeApi, StubClient, alive, left_behind, settle

pytestmark = [pytest.mark.looptime, pytest.mark.unmeasured]

MOST_STEPS = 400
STRIDE = int(os.environ.get("INTERRUPTION_STRIDE") or full(23, quick=47))
"""1 tries every step; the unit suite takes longer strides."""
tried: Counter[str] = Counter()


@dataclass
class World:
    """One run of a scenario."""

    api: FakeCustomObjectsApi
    manager: SandboxManager
    clients: Clients
    callers: list[asyncio.Task[Any]] = field(default_factory=list)
    shut: bool = False
    """Whether somebody has asked for its shutdown."""

    def call(self, function: Callable[..., Awaitable[Any]], *args: Any) -> None:
        async def caller() -> Any:
            return await function(*args)

        self.callers.append(asyncio.create_task(caller()))


def config(**settings: Any) -> SandboxManagerConfig:
    return SandboxManagerConfig(
        mode="multi",
        instance_id="me",
        max_sessions=2,
        capacity_timeout=5.0,
        ready_timeout=20.0,
        idle_check_interval=10.0,
        session_idle_timeout=15.0,
        **settings,
    )


@asynccontextmanager
async def world() -> AsyncIterator[World]:
    async with LoopTimeApi(auto_ready=True) as api:
        clients = Clients()
        manager = SandboxManager(config(), custom_objects_api=api, client_factory=clients)
        try:
            yield World(api, manager, clients)
        finally:
            await manager.shutdown()


# What is interrupted


async def create(w: World) -> None:
    w.call(w.manager.get_client, "s")


async def create_for_two(w: World) -> None:
    w.call(w.manager.on_session_initialized, "s")
    w.call(w.manager.get_client, "s")


async def hold(w: World) -> None:
    async def use() -> None:
        async with w.manager.session("s"):
            await settle()

    w.call(use)


async def queue(w: World) -> None:
    await w.manager.get_client("x")
    await w.manager.get_client("y")
    w.call(w.manager.get_client, "s")
    w.call(w.manager.on_session_closed, "x")


async def close(w: World) -> None:
    await w.manager.get_client("s")
    w.call(w.manager.on_session_closed, "s")


async def close_while_creating(w: World) -> None:
    w.call(w.manager.get_client, "s")
    w.call(w.manager.on_session_closed, "s")


async def close_and_come_back(w: World) -> None:
    await w.manager.get_client("s")
    w.call(w.manager.on_session_closed, "s")
    w.call(w.manager.get_client, "s")


async def reap_and_come_back(w: World) -> None:
    await w.manager.get_client("s")
    # By hand, for a call in the very pass in which the reaper ends it: no timer meets that.
    assert w.manager._engine is not None
    for session in list(w.manager._engine.table.current.values()):
        w.manager._engine.parts.ends.end(session, "reaped")
    w.call(w.manager.get_client, "s")


async def check(w: World) -> None:
    client = await w.manager.get_client("s")
    assert isinstance(client, StubClient)
    client.fail()
    w.call(w.manager.get_client, "s")
    w.call(w.manager.get_client, "s")


async def move_to_another_pod(w: World) -> None:
    await w.manager.get_client("s")
    w.api.set_ready(w.manager.sandbox_name("s"))
    await settle()
    w.call(w.manager.get_client, "s")


async def leave_one_behind(w: World) -> None:
    """A manager that was killed: its Sandbox is there, and nobody looks after it."""
    await left_behind(w.api, "s")


async def adopt(w: World) -> None:
    await leave_one_behind(w)
    w.call(w.manager.get_client, "s")


async def clean_up(w: World) -> None:
    await leave_one_behind(w)
    w.call(w.manager.cleanup_orphaned_sandboxes)


async def lose_an_answer(w: World) -> None:
    w.api.faults.add("create", lost=True, times=1)
    w.call(w.manager.get_client, "s")


async def fail(w: World) -> None:
    w.api.faults.add("create", error=422, times=1)
    w.call(w.manager.get_client, "s")


async def shut_down(w: World) -> None:
    await w.manager.get_client("s")
    w.call(w.manager.get_client, "t")
    await settle()
    w.shut = True
    w.call(w.manager.shutdown)


SCENARIOS = [
    create,
    create_for_two,
    hold,
    queue,
    close,
    close_while_creating,
    close_and_come_back,
    reap_and_come_back,
    check,
    move_to_another_pod,
    adopt,
    clean_up,
    lose_an_answer,
    fail,
    shut_down,
]


# What happens


async def cancel_the_first(w: World) -> None:
    w.callers[0].cancel()


async def cancel_all(w: World) -> None:
    for caller in w.callers:
        caller.cancel()


async def cancel_again_and_again(w: World) -> None:
    for _ in range(6):
        for caller in w.callers:
            caller.cancel()
        await asyncio.sleep(0)


async def close_the_session(w: World) -> None:
    await w.manager.on_session_closed("s")


async def ask_for_it(w: World) -> None:
    w.call(w.manager.get_client, "s")


async def shut_the_manager_down(w: World) -> None:
    w.shut = True
    await w.manager.shutdown()


async def delete_its_sandbox(w: World) -> None:
    for name in alive(w.api):
        w.api.delete_now(name)


async def cut_the_watch(w: World) -> None:
    w.api.compact()
    w.api.cut_watches()


async def lose_the_next_answers(w: World) -> None:
    w.api.faults.add("*", lost=True, times=2)


async def refuse_the_next_requests(w: World) -> None:
    w.api.faults.add("*", error=503, times=2)


EVENTS = [
    cancel_the_first,
    cancel_all,
    cancel_again_and_again,
    close_the_session,
    ask_for_it,
    shut_the_manager_down,
    delete_its_sandbox,
    cut_the_watch,
    lose_the_next_answers,
    refuse_the_next_requests,
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
async def test_interrupted_at_every_step(
    scenario: Callable[[World], Awaitable[None]], event: Callable[[World], Awaitable[None]]
) -> None:
    for step in itertools.count(0, STRIDE):
        assert step < MOST_STEPS, "the scenario does not come to an end"
        async with world() as w:
            await scenario(w)
            for _ in range(step):
                await asyncio.sleep(0)
            over = all(caller.done() for caller in w.callers)
            await event(w)
            await well_in_the_end(w)
            await collect_what_was_left_by(scenario, w)
        assert w.api.objects == [], f"left behind after {event.__name__} at step {step}"
        assert all(client.closed for client in w.clients.made)
        tried[scenario.__name__] += 1
        count("cancellations at a step" if "cancel" in event.__name__ else "other interruptions at a step")
        if over:
            break


async def collect_what_was_left_by(scenario: Callable[[World], Awaitable[None]], w: World) -> None:
    """What a killed manager left is nobody's before somebody adopts it or cleans it up."""
    if scenario in (adopt, clean_up):
        async with SandboxManager(config(), custom_objects_api=w.api, client_factory=Clients()) as another:
            await w.manager.shutdown()
            await another.cleanup_orphaned_sandboxes()


async def well_in_the_end(w: World) -> None:
    # Longer than every deadline in the way: nobody waits for ever.
    await asyncio.sleep(60)
    for caller in w.callers:
        assert caller.done(), "a caller waits for ever"
        if not caller.cancelled() and caller.exception() is not None:
            assert isinstance(caller.exception(), SandboxError), caller.exception()
    w.api.faults.clear()
    stats = w.manager.stats()
    assert (stats.queued, stats.creating, stats.closing, stats.waiting) == (0, 0, 0, 0)
    living = [labels(sandbox)[LABEL_SESSION] for sandbox in w.api.objects if not is_deleting(sandbox)]
    assert len(living) == len(set(living))
    if w.manager.is_ready or not w.shut:
        # Every slot is there still, and the session works.
        for session_id in ("x", "y"):
            await w.manager.on_session_closed(session_id)
        client = await w.manager.get_client("s")
        assert client.sandbox is not None
        assert client.sandbox.name in alive(w.api)
        await w.manager.get_client("other")


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
async def test_in_a_cancelled_scope_of_anyio(scenario: Callable[[World], Awaitable[None]]) -> None:
    """anyio repeats the cancellation at every await until the scope is left."""
    for step in range(0, 60, STRIDE):
        async with world() as w, anyio.create_task_group() as group:

            def call(function: Callable[..., Awaitable[Any]], *args: Any, group: Any = group) -> None:
                async def caller() -> None:
                    with contextlib.suppress(SandboxError):
                        await function(*args)

                group.start_soon(caller)

            w.call = call  # type: ignore[method-assign]
            await scenario(w)
            for _ in range(step):
                await asyncio.sleep(0)
            group.cancel_scope.cancel()
            with anyio.CancelScope(shield=True):
                await well_in_the_end(w)
                await collect_what_was_left_by(scenario, w)
        assert w.api.objects == []
        tried[scenario.__name__] += 1
        count("cancellations at a step")
