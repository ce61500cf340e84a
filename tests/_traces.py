"""What a local cluster may have left behind: processes and files, by its directory."""

from __future__ import annotations

import asyncio
import os
import time
from itertools import chain
from pathlib import Path


def processes(directory: Path) -> dict[int, str]:
    """Processes, by their id, that have the directory in their arguments or work in it."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        try:
            place = os.readlink(path / "cwd")
        except OSError:  # It has ended, or keeps this to itself.
            place = ""
        if str(directory) in arguments or place.startswith(str(directory)):
            found[int(path.name)] = arguments.strip()
    found.pop(os.getpid(), None)
    return found


def traces(directory: Path) -> list[str]:
    """Processes of a directory, and the files in it."""
    files = [str(Path(parent, name)) for parent, *names in os.walk(directory) for name in chain(*names)]
    return [*processes(directory).values(), *files]


async def until_gone(directory: Path, timeout: float = 5.0) -> None:
    """Waits until there is no trace left.

    Raises:
        AssertionError: There still is; it says what.
    """
    deadline = time.monotonic() + timeout
    while found := traces(directory):
        assert time.monotonic() < deadline, found
        await asyncio.sleep(0.01)
