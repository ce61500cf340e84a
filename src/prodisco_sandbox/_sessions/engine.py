"""Multi mode: callers and the watch on one side, the lives of sessions on the other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .. import _telemetry
from .._cluster import metadata
from .._cluster.manifest import SANDBOX
from .._cluster.metadata import Object
from ..config import SandboxManagerConfig
from ..errors import SandboxCapacityError, SandboxError, SandboxFailedError, SandboxManagerClosedError
from .ends import LostError
from .inbox import News
from .life import Lives
from .parts import Parts
from .shared import SharedSessions
from .table import RETURNED, SERVING, Session, SessionState

if TYPE_CHECKING:
    from ..client import SandboxClient

ROUNDS = 3
"""How often a caller asks again when the sandbox dies before it gets the client."""


class Engine:
    """Sessions on Sandboxes, for one manager in multi mode.

    State changes are synchronous calls into the table. All I/O runs in tasks of the
    engine's, most of it in the lives of sessions, which a caller's cancellation never
    reaches: callers only wait for outcomes.
    """

    def __init__(
        self,
        config: SandboxManagerConfig,
        api: Any | None,
        client_factory: Callable[[str], SandboxClient],
        wall_clock: Callable[[], float],
    ) -> None:
        self._config = config
        self.parts = parts = Parts(config, api, wall_clock, self)
        self.table, self.shared = parts.table, parts.shared
        self._log, self._tasks, self._ends = parts.log, parts.tasks, parts.ends
        self._resources, self._watch, self._suspended = parts.resources, parts.watch, parts.suspended
        self._lives = Lives(parts, client_factory)
        self._watch_task: asyncio.Task[None] | None = None
        self._sweep_task: asyncio.Task[None] | None = None
        self._kind_checked = False
        self._closed = False

    def start(self) -> None:
        _telemetry.tables.add(self.table)
        self._tasks.supervise(self._reap, "sandbox-reaper")
        self._tasks.supervise(self.parts.leases.run, "sandbox-leases")
        if self.shared is not None:
            self._follow()

    def _follow(self) -> None:
        if self._watch_task is None:
            self._watch_task = self._tasks.supervise(self._watch.run, "sandbox-watch")
            if self._resources.resource is not SANDBOX and not self._kind_checked:
                self._kind_checked = True
                self._tasks.spawn(self._warn_of_other_kind(), "sandbox-other-kind")

    # Callers

    async def acquire(
        self, session_id: str, *, owner: str | None = None, use: bool = True, hold: bool = False
    ) -> Session:
        """Waits for the session's sandbox; makes one if there is none.

        Args:
            session_id: Any non-empty text.
            owner: Whose session it is; the first that is given stays.
            use: Count this as a use.
            hold: Count the session as busy, until the caller takes one from `holds`.
        """
        session, lasts = self.table.ready.get(session_id), 0.0
        known = self.table.current.get(session_id)
        returns = known is not None and known.state in SERVING
        if self.shared is not None:
            lasts = self.shared.slack if hold else 0.0
            session = session if session is not None and self.shared.covers(session, lasts) else None
        if session is None:
            trace = None if known is None else _telemetry.joining(known.trace)
            with _telemetry.span("sandbox.get_client", trace):
                session = await self._awaited(session_id, owner, lasts)
        session.owner = session.owner or owner
        session.last_used = self.parts.now()
        session.holds += hold
        if use:
            session.uses = session.uses + 1 if returns else max(session.uses, 1)
        return session

    async def _awaited(self, session_id: str, owner: str | None, lasts: float) -> Session:
        for _ in range(ROUNDS):
            session = self.table.current.get(session_id)
            if session is None and self.shared is not None:
                await self.shared.listed()
                session = self.table.current.get(session_id)
            if self._closed:
                raise SandboxManagerClosedError("the manager has been shut down")
            session = session or self._admit(session_id, owner)
            session.owner = session.owner or owner
            if self.table.check(session):
                session.trace = _telemetry.here()
            error = None
            if session.state is not SessionState.READY:
                error = await self._ends.outcome(session)
            if session.state is SessionState.READY and self.shared is not None:
                await self._outlives(session, self.shared, lasts)
            if session.state is SessionState.READY:
                return session
            if error is not None:
                raise error.copy_for_waiter()
        raise SandboxFailedError(f"the session's sandbox died {ROUNDS} times before it could be used")

    async def _outlives(self, session: Session, shared: SharedSessions, lasts: float) -> None:
        """Sees to it that the session's object outlives a use; one that is gone ends the session."""
        admission = shared.admit(session, lasts)
        if admission is not None:
            session.waiters += 1
            try:
                await admission
            except LostError:
                return
            finally:
                session.waiters -= 1

    def _admit(self, session_id: str, owner: str | None) -> Session:
        now, session_hash = self.parts.now(), metadata.session_hash(session_id)
        name, incarnation = self.parts.past.fresh_name(session_id, now)
        recreated = self.parts.past.was_here(session_hash)
        session = Session(
            session_id=session_id,
            session_hash=session_hash,
            name=name,
            incarnation=incarnation,
            owner=owner,
            since=now,
            recreated=recreated,
            uses=RETURNED if recreated else 0,
            after_eviction=self.parts.past.was_evicted(session_hash),
            trace=_telemetry.here(),
        )
        may_queue = self._config.capacity_timeout > 0 or self._config.when_full == "evict"
        try:
            self.table.admit(session, may_queue=may_queue)
        except SandboxCapacityError as e:
            self._ends.refused(session, e)
            raise
        self._follow()
        self._lives.begin(session)
        return session

    async def _warn_of_other_kind(self) -> None:
        """Warns of Sandboxes from before the warm pool, which are neither adopted nor cleaned up."""
        try:
            found, _ = await self._resources.of(SANDBOX).list(self.parts.own_objects)
        except SandboxError as e:  # Such as a Role for claims only.
            self._log.info("sandbox_kind_not_checked", reason=str(e))
            return
        if left := [metadata.name(sandbox) for sandbox in found if not metadata.is_deleting(sandbox)]:
            self._log.error(
                "sandbox_kind_changed",
                sandboxes=sorted(left),
                reason="this instance_id has Sandboxes that are no claims: with warm_pool, use a new one",
            )

    async def close(self, session_id: str) -> None:
        """Ends a session; returns once it is gone or its deletion is left to the background."""
        session = self.table.current.get(session_id)
        if session is not None:
            self._ends.end(session, "closed", SandboxError("the session was closed while it was waited for"))
            if self.shared is not None:
                await self._deleted(session_id)
        if session_id not in self.table.closing and not self._lives.stopped:
            session_hash = metadata.session_hash(session_id)
            # With `shared` it may have ended before it has taken the object that another manager has made.
            looks = self.shared is not None and (session is None or session.known.uid is None)
            looks = looks or (self._config.on_idle == "suspend" and not self._watch.current)
            if (found := self._suspended.take(session_hash)) is not None:
                self._lives.bury(session_id, session_hash, found.name, metadata.uid(found.object))
            elif looks:
                await asyncio.wait({self._tasks.spawn(self._bury(session_id, session_hash), "sandbox-bury")})
        await self._deleted(session_id)

    async def _deleted(self, session_id: str) -> None:
        """Waits until a closing session is gone or its deletion is left to the background."""
        closing, waited = self.table.closing.get(session_id), None
        while closing is not None and closing is not waited:
            self.table.delete_after_all(closing)
            if closing.released is not None:
                await closing.released.wait()
            # If it had just been suspended, a second closing session deletes it.
            waited, closing = closing, self.table.closing.get(session_id)

    async def _bury(self, session_id: str, session_hash: str) -> None:
        """Deletes what another manager or an earlier process has made for a session that has nothing here."""
        name = self.sandbox_name(session_id, self.parts.now())
        deadline = self.parts.now() + self._config.ready_timeout
        try:
            if self.shared is not None:
                seen = await self.shared.look_up(name, deadline)
                left = [] if seen is None or seen.reading.phase == "ending" else [(name, seen.uid)]
            else:
                selector = self.parts.selector(instance=self._config.instance_label, session=session_hash)
                objects, _ = await self._resources.list(selector, deadline)
                left = [(metadata.name(o), metadata.uid(o)) for o in objects if not metadata.is_deleting(o)]
        except SandboxError as e:
            self._log.warning("sandbox_not_looked_for", sandbox=name, reason=str(e))
            return
        # If it was asked for again meanwhile, it takes the object.
        if left and session_id not in self.table.current and session_id not in self.table.closing:
            self._suspended.take(session_hash)
            self._lives.bury(session_id, session_hash, *left[0])

    async def clean_up(self, *, all_instances: bool) -> int:
        deadline = self.parts.now() + self._config.ready_timeout
        run = self._lives.remove.clean_up(all_instances=all_instances, deadline=deadline)
        task = self._tasks.spawn(run, "sandbox-orphan-cleanup")
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            task.cancel()
            raise
        if task.cancelled():
            raise SandboxManagerClosedError("the manager was shut down during the clean-up")
        return task.result()

    def has_session(self, session_id: str) -> bool:
        """Whether it is in the table or, with `shared`, has an object."""
        if session_id in self.table.current:
            return True
        return self.shared is not None and self.shared.has(self.sandbox_name(session_id, self.parts.now()))

    def count_sessions(self, owner: str) -> int:
        """How many sandboxes the sessions of an owner have, or are about to get."""
        mine = [session for session in self.table.current.values() if session.owner == owner]
        if self.shared is None:
            return len(mine)
        return self.shared.of_owner(owner) + sum(not self.shared.has(session.name) for session in mine)

    def sandbox_name(self, session_id: str, now: float) -> str:
        """The name that the session's object has, or would have."""
        session = self.table.current.get(session_id) or self.table.closing.get(session_id)
        if session is not None:
            return session.name
        suspended = self._suspended.of(metadata.session_hash(session_id))
        return self.parts.past.fresh_name(session_id, now)[0] if suspended is None else suspended.name

    # The watch tells

    def synced(self, sandboxes: list[Object], since: float) -> None:
        if self.shared is not None:
            self.shared.synced(sandboxes, since)
            self.table.start_waiting()
        listed = {metadata.uid(sandbox) for sandbox in sandboxes}
        names = {metadata.name(sandbox) for sandbox in sandboxes}
        for sandbox in sandboxes:
            self._tell_session(sandbox)
        for session in list(self.table.current.values()):
            known, serving = session.known, session.state in SERVING
            unseen = known.uid not in listed if known.uid else session.name not in names
            # One that is new to us may be too new for the list, but not if it is ready already.
            if known.claimed and unseen and (serving or (known.uid is not None and known.since < since)):
                self.table.look(session)
        self._suspended.listed(sandboxes)
        for session in self.table.closing.values():
            known = session.known
            if known.claimed and known.uid and known.uid not in listed and known.since < since:
                self.table.dropped(session)  # as `deleted` would have done

    def changed(self, sandbox: Object) -> None:
        if self.shared is not None:
            known = self.shared.known
            self.shared.changed(sandbox)
            if self.shared.known > known:  # It may be that of a session in the queue.
                self.table.start_waiting()
        self._tell_session(sandbox)

    def _tell_session(self, sandbox: Object) -> None:
        """What an object says now, for the session that it belongs to."""
        session = self._session_of(sandbox)
        if session is None:
            if self._config.on_idle == "suspend":
                self._suspended.seen(sandbox, is_suspended=not self._resources.resource.is_to_run(sandbox))
            return
        session.known.version = metadata.resource_version(sandbox)
        if session.state is SessionState.CLOSING:
            if session.suspends and not self._resources.resource.is_to_run(sandbox):
                session.known.object = sandbox
            return
        if session.state is SessionState.CREATING or session.checking:
            session.known.object, session.known.read_at = sandbox, self.parts.now()
            session.inbox.post(News.SEEN)
            return
        reading, machine = self.parts.reading(sandbox), session.machine
        if reading.phase == "ending":
            if metadata.is_deleting(sandbox):
                self.table.dropped(session)
            self._ends.lose(session, reading.text)
        elif reading.phase in ("dead", "suspended") or machine.is_another(reading.machine):
            if session.client is not None:
                self._lives.clients.lose_machine(session, reading.text)
        elif reading.target is None or machine.differs(reading.machine):
            self._lives.clients.suspect(session, reading.text)

    def deleted(self, sandbox: Object) -> None:
        if self.shared is not None:
            self.shared.gone(metadata.name(sandbox), metadata.uid(sandbox))
            self.table.start_waiting()
        session = self._session_of(sandbox)
        if session is None:
            self._suspended.gone(sandbox)
            return
        if session.known.uid is None and session.state not in SERVING:
            # Whether this is the object that we are making only the create's answer tells.
            session.known.gone = metadata.uid(sandbox)
            session.inbox.post(News.LOOK)  # Of an object without uid the answer tells nothing.
            return
        self.table.dropped(session)  # Nobody need delete it, and nobody may if it was claimed.
        text = f"sandbox {session.name} was deleted, or claimed by another manager"
        if session.state is SessionState.CREATING and (session.known.used or self.shared is not None):
            session.inbox.post(News.LOOK)  # If it was suspended, the session gets another object.
        elif session.state is SessionState.CREATING:
            self._ends.fail(session, SandboxFailedError(text))
        elif session.state in SERVING:
            self._ends.lose(session, text)

    def down(self) -> None:
        for session in self.table.current.values():
            if session.state is SessionState.CREATING:
                session.inbox.post(News.LOOK)

    def _session_of(self, sandbox: Object) -> Session | None:
        """Not a session of the same name's past."""
        session = self.table.named(metadata.name(sandbox))
        if session is None:
            return None
        if session.known.uid is not None:
            return session if session.known.uid == metadata.uid(sandbox) else None
        ours = metadata.labels(sandbox).get(metadata.LABEL_SESSION) == session.session_hash
        return session if ours else None

    # The reaper

    async def _reap(self) -> None:
        while True:
            await asyncio.sleep(self._config.idle_check_interval)
            await self._tick()

    async def _tick(self) -> None:
        timeout = self._config.session_idle_timeout
        for session in self.table.idle(self.parts.now(), timeout):
            await self.parts.pace()
            since, now = session.idle_since(), self.parts.now()
            if session.state in SERVING and since is not None and now - since >= timeout:
                if self.shared is None:
                    self._log.info("sandbox_reaped", sandbox=session.name, idle=round(now - since, 3))
                else:
                    self._log.info("sandbox_detached", sandbox=session.name, idle=round(now - since, 3))
                self._ends.end(session, "reaped")
        self._lives.remove.retry_now()
        if self._sweep_task is None or self._sweep_task.done():
            self._sweep_task = self._tasks.spawn(self._sweep(), "sandbox-sweep")
        if self.shared is not None:
            self.table.start_waiting()
        elif not self.table and not self._suspended and self._watch_task is not None and self._watch.active:
            self._watch_task.cancel()
            self._watch_task = None

    async def _sweep(self) -> None:
        """What needs the API server at each tick, where the watch does not do it."""
        try:
            await self._lives.remove.look_again()
            await self._lives.remove.limit_suspended()
            if self.shared is not None:
                await self.shared.delete_lapsed()
            if (self.table.current or self._suspended) and not self._watch.current:
                since = self.parts.now()
                self.synced((await self._resources.list(self.parts.own_objects))[0], since)
        except SandboxError as e:
            self._log.info("sandbox_sweep_failed", reason=str(e))

    # Shutdown

    async def shutdown(self) -> None:
        """Ends everything; bounded by shutdown_timeout."""
        self._closed = True
        self._watch.settled.set()  # Nobody waits for it any more.
        begun = self.parts.now()
        deadline = begun + self._config.shutdown_timeout
        lives, remove = self._lives, self._lives.remove
        for session in list(self.table.current.values()):
            self._ends.end(session, "shutdown", SandboxManagerClosedError("the manager has been shut down"))
        if self._config.has_random_instance_id:  # Nobody would come back to them.
            for session in self.table.closing.values():
                self.table.delete_after_all(session)
            for found in self._suspended.take_all():
                session_hash = metadata.labels(found.object)[metadata.LABEL_SESSION]
                lives.bury(found.name, session_hash, found.name, metadata.uid(found.object))
        remove.retry_now(last_chance=True)
        await lives.stop(deadline)
        try:
            async with asyncio.timeout_at(deadline):
                await remove.look_again(deadline)
        except (SandboxError, TimeoutError) as e:
            self._log.info("sandbox_sweep_failed", reason=str(e))
        left = {session.name for session in self.table.closing.values()} | set(remove.abandoned)
        uncertain = set(remove.unconfirmed) - left
        stuck = await self._tasks.end()
        await self.parts.leases.aclose()
        await self._resources.aclose()
        _telemetry.tables.discard(self.table)
        names = {"sandboxes": sorted(left), "may_appear": sorted(uncertain), "tasks": sorted(stuck)}
        took = round(self.parts.now() - begun, 3)
        if left or stuck:
            self._log.error("shutdown_incomplete", duration=took, **names)
        elif uncertain:
            self._log.warning("shutdown_incomplete", duration=took, **names)
