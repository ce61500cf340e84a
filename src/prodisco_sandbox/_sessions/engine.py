"""Multi mode: owns every task, and carries out what the session table decides."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .._aio.tasks import OwnedTasks, Pace
from .._cluster import manifest
from .._cluster.manifest import Object
from .._cluster.requests import SandboxResources
from .._cluster.watch import SandboxWatch
from .._log import get_logger
from ..config import SandboxManagerConfig
from ..errors import (
    SandboxCapacityError,
    SandboxError,
    SandboxFailedError,
    SandboxManagerClosedError,
    SandboxReplacedError,
    SandboxTimeoutError,
)
from ..results import SandboxRef
from .creation import Creation, LostError, SpentError
from .leases import Leases
from .remove import Closing
from .table import Session, SessionState, SessionTable

if TYPE_CHECKING:
    from ..client import SandboxClient

ROUNDS = 3
"""How often a caller asks again when the sandbox dies before it gets the client."""
REAPED_PER_PASS = 40
STEPS_PER_PASS = 16
"""Steps of creations and closes in one pass of the event loop; 20 to 80 µs each until they wait."""
NAME_MARGIN = 5.0
"""How much longer than its pod's grace period a name may be taken."""
LEFT = 10_000
"""How many sessions are looked for before one is created, because they may have a Sandbox."""
REMEMBERED = 1024
"""How many ended sessions are remembered, to tell a re-creation from a first creation."""


