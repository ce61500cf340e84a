"""A session's client: made for its machine, dropped with it, and closed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING

from .._cluster.resource import Reading
from ..errors import SandboxError, SandboxReplacedError
from .ends import LostError
from .parts import Parts
from .shared import SharedSessions
from .table import Session, SessionState

if TYPE_CHECKING:
    from ..client import SandboxClient

CLOSE_TIMEOUT = 5.0


class Clients:
    """Makes and drops the clients of sessions; `factory` makes the client of a gRPC target."""

    def __init__(self, parts: Parts, factory: Callable[[str], SandboxClient]) -> None:
        self._parts = parts
        self._factory = factory

    def client_for(self, session: Session, reading: Reading) -> SandboxClient | None:
        """The session's client for a running object; None: a newer status gives its target to another."""
        parts, machine, target, ips = self._parts, session.machine, reading.target or "", reading.machine.ips
        if session.client is not None and (machine.target != target or machine.differs(reading.machine)):
            self.discard(session)
        machine.ips, machine.pod = ips or machine.ips, reading.machine.pod
        if reading.place != machine.place:
            machine.place, machine.placed_at = reading.place, parts.now()
        # A function that gives several sessions one target means it.
        targets = () if callable(parts.config.endpoint) else (target,)
        others = parts.table.machines.occupy(session, tuple(dict.fromkeys((*targets, *ips))))
        if others is None:
            return None
        for other in others:
            self.suspect(other, f"the status of sandbox {session.name} names its address", always=True)
        if session.client is None:
            machine.target = target
            session.client = self._make(session, target)
        return session.client

    async def is_healthy(self, client: SandboxClient, timeout: float) -> bool:
        """What the client says of its server; a client cannot end the step, nor hide that it has ended."""
        try:
            healthy = await client.wait_for_healthy(timeout)
        except asyncio.CancelledError as e:
            if not _is_cancelled():
                raise SandboxError(f"the client of {client.target} has cancelled its own health check") from e
            raise
        if _is_cancelled():
            raise asyncio.CancelledError
        return healthy

    def is_own(self, session: Session, client: SandboxClient) -> bool:
        """Whether a client has met the session's own machine; notes it if that replaces another one."""
        parts, machine, boot_id = self._parts, session.machine, client._boot_id
        if machine.met is client:  # It never means another machine.
            return True
        other = None
        if boot_id is not None:
            other = parts.table.machines.meet(session, boot_id, parts.now())
        # Where the user's own function gives the targets, sessions may be meant to share one.
        shares = callable(parts.config.endpoint) and not set(machine.ips) & set(
            other.machine.ips if other else ()
        )
        if other is not None and not shares:
            text = f"the machine at its address is that of sandbox {other.name}"
            parts.log.info("sandbox_suspect", sandbox=session.name, reason=text)
            self.discard(session)
            parts.table.machines.vacate(session)
            return False
        before, machine.identity = machine.identity, boot_id or machine.ips or machine.identity
        machine.met = client
        # Without a boot id only the status tells: a pod that has ended is not met again.
        if (before and before != machine.identity) or (machine.lost and boot_id is None):
            session.incarnation += 1
            session.after_eviction = session.after_eviction and session.state is SessionState.CREATING
            reason = "another pod" if boot_id is None else "another boot id"
            parts.log.warning(
                "sandbox_pod_replaced", sandbox=session.name, incarnation=session.incarnation, reason=reason
            )
        machine.lost = False
        return True

    def suspect(self, session: Session, reason: str, *, always: bool = False) -> None:
        """The session's client is checked before it is handed out again."""
        if self._parts.table.suspect(session) or always:
            self._parts.log.info("sandbox_suspect", sandbox=session.name, reason=reason)

    def lose_machine(self, session: Session, reason: str) -> None:
        """The machine behind the client is gone. What becomes of the object is decided on the next use."""
        client = session.client
        if client is not None:
            self._parts.table.suspect(session)
            self._parts.log.warning("sandbox_machine_lost", sandbox=session.name, reason=reason)
            in_use = self._parts.now() if client.in_flight else client.last_used
            session.last_used = max(session.last_used, in_use)
            session.machine.lost = True
            self.discard(session)
        self._parts.table.machines.forget(session)

    def discard(self, session: Session) -> None:
        """Closes the session's client, which does not wait for it."""
        client, session.client, session.machine.target = session.client, None, None
        if client is not None:
            self.close_soon(session.name, client)

    def close_soon(self, name: str, client: SandboxClient) -> None:
        self._parts.tasks.spawn(self.close(name, client), f"sandbox-client-close:{name}")

    async def close(self, name: str, client: SandboxClient) -> None:
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await client.close()
        except (Exception, asyncio.CancelledError) as e:
            if isinstance(e, asyncio.CancelledError) and _is_cancelled():
                raise
            # The channel's end is no reason to keep the object.
            self._parts.log.warning("client_close_failed", sandbox=name, reason=repr(e))

    def _make(self, session: Session, target: str) -> SandboxClient:
        client = self._factory(target)
        if not hasattr(client, "wait_for_healthy"):  # such as a coroutine
            raise SandboxError(f"client_factory returned {client!r}: it must be a SandboxClient")

        tie = _Tie(self, session, client)
        admit = None if self._parts.shared is None else partial(tie.admit, self._parts.shared)
        pod, pace = session.machine.pod, self._parts.pace
        client._expect(pod, tie.other_machine, tie.look, admit, tie.closed, pace)
        client.on_suspect = tie.failed
        return client

    async def look(self, session: Session, client: SandboxClient) -> None:
        """Checks a session before a call to a server without fences whose connection has broken."""
        if session.state is SessionState.SUSPECT:
            self._parts.table.check(session)
            error = await self._parts.ends.outcome(session)
        else:
            error = session.outcome.error
        if error is not None:
            raise error.copy_for_waiter()
        if session.client is not client or session.state is not SessionState.READY:
            raise SandboxReplacedError(f"the machine of sandbox {session.name} was replaced: nothing was run")


def _is_cancelled() -> bool:
    """Whether somebody has cancelled this task: a client may raise CancelledError by itself."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class _Tie:
    """What a client tells of itself, as long as it is its session's client."""

    __slots__ = ("_client", "_clients", "_session")

    def __init__(self, clients: Clients, session: Session, client: SandboxClient) -> None:
        self._clients = clients
        self._session = session
        self._client = client

    def _suspect(self, reason: str) -> bool:
        is_current = self._session.client is self._client
        if is_current:
            self._clients.suspect(self._session, reason)
        return is_current

    def failed(self) -> None:
        self._suspect("a call failed")

    def closed(self) -> None:
        if self._suspect("a caller closed its client"):
            self._session.machine.target = None  # It leads nowhere now: the next look makes another.

    def other_machine(self, reason: str) -> None:
        if self._suspect(reason):
            self._session.machine.target = None
        self._clients.close_soon(self._session.name, self._client)

    def admit(self, shared: SharedSessions, lasts: float) -> Awaitable[None] | None:
        admission = shared.admit(self._session, lasts)
        return None if admission is None else self._admit(admission)

    async def _admit(self, admission: Awaitable[None]) -> None:
        try:
            await admission
        except LostError as e:
            raise SandboxReplacedError(f"{e}: nothing was run") from e

    async def look(self) -> None:
        self._suspect("its connection broke")
        await self._clients.look(self._session, self._client)
