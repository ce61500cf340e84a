"""Two or three managers, one cluster, and faults: no order of events breaks what shared sessions promise.

Managers have clocks of their own, up to `SKEW` apart. They are killed, shut down and added at any moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

import aiohttp
import looptime
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from prodisco_sandbox import SandboxError, SandboxManager, SandboxManagerConfig
from prodisco_sandbox._cluster.metadata import LABEL_SESSION, is_deleting, labels, name, session_hash, uid
from prodisco_sandbox.testing import FakeCustomObjectsApi
from tests.support.counts import count
from tests.support.managers import LoopTimeApi, StubClient

from .test_machine import disturb_watches, end, run_bounded, tries

IDLE, SKEW, READY = 120.0, 30.0, 20.0
SLACK = IDLE / 2
LAG = 15.0
"""Seconds until the controller, or the watch, has noticed what is due."""
IDS = st.sampled_from(["a", "b", "c", "d"])
WHICH = st.integers(0, 100)
PAUSES = st.sampled_from([0.0, 0.0, 0.01, 1.0, 5.0, 20.0, 50.0, 100.0])
LASTS = st.sampled_from([0.0, 0.0, 5.0, 40.0, 100.0])
VERBS = st.sampled_from(["create", "get", "list", "watch", "delete", "patch"])


class Link:
    """A manager's way to the cluster, which may be cut."""

    def __init__(self, api: FakeCustomObjectsApi) -> None:
        self._api = api
        self.is_cut = False

    def __getattr__(self, attribute: str) -> Any:
        method = getattr(self._api, attribute)

        async def call(*args: Any, **kwargs: Any) -> Any:
            if self.is_cut:
                await asyncio.sleep(0)
                raise aiohttp.ServerDisconnectedError
            return await method(*args, **kwargs)

        return call if attribute.endswith("custom_object") or attribute.startswith("get_api") else method


@dataclass
class Replica:
    manager: SandboxManager
    link: Link
    is_alive: bool = True


@dataclass
class Use:
    """One that was admitted: its object must be there until it ends."""

    session_id: str
    name: str
    uid: str
    ends: float


