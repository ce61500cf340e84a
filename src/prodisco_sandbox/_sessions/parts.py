"""What the steps of a session's life share, and the errors that they end with."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .._aio.pacing import Pace
from .._aio.tasks import OwnedTasks
from .._cluster import manifest, metadata
from .._cluster.metadata import Object
from .._cluster.requests import SandboxResources
from .._cluster.resource import Reading
from .._cluster.watch import SandboxWatch
from .._log import Logger
from ..config import SandboxManagerConfig
from ..errors import SandboxError, SandboxFailedError
from .table import Session, SessionTable

if TYPE_CHECKING:
    from .leases import Deadlines
    from .shared import SharedSessions
    from .suspended import SuspendedObjects


class LostError(SandboxError):
    """The session's object is no more, or no longer ours: there is nothing to delete."""


class SpentError(SandboxFailedError):
    """The object has come to its end and holds nothing: delete it, and make another."""


class SuspendedError(SandboxFailedError):
    """The object is suspended, and starting it was refused: it is kept."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The manager's parts that the steps work with."""

    config: SandboxManagerConfig
    resources: SandboxResources
    table: SessionTable
    leases: Deadlines
    shared: SharedSessions | None
    """In place of `leases`, with the setting of that name."""
    suspended: SuspendedObjects
    watch: SandboxWatch
    tasks: OwnedTasks
    pace: Pace
    """Steps of lives in one pass of the event loop."""
    wall_clock: Callable[[], float]
    log: Logger

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    def watched(self, session: Session) -> bool:
        """Whether the watch tells of the session's object."""
        return session.known.claimed and self.watch.active

    def reading(self, sandbox: Object, since: int = 0, *, strict: bool = False) -> Reading:
        """How far an object is; unless `strict`, as far as that can be told."""
        try:
            return self.resources.resource.reading(sandbox, self.config, now=self.wall_clock(), since=since)
        except Exception as e:
            if strict:
                raise
            # `endpoint` may be the caller's own function.
            return Reading("starting", None, f"its endpoint cannot be told: {e!r}")

    def is_spent(self, sandbox: Object) -> bool:
        """Whether nothing is lost with it: its pod has ended, and no volume outlives that."""
        phase = self.reading(sandbox).phase
        return phase == "ending" or (phase in ("dead", "never") and not manifest.holds_volumes(sandbox))

    def must_keep(self, session: Session) -> bool:
        """Whether a session that fails leaves its object: it may hold what a user wants back."""
        known = session.known
        observed = known.object or {}
        being_started = known.generation > 0  # since it was suspended
        return known.used and (
            manifest.holds_volumes(observed) or being_started or self.reading(observed).phase == "suspended"
        )

    def may_suspend(self, session: Session) -> bool:
        """Whether the end of a session may suspend its object: it was in use, and is ours to patch."""
        return self.config.on_idle == "suspend" and session.known.used and session.known.claimed

    def selector(self, *, instance: str | None = None, session: str | None = None) -> str:
        """Of the managed objects, those of an instance or a session."""
        return metadata.managed_selector(instance, session, managed_by=self.config.managed_by)

    def is_of(self, sandbox: Object, session_hash: str, instance: str | None = None) -> bool:
        return metadata.is_of(sandbox, session_hash, instance, managed_by=self.config.managed_by)

    def is_own(self, sandbox: Object, session_hash: str) -> bool:
        """Whether it is that session's, and this manager's or its group's."""
        return self.is_of(sandbox, session_hash, self.config.instance_label)
