"""The session table: every decision about sessions, and no await.

A session goes queued → creating → ready → closing → gone, and may leave that path at
any point for closing (or, where nothing has been started, for gone). The table decides
and returns what is to be done; the manager does it in tasks of its own. Nothing here
needs a running loop, so the table can be tested by itself.
"""

from __future__ import annotations

import asyncio
import enum
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import SandboxCapacityError, SandboxError

if TYPE_CHECKING:
    from ..client import SandboxClient


class SessionState(enum.Enum):
    """Where a session is in its life; creating, ready and closing hold a slot."""

    QUEUED = "queued"
    CREATING = "creating"
    READY = "ready"
    CLOSING = "closing"
    GONE = "gone"


@dataclass(slots=True, eq=False, kw_only=True)
class Session:
    """One sandbox of one session id, from the first request for it to its deletion.

    When a session id gets a new sandbox, it gets a new `Session`.
    """

    session_id: str = field(repr=False)
    session_hash: str
    name: str
    """Name of the Sandbox; it changes when the name turns out to be taken."""
    incarnation: int = 0
    """Goes up with the name, and with each pod that is replaced under the Sandbox."""
    state: SessionState = SessionState.QUEUED
    recreated: bool = False
    """Whether it replaces a sandbox that was reaped or died."""
    since: float = 0.0
    """When it was asked for, on the loop's clock."""
    after: Session | None = None
    """The session of the same id that must be gone before this one may start."""

    # What is known of the Sandbox.
    uid: str | None = None
    known_at: float = 0.0
    """When the uid became known, on the loop's clock."""
    observed: dict[str, Any] | None = None
    """The Sandbox as last seen."""
    observed_at: float = 0.0
    leftover: bool = False
    """There is, or may be, an object in the cluster that has to be deleted."""
    ambiguous: bool = False
    """The answer to a create was lost: it may land even after a get said 404."""
    ambiguous_at: float = 0.0
    """When the latest such answer was given up, on the loop's clock."""

    claimed: bool = True
    """It carries our instance label; False: it was adopted without leave to patch it."""
    generation: int = 0
    """Which of its generations our latest patch made; older conditions do not count."""
    was_used: bool = False
    """It was ready once, or was adopted: it may hold what a user wants back."""
    machine_lost: bool = False
    """The machine that its client led to is gone; the next client leads to another."""

    # What is known of its client.
    client: SandboxClient | None = None
    target: str | None = None
    """Where the client leads; None: there is none yet, or one of its users has closed it."""
    pod_ips: tuple[str, ...] = ()
    place: tuple[object, ...] = ()
    """Where its Sandbox's status said last that its machine is; see `manifest.place`."""
    placed_at: float = 0.0
    """When it said so first, on the loop's clock."""
    addresses: frozenset[str] = frozenset()
    """Target and addresses that no other session has meanwhile; see `SessionTable.occupy`."""
    misplaced: bool = False
    """Its machine is not where its status says, and news of that is waited for."""
    rivals: set[Session] = field(default_factory=set)
    """Sessions that wait for one of its addresses."""
    boot_ids: dict[str, float] = field(default_factory=dict)
    """Of all machines that it has had, and when it met them on the loop's clock."""
    met: SandboxClient | None = None
    """The client that last found its machine healthy."""
    machine: str | tuple[str, ...] = ()
    """The machine that it led to: its boot id or, of a server without fences, its addresses."""
    usable: bool = False
    """Ready, and no reason to doubt the client: it may be handed out at once."""

    # Who uses it.
    waiters: int = 0
    holds: int = 0
    last_used: float = 0.0

    # How it is going, and the manager's tasks for it.
    error: SandboxError | None = None
    """What whoever waits for it gets; None: they ask again."""
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when what is under way (a creation, a check) has an outcome."""
    released: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when it is gone, or when its deletion is left to the background."""
    news: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when `observed` has changed."""
    timer: asyncio.TimerHandle | None = None
    creation: asyncio.Task[None] | None = None
    request: asyncio.Task[dict[str, Any] | None] | None = None
    check: asyncio.Task[None] | None = None
    closer: asyncio.Task[None] | None = None

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


@dataclass(slots=True, kw_only=True)
class Totals:
    """What has happened to sessions so far; see `SandboxManagerStats`."""

    created: int = 0
    recreated: int = 0
    reaped: int = 0
    lost: int = 0
    failed: int = 0
    delete_retries: int = 0


def _are_loopback(addresses: tuple[str, ...]) -> bool:
    return bool(addresses) and all(address.startswith("127.") or address == "::1" for address in addresses)


class SessionTable:
    """All sessions of a manager, the slots they hold, and who waits for one.

    Invariants: per id there is at most one current and one closing session; creating
    and ready sessions are current; the sessions that hold a slot never exceed
    `max_sessions`; whoever waits for a slot gets it in the order of arrival; no two
    current sessions have the same address.
    """

    def __init__(self, max_sessions: int) -> None:
        self.max_sessions = max_sessions
        self.totals = Totals()
        self.current: dict[str, Session] = {}
        self.closing: dict[str, Session] = {}
        self._queue: dict[Session, None] = {}
        self._by_name: dict[str, Session] = {}
        self._by_address: dict[str, Session] = {}
        self._by_boot_id: dict[str, Session] = {}
        self._slots = 0

    def __len__(self) -> int:
        return len(self.current) + len(self.closing)

    def all(self) -> list[Session]:
        return [*self.current.values(), *self.closing.values()]

    def named(self, name: str) -> Session | None:
        """The session whose Sandbox has this name."""
        return self._by_name.get(name)

    def admit(self, session: Session, *, may_queue: bool) -> bool:
        """Registers a new session.

        A session whose predecessor is still closing always queues: it takes over the
        slot unless somebody came before it.

        Returns:
            Whether it has a slot and is to be created now.

        Raises:
            SandboxCapacityError: There is no slot, and it may not queue.
        """
        session.after = self.closing.get(session.session_id)
        start = session.after is None and self._slots < self.max_sessions
        if not start and session.after is None and not may_queue:
            raise self.full()
        self.current[session.session_id] = session
        if start:
            self._start(session)
        else:
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

    def rename(self, session: Session, name: str, incarnation: int) -> None:
        """Gives a creating session's Sandbox another name."""
        if self._by_name.get(session.name) is session:
            del self._by_name[session.name]
        session.name, session.incarnation = name, incarnation
        self._by_name[name] = session

    def ready(self, session: Session) -> None:
        """Creating → ready, or the end of a check that found it well."""
        session.state = SessionState.READY
        session.usable = True
        session.settled.set()

    def doubt(self, session: Session) -> None:
        """A ready session's client is not to be handed out until it was checked."""
        session.usable = False

    def occupy(self, session: Session, addresses: frozenset[str]) -> list[Session] | None:
        """Gives a session the addresses that its Sandbox's status names.

        A status may lag behind, so two can name one address. The one that has named it
        for the shorter time is taken to be right, until a server says otherwise.

        Returns:
            The sessions that have lost an address, whose status must be read again; None:
            another session's status is newer, and this one's must change.
        """
        if session.addresses == addresses:
            return []
        self.vacate(session)
        holders = {self._by_address.get(address) for address in addresses}
        others = [holder for holder in holders if holder is not None]
        for other in others:
            if other.placed_at >= session.placed_at:
                other.rivals.add(session)
                return None
        for other in others:
            self.vacate(other)
        session.addresses = addresses
        self._by_address |= dict.fromkeys(addresses, session)
        return others

    def vacate(self, session: Session) -> None:
        """Takes a session's addresses away, and wakes those that wait for one."""
        for address in session.addresses:
            del self._by_address[address]
        session.addresses = frozenset()
        for rival in session.rivals:
            rival.news.set()
        session.rivals.clear()

    def meet(self, session: Session, boot_id: str, now: float) -> Session | None:
        """Notes which machine a session has.

        Returns:
            Another current session that has met it before: then it is not this one's. But at a
            loopback address, which no pod has, a server that was met before this session's first
            Sandbox was made is meant for several sessions, as in tests.
        """
        other = self._by_boot_id.get(boot_id)
        if other is None:
            self._by_boot_id[boot_id] = session
            session.boot_ids[boot_id] = now
            return None
        shared = not session.was_used and other.boot_ids[boot_id] < session.known_at
        return None if other is session or (shared and _are_loopback(session.pod_ips)) else other

    def close(self, session: Session, error: SandboxError | None) -> bool:
        """Takes a session out of use.

        Returns:
            Whether there is anything to undo: then it is closing and holds its slot
            until `release`. A queued session is gone at once.
        """
        if self.current.get(session.session_id) is not session:
            return False
        del self.current[session.session_id]
        session.usable = False
        self.vacate(session)
        for boot_id in session.boot_ids:
            del self._by_boot_id[boot_id]
        session.boot_ids.clear()
        session.error = error
        session.settled.set()
        session.news.set()
        if session.state is SessionState.QUEUED:
            del self._queue[session]
            session.state = SessionState.GONE
            session.released.set()
            return False
        session.state = SessionState.CLOSING
        self.closing[session.session_id] = session
        return True

    def release(self, session: Session) -> list[Session]:
        """Closing → gone.

        Returns:
            The sessions that got a slot thereby and are to be created now.
        """
        if session.state is not SessionState.CLOSING:
            return []
        session.state = SessionState.GONE
        session.released.set()
        del self.closing[session.session_id]
        if self._by_name.get(session.name) is session:
            del self._by_name[session.name]
        self._slots -= 1
        return self._grant()

    def _grant(self) -> list[Session]:
        started = []
        for session in list(self._queue):
            if self._slots >= self.max_sessions:
                break
            if session.after is None or session.after.state is SessionState.GONE:
                del self._queue[session]
                self._start(session)
                started.append(session)
        return started

    def idle(self, now: float, timeout: float) -> list[Session]:
        """The ready sessions that nobody has used for `timeout` seconds."""
        idle = []
        for session in self.current.values():
            if session.state is not SessionState.READY or now - session.last_used < timeout:
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
        return Counter(session.state for session in self.all())

    def waiting(self) -> int:
        """How many callers wait for a session."""
        return sum(session.waiters for session in self.current.values())
