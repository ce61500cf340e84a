"""The end of a session's object: deletes that are never forgotten, and what was left behind."""

from __future__ import annotations

import asyncio

from .. import _telemetry
from .._aio.pacing import backoff
from .._cluster import metadata
from .._cluster.api_errors import NotFoundError, PreconditionError, RetryableError, UnexpectedError
from .._cluster.metadata import Object
from ..errors import SandboxError, SandboxPermissionError, SandboxUnavailableError
from .parts import Parts
from .table import Session

QUICK_RETRIES = 5
"""Deletes that are repeated with backoff before the next try is the reaper's tick."""
UNCONFIRMED_FOR = 60.0
"""How long a create whose answer was lost may still be carried out."""
CONCURRENT_DELETES = 20
"""Fewer than `requests.CONCURRENT_REQUESTS`: creates and reads do not wait for hundreds of deletes."""
ORPHAN_READS = 3
"""How often an orphan that changes while it is being deleted is looked at anew."""


class Remove:
    """Deletes objects; a deletion is never forgotten while the manager lives."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._deletes = asyncio.Semaphore(CONCURRENT_DELETES)
        self._limiting = asyncio.Lock()
        self._again = asyncio.Event()
        self._last_chance = False
        self.unconfirmed: dict[str, tuple[str, float]] = {}
        """Objects that may yet appear, since the answer to their create was lost: session, and until when."""
        self.abandoned: list[str] = []
        """Objects that shutdown had to leave because the API server refuses to delete them."""

    def retry_now(self, *, last_chance: bool = False) -> None:
        """Repeats the deletes that have failed. Since the `last_chance` a refusal is final."""
        self._last_chance = self._last_chance or last_chance
        self._again.set()
        self._again = asyncio.Event()

    async def __call__(self, session: Session) -> None:
        """Deletes or suspends the session's object, and retries until that succeeds."""
        parts, attempt, begun = self._parts, 0, self._parts.now()
        while True:
            again = self._again
            try:
                async with self._deletes:
                    if session.suspends and session.remains.needs_delete:
                        await self._suspend_once(session)
                    # It may be suspended, gone, or another manager's by now.
                    if session.remains.needs_delete:
                        with _telemetry.span("sandbox.delete", session.trace, session.about):
                            await self._delete_once(session)
                return
            except SandboxError as e:
                attempt += 1
                if parts.shared is not None and attempt > QUICK_RETRIES:
                    # Whoever waits for the close goes on, and may use it elsewhere; it has a deadline.
                    parts.log.warning("sandbox_kept", sandbox=session.name, reason=str(e))
                    return
                failed = {"sandbox": session.name, "attempt": attempt, "reason": str(e)}
                failed["duration"] = parts.since(begun)
                if not session.suspends:
                    parts.log.warning("sandbox_delete_failed", **failed)
                elif session.ended in ("failed", "lost") and isinstance(e, SandboxPermissionError):
                    parts.table.keep(session)
                    parts.log.warning("sandbox_kept", sandbox=session.name, reason=str(e))
                    return
                else:
                    parts.log.warning("sandbox_suspend_failed", **failed)
                pause = e.pause(attempt) if isinstance(e, RetryableError) else backoff(attempt)
                if self._last_chance and not isinstance(e, SandboxUnavailableError | UnexpectedError):
                    self.abandoned.append(session.name)
                    return
            if parts.shared is None:
                parts.table.leave_to_background(session)
            quick = self._last_chance or attempt <= QUICK_RETRIES
            try:
                async with asyncio.timeout(pause if quick else None):
                    await again.wait()
            except TimeoutError:
                continue

    async def _suspend_once(self, session: Session) -> None:
        """Suspends the object; one that has changed since it was last seen is read again first."""
        parts, known, name = self._parts, session.known, session.name
        resources, table = parts.resources, parts.table
        for _ in range(ORPHAN_READS):
            if known.uid is None or known.version is None or not parts.watch.current:
                found = await resources.get(name)
                # It has no uid if the answer to its claim was lost.
                same = found is not None and known.uid in (None, metadata.uid(found))
                if found is None or not same or not parts.is_own(found, session.session_hash):
                    table.dropped(session)
                    return
                known.uid, known.version = metadata.uid(found), metadata.resource_version(found)
            until = metadata.lease_time(parts.wall_clock(), parts.config.suspended_for)
            spec = resources.resource.mode_spec(await resources.api_version(), "Suspended")
            version, known.object, known.version = known.version, None, None
            try:
                patched = await parts.leases.write(name, known.uid, until, version=version, spec=spec)
            except NotFoundError:
                table.dropped(session)
                return
            except PreconditionError as e:
                error = e
                continue
            found = patched or await resources.get(name)
            # Meanwhile it may have been closed, deleted, or claimed by another manager.
            if found is not None and session.suspends and session.remains.needs_delete:
                table.suspended(session, found)
                parts.log.info("sandbox_suspended", sandbox=name, uid=known.uid, until=until)
            return
        raise error

    async def _delete_once(self, session: Session) -> None:
        uid, name, resources = session.known.uid, session.name, self._parts.resources
        if uid is None or (session.known.claimed and not self._parts.watch.current):
            # Nobody says whether another manager has claimed it.
            found = await resources.get(name)
            if found is None or not self._parts.is_own(found, session.session_hash):
                return
            uid = uid or metadata.uid(found)
        await resources.delete(name, uid)
        self._parts.log.info("sandbox_deleted", sandbox=name, uid=uid)

    # What may yet appear

    def remember(self, session: Session) -> None:
        """Notes that a create of a session may still be carried out under its present name."""
        if self._parts.shared is not None:
            return  # Another manager may have the session by then; the object has a deadline.
        lost_at = session.remains.lost_at
        if session.remains.what == "kept" or session.suspends:
            return  # Under its name is the object that was kept or suspended; a lost claim makes no other.
        if lost_at is not None and lost_at + UNCONFIRMED_FOR > self._parts.now():
            self.unconfirmed[session.name] = (session.session_hash, lost_at + UNCONFIRMED_FOR)

    async def look_again(self, deadline: float | None = None) -> None:
        """Looks for objects whose create was given up but may have been carried out since."""
        table, resources = self._parts.table, self._parts.resources
        for name, (session_hash, until) in list(self.unconfirmed.items()):
            # Before `until` another may appear: after the one found here, or after a session of that name.
            over = self._parts.now() >= until
            if table.named(name) is None:
                found = await resources.get(name, deadline)
                if table.named(name) is not None:
                    continue  # Meanwhile a session has come back, and this may be its object.
                is_own = found is not None and self._parts.suspended.is_own(found)
                if found is not None and not is_own and self._parts.is_own(found, session_hash):
                    over = await self._delete_seen(found, deadline) and over
            if over and self.unconfirmed.get(name) == (session_hash, until):
                del self.unconfirmed[name]

    # Orphans

    async def clean_up(self, *, all_instances: bool, deadline: float) -> int:
        """Deletes what previous incarnations left; see `SandboxManager.cleanup_orphaned_sandboxes`."""
        found, _ = await self._parts.resources.list(self._parts.selector(), deadline)
        # Few at a time: the end of a session does not wait for a clean-up that hangs.
        turns = asyncio.Semaphore(CONCURRENT_DELETES)

        async def delete(sandbox: Object) -> bool:
            async with turns:
                if self._parts.now() >= deadline:
                    raise SandboxUnavailableError("the clean-up did not come to its end within ready_timeout")
                return await self._delete_orphan(sandbox, deadline, all_instances=all_instances)

        results = await asyncio.gather(*map(delete, found), return_exceptions=True)
        errors = [result for result in results if isinstance(result, BaseException)]
        if errors:
            raise errors[0]
        return sum(result is True for result in results)

    def _is_orphan(self, sandbox: Object, *, all_instances: bool) -> bool:
        parts = self._parts
        if metadata.is_deleting(sandbox) or parts.table.named(metadata.name(sandbox)) is not None:
            return False
        instance, is_shared = metadata.instance(sandbox), parts.shared is not None
        has_lapsed = parts.resources.resource.lapsed(
            sandbox, parts.wall_clock() - (parts.config.clock_skew if is_shared else 0.0)
        )
        if not is_shared and metadata.is_shared(sandbox):
            has_lapsed = False  # Its group decides.
        is_left = instance == parts.config.instance_label and not is_shared
        return all_instances or has_lapsed or (is_left and not parts.suspended.is_own(sandbox))

    async def _delete_orphan(self, sandbox: Object, deadline: float, *, all_instances: bool) -> bool:
        # Since it was read, a session may have adopted it, or its manager renewed its lease.
        seen: Object | None = sandbox
        for _ in range(ORPHAN_READS):
            if seen is None or not self._is_orphan(seen, all_instances=all_instances):
                return False
            if await self._delete_seen(seen, deadline):
                return True
            seen = await self._parts.resources.get(metadata.name(seen), deadline)
        return False

    async def limit_suspended(self) -> None:
        """Deletes suspended objects that are too many, the oldest first."""
        parts, suspended = self._parts, self._parts.suspended
        async with self._limiting:
            for found in suspended.beyond(parts.config.most_suspended):
                seen = found.object
                if suspended.find(seen) is not found:  # Its session has come back.
                    continue
                try:
                    deleted = await self._delete_seen(seen)
                    now = None if deleted else await parts.resources.get(found.name)
                except SandboxError as e:  # At the next tick again.
                    parts.log.info("sandbox_sweep_failed", sandbox=found.name, reason=str(e))
                    if isinstance(e, SandboxUnavailableError):
                        return
                    continue
                same = now is not None and metadata.uid(now) == metadata.uid(seen)
                if now is not None and same and metadata.instance(now) == parts.config.instance_label:
                    suspended.seen(now, is_suspended=False)  # Ignored if its session has taken it meanwhile.
                else:
                    suspended.gone(seen)

    async def _delete_seen(self, sandbox: Object, deadline: float | None = None) -> bool:
        """Deletes an object of no session, unless somebody has changed it since it was read."""
        name, uid = metadata.name(sandbox), metadata.uid(sandbox)
        version = metadata.resource_version(sandbox)
        deleted = await self._parts.resources.delete(name, uid, deadline, version=version)
        if deleted:
            self._parts.log.info("orphan_deleted", sandbox=name, uid=uid, instance=metadata.instance(sandbox))
        return deleted
