"""The session table: decisions, slots and the queue, without a loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import pytest
from _counts import count, tries
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from prodisco_sandbox import SandboxCapacityError, SandboxError
from prodisco_sandbox._sessions.table import Session, SessionState, SessionTable


def make(session_id: str) -> Session:
    return Session(session_id=session_id, session_hash=f"hash-{session_id}", name=f"sandbox-{session_id}")


def admit(table: SessionTable, session_id: str, *, may_queue: bool = False) -> Session:
    session = make(session_id)
    table.admit(session, may_queue=may_queue)
    return session


def states(*sessions: Session) -> list[str]:
    return [session.state.value for session in sessions]


@dataclass
class StubClient:
    in_flight: int = 0
    last_used: float = 0.0


def test_admitted_sessions_hold_slots_up_to_the_cap_and_then_are_refused() -> None:
    table = SessionTable(2)
    first, second = admit(table, "a"), admit(table, "b")
    assert states(first, second) == ["creating", "creating"]
    with pytest.raises(SandboxCapacityError, match=r"all 2 sandbox slots.*max_sessions"):
        admit(table, "c")
    assert "c" not in table.current, "a refused session leaves nothing behind"
    assert table.counts() == {SessionState.CREATING: 2}


def test_a_slot_comes_back_exactly_once() -> None:
    table = SessionTable(1)
    session = admit(table, "a")
    assert table.close(session, None)
    assert not table.close(session, None)
    assert table.release(session) == []
    assert table.release(session) == []
    admit(table, "b")
    with pytest.raises(SandboxCapacityError):
        admit(table, "c")


def test_waiters_for_a_slot_are_served_in_the_order_of_arrival() -> None:
    table = SessionTable(2)
    running = [admit(table, f"r{i}") for i in range(2)]
    waiting = [admit(table, f"w{i}", may_queue=True) for i in range(3)]
    assert all(session.state is SessionState.QUEUED for session in waiting)
    for session in running:
        table.close(session, None)
    assert table.release(running[1]) == [waiting[0]]
    assert table.release(running[0]) == [waiting[1]]
    assert waiting[2].state is SessionState.QUEUED


def test_the_next_session_of_an_id_waits_for_the_last_one_even_where_queueing_is_off() -> None:
    table = SessionTable(1)
    old = admit(table, "a")
    table.close(old, None)
    new = admit(table, "a", may_queue=False)
    assert states(new) == ["queued"]
    assert table.release(old) == [new]
    assert states(new) == ["creating"]
    assert new.after is None, "a predecessor that is gone is not kept in memory"


def test_a_free_slot_is_not_given_to_a_session_whose_predecessor_still_closes() -> None:
    table = SessionTable(3)
    old, other = admit(table, "a"), admit(table, "b")
    table.close(old, None)
    new = admit(table, "a")
    table.close(other, None)
    assert table.release(other) == [], "there is a slot, but two Sandboxes of one session are one too many"
    assert admit(table, "c").state is SessionState.CREATING, "others may have it meanwhile"
    assert table.release(old) == [new]


def test_who_came_first_gets_the_slot_of_a_closing_session() -> None:
    table = SessionTable(1)
    old = admit(table, "a")
    earlier = admit(table, "b", may_queue=True)
    table.close(old, None)
    successor = admit(table, "a", may_queue=True)
    assert table.release(old) == [earlier]
    table.close(earlier, None)
    assert table.release(earlier) == [successor]


def test_closing_a_queued_session_needs_no_undoing() -> None:
    table = SessionTable(1)
    admit(table, "a")
    queued = admit(table, "b", may_queue=True)
    error = SandboxError("closed")
    assert not table.close(queued, error)
    assert queued.state is SessionState.GONE
    assert queued.error is error
    assert queued.settled.is_set()
    assert queued.released.is_set()
    assert "b" not in table.current


def test_names_lead_to_their_session_until_it_is_gone() -> None:
    table = SessionTable(2)
    session = admit(table, "a")
    assert table.named("sandbox-a") is session
    table.rename(session, "sandbox-a2", 1)
    assert table.named("sandbox-a") is None
    assert table.named("sandbox-a2") is session
    assert session.incarnation == 1
    table.close(session, None)
    assert table.named("sandbox-a2") is session, "it still has to be deleted"
    table.release(session)
    assert table.named("sandbox-a2") is None


def test_ready_and_doubt() -> None:
    table = SessionTable(1)
    session = admit(table, "a")
    seen = [(*states(session), session.usable, session.settled.is_set())]
    table.ready(session)
    seen.append((*states(session), session.usable, session.settled.is_set()))
    table.doubt(session)
    seen.append((*states(session), session.usable, session.settled.is_set()))
    assert seen == [("creating", False, False), ("ready", True, True), ("ready", False, True)]


@pytest.mark.parametrize(
    ("holds", "waiters", "in_flight", "last_used", "client_last_used", "idle"),
    [
        (0, 0, 0, 0.0, 0.0, True),
        (1, 0, 0, 0.0, 0.0, False),
        (0, 1, 0, 0.0, 0.0, False),
        (0, 0, 1, 0.0, 0.0, False),
        (0, 0, 0, 0.1, 0.0, False),
        (0, 0, 0, 0.0, 0.1, False),
    ],
)
def test_busy_is_not_idle(
    holds: int, waiters: int, in_flight: int, last_used: float, client_last_used: float, idle: bool
) -> None:
    table = SessionTable(1)
    session = admit(table, "a")
    table.ready(session)
    session.client = cast("Any", StubClient(in_flight, client_last_used))
    session.holds, session.waiters, session.last_used = holds, waiters, last_used
    assert table.idle(now=10.0, timeout=10.0) == ([session] if idle else [])


def test_a_client_is_asked_again_only_when_its_last_use_is_long_ago_too() -> None:
    table = SessionTable(1)
    session = admit(table, "a")
    table.ready(session)
    client = StubClient(last_used=5.0)
    session.client = cast("Any", client)
    assert table.idle(now=10.0, timeout=10.0) == []
    client.last_used = 0.0
    assert table.idle(now=14.9, timeout=10.0) == []
    assert table.idle(now=15.0, timeout=10.0) == [session]


def test_only_ready_sessions_are_idle() -> None:
    table = SessionTable(3)
    admit(table, "creating")
    closing = admit(table, "closing")
    table.ready(closing)
    table.close(closing, None)
    assert table.idle(now=1e9, timeout=1.0) == []


def test_who_waits_for_its_predecessor_holds_nobody_else_up() -> None:
    table = SessionTable(2)
    old, other = admit(table, "a"), admit(table, "b")
    table.close(old, None)
    new = admit(table, "a")
    later = admit(table, "c", may_queue=True)
    table.close(other, None)
    assert table.release(other) == [later], "the first in the queue cannot use the slot yet"
    assert table.release(old) == [new]


def test_a_session_that_was_closed_is_not_usable() -> None:
    table = SessionTable(1)
    session = admit(table, "a")
    table.ready(session)
    table.close(session, None)
    assert not session.usable


IDS = st.sampled_from("abcdef")


class Table(RuleBasedStateMachine):
    """Any order of calls keeps the table's promises, checked against a plain model."""

    sessions = Bundle("sessions")

    def __init__(self) -> None:
        super().__init__()
        self.cap = 3
        self.table = SessionTable(self.cap)
        self.arrivals: list[Session] = []
        self.started: list[Session] = []
        self.steps = 0

    def note(self, started: list[Session]) -> None:
        for session in started:
            assert session.state is SessionState.CREATING
            # First come, first served, among those whose predecessor is gone.
            for earlier in self.arrivals[: self.arrivals.index(session)]:
                assert earlier.after is not None
                assert earlier.after.state is not SessionState.GONE
            self.arrivals.remove(session)
        self.started += started

    def teardown(self) -> None:
        count("steps of the table's machine", self.steps)

    @rule(target=sessions, session_id=IDS, may_queue=st.booleans())
    def ask(self, session_id: str, may_queue: bool) -> Session:
        present = self.table.current.get(session_id)
        if present is not None:
            return present
        session = make(session_id)
        holding = self.holding()
        try:
            if not self.table.admit(session, may_queue=may_queue):
                self.arrivals.append(session)
            else:
                self.started.append(session)
        except SandboxCapacityError:
            assert holding == self.cap
            assert not may_queue
            assert self.table.current.get(session_id) is None
        return session

    @rule(session=sessions)
    def becomes_ready(self, session: Session) -> None:
        if session.state is SessionState.CREATING:
            self.table.ready(session)

    @rule(session=sessions)
    def close(self, session: Session) -> None:
        was = session.state
        undo = self.table.close(session, None)
        assert undo == (was in (SessionState.CREATING, SessionState.READY))
        if session in self.arrivals:
            self.arrivals.remove(session)

    @rule(session=consumes(sessions))
    def release(self, session: Session) -> None:
        was_closing = session.state is SessionState.CLOSING
        started = self.table.release(session)
        assert was_closing or not started
        self.note(started)

    def holding(self) -> int:
        counts = self.table.counts()
        return sum(counts[s] for s in (SessionState.CREATING, SessionState.READY, SessionState.CLOSING))

    @invariant()
    def never_more_than_the_cap(self) -> None:
        self.steps += 1  # checked once after each
        assert self.holding() <= self.cap

    @invariant()
    def nobody_waits_while_there_is_a_slot_for_him(self) -> None:
        if self.holding() < self.cap:
            for session in self.arrivals:
                assert session.after is not None
                assert session.after.state is SessionState.CLOSING

    @invariant()
    def one_current_and_one_closing_session_an_id(self) -> None:
        for session_id, session in self.table.current.items():
            assert session.session_id == session_id
            assert session.state in (SessionState.QUEUED, SessionState.CREATING, SessionState.READY)
            if session_id in self.table.closing:
                assert session.state is SessionState.QUEUED
        assert all(session.state is SessionState.CLOSING for session in self.table.closing.values())


