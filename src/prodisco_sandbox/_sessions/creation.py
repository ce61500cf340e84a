"""From a session to a healthy client: create or adopt the Sandbox, wait, connect."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Literal

from .._aio.tasks import OwnedTasks, Pace
from .._cluster import manifest
from .._cluster.api_errors import (
    AlreadyExistsError,
    NotFoundError,
    PreconditionError,
    RetryableError,
    UnsupportedError,
)
from .._cluster.manifest import Object
from .._cluster.requests import SandboxResources, backoff
from .._log import get_logger
from ..config import SandboxManagerConfig
from ..errors import (
    SandboxCapacityError,
    SandboxConflictError,
    SandboxError,
    SandboxFailedError,
    SandboxPermissionError,
    SandboxReplacedError,
    SandboxTimeoutError,
    SandboxUnavailableError,
)
from .leases import Leases
from .table import Session, SessionTable

if TYPE_CHECKING:
    from ..client import SandboxClient

CONCURRENT_CREATES = 16
"""More are no faster on a quick API server, and each connection's TLS handshake holds up the loop."""
WATCHED_INTERVAL = 15.0
"""A creating session that hears nothing from the watch for this long is read with get."""
LOOK_TIMEOUT = 10.0
"""How long the API server is asked about a Sandbox whose client failed."""
HEALTH_SLICE = 1.0
"""How long health is waited for before the Sandbox itself is looked at again."""
HEALTH_PAUSE = 0.1
INCARNATIONS = 100
"""How many incarnations of a name are tried, and recognised in a Sandbox that is adopted."""
STARTS = 3
"""How often a suspended Sandbox is started for one use: something else may suspend it again."""
REFUSAL_PAUSE, REFUSAL_BELIEVED = 1.0, 2.0
"""A pod that seems to be refused for good is read each second, and believed to be after two."""


class LostError(SandboxError):
    """The session's Sandbox is no more, or no longer ours: there is nothing to delete."""


class SpentError(SandboxFailedError):
    """The Sandbox has come to its end and holds nothing: delete it, and make another."""


class SuspendedError(SandboxFailedError):
    """The Sandbox is suspended, and starting it was refused: it is kept."""