class Engine:
    """Sessions on Sandboxes, for one manager in multi mode.

    The rule of this class: state changes are synchronous calls into the table; all I/O
    runs in tasks of the engine's, which a caller's cancellation never reaches. Callers
    only wait for events. Each session has at most one creation, one check and one
    closer; the closer is the only one to close a client or delete a Sandbox.
    """

    def __init__(
        self,
        config: SandboxManagerConfig,
        api: Any | None,
        client_factory: Callable[[str], SandboxClient],
        wall_clock: Callable[[], float],
    ) -> None:
        self.table = SessionTable(config.max_sessions)
        self._config = config
        self._client_factory = client_factory
        self.events: Counter[str] = Counter()
        self._log = get_logger("manager", self.events)
        self._tasks = OwnedTasks(self.events)
        self._resources = SandboxResources(config, api, self.events)
        selector = manifest.managed_selector(instance=config.instance_label, managed_by=config.managed_by)
        everyone = manifest.managed_selector(managed_by=config.managed_by)
        self._watch = SandboxWatch(self._resources, selector, self, survey=(everyone, self._surveyed))
        self._watch_task: asyncio.Task[None] | None = None
        self._sweep_task: asyncio.Task[None] | None = None
        self._leases = Leases(self._resources, config.lease_duration, wall_clock, self._lost_unseen)
        self._closing = Closing(
            config, self._resources, self.table, told=lambda: self._watch.current, wall_clock=wall_clock
        )
        self._pace = Pace(STEPS_PER_PASS)
        self._creation = Creation(
            config,
            self._resources,
            self.table,
            self._leases,
            self._tasks,
            make_client=self._make_client,
            discard=self._discard,
            remember=self._closing.remember,
            watching=lambda: self._watch.active,
            wall_clock=wall_clock,
            pace=self._pace,
        )
        self._ended: OrderedDict[str, None] = OrderedDict()
        self._left: set[str] = set()
        """Hashes of sessions that may have a Sandbox which this manager does not follow."""
        self._occupied: dict[str, float] = {}
        """Names whose pods may not be gone yet, and until when."""
        self._occupied_for = manifest.grace_period(config) + NAME_MARGIN
        self._closed = False

    def start(self) -> None:
        self._tasks.supervise(self._reap, "sandbox-reaper")
        self._tasks.supervise(self._leases.run, "sandbox-leases")

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    # What callers wait for

    async def acquire(self, session_id: str, *, hold: bool = False) -> Session:
        """Waits for the session's sandbox; makes one if there is none.

        Args:
            session_id: Any non-empty text.
            hold: Count the session as busy, until the caller takes one from `holds`.
        """
        for _ in range(ROUNDS):
            session = self._wanted(session_id)
            if not session.usable:
                await self._wait(session)
            if session.usable:
                session.last_used = self._now()
                session.holds += hold
                return session
            if session.error is not None:
                raise session.error.copy_for_waiter()
        raise SandboxFailedError(f"the session's sandbox died {ROUNDS} times before it could be used")

    async def close(self, session_id: str) -> None:
        """Ends a session; returns once it is gone or its deletion is left to the background."""
        session = self.table.current.get(session_id)
        if session is not None:
            self._end(session, "closed", SandboxError("the session was closed while it was waited for"))
        closing = self.table.closing.get(session_id)
        if closing is not None:
            await closing.released.wait()

    async def clean_up(self, *, all_instances: bool) -> int:
        deadline = self._now() + self._config.ready_timeout
        run = self._closing.clean_up(all_instances=all_instances, deadline=deadline)
        task = self._tasks.spawn(run, "sandbox-orphan-cleanup")
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            task.cancel()
            raise
        if task.cancelled():
            raise SandboxManagerClosedError("the manager was shut down during the clean-up")
        return task.result()

    def _wanted(self, session_id: str) -> Session:
        if self._closed:
            raise SandboxManagerClosedError("the manager has been shut down")
        session = self.table.current.get(session_id)
        if session is None:
            return self._admit(session_id)
        if session.state is SessionState.READY and not session.usable and session.check is None:
            self._start_check(session)
        return session

    async def _wait(self, session: Session) -> None:
        session.waiters += 1
        try:
            await session.settled.wait()
        finally:
            session.waiters -= 1
            session.last_used = self._now()
            if session.state is SessionState.QUEUED and not session.waiters:
                self._end(session, "withdrawn", None)

    # Creation

    def _admit(self, session_id: str) -> Session:
        session_hash = manifest.session_hash(session_id)
        session = Session(
            session_id=session_id,
            session_hash=session_hash,
            name=manifest.sandbox_name(session_id),
            since=self._now(),
            recreated=session_hash in self._ended,
        )
        try:
            started = self.table.admit(session, may_queue=self._config.capacity_timeout > 0)
        except SandboxCapacityError as e:
            self._refused(session, e)
            raise
        if started:
            self._begin(session)
        else:
            patience = self._config.capacity_timeout
            if session.after is not None:
                patience = max(patience, self._config.ready_timeout)
            loop = asyncio.get_running_loop()
            session.timer = loop.call_later(patience, self._queued_too_long, session)
        return session

    def _queued_too_long(self, session: Session) -> None:
        error: SandboxError = self.table.full()
        if session.after is not None and session.after.state is not SessionState.GONE:
            error = SandboxTimeoutError(
                f"the session's previous sandbox {session.after.name} could not be deleted in time"
            )
        self._refused(session, error)
        self._end(session, "queued", error)

    def _refused(self, session: Session, error: SandboxError) -> None:
        waited = round(self._now() - session.since, 3)
        self._log.info("session_refused", sandbox=session.name, reason=str(error), duration=waited)

    def _begin(self, session: Session) -> None:
        if session.timer is not None:
            session.timer.cancel()
        self._ended.pop(session.session_hash, None)
        self.table.rename(session, *self.fresh_name(session.session_id, self._now()))
        if self._watch_task is None:
            self._watch_task = self._tasks.supervise(self._watch.run, "sandbox-watch")
        session.creation = self._tasks.spawn(self._create(session), f"sandbox:{session.name}")

    def fresh_name(self, session_id: str, now: float) -> tuple[str, int]:
        """The first incarnation of the session's name that no pod may still hold, and its number."""
        names = ((manifest.sandbox_name(session_id, i), i) for i in itertools.count())
        return next((name, i) for name, i in names if self._occupied.get(name, now) <= now)

    def _occupy(self, name: str) -> None:
        now = self._now()
        for old, until in list(itertools.islice(self._occupied.items(), 2)):
            if until <= now:  # Older ones come first.
                del self._occupied[old]
        self._occupied.pop(name, None)
        self._occupied[name] = now + self._occupied_for

    async def _create(self, session: Session) -> None:
        session.since = self._now()
        deadline = session.since + self._config.ready_timeout
        await self._pace()
        try:
            async with asyncio.timeout_at(deadline):
                client = await self._obtain(session, deadline)
        except Exception as e:  # noqa: BLE001 - whatever it is, those who wait get it
            self._fail(session, self._creation.failure(session, e))
        else:
            self._ready(session, client)
            took = round(self._now() - session.since, 3)
            self._log.info("sandbox_ready", sandbox=session.name, target=session.target, duration=took)

    async def _obtain(self, session: Session, deadline: float) -> SandboxClient:
        """Makes or adopts the session's Sandbox and connects to it; replaces one that ends meanwhile."""
        await self._watch.tried.wait()
        look = session.session_hash in self._left
        if not look and not self._watch.surveyed:
            look = await self._creation.has_one(session)
        await self._creation.obtain(session, deadline, look=look)
        try:
            return await self._creation.connect(session, deadline, exchange=not session.was_used)
        except SpentError as e:
            self._log.warning("sandbox_replaced", sandbox=session.name, reason=str(e))
            if await self._creation.discard_spent(session, deadline):
                await self._creation.obtain(session, deadline)
        return await self._creation.connect(session, deadline)

    def _fail(self, session: Session, error: SandboxError) -> None:
        self.table.totals.failed += 1
        took = round(self._now() - session.since, 3)
        self._log.warning("sandbox_failed", sandbox=session.name, reason=str(error), duration=took)
        self._end(session, "failed", error)

    def _ready(self, session: Session, client: SandboxClient) -> None:
        if self.table.current.get(session.session_id) is not session:
            return  # Closed meanwhile, and the client has hidden the cancellation.
        session.check = None
        session.was_used, session.generation = True, 0
        self._left.discard(session.session_hash)
        boot_id = session.machine if isinstance(session.machine, str) else None
        client.sandbox = SandboxRef(session.name, session.uid or "", session.incarnation, boot_id)
        session.last_used = self._now()
        # Each holds a whole Sandbox, pod template and all.
        session.observed = session.request = session.creation = None
        self.table.ready(session)

    def _make_client(self, session: Session, target: str) -> SandboxClient:
        client = self._client_factory(target)
        if not hasattr(client, "wait_for_healthy"):  # such as a coroutine
            raise SandboxError(f"client_factory returned {client!r}: it must be a SandboxClient")

        def doubt(reason: str) -> None:
            if session.client is client and session.state is SessionState.READY and session.usable:
                self._log.info("sandbox_suspect", sandbox=session.name, reason=reason)
                self.table.doubt(session)

        def closed() -> None:
            doubt("a caller closed its client")
            if session.client is client:
                session.target = None  # It leads nowhere now: the next look makes another.

        def other_machine(reason: str) -> None:
            doubt(reason)
            if session.client is client:
                session.target = None
            self._discard(session.name, client)

        async def look() -> None:
            """Before a call to a server without fences whose connection has broken."""
            doubt("its connection broke")
            if self.table.current.get(session.session_id) is session and not session.usable:
                if session.check is None:
                    self._start_check(session)
                await self._wait(session)
            if session.error is not None:
                raise session.error.copy_for_waiter()
            if session.client is not client or not session.usable:
                raise SandboxReplacedError(
                    f"the machine of sandbox {session.name} was replaced: nothing was run"
                )

        pod = session.name if session.observed is None else manifest.pod_name(session.observed)
        client._expect(pod, other_machine, look)
        client.on_suspect = lambda: doubt("a call failed")
        client._tell_closed(closed)
        client._keep_pace(self._pace)
        return client

    def _discard(self, name: str, client: SandboxClient) -> None:
        self._tasks.spawn(self._closing.close_client(name, client), f"sandbox-client-close:{name}")

    # Doubt and death

    def _start_check(self, session: Session) -> None:
        session.settled = asyncio.Event()
        session.error = None
        session.check = self._tasks.spawn(self._check(session), f"sandbox-check:{session.name}")

    async def _check(self, session: Session) -> None:
        """Finds out whether a doubted sandbox lives: the Sandbox first, then its server's health."""
        begun = self._now()
        deadline = begun + self._config.ready_timeout
        session.misplaced = False
        try:
            await self._creation.look_at(session)
            async with asyncio.timeout_at(deadline):
                client = await self._creation.connect(session, deadline)
        except (LostError, SpentError) as e:
            session.leftover = session.leftover and isinstance(e, SpentError)
            self._lose(session, str(e))
        except Exception as e:  # noqa: BLE001
            error = self._creation.failure(session, e)
            in_time = isinstance(e, SandboxError) or not isinstance(e, TimeoutError)
            if not (in_time or session.misplaced or self._creation.must_keep(session)):
                self._lose(session, "its server does not answer", error)
                return
            # The cluster cannot be asked, the Sandbox not be started, or its machine not be
            # found: what it holds may be well.
            session.error = error
            session.check = None
            took = round(self._now() - begun, 3)
            reason = str(session.error)
            self._log.warning("sandbox_check_failed", sandbox=session.name, reason=reason, duration=took)
            session.settled.set()
        else:
            self._ready(session, client)

    def _lose_machine(self, session: Session, reason: str) -> None:
        """Its pod never runs again; what becomes of the Sandbox is decided when it is asked for."""
        if session.client is not None:
            self._log.warning("sandbox_machine_lost", sandbox=session.name, reason=reason)
            self.table.doubt(session)
            self._creation.drop_machine(session)

    def _lose(self, session: Session, reason: str, error: SandboxError | None = None) -> None:
        self.table.totals.lost += not session.machine_lost
        lived = round(self._now() - session.since, 3)
        self._log.warning("sandbox_lost", sandbox=session.name, reason=reason, duration=lived)
        self._end(session, "lost", error)

    def _lost_unseen(self, session: Session) -> None:
        """A lease could not be renewed because the Sandbox is gone or not ours."""
        if session.state is SessionState.READY:
            self.table.doubt(session)
            if session.check is None:
                self._start_check(session)
        elif session.state is SessionState.CREATING:
            self._read_now(session)

    # The end

    def _end(self, session: Session, reason: str, error: SandboxError | None) -> None:
        if session.timer is not None:
            session.timer.cancel()
        if not self.table.close(session, error):
            return
        if reason in ("failed", "lost"):
            if session.leftover and self._creation.must_keep(session):
                session.leftover = False
                self._log.warning("sandbox_kept", sandbox=session.name, reason=reason)
            if not session.leftover:  # It was kept, or perhaps claimed by another manager.
                self._left.add(session.session_hash)
                if len(self._left) > LEFT:
                    self._left.pop()
        if reason in ("lost", "reaped"):
            self._ended[session.session_hash] = None
            if len(self._ended) > REMEMBERED:
                self._ended.popitem(last=False)
        self._leases.drop(session)
        for task in (session.creation, session.check):
            if task is not None and task is not asyncio.current_task():
                task.cancel()
        session.closer = self._tasks.spawn(self._close(session, reason), f"sandbox-close:{session.name}")
        # Not at the end of the closer itself: a task that is cancelled early never runs.
        session.closer.add_done_callback(lambda _: self._released(session))

    def _released(self, session: Session) -> None:
        if (session.uid is not None or session.leftover) and not self._closed:
            self._occupy(session.name)
        for started in self.table.release(session):
            self._begin(started)

    async def _close(self, session: Session, reason: str) -> None:
        begun = self._now()
        working = (session.creation, session.check, session.request)
        if pending := {task for task in working if task is not None and not task.done()}:
            await asyncio.wait(pending)
        await self._pace()
        if session.client is not None:
            await self._closing.close_client(session.name, session.client)
        if session.leftover:
            await self._closing.delete(session)
        if session.ambiguous:
            self._closing.remember(session)
        took = round(self._now() - begun, 3)
        self._log.info("sandbox_closed", sandbox=session.name, reason=reason, duration=took)

    # The watch tells

    def _surveyed(self, sandboxes: list[Object]) -> None:
        living = (sandbox for sandbox in sandboxes if not manifest.is_deleting(sandbox))
        self._left = {manifest.labels(sandbox).get(manifest.LABEL_SESSION, "") for sandbox in living}

    def synced(self, sandboxes: list[Object], since: float) -> None:
        listed = {manifest.uid(sandbox) for sandbox in sandboxes}
        names = {manifest.name(sandbox) for sandbox in sandboxes}
        for sandbox in sandboxes:
            self.changed(sandbox)
        for session in list(self.table.current.values()):
            known = session.uid is not None or session.state is SessionState.READY
            unseen = session.uid not in listed if session.uid else session.name not in names
            # One that is new to us may be too new for the list, but not if it is ready already.
            old = session.known_at < since or session.state is SessionState.READY
            if known and unseen and session.claimed and old:
                self._lost_unseen(session)
        for session in self.table.closing.values():
            if session.claimed and session.uid and session.uid not in listed and session.known_at < since:
                session.leftover = False  # as `deleted` would have said

    def changed(self, sandbox: Object) -> None:
        session = self._session_of(sandbox)
        if session is None or session.state is SessionState.CLOSING:
            return
        if session.state is SessionState.CREATING or session.check is not None:
            session.observed = sandbox
            session.observed_at = self._now()
            session.news.set()
            return
        reading = self._creation.reading(sandbox)
        if reading.phase == "ending":
            session.leftover = session.leftover and not manifest.is_deleting(sandbox)
            self._lose(session, reading.text)
        elif reading.phase in ("dead", "suspended"):
            self._lose_machine(session, reading.text)
        elif session.usable:
            ips = manifest.pod_ips(sandbox)
            if reading.target is None or (ips and session.pod_ips and ips != session.pod_ips):
                self._log.info("sandbox_suspect", sandbox=session.name, reason=reading.text)
                self.table.doubt(session)

    def deleted(self, sandbox: Object) -> None:
        session = self._session_of(sandbox)
        if session is None:
            return
        if session.uid is None:
            # Whether this is the object that we are making only the create's answer tells.
            sandbox["metadata"].setdefault("deletionTimestamp", "unknown")
            session.observed = sandbox
            session.news.set()
            return
        session.leftover = False
        if session.state is SessionState.CLOSING:
            return  # Its closer need not delete it, and must not if it was claimed.
        text = f"sandbox {session.name} was deleted, or claimed by another manager"
        if session.state is SessionState.CREATING:
            self._fail(session, SandboxFailedError(text))
        else:
            self._lose(session, text)

    def down(self) -> None:
        for session in self.table.current.values():
            if session.state is SessionState.CREATING:
                self._read_now(session)

    def _read_now(self, session: Session) -> None:
        session.observed_at = -math.inf
        session.news.set()

    def _session_of(self, sandbox: Object) -> Session | None:
        """The session that a Sandbox belongs to; not one of the same name's past."""
        session = self.table.named(manifest.name(sandbox))
        if session is None:
            return None
        if session.uid is not None:
            return session if session.uid == manifest.uid(sandbox) else None
        ours = manifest.labels(sandbox).get(manifest.LABEL_SESSION) == session.session_hash
        return session if ours else None

    # The reaper

    async def _reap(self) -> None:
        pause = self._config.idle_check_interval
        while True:
            await asyncio.sleep(pause)
            pause = 0.0 if self._tick() else self._config.idle_check_interval

    def _tick(self) -> bool:
        """Looks at all sessions once.

        Returns:
            Whether more are idle than are ended in one pass of the event loop.
        """
        now = self._now()
        idle = self.table.idle(now, self._config.session_idle_timeout)
        for session in idle[:REAPED_PER_PASS]:
            self.table.totals.reaped += 1
            unused = round(now - (session.idle_since() or now), 3)
            self._log.info("sandbox_reaped", sandbox=session.name, idle=unused)
            self._end(session, "reaped", None)
        if len(idle) > REAPED_PER_PASS:
            return True
        self._closing.retry_now()
        if self._sweep_task is None or self._sweep_task.done():
            self._sweep_task = self._tasks.spawn(self._sweep(), "sandbox-sweep")
        if not self.table and self._watch_task is not None and self._watch.active:
            self._watch_task.cancel()
            self._watch_task = None
        return False

    async def _sweep(self) -> None:
        """What needs the API server at each tick, where the watch does not do it."""
        try:
            await self._closing.look_again()
            if self.table.current and not self._watch.current:
                since = self._now()
                selector = manifest.managed_selector(
                    instance=self._config.instance_label, managed_by=self._config.managed_by
                )
                self.synced((await self._resources.list(selector))[0], since)
        except SandboxError as e:
            self._log.info("sandbox_sweep_failed", reason=str(e))

    # Shutdown

    async def shutdown(self) -> None:
        """Ends everything; bounded by shutdown_timeout."""
        self._closed = True
        begun = self._now()
        deadline = begun + self._config.shutdown_timeout
        for session in list(self.table.current.values()):
            self._end(session, "shutdown", SandboxManagerClosedError("the manager has been shut down"))
        self._closing.retry_now(last_chance=True)
        closers = {s.closer for s in self.table.closing.values() if s.closer is not None}
        if closers:
            await asyncio.wait(closers, timeout=max(0.0, deadline - self._now()))
        try:
            async with asyncio.timeout_at(deadline):
                await self._closing.look_again(deadline)
        except (SandboxError, TimeoutError) as e:
            self._log.info("sandbox_sweep_failed", reason=str(e))
        left = {s.name for s in self.table.closing.values()}
        left.update(self._closing.abandoned)
        uncertain = set(self._closing.uncertain()) - left
        stuck = await self._tasks.end()
        await self._leases.aclose()
        await self._resources.aclose()
        names = {"sandboxes": sorted(left), "may_appear": sorted(uncertain), "tasks": sorted(stuck)}
        took = round(self._now() - begun, 3)
        if left or stuck:
            self._log.error("shutdown_incomplete", duration=took, **names)
        elif uncertain:
            self._log.warning("shutdown_incomplete", duration=took, **names)
