"""Process trees: finding descendants through /proc, and killing all of them.

Runs in the server and, as part of the supervisor, in every execution; standard library
only, and little of it, since every import delays every execution.
"""

from __future__ import annotations

import _signal as signal  # type: ignore[import-not-found] # the public module imports enum
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

Table = dict[int, list[int]]


def children_by_parent() -> Table:
    """All processes that this one can see, by the id of their parent.

    Zombies too: one whose main thread has ended may have other threads that live on.
    """
    table: Table = {}
    with os.scandir("/proc") as entries:
        pids = [entry.name for entry in entries if entry.name.isdigit()]
    for pid in pids:
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123
                stat = file.read()
        except (FileNotFoundError, ProcessLookupError):
            continue
        # The command name, in parentheses, may itself hold blanks and parentheses.
        parent = stat[stat.rindex(b")") + 2 :].split(maxsplit=2)[1]
        table.setdefault(int(parent), []).append(int(pid))
    return table


def descendants(roots: Iterable[int], table: Table | None = None) -> list[int]:
    """The roots and everything below them, parents before their children."""
    table = children_by_parent() if table is None else table
    found = list(roots)
    for pid in found:  # grows while it is walked
        found.extend(table.get(pid, ()))
    return found


def kill_once(roots_of: Callable[[Table], Iterable[int]]) -> list[int]:
    """Stops, then kills, every process in the trees below the roots.

    Stopped processes keep their places under a process limit and cannot fork, so that
    the search comes to an end even against a fork bomb; killing right away would only
    make room for the next generation.

    Args:
        roots_of: Picks the roots from a table of `children_by_parent`.

    Returns:
        Those that were sent SIGKILL; empty when none was left.
    """
    seen: list[int] = []
    while new := _unseen(roots_of, seen):
        for pid in new:
            _send(pid, signal.SIGSTOP)
        seen += new
    for pid in seen:
        _send(pid, signal.SIGKILL)
    return seen


def _unseen(roots_of: Callable[[Table], Iterable[int]], seen: list[int]) -> list[int]:
    table = children_by_parent()
    known = set(seen)
    return [pid for pid in descendants(roots_of(table), table) if pid not in known]


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        # Gone, which is what was wanted; or another user's, which the caller finds
        # still there when it looks again.
        return
