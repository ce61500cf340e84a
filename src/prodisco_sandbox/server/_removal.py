"""Removing directories that code in a sandbox could write to."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path


def remove_tree(directory: Path) -> None:
    """Removes a directory and all in it.

    Code in a sandbox can lock its directories, even against itself, and nest them deeper
    than recursion goes and than the kernel's longest path.

    Raises:
        OSError, RecursionError: Something is left.
    """
    try:
        shutil.rmtree(directory)
    except (OSError, RecursionError):
        with contextlib.suppress(OSError):
            _flatten(directory)
        shutil.rmtree(directory)


def _flatten(directory: Path) -> None:
    """Unlocks all directories below, and moves them up beside each other."""
    directory.chmod(0o700)
    places = [directory]
    for place in places:  # grows while it is walked
        with os.scandir(place) as entries:
            nested = [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
        for path in nested:
            with contextlib.suppress(OSError):  # One that stays put does not keep the others.
                path.chmod(0o700)
                places.append(path.rename(directory / os.urandom(8).hex()))
