"""The session table: every decision about sessions, and no await.

A session goes queued → creating → ready ⇄ suspect → closing → gone, and may leave that
path at any point for closing or, where nothing has been started, for gone. The table
decides and returns what is to be done; a session's life does it (`life`). Nothing here
needs a running loop, so the table is tested by itself.
"""

from __future__ import annotations

import asyncio
import enum
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, get_args

from .._cluster import metadata
from .._cluster.metadata import Object
from .._cluster.resource import Reading
from .._telemetry import Trace
from ..errors import SandboxCapacityError, SandboxError
from .eviction import Holder
from .inbox import Inbox, News
from .machines import Machine, Machines

if TYPE_CHECKING:
    from ..client import SandboxClient


class SessionState(enum.Enum):
    """Where a session is in its life; all but queued and gone hold a slot."""

    QUEUED = "queued"
    CREATING = "creating"
    READY = "ready"
    SUSPECT = "suspect"
    """It was ready, and its client must be checked before it is handed out again."""
    CLOSING = "closing"
    GONE = "gone"


SERVING = (SessionState.READY, SessionState.SUSPECT)
LIVING = (SessionState.CREATING, *SERVING)
RETURNED = 2
"""The uses of a session that somebody has come back to; one that is made again has as many."""


@dataclass(slots=True, kw_only=True)
class Known:
    """What the watch, or a get, said last of the session's object."""

    uid: str | None = None
    since: float = 0.0
    """When the uid became known, on the loop's clock."""
    reading: Reading | None = None
    """Instead of `object`, of one that another manager has made."""
    object: Object | None = None
    """Only while the session is created, checked or suspended: it holds the whole pod template."""
    read_at: float = 0.0
    """When it was read or heard of last, on the loop's clock."""
    claimed: bool = True
    """It carries our instance label; False: it was adopted without leave to patch it."""
    generation: int = 0
    """Which of its generations our latest patch made; older conditions do not count."""
    used: bool = False
    """It was ready once, or was adopted: it may hold what a user wants back."""
    gone: str | None = None
    """The uid of an object of this name that was deleted before ours was known."""
    version: str | None = None
    """Its resourceVersion, as far as the watch has told."""


What = Literal["nothing", "known", "unconfirmed", "another's", "kept", "suspended"]


@dataclass(frozen=True, slots=True)
class Remains:
    """What the end of a session has to delete.

    Attributes:
        what: ``"nothing"``; ``"known"``: its object; ``"unconfirmed"``: a request that makes one
            is on its way, or its answer was lost; ``"another's"``: deleted, or claimed by another
            manager; ``"kept"``: it may hold what a user wants back; ``"suspended"``: it has been
            suspended for when the session comes back.
        lost_at: When the answer to a create was lost that may still be carried out, on the
            loop's clock.
    """

    what: What = "nothing"
    lost_at: float | None = None

    @property
    def needs_delete(self) -> bool:
        return self.what in ("known", "unconfirmed")


_REMAINS: dict[What, Remains] = {what: Remains(what) for what in get_args(What)}
"""Most sessions share one of these."""


class Outcome(asyncio.Event):
    """Set when a creation or a check has ended; what those who wait for it raise."""

    error: SandboxError | None = None

    def reach(self, error: SandboxError | None = None) -> None:
        self.error = error
        self.set()


_REACHED = Outcome()
"""Of all ready sessions: an event of its own for each would take a tenth of their memory."""
_REACHED.set()


@dataclass(slots=True, eq=False, kw_only=True)
class Session:
    """One sandbox of one session id, from the first request for it to its deletion.

    When a session id gets a new sandbox, it gets a new `Session`.
    """

    session_id: str = field(repr=False)
    session_hash: str
    name: str
    """Name of its object; it changes when the name turns out to be taken."""
    incarnation: int = 0
    """Goes up with the name, and with each machine that is replaced under the object."""
    owner: str | None = field(default=None, repr=False)
    """Whose session it is, as far as a caller has said."""
    state: SessionState = SessionState.QUEUED
    since: float = 0.0
    """When it was asked for or, later, when its creation began; on the loop's clock."""
    trace: Trace | None = None
    """Where the spans of its steps belong: to whoever has asked for it, checks it, or ends it."""
    after: Session | None = None
    """The session of the same id that must be gone before this one may start."""
    recreated: bool = False
    """It replaces a sandbox that was reaped or died."""
    known: Known = field(default_factory=Known)
    remains: Remains = Remains()
    machine: Machine = field(default_factory=Machine)
    client: SandboxClient | None = None
    holds: int = 0
    """Entered `SandboxManager.session` contexts."""
    waiters: int = 0
    last_used: float = 0.0
    uses: int = 0
    """How often somebody began to use it; all who have waited for its creation count once."""
    has_evicted: bool = False
    """Another session was ended to make room for it."""
    after_eviction: bool = False
    """Its id's sandbox before was ended to make room for another's."""
    outcome: Outcome = field(default_factory=Outcome)
    inbox: Inbox = field(default_factory=Inbox)
    request: asyncio.Task[Any] | None = None
    """The create, claim or renewal in flight, which nothing cancels: the removal waits for it."""
    ended: str = ""
    """Why it ended."""
    suspends: bool = False
    """Of a session that has ended: its object is suspended instead of deleted."""
    has_slot: bool = True
    released: asyncio.Event | None = None
    """Of a closing session: set when it is gone, or when its deletion is left to the background."""

    @property
    def about(self) -> dict[str, str]:
        return {"sandbox.name": self.name}

    @property
    def checking(self) -> bool:
        """Whether a suspect session's check is under way."""
        return self.state is SessionState.SUSPECT and not self.outcome.is_set()

    @property
    def may_start(self) -> bool:
        """Whether a queued session needs nothing but a slot."""
        return self.after is None or self.after.state is SessionState.GONE

    def idle_since(self) -> float | None:
        """When its last use ended, on the loop's clock; None while it is in use."""
        if self.holds or self.waiters:
            return None
        client = self.client
        if client is None:
            return self.last_used
        if client.in_flight:
            return None
        return max(self.last_used, client.last_used)


