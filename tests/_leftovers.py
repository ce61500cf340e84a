"""What a test leaves behind: child processes, open files (Linux only)."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

SETTLING = 10.0
"""Seconds in which a library's threads close what they have open for a moment, on a slow machine too."""


def children() -> set[int]:
    """Processes that this one started and that have not been waited for."""
    pids: set[int] = set()
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # A thread that just ended.
            pids.update(map(int, path.read_text().split()))
    return pids


def open_files() -> dict[int, str]:
    """Regular files and pipes that are open, by descriptor.

    Not sockets: gRPC closes its own in threads, some time later.
    """
    found: dict[int, str] = {}
    if not Path("/proc/self/fd").is_dir():
        return found
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # The listing's own descriptor.
            target = os.readlink(f"/proc/self/fd/{descriptor}")
            if target.startswith("pipe:") or os.path.isfile(target):
                found[int(descriptor)] = target
    return found


def kept_open(before: dict[int, str]) -> list[tuple[int, str]]:
    """Files and pipes that were opened since and stay open.

    Other threads open files at any moment, as gRPC's resolver opens /etc/resolv.conf. Only
    what is open at every look counts.
    """
    kept = open_files().items() - before.items()
    deadline = time.monotonic() + SETTLING
    while kept and time.monotonic() < deadline:
        time.sleep(0.01)
        kept &= open_files().items()
    return sorted(kept)
