"""Any order of calls, faults, deaths and cancellations keeps the manager's promises.

The manager runs on the fake API in virtual time; each rule makes one move, lets a little
or much time pass, and the invariants are checked after each.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from collections import Counter
from typing import Any

import aiohttp
import anyio
import looptime
import pytest
import structlog
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from prodisco_sandbox import SandboxClient, SandboxError, SandboxManager, SandboxManagerConfig
from prodisco_sandbox._cluster.manifest import is_to_run
from prodisco_sandbox._cluster.metadata import (
    LABEL_SESSION,
    is_deleting,
    labels,
    lease_time,
    name,
    session_hash,
    uid,
)
from prodisco_sandbox.testing import FakeCustomObjectsApi, api_error
from tests.support.counts import count, full
from tests.support.managers import LoopTimeApi, StubClient, conditions
from tests.support.patience import PATIENCE


class Spinning(KeyboardInterrupt):
    """Nothing less gets out of an event loop."""


def _spinning(_number: int, _frame: object) -> None:
    raise Spinning


def run_bounded(loop: asyncio.AbstractEventLoop, awaitable: Any) -> Any:
    """Runs a loop with virtual time until something is done; fails if no time passes any more."""
    signal.signal(signal.SIGALRM, _spinning)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        return loop.run_until_complete(awaitable)
    except Spinning as e:
        raise AssertionError("it is busy for ever, and no time passes") from e
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def disturb_watches(api: FakeCustomObjectsApi, how: str) -> None:
    if how == "silence":
        api.silence_watches()
    else:
        if how == "compact":
            api.compact()
        api.cut_watches()


def end(loop: asyncio.AbstractEventLoop, api: FakeCustomObjectsApi) -> None:
    """Ends a loop with whatever a test has left on it."""
    run_bounded(loop, api.aclose())
    for task in asyncio.all_tasks(loop):
        task.cancel()
    run_bounded(loop, asyncio.sleep(0))
    loop.close()


def tries(examples: int, *, quick: int, steps: int) -> settings:
    """How long a machine is tried: as MACHINE_EXAMPLES says, else in full in CI alone."""
    return settings(
        max_examples=int(os.environ.get("MACHINE_EXAMPLES") or full(examples, quick=quick)),
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


SUSPENDED = 2
IDS = st.sampled_from(["a", "b", "c", "d", "e"])
OWNERS = {"a": "one", "b": "one", "c": "two"}
PAUSES = st.sampled_from([0.0, 0.0, 0.01, 0.3, 2.0, 12.0, 45.0])
VERBS = st.sampled_from(["create", "get", "list", "watch", "delete", "patch", "discovery"])
ERRORS = st.sampled_from([429, 500, 503, 504, aiohttp.ServerDisconnectedError, TimeoutError])

FIGURES = {
    **dict.fromkeys(("cancel", "cancel a scope"), "cancellations of callers"),
    **dict.fromkeys(("fault", "lost answer", "delay", "watch disturbed", "death"), "faults injected"),
    **dict.fromkeys(("broken connection", "slow pod", "slow delete"), "faults injected"),
}
"""What moves are counted as; the others are just moves."""


class Machine(RuleBasedStateMachine):
    """The moves that are tried, and what must hold after each."""

    moves: Counter[str] = Counter()
    done: Counter[str]
    pool: str | None = None
    suspends = False
    evicts = False
    cap = 3

    @initialize(seed=st.integers(0, 2**16), polling=st.booleans(), leases=st.booleans())
    def begin(self, seed: int, polling: bool, leases: bool) -> None:
        random.seed(seed)
        self.loop = looptime.new_event_loop(start=1000.0, noop_cycles=0)
        self.api = LoopTimeApi(auto_ready=self.readiness, now=self.loop.time)
        if self.pool is not None:
            self.api.add_warm_pool(self.pool, 2)
        if polling:
            self.api.forbid("watch")
        if not leases:
            self.api.forbid("patch")
        self.leases = leases
        self.readying: list[Any] = []
        self.clients: list[StubClient] = []
        self.sick: set[str] = set()
        self.callers: list[asyncio.Task[Any]] = []
        self.scopes: list[anyio.CancelScope] = []
        self.busy_when_ended: list[str] = []
        self.pins: Counter[StubClient] = Counter()
        self.strays = 0
        self.named: set[str] = set()
        """What shutdown said that it had to leave, or that it may yet appear."""
        self.done = Counter({"runs of the manager's machine": 1})
        config = SandboxManagerConfig(
            mode="multi",
            instance_id="me",
            warm_pool=self.pool,
            **self.suspension,
            when_full="evict" if self.evicts else "refuse",
            evict_after=1.0,
            max_sessions=self.cap,
            capacity_timeout=15.0 if self.evicts else 5.0,
            ready_timeout=20.0,
            session_idle_timeout=30.0,
            idle_check_interval=10.0,
            lease_duration=60.0,
            shutdown_timeout=120.0,
        )
        self.manager = SandboxManager(
            config, custom_objects_api=self.api, client_factory=self.client, wall_clock=self.loop.time
        )
        structlog.configure(processors=[self.note])
        self.run(self.manager.start())

    def note(self, _: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        """Reads each event as it happens."""
        self.named.update(event.get("sandboxes", ()), event.get("may_appear", ()))
        if event["event"] in ("sandbox_reaped", "sandbox_evicted"):
            self.busy_when_ended += [
                client.sandbox.name
                for client, users in self.pins.items()
                if users and not client.closed and client.sandbox and client.sandbox.name == event["sandbox"]
            ]
        raise structlog.DropEvent

    # The world

    @property
    def suspension(self) -> dict[str, Any]:
        if not self.suspends:
            return {}
        kept = {"suspended_for": 200.0, "max_suspended": SUSPENDED}
        return {"on_idle": "suspend", "workspace_storage": "1Gi", **kept}

    @property
    def objects(self) -> list[dict[str, Any]]:
        """Those of sessions."""
        return self.api.objects if self.pool is None else self.api.claims

    @property
    def living(self) -> list[dict[str, Any]]:
        return [found for found in self.objects if not is_deleting(found) and is_to_run(found)]

    def readiness(self, sandbox: dict[str, Any]) -> Any:
        return self.readying.pop(0) if self.readying else 0.2

    def client(self, target: str) -> StubClient:
        client = StubClient(target, healthy=target not in self.sick)
        self.clients.append(client)
        return client

    def run(self, awaitable: Any) -> Any:
        return run_bounded(self.loop, awaitable)

    def move(self, name: str, pause: float) -> None:
        self.moves[name] += 1
        self.done[FIGURES.get(name, "moves of the manager's machine")] += 1
        self.run(asyncio.sleep(pause))
        for _ in range(random.randrange(6)):
            self.run(asyncio.sleep(0))

    async def use(self, session_id: str, hold: float | None) -> None:
        """What a request handler does; it checks what it gets."""
        owner = OWNERS.get(session_id)
        with contextlib.suppress(SandboxError):
            if hold is None:
                self.check(session_id, await self.manager.get_client(session_id, owner=owner))
                return
            async with self.manager.session(session_id, owner=owner) as client:
                self.check(session_id, client)
                assert isinstance(client, StubClient)
                self.pins[client] += 1
                try:
                    await asyncio.sleep(hold)
                finally:
                    self.pins[client] -= 1

    def check(self, session_id: str, client: SandboxClient) -> None:
        assert isinstance(client, StubClient)
        assert client.sandbox is not None
        assert not client.closed, "a client that was handed out had been closed"
        # Which client is the current one no public member says.
        assert self.manager._engine is not None
        session = self.manager._engine.table.current[session_id]
        assert session.client is client
        assert (session.name, session.known.uid) == (client.sandbox.name, client.sandbox.uid)
        found = self.api.get(client.sandbox.name)
        if found is not None and uid(found) == client.sandbox.uid:
            assert labels(found)[LABEL_SESSION] == session_hash(session_id), "somebody else's sandbox"

    # Moves

    @rule(session_id=IDS, hold=st.sampled_from([None, None, 0.0, 1.0, 50.0]), pause=PAUSES)
    def ask(self, session_id: str, hold: float | None, pause: float) -> None:
        self.callers.append(self.loop.create_task(self.use(session_id, hold)))
        self.move("ask", pause)

    @rule(session_id=IDS, count=st.integers(2, 5))
    def ask_together(self, session_id: str, count: int) -> None:
        self.callers += [self.loop.create_task(self.use(session_id, None)) for _ in range(count)]
        self.move("ask", 0)

    @rule(session_id=IDS, pause=PAUSES)
    def initialize(self, session_id: str, pause: float) -> None:
        async def initialize() -> None:
            with contextlib.suppress(SandboxError):
                await self.manager.on_session_initialized(session_id)

        self.callers.append(self.loop.create_task(initialize()))
        self.move("initialize", pause)

    @rule(session_id=IDS, hold=st.sampled_from([None, 1.0, 50.0]), pause=PAUSES)
    def ask_in_a_scope(self, session_id: str, hold: float | None, pause: float) -> None:
        async def use() -> None:
            with anyio.CancelScope() as scope:
                self.scopes.append(scope)
                await self.use(session_id, hold)

        self.callers.append(self.loop.create_task(use()))
        self.move("ask in a scope", pause)

    @rule(which=st.integers(0, 100), pause=PAUSES)
    def cancel_a_scope(self, which: int, pause: float) -> None:
        """anyio cancels again at every await until the scope is left."""

        async def cancel() -> None:
            self.scopes.pop(which % len(self.scopes)).cancel()

        if self.scopes:
            self.run(cancel())
            self.move("cancel a scope", pause)

    @rule(session_id=IDS, pause=PAUSES)
    def close(self, session_id: str, pause: float) -> None:
        self.callers.append(self.loop.create_task(self.manager.on_session_closed(session_id)))
        self.move("close", pause)

    @rule(which=st.integers(0, 100), times=st.integers(1, 3), pause=PAUSES)
    def cancel(self, which: int, times: int, pause: float) -> None:
        pending = [task for task in self.callers if not task.done()]
        if pending:
            for _ in range(times):  # anyio does it at every await
                pending[which % len(pending)].cancel()
                self.run(asyncio.sleep(0))
            self.move("cancel", pause)

    @rule(pause=PAUSES)
    def clean_up(self, pause: float) -> None:
        async def clean_up() -> None:
            with contextlib.suppress(SandboxError):
                await self.manager.cleanup_orphaned_sandboxes()

        self.callers.append(self.loop.create_task(clean_up()))
        self.move("clean up", pause)

    @precondition(lambda self: sum(self.done.values()) > 20)
    @rule(pause=PAUSES)
    def shut_down(self, pause: float) -> None:
        self.callers.append(self.loop.create_task(self.manager.shutdown()))
        self.move("shut down", pause)

    @rule(pause=PAUSES)
    def wait(self, pause: float) -> None:
        self.move("wait", pause)

    @rule(verb=VERBS, error=ERRORS, times=st.integers(1, 4))
    def fault(self, verb: Any, error: Any, times: int) -> None:
        if error == 429:
            error = api_error(429, retry_after=random.choice([0, 1, 3]))
        self.api.faults.add(verb, error=error, times=times)
        self.move("fault", 0)

    @rule(verb=VERBS, times=st.integers(1, 3))
    def lose_answers(self, verb: Any, times: int) -> None:
        self.api.faults.add(verb, lost=True, times=times)
        self.move("lost answer", 0)

    @rule(verb=VERBS, latency=st.sampled_from([0.1, 3.0, 15.0]), lands=st.booleans())
    def delay(self, verb: Any, latency: float, lands: bool) -> None:
        # A create that lands after its caller has given up may be one too many for a while.
        self.strays += lands and verb == "create"
        self.api.faults.add(verb, latency=latency, lands=lands, times=2)
        self.move("delay", 0)

    @rule(how=st.sampled_from(["cut", "silence", "compact"]), pause=PAUSES)
    def disturb_the_watch(self, how: str, pause: float) -> None:
        disturb_watches(self.api, how)
        self.move("watch disturbed", pause)

    @rule(
        which=st.integers(0, 100),
        how=st.sampled_from(["deleted", "failed", "finished", "replaced", "unready", "rebound", "suspended"]),
        pause=PAUSES,
    )
    def befall(self, which: int, how: str, pause: float) -> None:
        names = [name(found) for found in self.living]
        if not names:
            return
        taken = names[which % len(names)]
        match how:
            case "deleted":
                self.api.delete_now(taken)
            case "failed" if self.pool is not None:
                with contextlib.suppress(KeyError):  # It has no pod yet.
                    self.api.fail_pod(taken)
            case "rebound":
                bound = (self.api.get(taken) or {}).get("status", {}).get("sandbox", {}).get("name")
                if self.api.get(str(bound), kind="Sandbox") is not None:
                    self.api.delete_now(str(bound))
            case "failed":
                self.api.set_status(taken, conditions("PodFailed"))
            case "finished":
                self.api.set_condition(taken, "Finished", "True", "PodSucceeded")
            case "suspended" if self.pool is None and self.leases:  # else nothing would ever end it
                self.api.suspend(taken)
            case "unready":
                self.api.set_condition(taken, "Ready", "False", "DependenciesNotReady")
            case _:
                self.api.set_ready(taken)  # with another pod IP each time
        self.move("death", pause)

    @rule(which=st.integers(0, 100), gets_well=st.booleans(), pause=PAUSES)
    def break_a_connection(self, which: int, gets_well: bool, pause: float) -> None:
        if self.clients:
            client = self.clients[which % len(self.clients)]
            client.healthy = gets_well
            client.fail()
            self.move("broken connection", pause)

    @rule(which=st.integers(0, 100), pause=PAUSES)
    def close_a_client(self, which: int, pause: float) -> None:
        if self.clients:
            self.run(self.clients[which % len(self.clients)].close())
            self.move("closed client", pause)

    @rule(outcomes=st.lists(st.sampled_from([True, 1.0, 15.0, 30.0, False]), min_size=1, max_size=4))
    def be_slow(self, outcomes: list[Any]) -> None:
        self.readying = outcomes
        self.move("slow pod", 0)

    @rule(lingers=st.booleans())
    def linger(self, lingers: bool) -> None:
        if lingers:
            self.api.linger_deletes = True
        else:
            self.api.finish_deletes()
        self.move("slow delete", 0)

    # What must hold

    @invariant()
    def a_session_has_at_most_one_living_sandbox(self) -> None:
        owners = Counter(labels(o)[LABEL_SESSION] for o in self.objects if not is_deleting(o))
        assert all(count == 1 for count in owners.values()), owners

    @invariant()
    def the_cap_holds(self) -> None:
        stats = self.manager.stats()
        assert stats.creating + stats.ready + stats.closing <= self.cap
        assert len(self.living) <= self.cap + self.strays

    @invariant()
    def the_busy_are_not_ended(self) -> None:
        assert self.busy_when_ended == []

    @invariant()
    def no_caller_meets_what_it_should_not(self) -> None:
        for task in [task for task in self.callers if task.done()]:
            self.callers.remove(task)
            if not task.cancelled():
                task.result()

    def teardown(self) -> None:
        if not hasattr(self, "loop"):
            return
        for what, number in self.done.items():
            count(what, number)
        try:
            self.api.faults.clear()
            self.api.finish_deletes()
            self.api.allow("watch", "patch")
            # Nobody waits for ever: what is slow has its deadline within this.
            self.run(asyncio.sleep(300))
            assert not [task for task in self.callers if not task.done()]
            self.no_caller_meets_what_it_should_not()
            self.run(self.manager.shutdown())
            ends = lease_time(self.loop.time(), 200.0)
            for found in self.objects:  # else it is suspended, and ends by its deadline
                deadline = found["spec"].get("shutdownTime", "9") if self.suspends else "9"
                assert name(found) in self.named or (not is_to_run(found) and deadline <= ends)
            assert all(client.closed for client in self.clients)
            tasks = asyncio.all_tasks(self.loop)
            assert not tasks, tasks
        finally:
            structlog.reset_defaults()
            end(self.loop, self.api)


def test_a_second_create_lands_after_the_first_was_deleted() -> None:
    # Found by the machine: both creates were given up, one landed before the session's end.
    machine = Machine()
    machine.begin(seed=0, polling=False, leases=False)
    machine.be_slow([True, True, True])
    machine.delay("create", 15.0, True)
    machine.ask_together("a", 2)
    machine.wait(12.0)
    machine.teardown()


class ClaimMachine(Machine):
    """The same with sessions that are claims on a pool of two."""

    pool = "python"


class SuspendMachine(Machine):
    """The same with sessions that are suspended when nobody uses them."""

    suspends = True


class EvictMachine(SuspendMachine):
    """The same with sessions that are suspended to make room for others."""

    evicts = True
    cap = 2


SETTINGS = tries(15, quick=5, steps=40)
TestMachine = pytest.mark.unmeasured(Machine.TestCase)
TestMachine.settings = SETTINGS
TestClaimMachine = pytest.mark.unmeasured(ClaimMachine.TestCase)
TestClaimMachine.settings = SETTINGS
TestSuspendMachine = pytest.mark.unmeasured(SuspendMachine.TestCase)
TestSuspendMachine.settings = SETTINGS
TestEvictMachine = pytest.mark.unmeasured(EvictMachine.TestCase)
TestEvictMachine.settings = settings(SETTINGS, max_examples=max(1, SETTINGS.max_examples // 3))
