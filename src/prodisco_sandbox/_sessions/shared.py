"""Sessions that several managers serve side by side: their objects carry their deadlines.

The cluster deletes an object at its deadline. Before a use, a manager sees to it that the deadline
lies an idle timeout behind the use's end; it writes seldom, since each write adds some slack. All
that managers share is the cluster.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import sys
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .._cluster import metadata
from .._cluster.api_errors import NotFoundError, PreconditionError
from .._cluster.metadata import Object
from .._cluster.resource import Machine, Reading
from ..errors import SandboxError, SandboxPermissionError, SandboxUnavailableError
from .ends import LostError
from .eviction import Holder
from .leases import Deadlines
from .table import LIVING, RETURNED, SERVING, Session, SessionState

if TYPE_CHECKING:
    from .parts import Parts

BELIEVED_FOR = 90.0
"""Seconds for which what was last heard of an object counts; a watch gets a bookmark each minute."""
WRITE_TIMEOUT = 10.0
"""How long a use waits for its deadline to be written."""
SETTLE = 2.0
"""After a late extension, whoever made it, how long the controller may delete by what it saw before."""
TRIES = 5
"""How often an extension that met another change is tried."""

LEAST_SLACK = 30.0
_UNREAD, _ENDING = Reading("starting", None, ""), Reading("ending", None, "it was evicted")


@dataclass(slots=True)
class Seen:
    """What was last heard of an object of the group, whoever made it.

    Attributes:
        uid: Its uid.
        owner: The label of the caller whose session it is.
        version: Its resourceVersion.
        until: Its deadline, a Unix time; None: it has none.
        reading: What it says of itself, as far as a first contact needs it.
        generation: Of its spec when the deadline was read.
        needed: The deadline that the uses of this manager need.
        read_at: When it was read other than by the watch, on the loop's clock.
        settles_at: Not until it has been read then is it certain that a late extension holds.
    """

    uid: str | None
    owner: str | None
    version: str | None = None
    until: float | None = None
    reading: Reading = _UNREAD
    generation: int = 0
    needed: float = 0.0
    read_at: float = -math.inf
    settles_at: float = -math.inf


class SharedSessions(Deadlines):
    """The sessions of a group of managers, and the deadlines of those in use here."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        config = parts.config
        self._idle, self._skew = config.session_idle_timeout, config.clock_skew
        # A use must show in the deadline before its session may be evicted.
        evicts = config.when_full == "evict"
        self.slack = max(config.evict_after, LEAST_SLACK) if evicts else self._idle / 2
        self._at_birth = max(self._idle + self.slack, config.ready_timeout + self._skew)
        self._patience = config.ready_timeout
        self._table, self._watch = parts.table, parts.watch
        self._table.elsewhere, self._table.has_object = self.elsewhere, self.has
        self._eviction: asyncio.Task[None] | None = None
        self._seen: dict[str, Seen] = {}
        self._writes: dict[Session, asyncio.Task[None]] = {}

    @property
    def known(self) -> int:
        return len(self._seen)

    # What the cluster holds

    def has(self, name: str) -> bool:
        """Whether there is an object of this name, as far as the watch has told."""
        return name in self._seen

    async def listed(self) -> None:
        """Waits until the group's objects are known, which tells who has a sandbox already."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._patience):
                await self._watch.settled.wait()
        if self.is_open:
            return
        if self._watch.settled.is_set():
            plural, refusal = self._resources.resource.plural, self._watch.refusal
            raise SandboxPermissionError(
                f"with shared the manager must be allowed to list and watch {plural}: {refusal}"
            ) from refusal
        raise SandboxUnavailableError(f"no watch of sandboxes within ready_timeout ({self._patience:g} s)")

    @property
    def is_open(self) -> bool:
        """Whether the group's objects have been listed and are watched."""
        return self._watch.settled.is_set() and self._watch.active

    def synced(self, objects: list[Object], since: float) -> None:
        """All objects of the group, from a list asked for at `since` on the loop's clock."""
        names = {metadata.name(obj) for obj in objects}
        for name in [n for n, seen in self._seen.items() if n not in names and seen.read_at < since]:
            del self._seen[name]
        for obj in objects:
            seen = self._seen.get(metadata.name(obj))
            if seen is None or seen.uid == metadata.uid(obj) or seen.read_at < since:
                self._note(obj)

    def changed(self, obj: Object) -> None:
        """An event of the watch; not if it is older than what a session here knows."""
        name, uid = metadata.name(obj), metadata.uid(obj)
        seen, session = self._seen.get(name), self._table.named(name)
        if seen is None or seen.uid == uid or session is None or session.known.uid != seen.uid:
            self._note(obj)

    def found(self, obj: Object) -> None:
        """An object that was read, or written, by this manager."""
        self._note(obj).read_at = asyncio.get_running_loop().time()

    def gone(self, name: str, uid: str | None) -> None:
        seen = self._seen.get(name)
        if seen is not None and seen.uid == uid:
            del self._seen[name]

    def _note(self, obj: Object) -> Seen:
        name, uid, generation = metadata.name(obj), metadata.uid(obj), metadata.generation(obj)
        said = self._parts.reading(obj)
        pod = name if said.machine.pod == name else said.machine.pod  # One text instead of two.
        reading = Reading(
            said.phase, said.target, sys.intern(said.text), None, Machine(pod, said.machine.ips)
        )
        seen = self._seen.get(name)
        if seen is None or seen.uid != uid:
            seen = self._seen[name] = Seen(uid, metadata.labels(obj).get(metadata.LABEL_OWNER))
        seen.version, seen.reading = metadata.resource_version(obj), reading
        if generation >= seen.generation:  # else it is older than a write of ours
            until = self._resources.resource.deadline(obj)
            if until != seen.until and self._is_late(seen):
                seen.settles_at = asyncio.get_running_loop().time() + SETTLE
            seen.until, seen.generation = until, generation
        return seen

    async def look_up(self, name: str, deadline: float, *, always: bool = False) -> Seen | None:
        """What is known of an object; read now if the watch has been silent, or `always`."""
        seen = self._seen.get(name)
        if not always and self._is_believed(seen):
            return seen
        found = await self._resources.get(name, deadline)
        if found is not None:
            self.found(found)
        elif seen is not None:
            self.gone(name, seen.uid)
        return self._seen.get(name)

    def _is_believed(self, seen: Seen | None) -> bool:
        heard_at = max(self._watch.heard_at, -math.inf if seen is None else seen.read_at)
        return asyncio.get_running_loop().time() - heard_at < BELIEVED_FOR

    def of_owner(self, owner: str) -> int:
        """How many objects are of one caller's sessions."""
        label = metadata.owner_label(owner)
        return sum(seen.owner == label and not self._has_lapsed(seen) for seen in self._seen.values())

    def elsewhere(self) -> tuple[int, int]:
        """How many objects hold a slot and are in no session here; how many of these are being deleted."""
        named, lapsed = self._table.named, self._wall_clock() - self._skew
        held = [
            seen
            for name, seen in self._seen.items()
            if named(name) is None and (seen.until is None or seen.until >= lapsed)
        ]
        return len(held), sum(seen.reading.phase == "ending" for seen in held)

    def _has_lapsed(self, seen: Seen) -> bool:
        """Whether the cluster should have deleted it, by any clock."""
        return seen.until is not None and seen.until + self._skew < self._wall_clock()

    async def delete_lapsed(self) -> None:
        """Deletes what the cluster should have deleted, unless it has changed or is in use here."""
        for name, seen in list(self._seen.items()):
            session = self._table.named(name)
            if self._has_lapsed(seen) and (session is None or session.state not in LIVING):
                if await self._resources.delete(name, seen.uid, version=seen.version):
                    self._log.info("lapsed_deleted", sandbox=name, uid=seen.uid)
                else:
                    await self.look_up(name, asyncio.get_running_loop().time(), always=True)

    # Eviction

    @property
    def evicting(self) -> bool:
        return self._eviction is not None and not self._eviction.done()

    def holders(self) -> list[Holder]:
        """What `eviction` chooses from: objects, whichever manager uses them."""
        holders = []
        for name, seen in self._seen.items():
            if seen.reading.phase == "ending" or self._has_lapsed(seen):
                continue
            session = self._table.named(name)
            idle = None if seen.until is None else self._idle - self._skew - (seen.until - self._wall_clock())
            if session is not None and (session.state not in SERVING or session.idle_since() is None):
                idle = None
            # Who comes back moves the deadline, sooner or later.
            returned = seen.generation > 1 or (session is not None and session.uses >= RETURNED)
            holders.append(Holder(name, seen.owner, idle, returned))
        return holders

    def evict(self, name: str, idle: float) -> None:
        """Begins to end a session, of whichever manager, for another."""
        run = self._evict(name, self._seen[name], idle)
        self._eviction = self._parts.tasks.spawn(run, f"evict:{name}")

    async def _evict(self, name: str, seen: Seen, idle: float) -> None:
        """Deletes an object as it was seen: a use that has moved its deadline wins."""
        try:
            deleted = await self._resources.delete(name, seen.uid, version=seen.version)
            if not deleted:
                await self.look_up(name, asyncio.get_running_loop().time(), always=True)
                return
        except SandboxError as e:
            self._log.info("eviction_failed", sandbox=name, reason=str(e))
            return
        seen.reading = _ENDING  # The watch will say so.
        self._log.info("sandbox_evicted", sandbox=name, idle=round(idle, 3))
        session = self._table.named(name)
        if session is not None and session.known.uid == seen.uid:
            self._table.dropped(session)
            self._parts.ends.end(session, "evicted")

    # Deadlines

    def next(self) -> str:
        return metadata.lease_time(math.ceil(self._wall_clock() + self._at_birth), 0)

    async def allowed(self, deadline: float) -> bool:
        """Always True; `SandboxPermissionError`: it could not keep a session alive."""
        self._refused_at = None  # Not without asking.
        if not await super().allowed(deadline):
            raise SandboxPermissionError(
                f"with shared the manager must be allowed to patch {self._resources.resource.plural}"
            )
        return True

    def admit(self, session: Session, lasts: float) -> Coroutine[Any, Any, None] | None:
        """Sees to it that the session's object outlives a use of so many seconds by an idle timeout.

        Returns:
            None: it does. Else the use must wait for this, which is safe to cancel; it raises
            `LostError` where the object is gone, and `SandboxError` where its deadline is too near
            and cannot be moved.
        """
        return None if self.covers(session, lasts) else self._extend(session, lasts)

    def covers(self, session: Session, lasts: float) -> bool:
        """Whether the session's object is known to outlive such a use by an idle timeout."""
        seen, needed = self._own(session), self._wall_clock() + lasts + self._idle
        if seen is None or seen.until is None or seen.until < needed or not self._is_believed(seen):
            return False
        if seen.read_at < seen.settles_at:
            return False
        seen.needed = max(seen.needed, needed)
        return True

    def _own(self, session: Session) -> Seen | None:
        """What is known of the session's object; None: it is gone, another, or being deleted."""
        seen = self._seen.get(session.name)
        if seen is None or seen.uid != session.known.uid or seen.reading.phase == "ending":
            return None
        return seen

    async def _extend(self, session: Session, lasts: float) -> None:
        name = session.name
        for _ in range(TRIES):
            if self.covers(session, lasts):
                return
            write = self._writes.get(session)
            if write is None:
                write = self._parts.tasks.spawn(self._write(session, lasts), f"deadline:{name}")
                self._writes[session] = write
                write.add_done_callback(lambda _: self._writes.pop(session, None))
            await asyncio.wait({write})
            if write.cancelled():
                raise SandboxUnavailableError(f"the manager of sandbox {name} was shut down")
            error = write.exception()
            if isinstance(error, SandboxError):
                if isinstance(error, LostError):
                    raise error.copy_for_waiter()
                self._log.warning("deadline_not_moved", sandbox=name, reason=str(error))
                seen, ends = self._own(session), self._wall_clock() + lasts + self._skew
                if seen is None or seen.read_at < seen.settles_at or (seen.until or math.inf) < ends:
                    raise error.copy_for_waiter()
                return  # Its deadline is known to be far enough for this use.
            if error is not None:
                raise error
        raise SandboxUnavailableError(f"the deadline of sandbox {name} could not be moved: it keeps changing")

    async def _write(self, session: Session, lasts: float) -> None:
        """Moves a deadline, or learns what has become of the object; the caller looks again."""
        name, loop = session.name, asyncio.get_running_loop()
        deadline = loop.time() + WRITE_TIMEOUT
        await self.look_up(name, deadline)
        if self.covers(session, lasts):
            return
        if (seen := self._own(session)) is not None:
            if seen.read_at < seen.settles_at:
                await asyncio.sleep(seen.settles_at - loop.time())
            elif await self._move(session, seen, lasts, deadline):
                return
        await self.look_up(name, deadline, always=True)
        if self._own(session) is None:
            text = f"sandbox {name} was deleted"
            if session.state in SERVING:
                self._parts.ends.dropped(session, text)
            raise LostError(text)

    async def _move(self, session: Session, seen: Seen, lasts: float, deadline: float) -> bool:
        """Writes a deadline. Returns whether the object as it is now was noted."""
        now = self._wall_clock()
        until = metadata.lease_time(math.ceil(now + lasts + self._idle + self.slack), 0)
        version = seen.version if self._is_late(seen) else None
        try:
            patched = await self.write(session.name, seen.uid, until, version=version, deadline=deadline)
        except (NotFoundError, PreconditionError):
            return False
        if patched is not None:
            self.found(patched)
        return patched is not None

    def _is_late(self, seen: Seen) -> bool:
        """Whether the controller may have seen the deadline lapse: then it deletes by name, once."""
        return seen.until is not None and seen.until < self._wall_clock() + self._skew

    async def run(self) -> None:
        """Moves the deadlines of sessions that stay in use, until it is cancelled."""
        while True:
            await asyncio.sleep(self.slack / 2)
            sessions = [each for each in self._table.current.values() if each.state in SERVING]
            await self._each(sessions, self._keep)

    async def _keep(self, session: Session) -> None:
        """Extends the use of a session that is in use, and repeats what another write has undone."""
        seen, now, client = self._seen.get(session.name), self._wall_clock(), session.client
        has_calls = client is not None and client.in_flight
        if session.holds and client is not None and not has_calls:
            self._table.check(session)
        # Only one that can be reached is extended. Calls that get no sign of life end soon.
        if seen is None or not (has_calls or session.state is SessionState.READY):
            return
        lasts = seen.needed - now - self._idle
        if session.idle_since() is None:
            lasts = max(lasts, self.slack / 2)
        if seen.until is None or seen.until >= now + lasts + self._idle:
            return
        with contextlib.suppress(SandboxError):  # It is logged, and tried again.
            await self._extend(session, lasts)

    def measure(self, made: Object, sent: float) -> float | None:
        """How far this clock is ahead of the cluster's, by an object asked for at `sent`; within a second."""
        created = metadata.unix_time(made["metadata"].get("creationTimestamp"))
        if created is None:
            return None
        # It was made between `sent` and now, and its time is in whole seconds.
        early, late = sent - created - 1.0, self._wall_clock() - created
        ahead = max(early, 0.0) + min(late, 0.0)
        if abs(ahead) > self._skew / 2:
            self._log.warning("clocks_apart", ahead=round(ahead, 1), clock_skew=self._skew)
        return round(ahead, 1)
