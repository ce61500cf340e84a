"""Leases: the cluster itself removes the Sandboxes of a manager that was killed."""

from __future__ import annotations

import asyncio
import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from .._aio.pacing import backoff
from .._aio.single_flight import SingleFlight
from .._cluster import metadata
from .._cluster.api_errors import NotFoundError, PreconditionError, UnsupportedError
from .._cluster.metadata import Object
from .._log import get_logger
from ..errors import SandboxError, SandboxPermissionError
from .table import LIVING, Session

if TYPE_CHECKING:
    from .parts import Parts

PROBE = "sandbox-lease-probe"
"""Name of a Sandbox that does not exist; patching it tells whether one may patch."""
CONCURRENT_WRITES = 10
"""Few, so that creations and deletes do not queue behind hundreds of them."""
TIMER_SLACK = 0.001
"""A loop's timer may fire that much early; what is due by then is done, not waited for again."""
RETRY_FIRST, RETRY_MOST = 1.0, 30.0
REFUSAL_HOLDS = 300.0
"""How long a refused probe counts; an API server that starts refuses everything."""


class Deadlines(ABC):
    """Writes ``spec.shutdownTime`` of Sandboxes, at which the cluster deletes them.

    Either every Sandbox has its deadline from birth or none has: before the first creation
    a probe asks whether patching is allowed, since a deadline that cannot be moved would
    end a sandbox in use. Times are the wall clock's.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._log = get_logger("leases", parts.events)
        self._resources = parts.resources
        self._wall_clock = parts.wall_clock
        self._probe = SingleFlight("lease-probe", self._may_patch)
        self._refused_at: float | None = None

    @abstractmethod
    def next(self) -> str:
        """The shutdownTime of a Sandbox that is about to be made, or to be renewed."""

    @abstractmethod
    async def run(self) -> None:
        """Moves what is due, until it is cancelled."""

    def add(self, session: Session) -> None:  # noqa: B027 - what counts may be in the object alone
        """A session has an object with a deadline."""

    def drop(self, session: Session) -> None:  # noqa: B027
        """A session has no object any more, or has ended."""

    async def allowed(self, deadline: float) -> bool:
        """Whether a new Sandbox gets a deadline. `SandboxError`: the probe got no answer."""
        now = asyncio.get_running_loop().time()
        if self._refused_at is not None and now - self._refused_at < REFUSAL_HOLDS:
            return False
        allowed = await self._resources.retry("patch", self._probe, deadline)
        if not allowed:
            self._probe.forget()
        return allowed

    async def _may_patch(self) -> bool:
        try:
            await self._resources.patch(PROBE, {"metadata": {"annotations": None}})
        except (NotFoundError, PreconditionError):
            return True
        except (SandboxPermissionError, UnsupportedError) as e:
            if self._refused_at is None:
                self._log.warning("leases_off", reason=str(e))
            self._refused_at = asyncio.get_running_loop().time()
            return False
        return True

    async def _each(self, sessions: list[Session], move: Callable[[Session], Awaitable[None]]) -> None:
        """Moves the deadlines of several sessions, a few at a time."""
        for start in range(0, len(sessions), CONCURRENT_WRITES):
            await asyncio.gather(*map(move, sessions[start : start + CONCURRENT_WRITES]))

    async def write(
        self,
        name: str,
        uid: str | None,
        until: str,
        *,
        version: str | None = None,
        spec: Object | None = None,
        deadline: float | None = None,
    ) -> Object | None:
        """Moves an object's deadline, together with other fields of its spec; errors as for a patch."""
        unchanged = {} if version is None else {"resourceVersion": version}
        fields = (spec or {}) | self._resources.resource.deadline_spec(until)
        body = {"metadata": {"uid": uid, **unchanged}, "spec": fields}
        return await self._resources.patch(name, body, deadline)

    async def aclose(self) -> None:
        await self._probe.aclose()


class Leases(Deadlines):
    """Keeps the deadlines of a manager's Sandboxes ahead, for as long as the manager lives."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self._duration = parts.config.lease_duration or 0.0
        self._due: dict[Session, float] = {}
        self._failures: dict[Session, int] = {}
        self._added = asyncio.Event()
        self._wakes_at = 0.0

    def next(self) -> str:
        return metadata.lease_time(self._wall_clock(), self._duration)

    async def allowed(self, deadline: float) -> bool:
        return self._duration > 0 and await super().allowed(deadline)

    def add(self, session: Session) -> None:
        """Renews the session's lease from now on, at half time."""
        due = self._due[session] = asyncio.get_running_loop().time() + self._duration / 2
        if due < self._wakes_at:
            self._added.set()

    def drop(self, session: Session) -> None:
        self._due.pop(session, None)
        self._failures.pop(session, None)

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._added.clear()
            now = loop.time() + TIMER_SLACK
            due = [session for session, at in self._due.items() if at <= now]
            await self._each(due, self._renew)
            if due:
                continue
            self._wakes_at = min(self._due.values(), default=math.inf)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(self._wakes_at if self._due else None):
                    await self._added.wait()

    async def _renew(self, session: Session) -> None:
        if session not in self._due:
            return
        loop = asyncio.get_running_loop()
        begun = loop.time()
        task = session.request = asyncio.current_task()
        try:
            await self.write(session.name, session.known.uid, self.next())
        except SandboxError as e:
            if isinstance(e, NotFoundError | PreconditionError):
                # Gone, or not ours: then the session ends. If not, its lease goes on.
                self._parts.table.look(session)
            attempt = self._failures[session] = self._failures.get(session, 0) + 1
            most = min(RETRY_MOST, self._duration / 8)
            pause = backoff(attempt - 1, first=RETRY_FIRST, most=most, jitter=0.0)
            self._log.warning("lease_renewal_failed", sandbox=session.name, attempt=attempt, reason=str(e))
            due = begun + pause
        else:
            self._failures.pop(session, None)
            due = begun + self._duration / 2
        if session.request is task:
            session.request = None
        if session in self._due and session.state in LIVING:
            self._due[session] = due
        else:
            self.drop(session)
