"""What a test leaves behind: child processes, open files (Linux only)."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

SETTLING = 10.0
"""Seconds in which threads of libraries let go of what they have for a moment, on a slow machine too."""


def children() -> set[int]:
    """Processes that this one started and that have not been waited for."""
    pids: set[int] = set()
    if not os.path.isdir("/proc/self/task"):
        return pids
    for thread in os.listdir("/proc/self/task"):
        with (
            contextlib.suppress(FileNotFoundError, ProcessLookupError),  # A thread that just ended.
            open(f"/proc/self/task/{thread}/children", "rb", buffering=0) as file,
        ):
            pids.update(map(int, file.read().split()))
    return pids


def open_files() -> dict[int, str]:
    """Regular files and pipes that are open, by descriptor.

    Not sockets: gRPC closes its own in threads, some time later.
    """
    found: dict[int, str] = {}
    if not os.path.isdir("/proc/self/fd"):
        return found
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # The listing's own descriptor.
            target = os.readlink(f"/proc/self/fd/{descriptor}")
            # Most are sockets and anon_inodes, whose targets are no paths.
            if target.startswith("pipe:") or (target[0] == "/" and os.path.isfile(target)):
                found[int(descriptor)] = target
    return found


def left_running(before: set[int]) -> list[int]:
    """Children that were started since and are still there.

    asyncio waits for a killed child in a thread.
    """
    return sorted(_at_every_look(lambda: children() - before))


def kept_open(before: dict[int, str]) -> list[tuple[int, str]]:
    """Files and pipes that were opened since and stay open.

    Other threads open files at any moment, as gRPC's resolver opens /etc/resolv.conf.
    """
    return sorted(_at_every_look(lambda: open_files().items() - before.items()))


def _at_every_look(look: Callable[[], set[T]]) -> set[T]:
    found = look()
    deadline = time.monotonic() + SETTLING
    while found and time.monotonic() < deadline:
        time.sleep(0.01)
        found &= look()
    return found