class SharedMachine(RuleBasedStateMachine):
    pool: str | None = None
    extra: dict[str, Any] = {}

    @initialize(seed=st.integers(0, 2**16), replicas=st.integers(2, 3))
    def begin(self, seed: int, replicas: int) -> None:
        random.seed(seed)
        self.loop = looptime.new_event_loop(start=10_000.0, noop_cycles=0)
        self.api = LoopTimeApi(auto_ready=0.2, now=self.loop.time)
        if self.pool is not None:
            self.api.add_warm_pool(self.pool, 1)
        self.replicas: list[Replica] = []
        self.uses: list[Use] = []
        self.touched: dict[str, float] = {}
        self.pending: Counter[str] = Counter()
        self.closing: Counter[str] = Counter()
        self.callers: set[asyncio.Task[None]] = set()
        self.moves = 0
        for _ in range(replicas):
            self.add(random.uniform(-SKEW / 2, SKEW / 2))

    # The world

    @property
    def objects(self) -> list[dict[str, Any]]:
        return self.api.objects if self.pool is None else self.api.claims

    @property
    def alive(self) -> list[Replica]:
        return [replica for replica in self.replicas if replica.is_alive]

    def run(self, awaitable: Any) -> Any:
        return run_bounded(self.loop, awaitable)

    def pause(self, seconds: float) -> None:
        self.moves += 1
        self.run(asyncio.sleep(seconds))

    def touch(self, session_id: str, until: float) -> None:
        self.touched[session_id] = max(self.touched.get(session_id, 0.0), until)

    def excuse(self, session_id: str) -> None:
        """Its object is deleted on purpose, or its machine dies."""
        self.uses = [use for use in self.uses if use.session_id != session_id]

    async def use(self, replica: Replica, session_id: str, lasts: float, *, hold: bool) -> None:
        self.pending[session_id] += 1
        try:
            with contextlib.suppress(SandboxError):
                if hold:
                    async with replica.manager.session(session_id) as client:
                        self.note(replica, session_id, client, lasts)
                        await asyncio.sleep(lasts)
                    self.touch(session_id, self.loop.time() + SLACK)
                    return
                client = await replica.manager.get_client(session_id)
                assert isinstance(client, StubClient)
                await client.begin(lasts)
                self.note(replica, session_id, client, lasts)
                client.calls += 1
                await asyncio.sleep(lasts)
                client.calls -= 1
                client.used_at = self.loop.time()
        finally:
            self.pending[session_id] -= 1
            self.touch(session_id, self.loop.time() + SLACK / 2)

    def note(self, replica: Replica, session_id: str, client: Any, lasts: float) -> None:
        if replica.is_alive:  # What a killed one believes reaches nobody.
            sandbox, ends = client.sandbox, self.loop.time() + lasts
            if not self.closing[session_id]:  # A use beside a close comes before it or after it.
                self.uses.append(Use(session_id, sandbox.name, sandbox.uid, ends))
            self.touch(session_id, ends)

    def spawn(self, work: Any) -> None:
        task = self.loop.create_task(work)
        self.callers.add(task)

    # Moves

    @rule(offset=st.floats(-SKEW / 2, SKEW / 2))
    def add(self, offset: float) -> None:
        if len(self.alive) == 3:
            return
        link = Link(self.api)
        config = SandboxManagerConfig(
            **{
                "mode": "multi",
                "instance_id": "group",
                "shared": True,
                "warm_pool": self.pool,
                "clock_skew": SKEW,
                "session_idle_timeout": IDLE,
                "idle_check_interval": 10.0,
                "ready_timeout": READY,
                "capacity_timeout": 5.0,
                "max_sessions": 4,
                "shutdown_timeout": 30.0,
                **self.extra,
            }
        )
        manager = SandboxManager(
            config,
            custom_objects_api=link,
            client_factory=StubClient,
            wall_clock=lambda: self.loop.time() + offset,
        )
        self.run(manager.start())
        self.replicas.append(Replica(manager, link))

    @rule(which=WHICH, session_id=IDS, lasts=LASTS, hold=st.booleans(), pause=PAUSES)
    def ask(self, which: int, session_id: str, lasts: float, hold: bool, pause: float) -> None:
        if self.alive:
            replica = self.alive[which % len(self.alive)]
            self.spawn(self.use(replica, session_id, lasts, hold=hold))
            self.pause(pause)

    @rule(session_id=IDS, lasts=LASTS, pause=PAUSES)
    def ask_all(self, session_id: str, lasts: float, pause: float) -> None:
        for replica in self.alive:
            self.spawn(self.use(replica, session_id, lasts, hold=False))
        self.pause(pause)

    @rule(which=WHICH, session_id=IDS, pause=PAUSES)
    def close(self, which: int, session_id: str, pause: float) -> None:
        if self.alive:

            async def close() -> None:
                self.pending[session_id] += 1
                self.closing[session_id] += 1
                await manager.on_session_closed(session_id)
                self.closing[session_id] -= 1
                self.pending[session_id] -= 1
                self.excuse(session_id)

            manager = self.alive[which % len(self.alive)].manager
            self.spawn(close())
            self.run(asyncio.sleep(0))
            self.excuse(session_id)
            self.pause(pause)

    @rule(which=WHICH, pause=PAUSES)
    def kill(self, which: int, pause: float) -> None:
        if len(self.alive) > 1:
            replica = self.alive[which % len(self.alive)]
            replica.is_alive, replica.link.is_cut = False, True
            self.api.cut_watches()
            self.pause(pause)

    @rule(which=WHICH, pause=PAUSES)
    def shut_down(self, which: int, pause: float) -> None:
        if len(self.alive) > 1:
            replica = self.alive[which % len(self.alive)]
            replica.is_alive = False
            self.spawn(replica.manager.shutdown())
            self.pause(pause)

    @rule(which=WHICH, pause=PAUSES)
    def cut(self, which: int, pause: float) -> None:
        """A manager's network is broken for a while."""
        if self.alive:
            link = self.alive[which % len(self.alive)].link
            link.is_cut = not link.is_cut
            self.pause(pause)

    @rule(pause=PAUSES)
    def wait(self, pause: float) -> None:
        self.pause(pause)

    @rule(verb=VERBS, error=st.sampled_from([409, 429, 500, 503, TimeoutError]), times=st.integers(1, 4))
    def fault(self, verb: Any, error: Any, times: int) -> None:
        self.api.faults.add(verb, error=error if error != 409 or verb == "patch" else 503, times=times)
        self.pause(0)

    @rule(verb=VERBS, times=st.integers(1, 3))
    def lose_answers(self, verb: Any, times: int) -> None:
        self.api.faults.add(verb, lost=True, times=times)
        self.pause(0)

    @rule(verb=VERBS, latency=st.sampled_from([0.1, 3.0, 15.0]), lands=st.booleans())
    def delay(self, verb: Any, latency: float, lands: bool) -> None:
        self.api.faults.add(verb, latency=latency, lands=lands and verb != "delete", times=2)
        self.pause(0)

    @rule(how=st.sampled_from(["cut", "silence", "compact"]), pause=PAUSES)
    def disturb_the_watches(self, how: str, pause: float) -> None:
        disturb_watches(self.api, how)
        self.pause(pause)

    @rule(which=WHICH, how=st.sampled_from(["deleted", "failed"]), pause=PAUSES)
    def befall(self, which: int, how: str, pause: float) -> None:
        living = [found for found in self.objects if not is_deleting(found)]
        if not living:
            return
        found = living[which % len(living)]
        for session_id in "abcd":
            if session_hash(session_id) == labels(found)[LABEL_SESSION]:
                self.excuse(session_id)
        if how == "deleted":
            self.api.delete_now(name(found))
        else:
            with contextlib.suppress(KeyError):  # It has no pod yet.
                self.api.fail_pod(name(found))
        self.pause(pause)

    # What must hold

    @invariant()
    def a_session_has_one_live_machine(self) -> None:
        owners = Counter(labels(o)[LABEL_SESSION] for o in self.objects if not is_deleting(o))
        assert all(number == 1 for number in owners.values()), owners

    @invariant()
    def no_session_in_use_is_deleted(self) -> None:
        now = self.loop.time()
        self.uses = [use for use in self.uses if use.ends > now]
        there = {(name(found), uid(found)) for found in self.objects if not is_deleting(found)}
        for use in self.uses:
            assert (use.name, use.uid) in there, use

    @invariant()
    def no_unused_session_outlives_its_time(self) -> None:
        by_hash = {session_hash(session_id): session_id for session_id in "abcd"}
        for found in self.objects:
            session_id = by_hash[labels(found)[LABEL_SESSION]]
            if not self.pending[session_id] and not is_deleting(found):
                last = self.touched.get(session_id, 0.0) + READY
                assert self.loop.time() <= last + 1.5 * IDLE + SKEW + LAG, session_id

    @invariant()
    def no_caller_meets_what_it_should_not(self) -> None:
        for task in [task for task in self.callers if task.done()]:
            self.callers.remove(task)
            task.result()

    def teardown(self) -> None:
        if not hasattr(self, "loop"):
            return
        count("runs of the machine of several managers")
        count("moves of the machine of several managers", self.moves)
        try:
            self.api.faults.clear()
            self.run(asyncio.sleep(READY + 110.0))
            for replica in self.replicas:  # All are killed: the cluster alone ends what is left.
                replica.link.is_cut = True
            self.run(asyncio.sleep(1.5 * IDLE + 2 * SLACK + SKEW + LAG))
            assert self.objects == []
            for replica in self.replicas:
                self.run(replica.manager.shutdown())
            self.run(asyncio.sleep(0))
            self.no_caller_meets_what_it_should_not()
            assert not self.callers
            assert not asyncio.all_tasks(self.loop)
        finally:
            end(self.loop, self.api)


class SharedClaimMachine(SharedMachine):
    """The same with claims on a pool of one."""

    pool = "python"


class SharedEvictionMachine(SharedMachine):
    """The same with fewer slots than sessions, and idle sessions that make room."""

    extra = {"max_sessions": 2, "when_full": "evict", "evict_after": 20.0}


SETTINGS = tries(10, quick=3, steps=30)
TestSharedMachine = pytest.mark.unmeasured(SharedMachine.TestCase)
TestSharedMachine.settings = SETTINGS
TestSharedClaimMachine = pytest.mark.unmeasured(SharedClaimMachine.TestCase)
TestSharedClaimMachine.settings = SETTINGS
TestSharedEvictionMachine = pytest.mark.unmeasured(SharedEvictionMachine.TestCase)
TestSharedEvictionMachine.settings = SETTINGS