class SessionTable:
    """All sessions of a manager, the slots they hold, and who waits for one.

    Invariants: per id there is at most one current and one closing session; creating,
    ready and suspect sessions are current; the sessions that hold a slot never exceed
    `max_sessions`; whoever waits for a slot gets it in the order of arrival.

    Attributes:
        current: By session id, those that have not ended.
        ready: By session id, those whose client may be handed out at once.
        closing: By session id, those that have ended and hold their slot.
        elsewhere: Tells how many slots are taken by sessions that are not in the table, and how many
            of these are about to be free.
        has_object: Tells whether there is an object of this name already, with a slot that is its session's.
    """

    def __init__(self, max_sessions: int) -> None:
        self.max_sessions = max_sessions
        self.elsewhere: Callable[[], tuple[int, int]] = lambda: (0, 0)
        self.has_object: Callable[[str], bool] = lambda _: False
        self.machines = Machines()
        self.current: dict[str, Session] = {}
        self.ready: dict[str, Session] = {}
        self.closing: dict[str, Session] = {}
        self._queue: dict[Session, None] = {}
        self._by_name: dict[str, Session] = {}
        self._slots = 0
        self._room: int | None = None
        """How many slots the cluster had room for when it last refused one; only while sessions wait."""
        self._tries: Session | None = None
        """Whoever finds out whether there is more."""
        self._starts_fail = False

    def __len__(self) -> int:
        return len(self.current) + len(self.closing)

    def named(self, name: str) -> Session | None:
        return self._by_name.get(name)

    # Slots

    @property
    def slots(self) -> int:
        """How many sessions there may be at once, as far as is known."""
        known = self._room if self._queue and self._room is not None else self.max_sessions
        return min(known, self.max_sessions)

    @property
    def is_full(self) -> bool:
        return self._slots + self.elsewhere()[0] >= self.slots

    def admit(self, session: Session, *, may_queue: bool) -> bool:
        """Registers a session of an id that has no current one. Returns whether it has a slot.

        One whose predecessor is still closing always queues: it takes over the slot unless somebody came
        before it. `SandboxCapacityError`: there is no slot, and it may not queue.
        """
        session.after = self.closing.get(session.session_id)
        start = session.after is None and (self.has_object(session.name) or not self.is_full)
        if not start and session.after is None and not may_queue:
            raise self.full()
        self.current[session.session_id] = session
        if start:
            self._start(session)
        else:
            self._room = self._room if self._queue else None
            self._queue[session] = None
        return start

    def full(self) -> SandboxCapacityError:
        return SandboxCapacityError(
            f"all {self.max_sessions} sandbox slots are taken: close a session, wait (capacity_timeout),"
            " or raise max_sessions"
        )

    def _start(self, session: Session) -> None:
        session.state = SessionState.CREATING
        session.after = None
        self._slots += 1
        self._by_name[session.name] = session

    def release(self, session: Session) -> list[Session]:
        """Closing → gone. Returns the sessions that got a slot thereby."""
        if session.state is not SessionState.CLOSING:
            return []
        session.state = SessionState.GONE
        self.leave_to_background(session)
        del self.closing[session.session_id]
        if self._by_name.get(session.name) is session:
            del self._by_name[session.name]
        self._slots -= session.has_slot
        return self.start_waiting()

    def start_waiting(self) -> list[Session]:
        """Gives free slots to those who wait for one. Returns the sessions that got one."""
        started: list[Session] = []
        full = False
        for waiting in list(self._queue):
            full = full or self.is_full
            if waiting.may_start and (not full or self.has_object(waiting.name)):
                del self._queue[waiting]
                self._start(waiting)
                waiting.inbox.post(News.SLOT)
                started.append(waiting)
        return started

    def requeue(self, session: Session) -> None:
        """Creating → queued, at the head: the cluster has refused what the slot promised."""
        del self._by_name[session.name]
        self._slots -= 1
        session.state = SessionState.QUEUED
        self._queue = {session: None, **self._queue}
        self._room = self._slots + self.elsewhere()[0]
        self._starts_fail = self._starts_fail or session.has_evicted

    def try_room(self) -> None:
        """Gives the first in the queue a slot that the cluster has refused: there may be room by now."""
        tries = self._tries is not None and self._tries.state is SessionState.CREATING
        if self._room is not None and not tries and self._slots_to_come() == 0:
            self._room += 1
            self._tries = next(iter(self.start_waiting()), None)

    def leave_to_background(self, session: Session) -> None:
        """Whoever waits for the end of a closing session goes on."""
        if session.released is not None:
            session.released.set()

    def _slots_to_come(self) -> int:
        """Slots that are free, or will be soon: not those whose deletion was left to the background."""
        ending = [s for s in self.closing.values() if s.has_slot and s.released and not s.released.is_set()]
        taken, leaving = self.elsewhere()
        return max(0, self.slots - self._slots - taken + leaving + len(ending))

    def is_first(self, session: Session) -> bool:
        return next(iter(self._queue), None) is session

    def expects_slot(self, session: Session) -> bool:
        """Whether one of the slots to come is a queued session's."""
        return session in islice(self._queue, self._slots_to_come())

    @property
    def may_evict(self) -> bool:
        """False while creations fail, or while the object of an evicted session cannot be deleted."""
        left = [session for session in self.closing.values() if session.ended == "evicted"]
        return not self._starts_fail and not any(s.released and s.released.is_set() for s in left)

    def first_unserved(self) -> tuple[Session, list[Session]] | None:
        """The first in the queue that no slot is coming for, and those before it, if another may be ended."""
        if not self.may_evict:
            return None
        to_come = self._slots_to_come()
        first = next((s for s in islice(self._queue, to_come, None) if s.may_start), None)
        return None if first is None else (first, list(islice(self._queue, to_come)))

    def holders(self, now: float) -> list[Holder]:
        """What `eviction` chooses from."""
        holders = []
        for session in self.holding():
            since = session.idle_since() if session.state in SERVING else None
            idle = None if since is None else now - since
            holders.append(Holder(session.session_id, session.owner, idle, session.uses >= RETURNED))
        return holders

    def holding(self) -> list[Session]:
        """The current sessions that hold a slot."""
        return [session for session in self.current.values() if session.state is not SessionState.QUEUED]

    # A session's object

    def rename(self, session: Session, name: str, incarnation: int) -> None:
        """Gives a creating session's object another name, of which nothing is known yet."""
        if self._by_name.get(session.name) is session:
            del self._by_name[session.name]
        session.name, session.incarnation = name, incarnation
        self._by_name[name] = session

    def sent(self, session: Session) -> None:
        """A request goes out that makes an object, or makes one the session's."""
        self._set_remains(session, "unconfirmed")

    def answered(self, session: Session, uid: str | None) -> None:
        """The session has an object, which its end deletes."""
        session.known.uid = uid
        self._set_remains(session, "known")

    def refused(self, session: Session) -> None:
        """A clear refusal: there is nothing, unless an earlier answer was lost."""
        self._set_remains(session, "nothing" if session.remains.lost_at is None else "unconfirmed")

    def unanswered(self, session: Session, now: float) -> None:
        """The answer was lost: the request may be carried out, even after a get said 404."""
        session.remains = replace(session.remains, lost_at=now)
        self._set_remains(session, "unconfirmed")

    def found(self, session: Session, sandbox: Object, uid: str | None, now: float) -> None:
        """The session has this object; what the watch has told of it meanwhile is newer."""
        known = session.known
        self.answered(session, uid)
        known.since = known.read_at = now
        known.version = metadata.resource_version(sandbox)
        if known.object is None or known.object["metadata"].get("uid") != uid:
            known.object = sandbox

    def confirmed(self, session: Session) -> None:
        """The only create whose answer was lost has been carried out: no other can follow."""
        session.remains = replace(session.remains, lost_at=None)

    def deleted(self, session: Session) -> None:
        """Its object was deleted here, and it has no other yet."""
        self._set_remains(session, "nothing")

    def dropped(self, session: Session) -> None:
        """Its object was deleted, or belongs to another manager: there is nothing to delete."""
        self._set_remains(session, "another's")

    def _set_remains(self, session: Session, what: What) -> None:
        lost_at = session.remains.lost_at
        if session.remains.what != "kept":  # Which no late answer to a claim may undo.
            session.remains = _REMAINS[what] if lost_at is None else Remains(what, lost_at)

    # Its state

    def make_ready(self, session: Session, client: SandboxClient, now: float) -> bool:
        """Creating or suspect → ready. Returns False if the session has ended meanwhile."""
        if session.state not in LIVING:
            return False
        if session.state is SessionState.CREATING:
            self._starts_fail = False
            if session.known.used:
                session.uses = RETURNED
        session.state = SessionState.READY
        session.client = client
        session.last_used = now
        session.known.used, session.known.generation = True, 0
        session.known.object = session.known.reading = session.request = None
        self.ready[session.session_id] = session
        session.outcome.reach()
        session.outcome = _REACHED
        return True

    def suspect(self, session: Session) -> bool:
        """Ready → suspect. Returns whether it was ready."""
        if session.state is not SessionState.READY:
            return False
        session.state = SessionState.SUSPECT
        del self.ready[session.session_id]
        return True

    def check(self, session: Session) -> bool:
        """Begins the check of a suspect session. Returns False if one is under way, or none is needed."""
        if session.state is not SessionState.SUSPECT or session.checking:
            return False
        session.outcome = Outcome()
        session.inbox.post(News.LOOK)
        return True

    def look(self, session: Session) -> None:
        """The session's object may be gone, or no longer ours: its life reads it now."""
        if session.state is SessionState.CREATING:
            session.inbox.post(News.LOOK)
        else:
            self.suspect(session)
            self.check(session)

    def checked(self, session: Session, error: SandboxError) -> None:
        """The check found out nothing: the session stays suspect, and the next use checks again."""
        if session.checking:
            session.outcome.reach(error)

    def close(
        self,
        session: Session,
        error: SandboxError | None,
        reason: str = "closed",
        *,
        keep: bool = False,
        suspend: bool = False,
    ) -> bool:
        """Takes a session out of use: if it was queued it is gone, else it holds its slot until `release`.

        Args:
            session: A current one; of others it has been done.
            error: What those who wait for it get; None: they ask again.
            reason: For the log.
            keep: Its object is not deleted.
            suspend: Its object is suspended instead of deleted; with `keep` only if it has one for certain.

        Returns:
            Whether there is anything to undo.
        """
        if self.current.get(session.session_id) is not session:
            return False
        del self.current[session.session_id]
        self.ready.pop(session.session_id, None)
        self.machines.leave(session)
        session.ended = reason
        self._starts_fail = self._starts_fail or reason == "failed"
        certain = session.remains.what == "known"
        session.suspends = suspend and (certain or (session.remains.needs_delete and not keep))
        if keep and not session.suspends and session.remains.needs_delete:
            self._set_remains(session, "kept")
        if session.outcome is _REACHED:
            session.outcome = Outcome()
        session.outcome.reach(error)
        queued = session.state is SessionState.QUEUED
        if queued:
            del self._queue[session]
            session.state = SessionState.GONE
        else:
            self._begin_closing(session)
        session.inbox.close()
        return not queued

    def _begin_closing(self, session: Session) -> None:
        session.state = SessionState.CLOSING
        session.released = asyncio.Event()
        self.closing[session.session_id] = session

    def bury(self, session: Session) -> None:
        """Registers a closing session for an object that had no session. It holds no slot."""
        session.has_slot, session.ended = False, "closed"
        session.remains = Remains("known")
        self._by_name[session.name] = session
        self._begin_closing(session)
        session.inbox.close()

    def delete_after_all(self, session: Session) -> None:
        """Has a closing session's object deleted instead of suspended."""
        session.suspends = False

    def suspended(self, session: Session, obj: Object) -> None:
        """A closing session's object has been suspended; what the watch has told of it since is newer."""
        session.known.object = session.known.object or obj
        self._set_remains(session, "suspended")

    def keep(self, session: Session) -> None:
        """A closing session's object can neither be suspended nor be deleted."""
        session.suspends = False
        self._set_remains(session, "kept")

    # Looking at all

    def idle(self, now: float, timeout: float) -> list[Session]:
        """The ready and suspect sessions that nobody has used for `timeout` seconds."""
        idle = []
        for session in self.current.values():
            if session.state not in SERVING or now - session.last_used < timeout:
                continue
            since = session.idle_since()
            if since is None:
                continue
            if now - since >= timeout:
                idle.append(session)
            # The client need not be asked again until that is long ago, too.
            session.last_used = since
        return idle

    def counts(self) -> Counter[SessionState]:
        """Sessions by state, without closing ones that hold no slot (see `bury`)."""
        closing = [session for session in self.closing.values() if session.has_slot]
        return Counter(session.state for session in (*self.current.values(), *closing))

    def waiting(self) -> int:
        return sum(session.waiters for session in self.current.values())
