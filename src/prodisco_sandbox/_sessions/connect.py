"""From a session's object to a healthy client: wait for the pod, start it if need be, connect."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from .. import _telemetry
from .._cluster import manifest, metadata
from .._cluster.api_errors import NotFoundError, PreconditionError, UnsupportedError
from .._cluster.resource import Reading
from ..errors import (
    SandboxCapacityError,
    SandboxError,
    SandboxFailedError,
    SandboxPermissionError,
    SandboxReplacedError,
    SandboxTimeoutError,
    SandboxUnavailableError,
)
from .clients import Clients
from .ends import LostError, SpentError, SuspendedError
from .inbox import News
from .parts import Parts
from .table import Session

if TYPE_CHECKING:
    from ..client import SandboxClient

WATCHED_INTERVAL = 15.0
"""A session whose life waits and hears nothing from the watch for this long is read with get."""
LOOK_TIMEOUT = 10.0
"""How long the API server is asked about an object whose client failed."""
HEALTH_SLICE = 1.0
"""How long health is waited for before the object itself is looked at again."""
HEALTH_PAUSE = 0.1
STARTS = 3
"""How often a suspended object is started for one use: something else may suspend it again."""
REFUSAL_PAUSE, REFUSAL_BELIEVED = 1.0, 2.0
"""A pod that seems to be refused for good is read each second, and believed to be after two."""


async def look_at(parts: Parts, session: Session) -> None:
    """Reads a suspect session's object, which must not take long.

    `SandboxUnavailableError`, no answer or no turn to ask, says nothing of its life. Else as `refresh`.
    """
    patience = min(parts.config.ready_timeout, LOOK_TIMEOUT)
    try:
        async with asyncio.timeout(patience):
            await refresh(parts, session, parts.now() + patience)
    except TimeoutError as e:
        raise SandboxUnavailableError(f"the API server did not answer a get within {patience:g} s") from e


def failure(parts: Parts, session: Session, e: Exception) -> SandboxError:
    """The error that those who wait for the session get."""
    error: SandboxError
    if isinstance(e, LostError):
        error = SandboxFailedError(str(e))
    elif isinstance(e, SandboxError):
        return e
    elif isinstance(e, TimeoutError) and session.machine.misplaced:
        error = SandboxUnavailableError(
            f"the address in the status of sandbox {session.name} leads to another machine, and the"
            " status has not changed in time"
        )
    elif isinstance(e, TimeoutError):
        limit, seen = parts.config.ready_timeout, _last_seen(parts, session)
        error = SandboxTimeoutError(
            f"sandbox {session.name} was not ready within ready_timeout ({limit:g} s); last seen: {seen}"
        )
    else:
        error = SandboxError(f"sandbox {session.name} failed: {type(e).__name__}: {e}")
    error.__cause__ = e
    return error


def _last_seen(parts: Parts, session: Session) -> str:
    if session.known.object is None:
        return f"its creation has not been {'sent' if session.request is None else 'answered'}"
    reading = parts.reading(session.known.object)
    if reading.target is not None and session.client is not None:
        return f"ready, but its server is not healthy ({session.client.health_error})"
    return reading.text


class Connecting:
    """One connection to a session's machine, from the first reading to a healthy client.

    Args:
        exchange: A name that an earlier pod still holds is not waited for: `SpentError`.
        resume: The object was suspended: it needs a lease even if somebody else has started it.
    """

    def __init__(
        self,
        parts: Parts,
        clients: Clients,
        session: Session,
        deadline: float,
        *,
        exchange: bool = False,
        resume: bool = False,
    ) -> None:
        self._parts, self._clients, self._session, self._deadline = parts, clients, session, deadline
        self._exchange, self._resume = exchange, resume
        self._resource = parts.resources.resource
        self._restarted = False
        self._starts = 0
        self._refused_at: float | None = None

    async def run(self) -> SandboxClient:
        """Waits until the object is ready and its server healthy; makes the client.

        A client that the session has is kept as long as it leads to the same pod.

        Raises:
            SpentError: It, or its pod, has come to its end, and nothing is lost with it.
            LostError: It is gone, or being deleted.
            SandboxFailedError: It will not be ready; SuspendedError: nor may it be started.
            SandboxError: The API server could not be reached in time.
        """
        with _telemetry.stages(self._session.trace, self._session.about) as stage:
            return await self._run(stage)

    async def _run(self, stage: Callable[[str], object]) -> SandboxClient:
        session = self._session
        session.machine.misplaced = False
        known = session.known
        if known.object is None and known.reading is not None and known.reading.phase != "running":
            await refresh(self._parts, session, self._deadline)  # How it is started, the object tells.
        while True:
            session.inbox.take(News.SEEN)  # What comes from here on is heard, also during a health check.
            reading = self._read()
            if await self._started_again(reading):
                continue
            if reading.target is None:
                stage("sandbox.wait_ready")
                await self._wait_for_pod(reading)
                continue
            client = self._clients.client_for(session, reading)
            if client is None:
                await self._hear_of_place()
                continue
            stage("sandbox.wait_healthy")
            remaining = max(0.0, min(HEALTH_SLICE, self._deadline - self._parts.now()))
            if not await self._clients.is_healthy(client, remaining):
                await self._find_out_why(client)
                continue
            after = self._read()
            if after.target is None or self._clients.client_for(session, after) is not client:
                continue
            if self._clients.is_own(session, client):
                if self._starts and not self._restarted:
                    self._parts.log.info("sandbox_resumed", sandbox=session.name, uid=session.known.uid)
                return client
            await self._hear_of_place()

    def _read(self) -> Reading:
        known = self._session.known
        if known.object is None and known.reading is not None:
            return known.reading
        observed = known.object or {}
        if metadata.is_deleting(observed):
            raise LostError(f"sandbox {self._session.name} is being deleted by somebody else")
        return self._parts.reading(observed, known.generation, strict=True)

    async def _started_again(self, reading: Reading) -> bool:
        """Starts what is suspended, and what is dead but has volumes; tells whether it did."""
        session, observed = self._session, self._session.known.object or {}
        match reading.phase:
            case "ending":
                raise SpentError(f"sandbox {session.name} has come to its end: {reading.text}")
            case "never":
                raise SandboxFailedError(f"sandbox {session.name} will never be ready: {reading.text}")
            case "dead":
                text = f"the pod of sandbox {session.name} has come to its end: {reading.text}"
                if not manifest.holds_volumes(observed):
                    raise SpentError(text)
                if self._restarted:
                    raise SandboxFailedError(f"{text}, also after a restart")
                self._restarted = True
                self._clients.lose_machine(session, reading.text)
                await self._set_mode("Suspended")
                return True
            case "suspended":
                self._clients.lose_machine(session, reading.text)
                if not self._resource.is_suspended(observed, session.known.generation):
                    return False
                self._starts += 1
                if self._starts > STARTS:
                    raise SuspendedError(
                        f"sandbox {session.name} was suspended again each time that it was started"
                    )
                await self._set_mode("Running")
                return True
            case "running" if self._resume:  # Somebody else has started it: it has no lease yet.
                await self._set_mode("Running")
                return True
        return False

    async def _wait_for_pod(self, reading: Reading) -> None:
        """Waits for news of a pod that is not ready; what refuses it for good is an error soon."""
        session, now = self._session, self._parts.now()
        if reading.refusal == "occupied" and self._exchange:
            raise SpentError(f"the name of sandbox {session.name} is not free yet: {reading.text}")
        if reading.refusal in (None, "occupied"):
            self._refused_at = None
            await self._hear()
            return
        self._refused_at = now if self._refused_at is None else self._refused_at
        if now >= self._refused_at + REFUSAL_BELIEVED:
            error = SandboxCapacityError if reading.refusal == "quota" else SandboxFailedError
            raise error(f"the pod of sandbox {session.name} is refused: {reading.text}")
        await self._hear(REFUSAL_PAUSE)

    async def _find_out_why(self, client: SandboxClient) -> None:
        """After a client has not found its server healthy for a while: the object may say why."""
        session, reason = self._session, client.health_error
        if isinstance(reason, SandboxReplacedError):
            if client._has_met:
                await refresh(self._parts, session, self._deadline)
            else:  # Its first contact was with another pod.
                self._parts.table.machines.vacate(session)
                await self._hear_of_place()
            return
        if session.machine.target is None:  # A caller has closed it meanwhile.
            return
        # The fault is on this side, such as a file for TLS: nobody has answered. A status may pass: that of
        # a proxy, for one, in front of a pod that starts.
        if type(reason) is SandboxError and reason.status is None:
            raise reason.copy_for_waiter()
        await asyncio.sleep(HEALTH_PAUSE)
        unread = self._parts.now() - session.known.read_at
        if session.inbox.take(News.LOOK) or unread >= self._interval():
            await refresh(self._parts, session, self._deadline)

    def _interval(self) -> float:
        watched = self._parts.watched(self._session)
        return WATCHED_INTERVAL if watched else self._parts.config.ready_poll_interval

    async def _hear(self, patience: float | None = None) -> None:
        """Waits until there is news of the object, or reads it after a while."""
        session, inbox = self._session, self._session.inbox
        patience = self._interval() if patience is None else patience
        remaining = session.known.read_at + patience - self._parts.now()
        news: News = News.LOOK
        try:
            async with asyncio.timeout(max(0.0, remaining)):
                news = await inbox.get()
        except TimeoutError:
            pass
        if news & ~News.LOOK:
            if News.LOOK in news:
                inbox.post(News.LOOK)  # What has been seen may do; a get may hang.
            await self._parts.pace()  # What it hears makes it connect.
            return
        # News that come while it is read count: a get may hang while the watch goes on.
        reading = self._parts.tasks.spawn(
            refresh(self._parts, session, self._deadline), f"read:{session.name}"
        )

        def read(task: asyncio.Task[None]) -> None:
            if not task.cancelled():  # else its end, which comes later, would cut the next one short
                inbox.post(News.SEEN)

        reading.add_done_callback(read)
        try:
            news = await inbox.get()
        finally:
            reading.cancel()
        if reading.done():
            reading.result()
        elif News.LOOK in news:
            inbox.post(News.LOOK)

    async def _hear_of_place(self) -> None:
        """Waits until there is news of where the machine is: it is not where its status says."""
        self._session.machine.misplaced = True
        await self._hear()
        self._session.machine.misplaced = False

    async def _set_mode(self, mode: Literal["Running", "Suspended"]) -> None:
        """Starts or suspends the object; what the controller saw before does not count any more."""
        session, known = self._session, self._session.known
        observed = known.object or {}
        spec = self._resource.mode_spec(str(observed.get("apiVersion")), mode)
        lease = None
        if mode == "Running":  # Its deadline may be that of a suspended one.
            self._resume = False
            lease = self._parts.leases.next() if await self._parts.leases.allowed(self._deadline) else None
            spec |= self._resource.deadline_spec(lease)
        patch = {"metadata": {"uid": known.uid}, "spec": spec}
        self._parts.log.info("sandbox_mode_changed", sandbox=session.name, mode=mode)
        try:
            patched = await self._parts.resources.patch(session.name, patch, self._deadline)
        except (NotFoundError, PreconditionError) as e:
            raise LostError(f"sandbox {session.name} has been deleted") from e
        except (SandboxPermissionError, UnsupportedError) as e:
            raise SuspendedError(
                f"sandbox {session.name} is {'suspended' if mode == 'Running' else 'dead'}, and the manager"
                f" may not patch it to start it: {e}",
                status=e.status,
            ) from e
        if lease is not None:
            self._parts.leases.add(session)
        known.generation = max(known.generation, metadata.generation(patched))
        if self._resource.is_to_run(known.object or {}) != (mode == "Running"):
            # The watch has not shown it yet, nor does every stand-in of the API return the object.
            known.object = patched or {**observed, "spec": {**(observed.get("spec") or {}), **spec}}
            known.read_at = self._parts.now()


async def refresh(parts: Parts, session: Session, deadline: float) -> None:
    """Reads the session's object. `LostError`: it is gone, being deleted, or somebody else's."""
    known, asked = session.known, parts.now()
    found = await parts.resources.get(session.name, deadline)
    if found is None:
        raise LostError(f"sandbox {session.name} has been deleted")
    if known.uid is None:
        known.uid = metadata.uid(found)
    elif metadata.uid(found) != known.uid:
        raise LostError(f"sandbox {session.name} has been deleted and made again by somebody else")
    if metadata.is_deleting(found):
        raise LostError(f"sandbox {session.name} is being deleted by somebody else")
    if known.claimed and metadata.instance(found) not in (None, parts.config.instance_label):
        raise LostError(f"sandbox {session.name} has been claimed by another manager")
    if known.read_at <= asked:  # else the watch has told since, of something newer
        known.object = found
    known.read_at = parts.now()
