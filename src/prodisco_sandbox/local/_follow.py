"""All objects of a kind, by a watch, or by lists where the API server refuses one."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Iterable

from .._aio.tasks import OwnedTasks
from .._cluster import metadata
from .._cluster.metadata import Object
from .._cluster.requests import SandboxResources
from .._cluster.watch import SandboxWatch
from .._log import get_logger
from ..errors import SandboxError

log = get_logger("local")

SELECTOR = f"{metadata.LABEL_APP}={metadata.APP}"
"""The objects of every manager."""


class Follower(ABC):
    """Follows the objects of a kind.

    Args:
        resources: The kind, and how to ask for it.
        poll_interval: How often they are listed where they cannot be watched, in seconds.

    Attributes:
        resources: As above.
        listed: Set once all of them have been listed.
    """

    def __init__(self, resources: SandboxResources, poll_interval: float) -> None:
        self.resources = resources
        self.listed = asyncio.Event()
        self._watch = SandboxWatch(resources, SELECTOR, self)
        self._poll_interval = poll_interval
        self._unwatched = asyncio.Event()

    def follow(self, tasks: OwnedTasks, name: str) -> None:
        """Starts."""
        tasks.supervise(self._watch.run, f"{name}-watch")
        tasks.supervise(self._poll, f"{name}-poll")

    @abstractmethod
    def changed(self, obj: Object) -> None:
        """An object was added or modified."""

    @abstractmethod
    def deleted(self, obj: Object) -> None:
        """An object is gone."""

    @abstractmethod
    def seen_before(self, since: float) -> Iterable[Object]:
        """The objects that were last seen before that time, on the loop's clock."""

    # Calls of the watch

    def synced(self, objects: list[Object], since: float) -> None:
        for obj in objects:
            self.changed(obj)
        listed = {metadata.uid(obj) for obj in objects}
        for obj in list(self.seen_before(since)):
            if metadata.uid(obj) not in listed:
                self.deleted(obj)
        self.listed.set()

    def down(self) -> None:
        self._unwatched.set()

    async def _poll(self) -> None:
        """Lists, while there is no watch."""
        while True:
            await self._unwatched.wait()
            since = asyncio.get_running_loop().time()
            try:
                self.synced((await self.resources.list(SELECTOR))[0], since)
            except SandboxError as e:
                log.info("list_failed", reason=str(e))
            if self._watch.active:
                self._unwatched.clear()
            else:
                await asyncio.sleep(self._poll_interval)