class Creation:
    """Creates, adopts and connects. What it finds out it writes into the session."""

    def __init__(
        self,
        config: SandboxManagerConfig,
        resources: SandboxResources,
        table: SessionTable,
        leases: Leases,
        tasks: OwnedTasks,
        *,
        make_client: Callable[[Session, str], SandboxClient],
        discard: Callable[[str, SandboxClient], None],
        remember: Callable[[Session], None],
        watching: Callable[[], bool],
        wall_clock: Callable[[], float],
        pace: Pace,
    ) -> None:
        self._log = get_logger("manager", resources.events)
        self._config = config
        self._resources = resources
        self._table = table
        self._leases = leases
        self._tasks = tasks
        self._make_client = make_client
        self._discard = discard
        self._remember = remember
        self._watching = watching
        self._wall_clock = wall_clock
        self._pace = pace
        self._creates = asyncio.Semaphore(CONCURRENT_CREATES)

    async def obtain(self, session: Session, deadline: float, *, look: bool = False) -> None:
        """Creates the session's Sandbox, or adopts the one that an earlier process left.

        Args:
            session: Its name says what to create.
            deadline: On the loop's clock.
            look: Look first for one that the session may have, whatever its name.

        Raises:
            SandboxConflictError: The name is taken by somebody else's Sandbox.
            SandboxError: The API server refused, or could not be reached in time.
        """
        attempt = names = 0
        while names < INCARNATIONS:
            if look:
                names += 1
                adopted = await self._adopt_existing(session, names, deadline)
                if adopted:
                    return
                look = adopted is not None
                continue
            # Asked anew for each try: either may have changed.
            leased = await self._leases.allowed(deadline)
            version = await self._resources.api_version(deadline)
            await self._pace()  # Who came together has waited for these together.
            try:
                async with self._creates:
                    lease = self._leases.next() if leased else None
                    body = manifest.sandbox_body(
                        self._config, version, session.name, session.session_hash, lease
                    )
                    created = await self._send(session, "create", partial(self._resources.create, body))
                created = created or await self._resources.get(session.name, deadline)
            except AlreadyExistsError as e:
                names += 1
                if await self._resolve_conflict(session, e, names, deadline):
                    return
                continue
            except RetryableError as e:
                created = await self._landed(session, deadline) if e.ambiguous else None
                if created is None:
                    await self._pause(session, e, "create", attempt, deadline)
                    attempt += 1
                    continue
                if not attempt:
                    session.ambiguous = False  # No other was lost before it.
            if created is not None:
                self._found(session, created)
            if lease is not None:
                self._leases.add(session)
            self._table.totals.created += 1
            self._table.totals.recreated += session.recreated
            self._log.info(
                "sandbox_created", sandbox=session.name, uid=session.uid, incarnation=session.incarnation
            )
            return
        raise SandboxConflictError(f"no free name for the sandbox after {names} tries: {session.name}")

    async def has_one(self, session: Session) -> bool:
        """Whether the session has a Sandbox, whatever its name, as far as that can be told now."""
        try:
            found, _ = await self._resources.list(self._selector(session))
        except SandboxError as e:
            self._log.info("sandbox_not_looked_for", sandbox=session.name, reason=str(e))
            return False
        return bool(found)

    async def _send(
        self, session: Session, verb: str, request: Callable[[], Awaitable[Object | None]]
    ) -> Object | None:
        """One request that makes a Sandbox, or makes it the session's.

        Once sent it is never cut off: its answer holds the uid that the Sandbox is deleted
        by. Whoever closes the session waits for it.
        """
        session.request = self._tasks.spawn(self._answered(session, request), f"{verb}:{session.name}")
        await asyncio.wait({session.request})
        return session.request.result()

    async def _answered(
        self, session: Session, request: Callable[[], Awaitable[Object | None]]
    ) -> Object | None:
        """The request's answer, and what it means for the session if nobody waits any more."""
        session.leftover = True
        try:
            sandbox = await request()
        except SandboxError as e:
            # Only a clear refusal says that nothing is there, unless an earlier answer was lost.
            if getattr(e, "ambiguous", False):
                session.ambiguous, session.ambiguous_at = True, asyncio.get_running_loop().time()
            session.leftover = session.ambiguous
            raise
        if sandbox is not None:
            session.uid = manifest.uid(sandbox)
        return sandbox

    async def _landed(self, session: Session, deadline: float) -> Object | None:
        """After a create whose answer was lost: the Sandbox, if it is there and is ours."""
        found = await self._resources.get(session.name, deadline)
        if found is None or manifest.is_deleting(found) or not self._is_ours(session, found):
            return None
        return found

    def _is_ours(self, session: Session, sandbox: Object) -> bool:
        return self._is_sessions(session, sandbox, self._config.instance_label)

    def _is_sessions(self, session: Session, sandbox: Object, instance: str | None = None) -> bool:
        managed_by = self._config.managed_by
        return manifest.is_of(sandbox, session.session_hash, instance, managed_by=managed_by)

    async def _pause(
        self, session: Session, error: RetryableError, verb: str, attempt: int, deadline: float
    ) -> None:
        pause = backoff(attempt) if error.retry_after is None else error.retry_after
        if asyncio.get_running_loop().time() + pause >= deadline:
            raise error
        self._log.info(
            "request_retried",
            verb=verb,
            sandbox=session.name,
            attempt=attempt + 1,
            pause=round(pause, 3),
            reason=str(error),
        )
        await asyncio.sleep(pause)

    def _found(self, session: Session, sandbox: Object) -> None:
        """Notes the uid; what the watch said meanwhile of this very object is newer."""
        session.uid = manifest.uid(sandbox)
        session.known_at = asyncio.get_running_loop().time()
        if session.observed is None or manifest.uid(session.observed) != session.uid:
            session.observed = sandbox
        # Without a watch nobody else will say when it is ready: read it at once.
        session.observed_at = session.known_at if self._watched(session) else -math.inf

    async def _resolve_conflict(
        self, session: Session, error: AlreadyExistsError, attempt: int, deadline: float
    ) -> bool:
        """The name is taken: adopts the session's own Sandbox, or moves to another name.

        Returns:
            Whether a Sandbox was adopted; otherwise create again.
        """
        if adopted := await self._adopt_existing(session, attempt, deadline):
            return True
        if adopted is not None:
            return False
        taken = await self._resources.get(session.name, deadline)
        if taken is None or (not manifest.is_deleting(taken) and self._is_sessions(session, taken)):
            return False  # It has gone, or come, since the list.
        if not manifest.is_deleting(taken):
            raise SandboxConflictError(
                f"the name {session.name} is taken by a Sandbox that is not this session's:"
                " delete it, or use another namespace",
                status=409,
            ) from error.__cause__
        self._next_name(session)
        return False

    async def _adopt_existing(self, session: Session, attempt: int, deadline: float) -> bool | None:
        """Adopts the newest Sandbox that the session has by its label; deletes those that are spent.

        Returns:
            Whether one was adopted; False: look again; None: there is none.
        """
        found, _ = await self._resources.list(self._selector(session), deadline)
        alive = [sandbox for sandbox in found if not manifest.is_deleting(sandbox)]
        spent = [sandbox for sandbox in alive if self._is_spent(sandbox)]
        for sandbox in spent:
            name, version = manifest.name(sandbox), manifest.resource_version(sandbox)
            deleted = await self._resources.delete(name, manifest.uid(sandbox), deadline, version=version)
            if name == session.name:
                self._next_name(session)
            if not deleted:
                return False  # It has changed: another manager may use it.
        alive = [sandbox for sandbox in alive if sandbox not in spent]
        if not alive:
            return False if spent else None
        newest = max(alive, key=lambda s: str((s.get("metadata") or {}).get("creationTimestamp") or ""))
        return await self._adopt(session, newest, attempt, deadline)

    def _selector(self, session: Session) -> str:
        return manifest.managed_selector(session=session.session_hash, managed_by=self._config.managed_by)

    def _is_spent(self, sandbox: Object) -> bool:
        """Whether nothing is lost with it: its pod has ended, and no volume outlives that."""
        phase = self.reading(sandbox).phase
        return phase == "ending" or (phase in ("dead", "never") and not manifest.holds_volumes(sandbox))

    def _next_name(self, session: Session) -> None:
        incarnation = session.incarnation + 1
        self._rename(session, manifest.sandbox_name(session.session_id, incarnation), incarnation)

    def _rename(self, session: Session, name: str, incarnation: int) -> None:
        if session.ambiguous and session.name != name:
            self._remember(session)  # What was asked for under the old name may still land.
        self._table.rename(session, name, incarnation)

    async def _adopt(self, session: Session, sandbox: Object, attempt: int, deadline: float) -> bool:
        """Claims a Sandbox by its instance label, so that our watch sees it.

        The last claimer wins; the loser's watch reports it gone, and it is not deleted.
        """
        name, metadata = manifest.name(sandbox), sandbox["metadata"]
        names = (manifest.sandbox_name(session.session_id, i) for i in range(INCARNATIONS))
        incarnation = next((i for i, known in enumerate(names) if known == name), session.incarnation)
        self._rename(session, name, incarnation)
        session.observed = sandbox  # What is known of it if the claim is not answered.
        session.was_used = True
        lease = self._leases.next() if await self._leases.allowed(deadline) else None
        patch: Object = {
            "metadata": {
                "uid": metadata.get("uid"),
                "resourceVersion": metadata.get("resourceVersion"),
                "labels": {manifest.LABEL_INSTANCE: self._config.instance_label},
            },
            # A lease that nobody renews would end it under the session.
            "spec": {"shutdownTime": None} if lease is None else manifest.lease_spec(lease),
        }
        try:
            claimed = await self._send(session, "claim", partial(self._resources.patch, name, patch))
        except (PreconditionError, NotFoundError):
            session.observed, session.was_used = None, False
            return False  # It has changed, or is gone: look again.
        except RetryableError as e:
            await self._pause(session, e, "patch", attempt - 1, deadline)
            return False
        except (SandboxPermissionError, UnsupportedError) as e:
            self._log.warning("sandbox_not_claimed", sandbox=name, reason=str(e))
            lease = claimed = None
            session.leftover = True
            session.claimed = manifest.instance(sandbox) == self._config.instance_label
        if session.observed is sandbox:  # else the watch has spoken since
            session.observed = None
        self._found(session, claimed or sandbox)
        if lease is not None:
            self._leases.add(session)
        self._log.info("sandbox_adopted", sandbox=name, uid=session.uid, incarnation=incarnation)
        return True

    # Its client

    async def connect(self, session: Session, deadline: float, *, exchange: bool = False) -> SandboxClient:
        """Waits until the Sandbox is ready and its server healthy; makes the client.

        A client that the session has is kept as long as it leads to the same pod.

        Args:
            session: It has a Sandbox.
            deadline: On the loop's clock.
            exchange: A name that an earlier pod still holds is not waited for: `SpentError`.

        Raises:
            SpentError: It, or its pod, has come to its end, and nothing is lost with it.
            LostError: It is gone, or being deleted.
            SandboxFailedError: It will not be ready; SuspendedError: nor may it be started.
            SandboxError: The API server could not be reached in time.
        """
        loop = asyncio.get_running_loop()
        restarted = False
        starts = 0
        refused_at: float | None = None
        while True:
            session.news.clear()  # What comes from here on is heard, also during a health check.
            if manifest.is_deleting(session.observed or {}):
                raise LostError(f"sandbox {session.name} is being deleted by somebody else")
            reading = self.reading(session.observed or {}, session.generation, strict=True)
            match reading.phase:
                case "ending":
                    raise SpentError(f"sandbox {session.name} has come to its end: {reading.text}")
                case "never":
                    raise SandboxFailedError(f"sandbox {session.name} will never be ready: {reading.text}")
                case "dead":
                    text = f"the pod of sandbox {session.name} has come to its end: {reading.text}"
                    if not manifest.holds_volumes(session.observed or {}):
                        raise SpentError(text)
                    if restarted:
                        raise SandboxFailedError(f"{text}, also after a restart")
                    restarted = True
                    self.drop_machine(session)
                    await self._set_mode(session, "Suspended", deadline)
                    continue
                case "suspended" if manifest.is_suspended(session.observed or {}, session.generation):
                    self.drop_machine(session)
                    starts += 1
                    if starts > STARTS:
                        raise SuspendedError(
                            f"sandbox {session.name} was suspended again each time that it was started"
                        )
                    await self._set_mode(session, "Running", deadline)
                    continue
                case "suspended":
                    self.drop_machine(session)
            if reading.target is None:
                if reading.refusal == "occupied" and exchange:
                    raise SpentError(f"the name of sandbox {session.name} is not free yet: {reading.text}")
                if reading.refusal in (None, "occupied"):
                    refused_at = None
                    await self._hear(session, deadline)
                    continue
                refused_at = loop.time() if refused_at is None else refused_at
                if loop.time() >= refused_at + REFUSAL_BELIEVED:
                    error = SandboxCapacityError if reading.refusal == "quota" else SandboxFailedError
                    raise error(f"the pod of sandbox {session.name} is refused: {reading.text}")
                await self._hear(session, deadline, REFUSAL_PAUSE)
                continue
            client = self._client(session, reading.target)
            if client is None:
                await self._hear_of_place(session, deadline)
                continue
            if await client.wait_for_healthy(max(0.0, min(HEALTH_SLICE, deadline - loop.time()))):
                after = self.reading(session.observed or {}, session.generation, strict=True)
                if after.target is None or self._client(session, after.target) is not client:
                    continue
                if self._is_own(session, client):
                    return client
                await self._hear_of_place(session, deadline)
                continue
            if isinstance(client.health_error, SandboxReplacedError):
                if client._has_met:
                    await self.refresh(session, deadline)
                else:  # Its first contact was with another pod.
                    self._table.vacate(session)
                    await self._hear_of_place(session, deadline)
                continue
            if session.target is None:  # A caller has closed it meanwhile.
                continue
            hopeless = client.health_error
            if type(hopeless) is SandboxError:  # Not the other side's doing, such as a file for TLS.
                raise hopeless.copy_for_waiter()
            await asyncio.sleep(HEALTH_PAUSE)
            # Why is it not healthy? The Sandbox may say.
            if loop.time() - session.observed_at >= self._interval(session):
                await self.refresh(session, deadline)

    def _client(self, session: Session, target: str) -> SandboxClient | None:
        """The session's client for this target; None: that is another session's, by a newer status."""
        observed = session.observed or {}
        ips = manifest.pod_ips(observed)
        moved = bool(ips and session.pod_ips and ips != session.pod_ips)
        if session.client is not None and (moved or session.target != target):
            self._discard(session.name, session.client)
            session.client = None
        session.pod_ips = ips or session.pod_ips
        place = manifest.place(observed, target)
        if place != session.place:
            session.place, session.placed_at = place, asyncio.get_running_loop().time()
        # A function that gives several sessions one target means it.
        targets = () if callable(self._config.endpoint) else (target,)
        others = self._table.occupy(session, frozenset((*targets, *ips)))
        if others is None:
            return None
        for other in others:
            text = f"the status of sandbox {session.name} names its address"
            self._log.info("sandbox_suspect", sandbox=other.name, reason=text)
            self._table.doubt(other)
        if session.client is None:
            session.target = target
            session.client = self._make_client(session, target)
        return session.client

    def _is_own(self, session: Session, client: SandboxClient) -> bool:
        """Whether a client has met the session's own machine; notes it if it has replaced another one."""
        if session.met is client:  # It never means another machine.
            return True
        boot_id = client._boot_id
        other = (
            None if boot_id is None else self._table.meet(session, boot_id, asyncio.get_running_loop().time())
        )
        # Where the user's own function gives the targets, sessions may be meant to share one.
        shares = callable(self._config.endpoint) and not set(session.pod_ips) & set(
            other.pod_ips if other else ()
        )
        if other is not None and not shares:
            text = f"the machine at its address is that of sandbox {other.name}"
            self._log.info("sandbox_suspect", sandbox=session.name, reason=text)
            self._discard(session.name, client)
            session.client = session.target = None
            self._table.vacate(session)
            return False
        before, session.machine = session.machine, boot_id or session.pod_ips or session.machine
        session.met = client
        # Without a boot id only the status tells: a pod that has ended is not met again.
        replaced = bool(before) and before != session.machine
        if replaced or (session.machine_lost and boot_id is None):
            session.incarnation += 1
            self._table.totals.recreated += 1
            self._log.warning(
                "sandbox_pod_replaced",
                sandbox=session.name,
                incarnation=session.incarnation,
                reason="another pod" if boot_id is None else "another boot id",
            )
        session.machine_lost = False
        return True

    def drop_machine(self, session: Session) -> None:
        """The machine behind the session's client is gone: ends the client at once."""
        client = session.client
        if client is not None:
            now = asyncio.get_running_loop().time()
            session.last_used = max(session.last_used, now if client.in_flight else client.last_used)
            self._discard(session.name, client)
            session.machine_lost = True
            self._table.totals.lost += 1
            self._table.vacate(session)
        session.client = session.target = None
        session.pod_ips = ()

    async def _set_mode(
        self, session: Session, mode: Literal["Running", "Suspended"], deadline: float
    ) -> None:
        """Starts or suspends the Sandbox; what the controller saw before does not count any more.

        Raises:
            LostError: It is gone, or another.
            SuspendedError: The manager may not patch.
            SandboxError: The API server could not be reached in time.
        """
        observed = session.observed or {}
        patch = {"metadata": {"uid": session.uid}, "spec": manifest.mode_spec(observed, mode)}
        self._log.info("sandbox_mode_changed", sandbox=session.name, mode=mode)
        try:
            patched = await self._resources.patch(session.name, patch, deadline)
        except (NotFoundError, PreconditionError) as e:
            raise LostError(f"sandbox {session.name} has been deleted") from e
        except (SandboxPermissionError, UnsupportedError) as e:
            raise SuspendedError(
                f"sandbox {session.name} is {'suspended' if mode == 'Running' else 'dead'}, and the manager"
                f" may not patch it to start it: {e}",
                status=e.status,
            ) from e
        session.generation = max(session.generation, manifest.generation(patched))
        if manifest.is_to_run(session.observed or {}) != (mode == "Running"):
            # The watch has not shown it yet, nor does every stand-in of the API return the object.
            spec = {**(observed.get("spec") or {}), **manifest.mode_spec(observed, mode)}
            session.observed = patched or {**observed, "spec": spec}
            session.observed_at = asyncio.get_running_loop().time()

    async def discard_spent(self, session: Session, deadline: float) -> bool:
        """Deletes the session's Sandbox, which is of no more use, and takes another name for the next.

        Returns:
            Whether it is gone; it is not if it has changed since it was read.
        """
        name, incarnation, uid = session.name, session.incarnation, session.uid
        version = manifest.resource_version(session.observed or {})
        if session.client is not None:
            self._discard(name, session.client)
        session.client = session.target = session.uid = session.observed = None
        session.pod_ips, session.machine, session.generation = (), (), 0
        self._table.vacate(session)
        self._next_name(session)  # Before it is deleted: that is no news for the session then.
        try:
            gone = await self._resources.delete(name, uid, deadline, version=version)
            found = None if gone else await self._resources.get(name, deadline)
        except BaseException:
            self._rename(session, name, incarnation)
            session.uid = uid  # Whoever ends the session deletes it.
            raise
        if found is not None and manifest.uid(found) == uid and not manifest.is_deleting(found):
            self._rename(session, name, incarnation)
            self._found(session, found)
            return False
        self._leases.drop(session)
        session.leftover = False
        return True

    def must_keep(self, session: Session) -> bool:
        """Whether a session that fails leaves its Sandbox: it may hold what a user wants back."""
        observed = session.observed or {}
        being_started = session.generation > 0  # since it was suspended
        return session.was_used and (
            manifest.holds_volumes(observed) or being_started or self.reading(observed).phase == "suspended"
        )

    def _watched(self, session: Session) -> bool:
        return session.claimed and self._watching()

    def _interval(self, session: Session) -> float:
        return WATCHED_INTERVAL if self._watched(session) else self._config.ready_poll_interval

    async def _hear(self, session: Session, deadline: float, patience: float | None = None) -> None:
        """Waits until there is news of the Sandbox, or reads it after a while."""
        loop = asyncio.get_running_loop()
        patience = self._interval(session) if patience is None else patience
        remaining = session.observed_at + patience - loop.time()
        try:
            async with asyncio.timeout(max(0.0, remaining)):
                await session.news.wait()
        except TimeoutError:
            pass
        else:
            await self._resources.pace()  # What it hears makes it connect.
            return
        # News that come while it is read count: a get may hang while the watch goes on.
        reading = self._tasks.spawn(self.refresh(session, deadline), f"read:{session.name}")

        def read(task: asyncio.Task[None]) -> None:
            if not task.cancelled():  # else its end, which comes later, would cut the next one short
                session.news.set()

        reading.add_done_callback(read)
        try:
            await session.news.wait()
        finally:
            reading.cancel()
        if reading.done():
            reading.result()

    async def _hear_of_place(self, session: Session, deadline: float) -> None:
        """Waits until there is news of where the session's machine is: it is not where its status says."""
        session.misplaced = True
        await self._hear(session, deadline)
        session.misplaced = False

    def reading(self, sandbox: Object, since: int = 0, *, strict: bool = False) -> manifest.Readiness:
        """How far a Sandbox is; unless `strict`, as far as that can be told."""
        try:
            return manifest.readiness(sandbox, self._config, now=self._wall_clock(), since=since)
        except Exception as e:
            if strict:
                raise
            # `endpoint` may be the caller's own function.
            return manifest.Readiness("starting", None, f"its endpoint cannot be told: {e!r}")

    def last_seen(self, session: Session) -> str:
        """How far a session has come that is not ready."""
        if session.observed is None:
            return f"its creation has not been {'sent' if session.request is None else 'answered'}"
        reading = self.reading(session.observed)
        if reading.target is not None and session.client is not None:
            return f"ready, but its server is not healthy ({session.client.health_error})"
        return reading.text

    def failure(self, session: Session, e: Exception) -> SandboxError:
        """What those who wait for the session get to see of a failure."""
        error: SandboxError
        if isinstance(e, LostError):
            session.leftover = False
            error = SandboxFailedError(str(e))
        elif isinstance(e, SandboxError):
            return e
        elif isinstance(e, TimeoutError) and session.misplaced:
            error = SandboxUnavailableError(
                f"the address in the status of sandbox {session.name} leads to another machine, and the"
                " status has not changed in time"
            )
        elif isinstance(e, TimeoutError):
            limit, seen = self._config.ready_timeout, self.last_seen(session)
            error = SandboxTimeoutError(
                f"sandbox {session.name} was not ready within ready_timeout ({limit:g} s); last seen: {seen}"
            )
        else:
            error = SandboxError(f"sandbox {session.name} failed: {type(e).__name__}: {e}")
        error.__cause__ = e
        return error

    async def look_at(self, session: Session) -> None:
        """Reads a doubted Sandbox, which must not take long.

        Raises:
            SandboxUnavailableError: No answer, or no turn to ask: it says nothing of its life.
            LostError: As `refresh`.
        """
        patience = min(self._config.ready_timeout, LOOK_TIMEOUT)
        try:
            async with asyncio.timeout(patience):
                await self.refresh(session, asyncio.get_running_loop().time() + patience)
        except TimeoutError as e:
            raise SandboxUnavailableError(f"the API server did not answer a get within {patience:g} s") from e

    async def refresh(self, session: Session, deadline: float) -> None:
        """Reads the Sandbox.

        Raises:
            LostError: It is gone, another, being deleted, or claimed by another manager.
        """
        asked = asyncio.get_running_loop().time()
        found = await self._resources.get(session.name, deadline)
        if found is None:
            raise LostError(f"sandbox {session.name} has been deleted")
        if session.uid is None:
            session.uid = manifest.uid(found)
        elif manifest.uid(found) != session.uid:
            raise LostError(f"sandbox {session.name} has been deleted and made again by somebody else")
        if manifest.is_deleting(found):
            raise LostError(f"sandbox {session.name} is being deleted by somebody else")
        if session.claimed and manifest.instance(found) not in (None, self._config.instance_label):
            raise LostError(f"sandbox {session.name} has been claimed by another manager")
        if session.observed_at <= asked:  # else the watch has spoken since, of something newer
            session.observed = found
        session.observed_at = asyncio.get_running_loop().time()
