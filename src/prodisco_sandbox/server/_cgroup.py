"""A pids cgroup per execution, where this server may make one.

It counts exactly the processes and threads of one execution, and it binds root, which
RLIMIT_NPROC does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
from pathlib import Path

log = logging.getLogger(__name__)

_PREFIX = "prodisco-sandbox-"


class PidsCgroups:
    """Makes cgroups below a directory of its own in the cgroup file system."""

    def __init__(self, parent: Path) -> None:
        self.base = parent / f"{_PREFIX}{os.getpid()}"
        self._count = 0
        _remove_stale(parent)
        self.base.mkdir()
        try:
            if not (self.base / "pids.max").exists():  # version 2: not passed on by itself
                _delegate_pids(parent, self.base)
                (self.base / "cgroup.subtree_control").write_text("+pids")
            self.make(1).remove()
        except OSError:
            self.remove()
            raise

    def make(self, limit: int) -> Cgroup:
        """A new cgroup for at most `limit` processes and threads."""
        self._count += 1
        path = self.base / str(self._count)
        path.mkdir()
        (path / "pids.max").write_text(str(limit))
        return Cgroup(path)

    def remove(self) -> None:
        """Removes all of them, which must be empty."""
        _remove_tree(self.base)


class Cgroup:
    """One execution's."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, pid: int) -> None:
        """Moves a process into it; no error where it has died."""
        with contextlib.suppress(ProcessLookupError):
            (self.path / "cgroup.procs").write_text(str(pid))

    def remove(self) -> bool:
        """Removes it; False while there is still something in it."""
        try:
            self.path.rmdir()
        except OSError:
            return False
        return True

    def remove_soon(self, attempts: int = 10) -> None:
        """Removes it once nothing is in it: dead processes leave it a little after they are reaped."""
        if not self.remove() and attempts:
            asyncio.get_running_loop().call_later(0.1, self.remove_soon, attempts - 1)


def find_pids_cgroups(proc: Path = Path("/proc/self")) -> PidsCgroups:
    """The place where this process may make pids cgroups.

    Raises:
        OSError: There is none.
    """
    mounts = (proc / "mountinfo").read_text().splitlines()
    for line in (proc / "cgroup").read_text().splitlines():
        hierarchy, controllers, path = line.split(":", 2)
        if "pids" in controllers.split(","):
            return PidsCgroups(_directory(mounts, "cgroup", "pids", path))
    for line in (proc / "cgroup").read_text().splitlines():
        hierarchy, _, path = line.split(":", 2)
        if hierarchy == "0":
            return PidsCgroups(_directory(mounts, "cgroup2", "", path))
    raise FileNotFoundError("no pids controller is mounted")


def find_memory_cgroup(proc: Path) -> Path:
    """The directory of the cgroup that accounts for this process's memory.

    Raises:
        OSError: There is none, or it cannot be seen from here.
    """
    mounts = (proc / "mountinfo").read_text().splitlines()
    lines = [line.split(":", 2) for line in (proc / "cgroup").read_text().splitlines()]
    for _, controllers, path in lines:
        if "memory" in controllers.split(","):
            return _directory(mounts, "cgroup", "memory", path)
    for hierarchy, _, path in lines:
        if hierarchy == "0":
            return _directory(mounts, "cgroup2", "", path)
    raise FileNotFoundError("no memory controller is mounted")


def _directory(mounts: list[str], kind: str, option: str, path: str) -> Path:
    """Where the cgroup `path` is found in the file system (proc(5), mountinfo)."""
    for line in mounts:
        left, _, right = line.partition(" - ")
        root, mount_point = left.split()[3:5]
        filesystem, _, options = right.split(maxsplit=2)
        if filesystem == kind and (not option or option in options.split(",")):
            return Path(mount_point, os.path.relpath(path, root) if path.startswith(root) else ".")
    raise FileNotFoundError(f"no {kind} file system with the {option or 'unified'} controller is mounted")


def _delegate_pids(parent: Path, base: Path) -> None:
    """Has a version 2 cgroup pass on its pids controller to those below it.

    The kernel refuses while the cgroup itself holds processes. This one can step down
    into a leaf of its own; if there are others, it is not ours to move them.
    """
    if "pids" not in (parent / "cgroup.controllers").read_text().split():
        raise FileNotFoundError(f"{parent} has no pids controller")
    control = parent / "cgroup.subtree_control"
    if "pids" in control.read_text().split():
        return
    try:
        control.write_text("+pids")
    except OSError:
        leaf = base / "server"
        leaf.mkdir()
        (leaf / "cgroup.procs").write_text(str(os.getpid()))
        try:
            control.write_text("+pids")
        except OSError:
            (parent / "cgroup.procs").write_text(str(os.getpid()))
            raise


def _remove_stale(parent: Path) -> None:
    """Removes what servers that were killed have left."""
    for path in parent.glob(f"{_PREFIX}*"):
        pid = re.fullmatch(rf"{_PREFIX}(\d+)", path.name)
        if pid and not Path("/proc", pid[1]).exists():
            _remove_tree(path)


def _remove_tree(base: Path) -> None:
    for path in [*base.glob("*/"), base]:
        with contextlib.suppress(FileNotFoundError):
            try:
                path.rmdir()
            except OSError as error:
                log.debug("could not remove cgroup %s: %s", path, error)
