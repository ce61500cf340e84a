"""A session's object: created, or adopted from an earlier process; and replaced once it is spent."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from .. import _telemetry
from .._cluster import metadata
from .._cluster.api_errors import (
    AlreadyExistsError,
    NotFoundError,
    PreconditionError,
    RetryableError,
    UnsupportedError,
)
from .._cluster.metadata import Object
from .._cluster.requests import wait_to_retry
from ..errors import SandboxConflictError, SandboxError, SandboxPermissionError
from .clients import Clients
from .ends import LostError
from .inbox import News
from .parts import Parts
from .remove import Remove
from .shared import SharedSessions
from .suspended import Suspended
from .table import Known, Session

CONCURRENT_CREATES = 16
"""A create that waits for its turn here has not been sent: the end of its session cancels it.

Without this limit 200 sessions at once (benchmarks, kube-apiserver) open three times as many
connections, and the longest pass of the loop is twice as long.
"""
ENDING_POLL = 1.0
"""How often an object that is being deleted is read until it is gone."""
INCARNATIONS = 100
"""How many incarnations of a name are tried, and recognised in an object that is adopted."""


class Obtain:
    def __init__(self, parts: Parts, clients: Clients, remove: Remove) -> None:
        self._parts = parts
        self._resource = parts.resources.resource
        self._clients = clients
        self._remove = remove
        self._creates = asyncio.Semaphore(CONCURRENT_CREATES)

    async def __call__(self, session: Session, deadline: float, *, look: bool = False) -> None:
        """Creates the session's object, or adopts the one that an earlier process left.

        Args:
            session: Its name says what to create.
            deadline: On the loop's clock.
            look: Look first for one that the session may have, whatever its name.

        Raises:
            SandboxConflictError: The name is taken by somebody else's object.
        """
        attempt = names = 0
        conflict: AlreadyExistsError | None = None
        while names < INCARNATIONS:
            try:
                if look:
                    names += 1
                    adopted = await self._adopt_existing(session, names, deadline)
                    if adopted:
                        return
                    if adopted is None and conflict is not None:
                        await self._move_on(session, conflict, deadline)
                    look = adopted is not None
                    continue
                await self._create(session, deadline, first=attempt == 0)
                return
            except AlreadyExistsError as e:
                conflict, look = e, True
            except RetryableError as e:
                await wait_to_retry(self._parts.log, e, "create", attempt, deadline, session.name)
                attempt += 1
        raise SandboxConflictError(f"no free name for the sandbox after {names} tries: {session.name}")

    async def has_one(self, session: Session) -> bool:
        """Whether the session has an object, whatever its name, as far as that can be told now."""
        selector = self._parts.selector(session=session.session_hash)
        try:
            found, _ = await self._parts.resources.list(selector)
        except SandboxError as e:
            self._parts.log.info("sandbox_not_looked_for", sandbox=session.name, reason=str(e))
            return False
        return any(not metadata.is_shared(sandbox) for sandbox in found)

    def take_up(self, session: Session, suspended: Suspended) -> None:
        """Gives the session the object that it has left; starting it is for `connect`."""
        parts = self._parts
        self._rename(session, suspended.name, suspended.incarnation + 1)  # It will be another machine.
        # Conditions from before the suspension do not count; events since then do.
        generation = metadata.generation(suspended.object)
        session.known = Known(used=True, generation=generation, object=session.known.object)
        parts.table.found(session, suspended.object, metadata.uid(suspended.object), parts.now())

    async def anew(self, session: Session, deadline: float) -> None:
        """Obtains another object for a session whose own is gone, or claimed by another manager."""
        self.let_go(session)
        session.recreated = True
        self._next_name(session)
        await self(session, deadline, look=True)  # Another manager may have claimed it.

    async def replace(self, session: Session, reason: str, deadline: float) -> None:
        """Deletes the session's object, which is spent, and makes another; keeps one that has changed."""
        parts = self._parts
        parts.log.warning("sandbox_replaced", sandbox=session.name, reason=reason)
        name, incarnation, known = session.name, session.incarnation, session.known
        version = metadata.resource_version(known.object or {})
        self._clients.discard(session)
        parts.table.machines.forget(session)
        session.machine.identity = ()
        session.known = Known(used=known.used, claimed=known.claimed)
        self._next_name(session)  # Before it is deleted: that is no news for the session then.
        try:
            gone = await parts.resources.delete(name, known.uid, deadline, version=version)
            found = None if gone else await parts.resources.get(name, deadline)
        except BaseException:
            self._rename(session, name, incarnation)
            session.known.uid = known.uid  # Whoever ends the session deletes it.
            raise
        if found is not None and metadata.uid(found) == known.uid and not metadata.is_deleting(found):
            self._rename(session, name, incarnation)
            self._found(session, found)
            return
        self.let_go(session)
        await self(session, deadline)

    # Creation

    async def _create(self, session: Session, deadline: float, *, first: bool) -> None:
        with _telemetry.span("sandbox.create", session.trace, session.about):
            await self._try_to_create(session, deadline, first=first)

    async def _try_to_create(self, session: Session, deadline: float, *, first: bool) -> None:
        """One create; after a lost answer the object itself tells whether it was carried out."""
        parts = self._parts
        about: dict[str, Any] = {}
        # Asked anew for each try: either may have changed.
        leased = await parts.leases.allowed(deadline)
        version = await parts.resources.api_version(deadline)
        await parts.pace()  # Those who came together have waited for these together.
        try:
            async with self._creates:
                lease, sent = parts.leases.next() if leased else None, parts.wall_clock()
                requested = parts.wall_clock() - (parts.now() - session.since)
                body = self._resource.body(
                    parts.config, version, session.name, session.session_hash, lease, requested,
                    _telemetry.annotation(), session.owner if parts.shared else None,
                )  # fmt: skip
                created = await self._send(session, "create", partial(parts.resources.create, body))
            created = created or await parts.resources.get(session.name, deadline)
        except RetryableError as e:
            created = await self._landed(session, deadline) if e.ambiguous else None
            if created is None:
                raise
            if first:
                parts.table.confirmed(session)
        if created is not None:
            self._found(session, created)
            if parts.shared is not None:
                about["clock_ahead"] = parts.shared.measure(created, sent)
        if lease is not None:
            parts.leases.add(session)
        about |= {"sandbox": session.name, "uid": session.known.uid, "incarnation": session.incarnation}
        if session.recreated:
            parts.log.info("sandbox_recreated", **about)
        else:
            parts.log.info("sandbox_created", **about)

    async def _send(
        self, session: Session, verb: str, request: Callable[[], Awaitable[Object | None]]
    ) -> Object | None:
        """One request that makes an object, or makes it the session's.

        Once sent it is never cut off: its answer holds the uid that the object is deleted
        by. The end of the session waits for it.
        """
        self._parts.table.sent(session)
        task = self._parts.tasks.spawn(self._answered(session, request), f"{verb}:{session.name}")
        session.request = task
        await asyncio.wait({task})
        return task.result()

    async def _answered(
        self, session: Session, request: Callable[[], Awaitable[Object | None]]
    ) -> Object | None:
        """The request's answer, and what it means for the session even if nobody waits any more."""
        table = self._parts.table
        try:
            sandbox = await request()
        except SandboxError as e:
            if getattr(e, "ambiguous", False):
                table.unanswered(session, self._parts.now())
            else:
                table.refused(session)
            raise
        if sandbox is not None:
            table.answered(session, metadata.uid(sandbox))
        return sandbox

    async def _landed(self, session: Session, deadline: float) -> Object | None:
        """After a create whose answer was lost: the object, if it is there and is ours."""
        found = await self._parts.resources.get(session.name, deadline)
        if found is None or metadata.is_deleting(found):
            return None
        return found if self._parts.is_own(found, session.session_hash) else None

    def _found(self, session: Session, sandbox: Object) -> None:
        uid = metadata.uid(sandbox)
        self._parts.table.found(session, sandbox, uid, self._parts.now())
        if self._parts.shared is not None:
            self._parts.shared.found(sandbox)
        if uid is not None and uid == session.known.gone:
            raise LostError(f"sandbox {session.name} has been deleted by somebody else")
        if not self._parts.watched(session):
            session.inbox.post(News.LOOK)  # Nobody else will say when it is ready.

    # Sharing

    async def share(self, session: Session, shared: SharedSessions, deadline: float) -> None:
        """Takes the session's object, whoever has made it, or creates it; waits for the end of an old one."""
        parts, name, attempt = self._parts, session.name, 0
        while True:
            seen = await shared.look_up(name, deadline)
            if seen is not None and seen.reading.phase == "ending":
                await self._hear_of_end(session)
                await shared.look_up(name, deadline, always=True)
            elif seen is not None:
                known = Known(uid=seen.uid, version=seen.version, used=True, reading=seen.reading)
                known.since = known.read_at = parts.now()
                session.known = known
                parts.table.answered(session, seen.uid)
                parts.log.info("sandbox_attached", sandbox=name, uid=seen.uid)
                return
            else:
                try:
                    await self._create(session, deadline, first=attempt == 0)
                    return
                except AlreadyExistsError as e:
                    taken = await parts.resources.get(name, deadline)
                    if taken is not None and not parts.is_own(taken, session.session_hash):
                        raise self._taken(session) from e.__cause__
                    if taken is not None:
                        shared.found(taken)
                except RetryableError as e:
                    await wait_to_retry(parts.log, e, "create", attempt, deadline, name)
                    attempt += 1

    async def _hear_of_end(self, session: Session) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ENDING_POLL):
                await session.inbox.get()

    def let_go(self, session: Session) -> None:
        """The session's object is gone, and it has none until it takes or makes another."""
        self._clients.discard(session)
        self._parts.table.machines.forget(session)
        self._parts.leases.drop(session)
        self._parts.table.deleted(session)
        session.known = Known()

    async def discard(self, session: Session, deadline: float | None = None) -> None:
        """Deletes the session's object, if it has one, unless that has changed since it was read."""
        known = session.known
        version = metadata.resource_version(known.object or {}) or known.version
        self.let_go(session)
        if known.uid is not None:
            await self._parts.resources.delete(session.name, known.uid, deadline, version=version)

    # Adoption

    async def _move_on(self, session: Session, conflict: AlreadyExistsError, deadline: float) -> None:
        """The name was taken, and not by an object to adopt: it may be free again, or another is needed."""
        taken = await self._parts.resources.get(session.name, deadline)
        if taken is not None and metadata.is_deleting(taken):
            self._next_name(session)
        elif taken is not None and not self._parts.is_of(taken, session.session_hash):
            raise self._taken(session) from conflict.__cause__

    def _taken(self, session: Session) -> SandboxConflictError:
        return SandboxConflictError(
            f"the name {session.name} is taken by a {self._resource.kind} that is not this session's:"
            " delete it, or use another namespace",
            status=409,
        )

    async def _adopt_existing(self, session: Session, attempt: int, deadline: float) -> bool | None:
        """Adopts the newest object that the session has by its label; deletes those that are spent.

        Returns None where there is none, False where it is to be looked at again.
        """
        parts = self._parts
        found, _ = await parts.resources.list(parts.selector(session=session.session_hash), deadline)
        alive = [s for s in found if not metadata.is_deleting(s) and not metadata.is_shared(s)]
        spent = [sandbox for sandbox in alive if parts.is_spent(sandbox)]
        for sandbox in spent:
            name, version = metadata.name(sandbox), metadata.resource_version(sandbox)
            deleted = await parts.resources.delete(name, metadata.uid(sandbox), deadline, version=version)
            if name == session.name:
                self._next_name(session)
            if not deleted:
                return False  # It has changed: another manager may use it.
        alive = [sandbox for sandbox in alive if sandbox not in spent]
        if not alive:
            return False if spent else None
        newest = max(alive, key=lambda s: str((s.get("metadata") or {}).get("creationTimestamp") or ""))
        return await self._adopt(session, newest, attempt, deadline)

    async def _adopt(self, session: Session, sandbox: Object, attempt: int, deadline: float) -> bool:
        """Claims an object by its instance label, so that our watch sees it.

        The last claimer wins; the loser's watch reports it gone, and it is not deleted.
        """
        parts, known = self._parts, session.known
        name, about = metadata.name(sandbox), sandbox["metadata"]
        names = (self._resource.name(session.session_id, i) for i in range(INCARNATIONS))
        incarnation = next((i for i, own in enumerate(names) if own == name), session.incarnation)
        self._rename(session, name, incarnation)
        known.object, known.used = sandbox, True  # What is known if the claim is not answered.
        lease = parts.leases.next() if await parts.leases.allowed(deadline) else None
        patch: Object = {
            "metadata": {
                "uid": about.get("uid"),
                "resourceVersion": about.get("resourceVersion"),
                "labels": {metadata.LABEL_INSTANCE: parts.config.instance_label},
            },
            # A lease that nobody renews would end it under the session.
            "spec": self._resource.deadline_spec(lease),
        }
        try:
            claimed = await self._send(session, "claim", partial(parts.resources.patch, name, patch))
        except (PreconditionError, NotFoundError):
            known.object, known.used = None, False
            return False  # It has changed, or is gone: look again.
        except RetryableError as e:
            await wait_to_retry(parts.log, e, "patch", attempt - 1, deadline, session.name)
            return False
        except (SandboxPermissionError, UnsupportedError) as e:
            parts.log.warning("sandbox_not_claimed", sandbox=name, reason=str(e))
            lease = claimed = None
            known.claimed = metadata.instance(sandbox) == parts.config.instance_label
        if known.object is sandbox:  # else the watch has told since
            known.object = None
        self._found(session, claimed or sandbox)
        if lease is not None:
            parts.leases.add(session)
        parts.log.info("sandbox_adopted", sandbox=name, uid=known.uid, incarnation=incarnation)
        return True

    def _next_name(self, session: Session) -> None:
        incarnation = session.incarnation + 1
        self._rename(session, self._resource.name(session.session_id, incarnation), incarnation)

    def _rename(self, session: Session, name: str, incarnation: int) -> None:
        if session.name != name:
            self._remove.remember(session)  # What was asked for under the old name may still land.
        self._parts.table.rename(session, name, incarnation)
