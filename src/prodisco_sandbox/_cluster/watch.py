"""One watch for all objects of a manager: list, then follow, for ever."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable
from typing import Protocol

from .._aio.pacing import backoff
from .._log import get_logger
from ..errors import SandboxError, SandboxPermissionError
from . import metadata
from .api_errors import ExpiredError, UnsupportedError
from .metadata import Object
from .requests import SandboxResources

REFUSED_FIRST, REFUSED_MOST = 10.0, 300.0
"""A watch that was refused is tried again after 10 s, doubling to 300 s."""

WARN_AT = 3
"""How many failures in a row are worth a warning."""


class WatchListener(Protocol):
    """Receives what a `SandboxWatch` finds; all calls are synchronous."""

    def synced(self, sandboxes: list[Object], since: float) -> None:
        """All objects that match, from a list asked for at `since` (loop's clock)."""

    def changed(self, sandbox: Object) -> None:
        """An object was added or modified."""

    def deleted(self, sandbox: Object) -> None:
        """An object is gone, or no longer matches."""

    def down(self) -> None:
        """The watch is refused or impossible: objects have to be read instead."""


class SandboxWatch:
    """Follows the objects that match a label selector.

    Args:
        resources: The kind of object, and how to ask for it.
        selector: Label selector.
        listener: Receives the events.
        survey: A wider selector for the first list, and a callback for all that it finds.

    Attributes:
        active: Whether events can be relied upon: they come, or will once a broken
            connection is back. False where watching is refused or impossible.
        tried: Set once the first list has been answered, or has failed.
        settled: Set once a watch was accepted, or refused for longer than by a server that starts.
        refusal: Why it was refused; None: it is not.
        heard_at: When a list, an event or a bookmark came last, on the loop's clock.
    """

    def __init__(
        self,
        resources: SandboxResources,
        selector: str,
        listener: WatchListener,
        *,
        survey: tuple[str, Callable[[list[Object]], None]] | None = None,
    ) -> None:
        self.active = True
        self.tried = asyncio.Event()
        self.settled = asyncio.Event()
        self.refusal: SandboxError | None = None
        self.heard_at = -math.inf
        self._survey = self._next_survey = survey
        self._log = get_logger("watch", resources.events)
        self._resources = resources
        self._selector = selector
        self._listener = listener
        self._failures = 0
        self._refusals = 0
        self._version = ""
        self._listed = False

    @property
    def current(self) -> bool:
        """Whether it misses nothing now: it has read a list, and no fault has come since the last event."""
        return self.active and not self._failures and self._listed

    @property
    def surveyed(self) -> bool:
        """Whether the first list has been read."""
        return self._next_survey is None

    async def run(self) -> None:
        """Watches until it is cancelled, or until it turns out that the API object cannot watch."""
        self.tried.clear()
        self._next_survey = self._survey
        while True:
            try:
                await self._lineage()
            except ExpiredError:
                # A fresh list shows what was missed; the pause spares a server that always says so.
                await self._pause("expired")
            except (SandboxPermissionError, UnsupportedError) as e:
                self._refuse(e)
                if isinstance(e, UnsupportedError) and e.status is None:
                    return  # not the server's answer, but an API object that cannot stream
                pause = backoff(self._refusals - 1, first=REFUSED_FIRST, most=REFUSED_MOST, jitter=0.0)
                await asyncio.sleep(pause)
            except SandboxError as e:
                await self._pause(str(e))

    async def _lineage(self) -> None:
        """One resourceVersion lineage: a list, and watches from there until one expires."""
        since = asyncio.get_running_loop().time()
        self._listed = False
        try:
            sandboxes = await self._list()
        finally:
            self.tried.set()
        self._listed, self.heard_at = True, since
        self._listener.synced(sandboxes, since)
        while True:
            try:
                await self._follow()
            except (ExpiredError, SandboxPermissionError, UnsupportedError):
                raise
            except SandboxError as e:
                await self._pause(str(e))

    async def _list(self) -> list[Object]:
        selector, tell = self._next_survey or (self._selector, None)
        found, self._version = await self._resources.list(selector)
        if tell is None:
            return found
        self._next_survey = None
        tell(found)
        return [sandbox for sandbox in found if metadata.matches(sandbox, self._selector)]

    async def _follow(self) -> None:
        """One watch request, until the server ends it."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        async with contextlib.aclosing(self._resources.watch(self._selector, self._version)) as events:
            async for kind, sandbox in events:
                if kind == "OPEN":
                    self._works()
                    continue
                self._failures, self.heard_at = 0, loop.time()
                self._version = metadata.resource_version(sandbox) or self._version
                if kind in ("ADDED", "MODIFIED"):
                    self._listener.changed(sandbox)
                elif kind == "DELETED":
                    self._listener.deleted(sandbox)
        if loop.time() - begun < 1.0:
            # Asking a server that ends every watch at once again and again would be a tight loop.
            await self._pause("ended at once")

    def _works(self) -> None:
        self.settled.set()
        self.refusal = None
        if not self.active:
            self.active = True
            self._refusals = 0
            self._log.info("watch_restored")

    def _refuse(self, error: SandboxError) -> None:
        self._refusals += 1
        self.refusal = error
        if self._refusals > 1 or error.status is None:
            self.settled.set()
        if self.active:
            self.active = False
            self._log.warning("watch_refused", reason=str(error), instead="polling")
            self._listener.down()

    async def _pause(self, reason: str) -> None:
        self._failures += 1
        pause = backoff(self._failures - 1)
        # One failure is routine; repeated ones hide deaths and readiness, so warn.
        level = logging.WARNING if self._failures == WARN_AT else logging.INFO
        self._log.log(level, "watch_broken", reason=reason, attempt=self._failures, pause=round(pause, 3))
        await asyncio.sleep(pause)