TestTable = pytest.mark.unmeasured(Table.TestCase)
TestTable.settings = settings(max_examples=tries(230), stateful_step_count=50, deadline=None)


def test_a_session_does_not_show_its_id() -> None:
    assert "secret" not in repr(Session(session_id="secret", session_hash="h", name="n"))


def test_a_machine_that_was_there_before_a_sandbox_was_made_is_shared_and_no_other_is() -> None:
    table = SessionTable(max_sessions=3)
    first, second, adopted = (admit(table, name) for name in "abc")
    for session in (first, second, adopted):
        session.pod_ips = ("127.0.0.1",)
    assert table.meet(first, "boot", 1.0) is None
    second.known_at = 2.0
    assert table.meet(second, "boot", 2.5) is None, "its own pod cannot have started before it was asked for"
    second.pod_ips = ("10.0.0.1",)
    assert table.meet(second, "boot", 2.5) is first, "no two pods have one address"
    second.pod_ips = ("127.0.0.1",)
    second.known_at = 0.5
    assert table.meet(second, "boot", 3.0) is first
    adopted.known_at, adopted.was_used = 2.0, True
    assert table.meet(adopted, "boot", 3.0) is first, "when its pod has started is not known"
    table.close(first, None)
    assert table.meet(adopted, "boot", 3.0) is None
