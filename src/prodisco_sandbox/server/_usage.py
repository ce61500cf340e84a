"""How much room executions take up, in the workspace and in files without a name."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

_BLOCK = 512
_PATH_MAX = 4096
_ENTRY = 4096
"""Bytes counted for each file and directory as such, so that empty ones are not free."""


def disk_usage(directories: Iterable[Path], enough: int) -> int:
    """Bytes on disk below the directories; counting ends where `enough` is passed.

    What vanishes meanwhile does not count.
    """
    total = 0
    pending = [os.fsencode(path) for path in directories]
    while pending and total <= enough:
        path = pending.pop()
        try:
            with _opened(path) as descriptor, os.scandir(descriptor) as entries:
                for entry in entries:
                    status = entry.stat(follow_symlinks=False)
                    total += status.st_blocks * _BLOCK + _ENTRY
                    if stat.S_ISDIR(status.st_mode):
                        pending.append(path + b"/" + os.fsencode(entry.name))
        except (FileNotFoundError, PermissionError, NotADirectoryError):
            continue
    return total


@contextlib.contextmanager
def _opened(path: bytes) -> Iterator[int]:
    """Opens a directory; piece by piece where its path is longer than the kernel takes."""
    here = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
    try:
        while path:
            cut = len(path) if len(path) < _PATH_MAX else path.rindex(b"/", 1, _PATH_MAX)
            there = os.open(path[:cut], os.O_RDONLY | os.O_DIRECTORY, dir_fd=here)
            os.close(here)
            here, path = there, path[cut + 1 :]
        yield here
    finally:
        os.close(here)


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
