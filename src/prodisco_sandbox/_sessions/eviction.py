"""Which session is ended to make room for another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Holder:
    """A session that holds a slot, or is about to get one.

    Attributes:
        session_id: Names it.
        owner: Whose it is; None: unknown.
        idle: For how many seconds nobody has used it; None: it may not be ended.
        returned: Whether somebody has come back to it after its first use.
    """

    session_id: str
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


def choose_own(holders: Sequence[Holder], owner: str, evict_after: float) -> Holder | None:
    """The holder that its owner gives up for another session of its own; None: nobody."""
    own = [holder for holder in holders if holder.owner == owner]
    return choose(own, owner, slots=len(own), evict_after=evict_after, long_idle=0.0)
