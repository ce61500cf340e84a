"""The end of a session: close its client, delete its Sandbox, and what was left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from .._cluster import manifest
from .._cluster.api_errors import RetryableError, UnexpectedError
from .._cluster.manifest import Object
from .._cluster.requests import SandboxResources, backoff
from .._log import get_logger
from ..config import SandboxManagerConfig
from ..errors import SandboxError, SandboxUnavailableError
from .table import Session, SessionTable

if TYPE_CHECKING:
    from ..client import SandboxClient

QUICK_RETRIES = 5
"""Deletes that are repeated with backoff before the next try is the reaper's tick."""
AMBIGUOUS_FOR = 60.0
"""How long a create whose answer was lost may still land."""
CLIENT_CLOSE_TIMEOUT = 5.0
CONCURRENT_DELETES = 20
ORPHAN_READS = 3
"""How often an orphan that changes while it is being deleted is looked at anew."""


class Closing:
    """Deletes Sandboxes; a deletion is never forgotten while the manager lives."""

    def __init__(
        self,
        config: SandboxManagerConfig,
        resources: SandboxResources,
        table: SessionTable,
        *,
        told: Callable[[], bool],
        wall_clock: Callable[[], float],
    ) -> None:
        self._log = get_logger("manager", resources.events)
        self._config = config
        self._resources = resources
        self._table = table
        self._told = told
        self._wall_clock = wall_clock
        self._deletes = asyncio.Semaphore(CONCURRENT_DELETES)
        self._again = asyncio.Event()
        self._last_chance = False
        self._ambiguous: dict[str, tuple[str, float]] = {}
        self.abandoned: list[str] = []
        """Sandboxes that shutdown had to leave because the API server refuses to delete them."""

    def retry_now(self, *, last_chance: bool = False) -> None:
        """Repeats the deletes that have failed.

        Args:
            last_chance: From now on, what the API server refuses for good is abandoned.
        """
        self._last_chance = self._last_chance or last_chance
        self._again.set()
        self._again = asyncio.Event()

    async def close_client(self, name: str, client: SandboxClient) -> None:
        try:
            async with asyncio.timeout(CLIENT_CLOSE_TIMEOUT):
                await client.close()
        except Exception as e:  # noqa: BLE001 - whatever it is, it is logged
            # The channel's end is no reason to keep the Sandbox.
            self._log.warning("client_close_failed", sandbox=name, reason=repr(e))

    async def delete(self, session: Session) -> None:
        """Deletes the session's Sandbox, however often that takes."""
        attempt, pause, begun = 0, 0.0, asyncio.get_running_loop().time()
        while True:
            again = self._again
            try:
                async with self._deletes:
                    if session.leftover:  # else it is gone, or another manager's by now
                        await self._delete_once(session)
                return
            except SandboxError as e:
                attempt += 1
                self._table.totals.delete_retries += 1
                took = round(asyncio.get_running_loop().time() - begun, 3)
                self._log.warning(
                    "sandbox_delete_failed",
                    sandbox=session.name,
                    attempt=attempt,
                    reason=str(e),
                    duration=took,
                )
                pause = backoff(attempt)
                if isinstance(e, RetryableError) and e.retry_after is not None:
                    pause = e.retry_after
                if self._last_chance and not isinstance(e, SandboxUnavailableError | UnexpectedError):
                    self.abandoned.append(session.name)
                    return
            session.released.set()
            quick = self._last_chance or attempt <= QUICK_RETRIES
            try:
                async with asyncio.timeout(pause if quick else None):
                    await again.wait()
            except TimeoutError:
                continue

    async def _delete_once(self, session: Session) -> None:
        uid = session.uid
        if uid is None or (session.claimed and not self._told()):
            # Nobody says whether another manager has claimed it.
            found = await self._resources.get(session.name)
            if found is None or not self._may_delete(found, session.session_hash):
                return
            uid = uid or manifest.uid(found)
        await self._resources.delete(session.name, uid)
        self._log.info("sandbox_deleted", sandbox=session.name, uid=uid)

    def _may_delete(self, sandbox: Object, session_hash: str) -> bool:
        instance, managed_by = self._config.instance_label, self._config.managed_by
        return manifest.is_of(sandbox, session_hash, instance, managed_by=managed_by)

    def remember(self, session: Session) -> None:
        """Notes that a create of a session that has ended may still land, a second one too."""
        until = session.ambiguous_at + AMBIGUOUS_FOR
        if until > asyncio.get_running_loop().time():
            self._ambiguous[session.name] = (session.session_hash, until)

    def uncertain(self) -> list[str]:
        """Sandboxes that may yet appear, because the answer to their create was lost."""
        return list(self._ambiguous)

    async def look_again(self, deadline: float | None = None) -> None:
        """Looks for Sandboxes whose create was given up but may have landed since."""
        for name, (session_hash, until) in list(self._ambiguous.items()):
            # Before `until` another may land: after the one found here, or after a session of that name.
            over = asyncio.get_running_loop().time() >= until
            if self._table.named(name) is None:
                found = await self._resources.get(name, deadline)
                if self._table.named(name) is not None:
                    continue  # Meanwhile a session has come back, and this may be its Sandbox.
                if found is not None and self._may_delete(found, session_hash):
                    over = await self._delete_seen(found, deadline) and over
            if over and self._ambiguous.get(name) == (session_hash, until):
                del self._ambiguous[name]

    async def _delete_seen(self, sandbox: Object, deadline: float | None = None) -> bool:
        """Deletes a Sandbox of no session, unless somebody has laid hands on it since it was read."""
        name, uid = manifest.name(sandbox), manifest.uid(sandbox)
        version = (sandbox.get("metadata") or {}).get("resourceVersion")
        deleted = await self._resources.delete(name, uid, deadline, version=version)
        if deleted:
            self._log.info("orphan_deleted", sandbox=name, uid=uid, instance=manifest.instance(sandbox))
        return deleted

    async def clean_up(self, *, all_instances: bool, deadline: float) -> int:
        """Deletes what previous incarnations left; see `SandboxManager.cleanup_orphaned_sandboxes`."""
        selector = manifest.managed_selector(managed_by=self._config.managed_by)
        found, _ = await self._resources.list(selector, deadline)
        # Turns of its own: the end of a session does not wait for a clean-up that hangs.
        turns = asyncio.Semaphore(CONCURRENT_DELETES)

        async def delete(sandbox: Object) -> bool:
            async with turns:
                if asyncio.get_running_loop().time() >= deadline:
                    raise SandboxUnavailableError("the clean-up did not come to its end within ready_timeout")
                return await self._delete_orphan(sandbox, deadline, all_instances=all_instances)

        results = await asyncio.gather(*map(delete, found), return_exceptions=True)
        errors = [result for result in results if isinstance(result, BaseException)]
        if errors:
            raise errors[0]
        return sum(result is True for result in results)

    def _is_orphan(self, sandbox: Object, *, all_instances: bool) -> bool:
        if manifest.is_deleting(sandbox) or self._table.named(manifest.name(sandbox)) is not None:
            return False
        return (
            all_instances
            or manifest.instance(sandbox) == self._config.instance_label
            or manifest.lease_lapsed(sandbox, self._wall_clock())
        )

    async def _delete_orphan(self, sandbox: Object, deadline: float, *, all_instances: bool) -> bool:
        # Since it was read, a session may have adopted it, or its manager renewed its lease.
        seen: Object | None = sandbox
        for _ in range(ORPHAN_READS):
            if seen is None or not self._is_orphan(seen, all_instances=all_instances):
                return False
            if await self._delete_seen(seen, deadline):
                return True
            seen = await self._resources.get(manifest.name(seen), deadline)
        return False
