"""One watch for all Sandboxes of a manager: list, then follow, for ever."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Protocol

from .._log import get_logger
from ..errors import SandboxError, SandboxPermissionError
from . import manifest
from .api_errors import ExpiredError, UnsupportedError
from .manifest import Object
from .requests import SandboxResources, backoff

REFUSED_FIRST, REFUSED_MOST = 10.0, 300.0
"""A watch that was refused is tried again after 10 s, doubling to 300 s."""

WARN_AT = 3
"""How many failures in a row are worth a warning."""


class WatchListener(Protocol):
    """Whom a `SandboxWatch` tells; all calls are synchronous."""

    def synced(self, sandboxes: list[Object], since: float) -> None:
        """All Sandboxes of ours, from a list asked for at `since` (loop's clock)."""

    def changed(self, sandbox: Object) -> None:
        """A Sandbox was added or modified."""

    def deleted(self, sandbox: Object) -> None:
        """A Sandbox is gone, or is no longer ours."""

    def down(self) -> None:
        """There is no watch for the time being: read for yourself."""


class SandboxWatch:
    """Follows the Sandboxes that match a label selector.

    Its first list can be a wider one, `survey`: a selector, and who is told what was found.

    Attributes:
        active: Whether events can be relied upon: they come, or will once a broken
            connection is back. False where watching is refused or impossible.
        tried: Set once the first list has been answered, or has failed.
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
        """Whether nothing escapes it now: it has read a list, and no fault has come since the last event."""
        return self.active and not self._failures and self._listed

    @property
    def surveyed(self) -> bool:
        """Whether the first list has been read."""
        return self._next_survey is None

    async def run(self) -> None:
        """Watches until it is cancelled, or until it turns out that the API cannot watch."""
        self.tried.clear()
        self._next_survey = self._survey
        while True:
            try:
                await self._lineage()
            except ExpiredError:
                # The version is too old to go on from: a fresh list tells what was missed.
                # The pause keeps a server that says so every time from being hammered.
                await self._pause("expired")
            except (SandboxPermissionError, UnsupportedError) as e:
                self._refuse(e)
                if isinstance(e, UnsupportedError) and e.status is None:
                    return  # not the server's answer, but an API object that cannot stream
                await asyncio.sleep(min(REFUSED_MOST, REFUSED_FIRST * 2.0 ** (self._refusals - 1)))
            except SandboxError as e:
                await self._pause(str(e))

    async def _lineage(self) -> None:
        """One resourceVersion lineage: a list, and watches from there until one expires."""
        since = asyncio.get_running_loop().time()
        self._listed = False
        try:
            if self._next_survey is None:
                sandboxes, self._version = await self._resources.list(self._selector)
            else:
                selector, tell = self._next_survey
                found, self._version = await self._resources.list(selector)
                self._next_survey = None
                tell(found)
                sandboxes = [sandbox for sandbox in found if manifest.matches(sandbox, self._selector)]
        finally:
            self.tried.set()
        self._listed = True
        self._listener.synced(sandboxes, since)
        while True:
            try:
                await self._follow()
            except (ExpiredError, SandboxPermissionError, UnsupportedError):
                raise
            except SandboxError as e:
                await self._pause(str(e))

    async def _follow(self) -> None:
        """One watch request, until the server ends it."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        async with contextlib.aclosing(self._resources.watch(self._selector, self._version)) as events:
            async for kind, sandbox in events:
                if kind == "OPEN":
                    self._works()
                    continue
                self._failures = 0
                self._version = (sandbox.get("metadata") or {}).get("resourceVersion") or self._version
                if kind in ("ADDED", "MODIFIED"):
                    self._listener.changed(sandbox)
                elif kind == "DELETED":
                    self._listener.deleted(sandbox)
        if loop.time() - begun < 1.0:
            # A server that ends watches at once, for whatever reason, is not asked in a tight loop.
            await self._pause("ended at once")

    def _works(self) -> None:
        if not self.active:
            self.active = True
            self._refusals = 0
            self._log.info("watch_restored")

    def _refuse(self, error: SandboxError) -> None:
        self._refusals += 1
        if self.active:
            self.active = False
            self._log.warning("watch_refused", reason=str(error), instead="polling")
            self._listener.down()

    async def _pause(self, reason: str) -> None:
        self._failures += 1
        pause = backoff(self._failures - 1)
        # Once is nothing; then nobody hears of deaths, and who waits for a sandbox waits in vain.
        level = logging.WARNING if self._failures == WARN_AT else logging.INFO
        self._log.log(level, "watch_broken", reason=reason, attempt=self._failures, pause=round(pause, 3))
        await asyncio.sleep(pause)
