"""Process trees: finding descendants through /proc, killing and reaping all of them.

Runs in the server, in LocalCluster's keeper and, as part of the supervisor, in every
execution; standard library only, and little of it, since every import delays every execution.
"""

from __future__ import annotations

import _signal as signal  # type: ignore[import-not-found] # the public module imports enum
import os
import select

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable

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


def kill_tree(root: int) -> None:
    """Kills a process and everything below it."""
    _kill(lambda _: [root])


def kill_children(but: Container[int] = ()) -> list[int]:
    """Kills the children of this process and everything below them, except some of the children.

    Returns:
        Those that were sent SIGKILL; empty when none was left.
    """
    me = os.getpid()
    return _kill(lambda table: [pid for pid in table.get(me, ()) if pid not in but])


def leave_no_child(timeout: float, wake: int) -> list[int]:
    """Kills and reaps every descendant of this process, which must be a child subreaper.

    Args:
        timeout: Seconds to look for survivors: only what sleeps in the kernel survives SIGKILL.
        wake: From `signal_pipe`, for SIGCHLD.

    Returns:
        The survivors.
    """
    poll = select.poll()
    poll.register(wake, select.POLLIN)
    left: list[int] = []
    for _ in range(int(timeout / 0.05)):
        # Without a child there is no descendant: orphans become children at once.
        if not reap()[1]:
            return []
        left = kill_children()
        if poll.poll(50):
            os.read(wake, 65536)
    return left


def reap() -> tuple[dict[int, int], bool]:
    """Reaps the children that have ended: their exit statuses, and whether any child is left."""
    ended: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended, False
        if not pid:
            return ended, True
        ended[pid] = os.waitstatus_to_exitcode(status)


def signal_pipe(*numbers: int) -> int:
    """A descriptor that can be read after each of these signals, which do nothing else any more.

    They are handled, not ignored: what is ignored, a program that is started would inherit.
    """
    wake, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    for number in numbers:
        signal.signal(number, lambda *_: None)
    return wake


def send(pid: int, number: int) -> None:
    """Sends a signal to a process that may have ended."""
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        # Gone; or another user's, which a caller that looks again finds still there.
        return


def _kill(roots_of: Callable[[Table], Iterable[int]]) -> list[int]:
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
            send(pid, signal.SIGSTOP)
        seen += new
    for pid in seen:
        send(pid, signal.SIGKILL)
    return seen


def _unseen(roots_of: Callable[[Table], Iterable[int]], seen: list[int]) -> list[int]:
    table = children_by_parent()
    known = set(seen)
    return [pid for pid in descendants(roots_of(table), table) if pid not in known]
