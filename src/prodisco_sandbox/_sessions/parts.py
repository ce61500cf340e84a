"""A manager's parts, which the steps of its sessions' lives share."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

from .._aio.tasks import OwnedTasks
from .._cluster import manifest, metadata
from .._cluster.metadata import Object
from .._cluster.requests import SandboxResources
from .._cluster.resource import Reading
from .._cluster.watch import SandboxWatch, WatchListener
from .._log import get_logger
from ..config import SandboxManagerConfig
from .ends import Ends
from .eviction import Eviction
from .leases import Deadlines, Leases
from .past import Past
from .shared import SharedSessions
from .suspended import SuspendedObjects
from .table import Session, SessionTable


class Parts:
    """Made once, and in this order: each part may use those before it at once, and all others later.

    Attributes:
        shared: The objects of the group, with the setting of that name.
        leases: Writes the objects' deadlines; `shared`, where that is set.
        pace: Of steps of lives and of requests.
    """

    def __init__(
        self,
        config: SandboxManagerConfig,
        api: Any | None,
        wall_clock: Callable[[], float],
        listener: WatchListener,
    ) -> None:
        self.config = config
        self.wall_clock = wall_clock
        self.events: Counter[str] = Counter()
        self.log = get_logger("manager", self.events)
        self.tasks = OwnedTasks(self.events)
        self.table = SessionTable(config.max_sessions)
        self.resources = SandboxResources(config, api, self.events)
        self.pace = self.resources.pace
        self.past = Past(self.resources.resource, manifest.grace_period(config), config.group)
        self.suspended = SuspendedObjects(self.past.suspended_is_gone)
        self.own_objects = self.selector(instance=config.instance_label)
        survey = (self.selector(), self.past.survey)
        self.watch = SandboxWatch(self.resources, self.own_objects, listener, survey=survey)
        self.ends = Ends(self)
        self.shared = SharedSessions(self) if config.shared else None
        self.leases: Deadlines = self.shared or Leases(self)
        self.eviction = Eviction(self)

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    def since(self, begun: float) -> float:
        return round(self.now() - begun, 3)

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

    def selector(self, *, instance: str | None = None, session: str | None = None) -> str:
        """Of the managed objects, those of an instance or a session."""
        return metadata.managed_selector(instance, session, managed_by=self.config.managed_by)

    def is_of(self, sandbox: Object, session_hash: str, instance: str | None = None) -> bool:
        return metadata.is_of(sandbox, session_hash, instance, managed_by=self.config.managed_by)

    def is_own(self, sandbox: Object, session_hash: str) -> bool:
        """Whether it is that session's, and this manager's or its group's."""
        return self.is_of(sandbox, session_hash, self.config.instance_label)
