"""How much room executions take up, in the workspace and in files without a name."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

_BLOCK = 512
_LONG = 1024
"""Bytes from which on a path is opened in pieces: the kernel takes 4,096, and walks each path whole."""
_PIECES = 200
"""Pieces that are open at the same time, to spare the server's descriptors; deeper files do not count."""
ENTRY = 4096
"""Bytes counted for each file and directory as such, so that empty ones are not free."""


def disk_usage(directories: Iterable[Path], enough: int) -> int:
    """Bytes on disk below the directories; counting ends where `enough` is passed.

    Files that vanish meanwhile do not count.
    """
    total = 0
    # Open directories, each with the paths from there that are still to be looked at.
    places: list[tuple[int | None, list[bytes]]] = [(None, [os.fsencode(path) for path in directories])]
    try:
        while places and total <= enough:
            here, pending = places[-1]
            if not pending:
                places.pop()
                if here is not None:
                    os.close(here)
                continue
            path = pending.pop()
            try:
                there = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=here)
            except OSError:
                continue  # Gone, closed to us, or a link by now, maybe to itself.
            places.append((there, below := []))
            with os.scandir(there) as entries:
                for entry in entries:
                    try:
                        status = entry.stat(follow_symlinks=False)
                    except (FileNotFoundError, PermissionError):
                        continue
                    total += status.st_blocks * _BLOCK + ENTRY
                    if stat.S_ISDIR(status.st_mode):
                        below.append(os.fsencode(entry.name))
                    if total > enough:
                        break
            if len(path) < _LONG or len(places) > _PIECES:
                places.pop()
                os.close(there)
            if len(path) < _LONG:
                pending += [path + b"/" + name for name in below]
    finally:
        for here, _ in places:
            if here is not None:
                os.close(here)
    return total


def held_open(pids: Iterable[int]) -> int:
    """Bytes of deleted files, and of memory files, that the processes hold open."""
    files: dict[tuple[int, int], int] = {}
    for pid in pids:
        try:
            with os.scandir(f"/proc/{pid}/fd") as entries:
                descriptors = [entry.path for entry in entries]
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        for path in descriptors:
            try:
                status = os.stat(path)  # noqa: PTH116
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
            if stat.S_ISREG(status.st_mode) and not status.st_nlink:
                files[status.st_dev, status.st_ino] = status.st_blocks * _BLOCK
    return sum(files.values())
