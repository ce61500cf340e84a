"""Directories nested deeper than recursion goes, as code in a sandbox can leave them."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path


def nest(directory: Path) -> None:
    """Makes directories deeper than recursion and paths go, the last one of them locked."""
    here = os.open(directory, os.O_RDONLY)
    for _ in range(1100):
        os.mkdir("deep", dir_fd=here)
        below = os.open("deep", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.fchmod(here, 0)
    os.close(here)


@contextlib.contextmanager
def removed_by_force(directory: Path) -> Iterator[None]:
    """Removes a directory in the end, whatever became of the test: pytest cannot."""
    try:
        yield
    finally:
        subprocess.run(["/bin/rm", "-rf", directory], check=True)
