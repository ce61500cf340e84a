"""What is remembered of sessions that are gone, within bounds."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterable

from .._cluster import metadata
from .._cluster.metadata import Object
from .._cluster.resource import Resource
from .table import Session

NAME_MARGIN = 5.0
"""How much longer than its pod's grace period a name may be taken, in seconds."""
STRAYS = 10_000
"""How many sessions are looked for before one is created, because they may have an object."""
REMEMBERED = 1024
"""How many ended sessions are remembered, to tell a re-creation from a first creation."""


class Past:
    """Which ids had a session, which may still have an object, and which names are not free yet.

    Args:
        resource: The kind of object that sessions have.
        grace_period: How long a pod may go on after its deletion, in seconds.
        group: Of managers that share their sessions, for whom a session has one name; empty: none.
    """

    def __init__(self, resource: Resource, grace_period: float, group: str) -> None:
        self._resource = resource
        self._group = group
        self._occupied_for = grace_period + NAME_MARGIN
        self._occupied: dict[str, float] = {}
        self._ended: OrderedDict[str, bool] = OrderedDict()
        """By session: whether it was evicted."""
        self._strays: set[str] = set()

    def survey(self, sandboxes: Iterable[Object]) -> None:
        """All managed objects, as the first list shows them: sessions that come back may have one."""
        living = (s for s in sandboxes if not metadata.is_deleting(s) and not metadata.is_shared(s))
        self._strays = {metadata.labels(sandbox).get(metadata.LABEL_SESSION, "") for sandbox in living}

    def may_have_one(self, session: Session) -> bool:
        """Whether an object of the session may be there which this manager does not follow."""
        return session.session_hash in self._strays

    def has_begun(self, session: Session) -> None:
        """The session is no re-creation of a later one; `ended` makes it one again."""
        self._ended.pop(session.session_hash, None)

    def is_ready(self, session: Session) -> None:
        self._strays.discard(session.session_hash)

    def was_here(self, session_hash: str) -> bool:
        """Whether the session's last sandbox was reaped, evicted or died."""
        return session_hash in self._ended

    def was_evicted(self, session_hash: str) -> bool:
        """Whether the session's last sandbox was ended to make room for another's."""
        return self._ended.get(session_hash, False)

    def ended(self, session: Session) -> None:
        if session.ended in ("failed", "lost") and not session.remains.needs_delete:
            # Its object was kept, or perhaps claimed by another manager.
            self._stray(session.session_hash)
        if session.ended in ("lost", "reaped", "evicted"):
            self._remember(session.session_hash, evicted=session.ended == "evicted")

    def suspended_is_gone(self, session_hash: str) -> None:
        """The session's suspended object was deleted, or claimed by another manager."""
        self._stray(session_hash)
        self._remember(session_hash, evicted=self.was_evicted(session_hash))

    def _stray(self, session_hash: str) -> None:
        self._strays.add(session_hash)
        if len(self._strays) > STRAYS:
            self._strays.pop()

    def _remember(self, session_hash: str, *, evicted: bool) -> None:
        self._ended[session_hash] = evicted
        if len(self._ended) > REMEMBERED:
            self._ended.popitem(last=False)

    def occupy(self, name: str, now: float) -> None:
        """The object of this name was deleted, and its pod may not be gone yet."""
        for old, until in list(itertools.islice(self._occupied.items(), 2)):
            if until <= now:  # Older ones come first.
                del self._occupied[old]
        self._occupied.pop(name, None)
        self._occupied[name] = now + self._occupied_for

    def fresh_name(self, session_id: str, now: float) -> tuple[str, int]:
        """The first incarnation of the session's name that no pod may still hold, and its number."""
        if self._group:
            return self._resource.name(session_id, group=self._group), 0
        names = ((self._resource.name(session_id, i), i) for i in itertools.count())
        return next((name, i) for name, i in names if self._occupied.get(name, now) <= now)
