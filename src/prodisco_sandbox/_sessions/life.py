"""A session's life: wait for a slot, obtain an object, connect, serve, remove.

One coroutine for each session, in a task that the manager owns. The table decides what a
session's state is; the life does what follows from it. What happens meanwhile reaches it
through the session's inbox, and the end of the session interrupts whatever it does.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from .._cluster import manifest
from ..errors import SandboxCapacityError, SandboxError, SandboxTimeoutError
from ..results import SandboxRef
from .clients import Clients
from .connect import Connecting, failure, look_at, refresh
from .ends import LostError, SpentError
from .obtain import Obtain
from .parts import Parts
from .remove import Remove
from .shared import SharedSessions
from .table import SERVING, Session, SessionState

if TYPE_CHECKING:
    from ..client import SandboxClient

LOOK_INTERVAL = 1.0
"""How often the first in the queue looks for a session to end, and for room, in seconds."""


class Lives:
    """Lives all sessions of a manager; `factory` makes the client of a gRPC target."""

    def __init__(self, parts: Parts, factory: Callable[[str], SandboxClient]) -> None:
        self._parts = parts
        self.clients = Clients(parts, factory)
        self.remove = Remove(parts)
        self._obtain = Obtain(parts, self.clients, self.remove)
        self._tasks: dict[asyncio.Task[None], Session] = {}
        self.stopped = False
        """Shutdown no longer waits for lives: a session that ends now is not removed."""

    def begin(self, session: Session) -> None:
        task = self._parts.tasks.spawn(self._live(session), f"sandbox:{session.name}")
        self._tasks[task] = session
        # Not the life's own last step: a task that is cancelled early never takes it.
        task.add_done_callback(self._over)

    async def stop(self, deadline: float) -> None:
        """Waits for lives that were ended; from then on a cancellation ends a life itself."""
        while self._tasks and (patience := deadline - self._parts.now()) > 0:
            await asyncio.wait(self._tasks, timeout=patience)
            await asyncio.sleep(0)  # `_over` may begin another life, which deletes what was just suspended.
        self.stopped = True

    def bury(self, session_id: str, session_hash: str, name: str, uid: str | None) -> None:
        """Deletes the object of an id that has no session, and retries until that succeeds."""
        session = Session(session_id=session_id, session_hash=session_hash, name=name)
        session.known.uid = uid
        self._parts.past.occupy(session.name, self._parts.now())
        self._parts.table.bury(session)
        self.begin(session)

    # The life

    async def _live(self, session: Session) -> None:
        session.inbox.open()
        try:
            asked_at, refusal = self._parts.now(), None
            while session.state in (SessionState.QUEUED, SessionState.CREATING):
                if session.state is SessionState.QUEUED:
                    await self._queue(session, asked_at, refusal)
                else:
                    refusal = await self._open(session, asked_at)
            while session.state in SERVING:
                await session.inbox.arrival()  # Ready or suspect, until somebody wants a suspect session.
                session.inbox.take_all()
                if session.checking:  # else it was news of a creation or check that has ended
                    await self._check(session)
        except asyncio.CancelledError:
            # The end of the session interrupts the step; else the manager ends its tasks.
            task = asyncio.current_task()
            if not session.inbox.closed or task is None or task.uncancel():
                raise
        except Exception as e:  # noqa: BLE001 - such as what a processor of events raises
            self._parts.ends.end(session, "failed", failure(self._parts, session, e))
        if session.state is SessionState.CLOSING:
            await self._close(session)

    async def _queue(self, session: Session, asked_at: float, refusal: SandboxError | None) -> None:
        parts, config, before = self._parts, self._parts.config, session.after
        patience = config.capacity_timeout
        if before is not None and before.ended != "evicted":
            patience = max(patience, config.ready_timeout)
        evicts = config.when_full == "evict"
        until = asked_at + patience
        for _ in range(2):
            try:
                async with asyncio.timeout_at(until):
                    await self._slot(session, evicts=evicts, tries=refusal is not None)
                return
            except TimeoutError:
                if session.state is not SessionState.QUEUED:
                    return  # The slot came at the last moment.
            if not (evicts and parts.table.expects_slot(session)):
                break  # else another session is being ended for it
            until = parts.now() + config.ready_timeout
        error = refusal or parts.table.full()
        if before is not None and before.ended != "evicted" and before.state is not SessionState.GONE:
            error = SandboxTimeoutError(
                f"the session's previous sandbox {before.name} could not be"
                f" {'suspended' if before.suspends else 'deleted'} in time"
            )
        parts.ends.refused(session, error)
        parts.ends.end(session, "queued", error)

    async def _slot(self, session: Session, *, evicts: bool, tries: bool) -> None:
        """Waits for a slot; the first in the queue looks each second for a session to end, and for room."""
        if evicts:
            self._parts.eviction.make_room()
        while True:
            try:
                async with asyncio.timeout(LOOK_INTERVAL if evicts or tries else None):
                    await session.inbox.get()
                return
            except TimeoutError:
                if self._parts.table.is_first(session):
                    if evicts:
                        self._parts.eviction.make_room()
                    self._parts.table.try_room()

    async def _open(self, session: Session, asked_at: float) -> SandboxError | None:
        """Creating → ready. Returns why the cluster has no room for it, if it is queued again."""
        parts, session.since = self._parts, self._parts.now()
        parts.past.has_begun(session)
        parts.table.rename(session, *parts.past.fresh_name(session.session_id, session.since))
        deadline = session.since + parts.config.ready_timeout
        await parts.pace()
        try:
            async with asyncio.timeout_at(deadline):
                client = await self._reach(session, deadline)
        except Exception as e:  # noqa: BLE001 - whatever it is, those who wait get it
            if session.inbox.closed:
                return None
            if isinstance(e, SandboxCapacityError) and await self._requeued(session, asked_at):
                return failure(parts, session, e)
            if isinstance(e, LostError):
                parts.table.dropped(session)
            parts.ends.fail(session, failure(parts, session, e))
        else:
            kind = self._kind_of_start(session)
            if self._ready(session, client):
                if kind == "warm":
                    parts.log.info("sandbox_started_warm", sandbox=session.name, pod=session.machine.pod)
                elif kind == "cold" and parts.config.warm_pool is not None:
                    parts.log.info("sandbox_started_cold", sandbox=session.name)
                took, target = parts.since(session.since), session.machine.target
                parts.log.info("sandbox_ready", sandbox=session.name, target=target, kind=kind, duration=took)
        return None

    async def _requeued(self, session: Session, asked_at: float) -> bool:
        """Queues a session again that the cluster has no room for: with `shared` a quota is the hard cap."""
        parts = self._parts
        if parts.shared is None or manifest.holds_volumes(session.known.object or {}):
            return False
        with contextlib.suppress(SandboxError):  # One that waits for its pod holds a slot.
            await self._obtain.discard(session)
        waits = bool(session.waiters) and parts.now() < asked_at + parts.config.capacity_timeout
        if waits:
            parts.table.requeue(session)
        return waits

    def _kind_of_start(self, session: Session) -> str:
        """How a session that is about to be ready came by its sandbox."""
        if session.known.used:
            return "resumed" if session.known.generation else "attached"
        # A cold start makes a Sandbox of the claim's name.
        is_warm = self._parts.config.warm_pool is not None and session.machine.pod != session.name
        return "warm" if is_warm else "cold"

    async def _reach(self, session: Session, deadline: float) -> SandboxClient:
        """Makes or adopts the session's object and connects to it; replaces one that ends meanwhile."""
        watch = self._parts.watch
        if self._parts.shared is not None:
            return await self._share(session, self._parts.shared, deadline)
        await watch.tried.wait()
        suspended = self._parts.suspended.take(session.session_hash)
        if suspended is not None:
            self._obtain.take_up(session, suspended)
        else:
            look = self._parts.past.may_have_one(session)
            if not look and not watch.surveyed:
                look = await self._obtain.has_one(session)
            await self._obtain(session, deadline, look=look)
        try:
            if suspended is not None and not watch.current:
                await refresh(self._parts, session, deadline)
            exchange, resume = not session.known.used, suspended is not None
            return await self._connect(session, deadline, exchange=exchange, resume=resume)
        except SpentError as e:
            await self._obtain.replace(session, str(e), deadline)
        except LostError:
            if suspended is None:
                raise
            await self._obtain.anew(session, deadline)
        return await self._connect(session, deadline)

    async def _connect(self, session: Session, deadline: float, **how: bool) -> SandboxClient:
        return await Connecting(self._parts, self.clients, session, deadline, **how).run()

    async def _share(self, session: Session, shared: SharedSessions, deadline: float) -> SandboxClient:
        """Takes or makes the session's object and connects to it, until one lives long enough."""
        was_replaced = False
        while True:
            try:
                await self._obtain.share(session, shared, deadline)
                return await self._connect(session, deadline)
            except SpentError as e:
                if was_replaced:
                    raise
                was_replaced = session.recreated = True
                self._parts.log.warning("sandbox_replaced", sandbox=session.name, reason=str(e))
                await self._obtain.discard(session, deadline)
            except LostError:
                shared.gone(session.name, session.known.uid)
                self._obtain.let_go(session)

    def _ready(self, session: Session, client: SandboxClient) -> bool:
        identity, uid = session.machine.identity, session.known.uid or ""
        boot_id = identity if isinstance(identity, str) else None
        # What one manager counts is no other's, nor its own after it has dropped the session.
        incarnation = session.incarnation if self._parts.shared is None or boot_id is None else 0
        client.sandbox = SandboxRef(
            session.name, uid, incarnation, boot_id, after_eviction=session.after_eviction
        )
        self._parts.past.is_ready(session)
        return self._parts.table.make_ready(session, client, self._parts.now())

    async def _check(self, session: Session) -> None:
        """Suspect → ready: finds out whether its machine lives."""
        begun = self._parts.now()
        deadline = begun + self._parts.config.ready_timeout
        try:
            await look_at(self._parts, session)  # The object first, then its server's health.
            async with asyncio.timeout_at(deadline):
                client = await self._connect(session, deadline)
        except Exception as e:  # noqa: BLE001 - whatever it is, those who wait get it
            if session.inbox.closed:
                return
            if isinstance(e, LostError | SpentError):
                if isinstance(e, LostError):
                    self._parts.table.dropped(session)
                self._parts.ends.lose(session, str(e))
                return
            error = failure(self._parts, session, e)
            in_time = isinstance(e, SandboxError) or not isinstance(e, TimeoutError)
            if not (in_time or session.machine.misplaced or self._parts.ends.must_keep(session)):
                self._parts.ends.lose(session, "its server does not answer", error)
                return
            # The cluster cannot be asked, the object not be started, or its machine not be
            # found: what it holds may be well.
            took = self._parts.since(begun)
            self._parts.log.warning(
                "sandbox_check_failed", sandbox=session.name, reason=str(error), duration=took
            )
            self._parts.table.checked(session, error)
        else:
            self._ready(session, client)

    async def _close(self, session: Session) -> None:
        begun = self._parts.now()
        if session.request is not None and not session.request.done():
            await asyncio.wait({session.request})
        await self._parts.pace()
        if session.client is not None:
            await self.clients.close(session.name, session.client)
        await self.remove(session)
        self.remove.remember(session)
        found = self._parts.suspended.take(session.session_hash) if session.ended == "closed" else None
        if found is not None:  # The session was closed before it took up its suspended object.
            self._obtain.take_up(session, found)
            await self.remove(session)
        took = self._parts.since(begun)
        self._parts.log.info("sandbox_closed", sandbox=session.name, reason=session.ended, duration=took)

    def _over(self, task: asyncio.Task[None]) -> None:
        session = self._tasks.pop(task)
        parts, found = self._parts, session.known.object
        if session.remains.what != "suspended":
            found = None
        if found is not None and session.suspends:
            parts.suspended.left(session, found)
            if parts.suspended.beyond(parts.config.most_suspended) and not self.stopped:
                parts.tasks.spawn(self.remove.limit_suspended(), "sandbox-limit-suspended")
        elif (
            parts.shared is None and not self.stopped and (session.known.uid or session.remains.needs_delete)
        ):
            self._parts.past.occupy(session.name, parts.now())
        if session.suspends and session.remains.what == "another's":
            self._parts.past.suspended_is_gone(session.session_hash)
        parts.table.release(session)
        if found is not None and not (session.suspends or self.stopped):  # It was closed at the last moment.
            self.bury(session.session_id, session.session_hash, session.name, session.known.uid)
