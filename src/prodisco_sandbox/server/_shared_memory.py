"""Semaphores and segments of shared memory, which must not outlive the code that made them."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterable
from pathlib import Path

from . import _confine

log = logging.getLogger(__name__)


class SharedMemory:
    """Whether each execution has its own, and what is to be cleaned up where it has not.

    Args:
        in_namespaces: Executions run in namespaces of bubblewrap's, each with its own.
        needed: Directories that executions must see.
        directory: Where the system has it.
    """

    def __init__(
        self,
        *,
        in_namespaces: bool,
        needed: Iterable[Path] = (),
        directory: Path = Path(_confine.SHARED_MEMORY),
    ) -> None:
        self._directory = directory
        self._before: set[str] = set()
        hidden = [path for path in needed if path.resolve().is_relative_to(directory)]
        reason = f"{hidden[0]} lies in it" if hidden else _refusal()
        if in_namespaces:
            reason = None
        self.private = not in_namespaces and reason is None
        """Whether an execution is to make its own before its code runs."""
        self._common = reason is not None
        if reason is not None:
            log.warning(
                "executions share %s with all programs of this user on this machine or in this pod: %s",
                directory,
                reason,
            )

    def begin(self) -> None:
        """Notes what is there before any execution runs."""
        if self._common:
            self._before = set(self._own())

    def end(self) -> None:
        """Removes what executions have left: this user's, new, and open nowhere.

        To be called while none runs, and before the next does.
        """
        if not self._common:
            return
        left = {name: inode for name, inode in self._own().items() if name not in self._before}
        if not left:
            return
        used = _used()
        for name, inode in left.items():
            if inode not in used:
                (self._directory / name).unlink(missing_ok=True)
                log.info("removed %s, which an execution has left behind", self._directory / name)

    def _own(self) -> dict[str, int]:
        """Names and inodes of this user's files there."""
        found = {}
        with contextlib.suppress(FileNotFoundError), os.scandir(self._directory) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    if entry.is_file(follow_symlinks=False) and entry.stat().st_uid == os.geteuid():
                        found[entry.name] = entry.inode()
        return found


def _used() -> set[int]:
    """Inodes that some process has open or mapped, on whatever file system.

    Not names: sem_open maps a new semaphore under a name that it takes away at once.
    """
    inodes: set[int] = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended meanwhile, or another user's
            lines = [line.split(maxsplit=5) for line in (process / "maps").read_bytes().split(b"\n")]
            inodes |= {int(fields[4]) for fields in lines if len(fields) > 4 and fields[4].isdigit()}
            with os.scandir(process / "fd") as entries:
                for entry in entries:
                    with contextlib.suppress(OSError):  # closed meanwhile
                        inodes.add(entry.stat().st_ino)
    return inodes


def _refusal() -> str | None:
    """Why executions cannot have shared memory of their own here; None where they can."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        # It warns of threads whose locks the child would never see released; the child takes no lock.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            _confine.own_shared_memory(1 << 20)
        except BaseException as error:  # noqa: BLE001 - said by the parent
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as file:  # noqa: PTH123
        reason = file.read().decode(errors="replace")
    _, status = os.waitpid(child, 0)
    return reason or (None if status == 0 else f"the attempt ended with status {status}")
