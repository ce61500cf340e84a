"""The session table: decisions, slots and the queue, without a loop."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, cast, get_args

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from prodisco_sandbox import SandboxCapacityError, SandboxError
from prodisco_sandbox._sessions.ends import FATES, Reason
from prodisco_sandbox._sessions.table import LIVING, Remains, Session, SessionState, SessionTable, What
from tests.support import ROOT
from tests.support.counts import count, tries


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


def test_room_that_the_cluster_refused_is_tried_again_and_never_beyond_the_cap() -> None:
    table = SessionTable(2)
    taken = 0
    table.elsewhere = lambda: (taken, 0)
    first = admit(table, "a")
    table.requeue(first)
    second = admit(table, "b", may_queue=True)
    assert (table.slots, states(first, second)) == (0, ["queued", "queued"])
    table.try_room()
    assert (table.slots, states(first, second)) == (1, ["creating", "queued"])
    table.make_ready(first, cast("Any", StubClient()), 0.0)
    taken = 2
    for _ in range(3):
        table.try_room()
    assert (table.slots, states(first, second)) == (2, ["ready", "queued"])
    table.close(second, None)
    assert table.slots == 2, "nobody waits: what was refused then is no matter now"


def test_one_session_at_a_time_tries_whether_there_is_room() -> None:
    table = SessionTable(9)
    first, second = admit(table, "a"), admit(table, "b")
    table.requeue(second)
    table.requeue(first)
    table.try_room()
    table.try_room()
    assert states(first, second) == ["creating", "queued"], "the second would pass the first"
    table.requeue(first)
    table.try_room()
    assert states(first, second) == ["creating", "queued"]


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
    assert queued.outcome.error is error
    assert queued.outcome.is_set()
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


def ready(table: SessionTable, session: Session, client: Any = None) -> None:
    assert table.make_ready(session, client, 0.0)


def test_ready_and_suspect() -> None:
    table = SessionTable(1)
    session = admit(table, "a")

    def seen() -> tuple[str, bool, bool, bool]:
        return session.state.value, "a" in table.ready, session.outcome.is_set(), session.checking

    assert seen() == ("creating", False, False, False)
    ready(table, session)
    assert seen() == ("ready", True, True, False)
    assert not table.check(session), "it is not suspect"
    assert table.suspect(session)
    assert not table.suspect(session)
    assert seen() == ("suspect", False, True, False)
    assert table.check(session)
    assert not table.check(session), "one check for all who ask"
    assert seen() == ("suspect", False, False, True)
    error, outcome = SandboxError("the API server is away"), session.outcome
    table.checked(session, error)
    assert (seen(), outcome.error) == (("suspect", False, True, False), error)
    assert table.check(session)
    assert outcome.error is error, "those who have waited for the first check still get its error"
    ready(table, session)
    assert seen() == ("ready", True, True, False)
    assert session.outcome.error is None


def test_a_session_that_has_ended_does_not_become_ready() -> None:
    table = SessionTable(1)
    session = admit(table, "a")
    table.close(session, None)
    assert not table.make_ready(session, cast("Any", None), 0.0)
    assert not table.suspect(session)
    assert not table.check(session)
    assert (session.state, table.ready) == (SessionState.CLOSING, {})


# Who deletes


def test_nothing_was_sent_so_nothing_is_deleted() -> None:
    session = admit(SessionTable(1), "a")
    assert not session.remains.needs_delete


def test_a_request_on_its_way_may_leave_an_object() -> None:
    table = SessionTable(1)
    session = admit(table, "a")
    table.sent(session)
    assert (session.remains, session.remains.needs_delete) == (Remains("unconfirmed"), True)
    table.refused(session)
    assert (session.remains, session.remains.needs_delete) == (Remains("nothing"), False)


def test_after_a_lost_answer_a_refusal_proves_nothing() -> None:
    table = SessionTable(1)
    session = admit(table, "a")
    table.sent(session)
    table.unanswered(session, 5.0)
    table.sent(session)
    table.refused(session)
    assert session.remains == Remains("unconfirmed", 5.0)
    table.sent(session)
    table.answered(session, "uid")
    assert session.remains == Remains("known", 5.0), "the first create may still be carried out"
    table.confirmed(session)
    assert session.remains == Remains("known")


@pytest.mark.parametrize("state", ["creating", "ready", "suspect", "closing"])
def test_what_others_have_deleted_or_claimed_is_not_deleted(state: str) -> None:
    table = SessionTable(1)
    session = admit(table, "a")
    table.found(session, {"metadata": {"uid": "u"}}, "u", 1.0)
    if state != "creating":
        ready(table, session)
    if state == "suspect":
        table.suspect(session)
    if state == "closing":
        table.close(session, None)
    assert session.state.value == state
    assert session.remains.needs_delete
    table.dropped(session)
    assert (session.remains, session.remains.needs_delete) == (Remains("another's"), False)
    table.close(session, None, keep=True)
    assert session.remains == Remains("another's"), "there is nothing of ours to keep"


def test_what_a_user_may_want_back_is_kept() -> None:
    table = SessionTable(1)
    session = admit(table, "a")
    table.found(session, {"metadata": {"uid": "u"}}, "u", 1.0)
    table.close(session, None, "failed", keep=True)
    assert (session.remains, session.remains.needs_delete) == (Remains("kept"), False)


def test_what_the_watch_has_told_meanwhile_is_newer_than_the_answer() -> None:
    table = SessionTable(1)
    session = admit(table, "a")
    told = {"metadata": {"uid": "u", "resourceVersion": "2"}}
    session.known.object = told
    table.found(session, {"metadata": {"uid": "u", "resourceVersion": "1"}}, "u", 1.0)
    assert session.known.object is told
    table.found(session, {"metadata": {"uid": "v"}}, "v", 2.0)
    assert session.known.object == {"metadata": {"uid": "v"}}


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
    ready(table, session)
    session.client = cast("Any", StubClient(in_flight, client_last_used))
    session.holds, session.waiters, session.last_used = holds, waiters, last_used
    assert table.idle(now=10.0, timeout=10.0) == ([session] if idle else [])


def test_a_client_is_asked_again_only_when_its_last_use_is_long_ago_too() -> None:
    table = SessionTable(1)
    session = admit(table, "a")
    ready(table, session)
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
    ready(table, closing)
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
    ready(table, session)
    table.close(session, None)
    assert table.ready == {}


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
        was = session.state
        became = self.table.make_ready(session, cast("Any", None), 0.0)
        assert became == (was in LIVING)

    @rule(session=sessions)
    def becomes_suspect(self, session: Session) -> None:
        was = session.state
        assert self.table.suspect(session) == (was is SessionState.READY)

    @rule(session=sessions)
    def is_asked_for(self, session: Session) -> None:
        needed = session.state is SessionState.SUSPECT and not session.checking
        assert self.table.check(session) == needed

    @rule(session=sessions)
    def is_checked(self, session: Session) -> None:
        self.table.checked(session, SandboxError("no answer"))

    @rule(session=sessions, move=st.sampled_from(["sent", "refused", "unanswered", "answered", "dropped"]))
    def is_told_of_its_object(self, session: Session, move: str) -> None:
        if session.state in (SessionState.QUEUED, SessionState.GONE):
            return
        argument: dict[str, tuple[Any, ...]] = {"unanswered": (1.0,), "answered": ("uid",)}
        getattr(self.table, move)(session, *argument.get(move, ()))
        expected = {
            "sent": True,
            "refused": session.remains.lost_at is not None,
            "unanswered": True,
            "answered": True,
            "dropped": False,
        }
        assert session.remains.needs_delete == expected[move]

    @rule(session=sessions)
    def close(self, session: Session) -> None:
        was = session.state
        undo = self.table.close(session, None)
        assert undo == (was in LIVING)
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
        return sum(counts[s] for s in (*LIVING, SessionState.CLOSING))

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
    def exactly_the_ready_sessions_are_handed_out(self) -> None:
        ready = {i: s for i, s in self.table.current.items() if s.state is SessionState.READY}
        assert self.table.ready == ready
        assert all(session.outcome.is_set() for session in ready.values())

    @invariant()
    def who_waits_for_a_session_that_has_ended_is_told(self) -> None:
        assert all(session.outcome.is_set() for session in self.table.closing.values())
        assert all(session.inbox.closed for session in self.table.closing.values())

    @invariant()
    def one_current_and_one_closing_session_an_id(self) -> None:
        for session_id, session in self.table.current.items():
            assert session.session_id == session_id
            assert session.state in (SessionState.QUEUED, *LIVING)
            if session_id in self.table.closing:
                assert session.state is SessionState.QUEUED
        assert all(session.state is SessionState.CLOSING for session in self.table.closing.values())


TestTable = pytest.mark.unmeasured(Table.TestCase)
TestTable.settings = settings(max_examples=tries(230, quick=60), stateful_step_count=50, deadline=None)


def test_the_diagram_and_the_table_of_the_documentation_are_those_of_the_code() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    diagram = text[text.index("stateDiagram-v2") : text.index("- **obtain**")]
    states = {
        name for pair in re.findall(r"^ +(\S+) --> (\w+)", diagram, flags=re.MULTILINE) for name in pair
    }
    assert states - {"[*]"} == {state.value for state in SessionState}
    table = text[text.index("| remains | set when") :].split("\n\n")[0]
    rows = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    assert rows == list(get_args(What))
    table = text[text.index("| reason | with one manager") :].split("\n\n")[0]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert {reason: (one.split(",")[0], shared) for reason, one, shared in cells} == FATES
    assert list(FATES) == list(get_args(Reason))


def test_a_session_does_not_show_its_id() -> None:
    assert "secret" not in repr(Session(session_id="secret", session_hash="h", name="n"))


def test_a_machine_that_was_there_before_a_sandbox_was_made_is_shared_and_no_other_is() -> None:
    table = SessionTable(max_sessions=3)
    first, second, adopted = (admit(table, name) for name in "abc")
    for session in (first, second, adopted):
        session.machine.ips = ("127.0.0.1",)
    assert table.machines.meet(first, "boot", 1.0) is None
    second.known.since = 2.0
    assert table.machines.meet(second, "boot", 2.5) is None, (
        "its own pod cannot have started before it was asked for"
    )
    second.machine.ips = ("10.0.0.1",)
    assert table.machines.meet(second, "boot", 2.5) is first, "no two pods have one address"
    second.machine.ips = ("127.0.0.1",)
    second.known.since = 0.5
    assert table.machines.meet(second, "boot", 3.0) is first
    adopted.known.since, adopted.known.used = 2.0, True
    assert table.machines.meet(adopted, "boot", 3.0) is first, "when its pod has started is not known"
    table.close(first, None)
    assert table.machines.meet(adopted, "boot", 3.0) is None
