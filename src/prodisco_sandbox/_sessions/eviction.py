"""Which session is ended to make room for another, and how."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .._cluster import metadata

if TYPE_CHECKING:
    from .parts import Parts
    from .table import Session


@dataclass(frozen=True, slots=True)
class Holder:
    """A session that holds a slot, or is about to get one.

    Attributes:
        name: With `shared` its object's, else its session's id.
        owner: Whose it is; None: unknown.
        idle: For how many seconds nobody has used it; None: it may not be ended.
        returned: Whether somebody has come back to it after its first use.
    """

    name: str
    owner: str | None
    idle: float | None = None
    returned: bool = False


def choose(
    holders: Sequence[Holder], caller: str | None, *, slots: int, evict_after: float, long_idle: float
) -> Holder | None:
    """The holder that is ended for a session of `caller`; None: nobody.

    In this order, and within each group first those that were never returned to, then the longest
    idle ones:

    1. the caller's own;
    2. those of the owner with most, as long as it keeps more than the caller has;
    3. those that were never returned to;
    4. those idle for `long_idle`.

    A known owner keeps its share, the slots divided by the owners, against all others. Where the
    caller or the holder's owner is unknown, only 3 and 4 apply.

    Args:
        holders: All of them; those about to get a slot count for their owners.
        caller: The owner of the session that needs a slot; None: unknown.
        slots: How many there are.
        evict_after: Seconds; whoever was used since is spared.
        long_idle: Seconds after which a session counts as left, though it was returned to.
    """
    counts = Counter(holder.owner for holder in holders)
    share = slots // len({caller, *counts})
    ranks: list[tuple[tuple[int, int, bool, float], Holder]] = []
    for holder in holders:
        owner, idle, left = holder.owner, holder.idle, counts[holder.owner] - 1
        if idle is None or idle < evict_after:
            continue
        known = owner is not None
        if known and owner == caller:
            group, most = 1, 0
        elif known and left < share:
            continue
        elif known and caller is not None and left > counts[caller]:
            group, most = 2, left
        elif not holder.returned:
            group, most = 3, 0
        elif idle >= long_idle:
            group, most = 4, 0
        else:
            continue
        ranks.append(((group, -most, holder.returned, -idle), holder))
    return min(ranks, key=lambda ranked: ranked[0], default=(None, None))[1]


class Eviction:
    """Ends idle sessions for those in the queue that no slot is coming for.

    Choice and end are one step without an await; with `shared` the end is the API server's, one at a time.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def make_room(self) -> None:
        parts = self._parts
        while (unserved := parts.table.first_unserved()) is not None:
            first, served = unserved
            if parts.shared is not None and parts.shared.evicting:
                return
            found = choose(
                [*map(self._holder, served), *self._holders()],
                self._owner(first.owner),
                slots=parts.table.slots,
                evict_after=parts.config.evict_after,
                long_idle=parts.config.session_idle_timeout / 2,
            )
            if found is None:
                return
            first.has_evicted = True
            self._end(found)

    def make_room_of(self, owner: str) -> bool:
        """Ends the session that an owner gives up for another of its own. Returns whether there is one."""
        parts, label = self._parts, self._owner(owner)
        if parts.config.when_full != "evict" or not parts.table.may_evict:
            return False
        own = [holder for holder in self._holders() if holder.owner == label]
        evict_after = parts.config.evict_after
        found = choose(own, label, slots=len(own), evict_after=evict_after, long_idle=0.0)
        if found is not None:
            self._end(found)
        return found is not None

    def _owner(self, owner: str | None) -> str | None:
        """With `shared` its label, which is all that the sessions of other managers tell."""
        return owner if owner is None or self._parts.shared is None else metadata.owner_label(owner)

    def _holder(self, session: Session) -> Holder:
        return Holder(session.name, self._owner(session.owner))

    def _holders(self) -> list[Holder]:
        parts = self._parts
        if parts.shared is None:
            return parts.table.holders(parts.now())
        unseen = [session for session in parts.table.holding() if not parts.shared.has(session.name)]
        return [*map(self._holder, unseen), *parts.shared.holders()]

    def _end(self, holder: Holder) -> None:
        parts, idle = self._parts, holder.idle or 0.0
        if parts.shared is not None:
            parts.shared.evict(holder.name, idle)
        else:
            session = parts.table.current[holder.name]
            parts.log.info("sandbox_evicted", sandbox=session.name, idle=round(idle, 3))
            parts.ends.end(session, "evicted")
