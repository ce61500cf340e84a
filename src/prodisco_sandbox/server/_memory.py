"""Memory limits: how much executions may use, and a watch that kills those that use more.

Memory in use counts, over all processes of an execution. Address space does not:
JavaScript, Java and WebAssembly reserve far more of it than they ever use.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import _confine, _tree
from ._cgroup import find_memory_cgroup

log = logging.getLogger(__name__)

_MIB = 1 << 20
_DEFAULT = 2048 * _MIB
"""For an execution where nothing bounds this server but the machine."""
SLACK = 16 * _MIB
"""Bytes that an execution may use beyond its limit, so that a single process gets MemoryError first."""
_SMALL = 32 * _MIB
"""An execution that uses less is not singled out when the container is full."""
_RATE = 8 << 30
"""Bytes per second that the watch keeps up with: two processors fill less."""
_SHORTEST, _LONGEST = 0.002, 0.25
"""Seconds between looks."""
_ENDING = 5.0
"""Seconds for which the memory of killed processes may still be in use."""
_STEP = 8 * _MIB
_KNOWS_CHILDREN = os.path.exists(f"/proc/self/task/{os.getpid()}/children")  # noqa: PTH110
"""Whether the kernel lists a process's children; else all processes have to be looked at."""


@dataclass(frozen=True)
class Memory:
    """The limits of executions, in bytes.

    Attributes:
        each: An execution.
        total: All of them together.
        container: Limit of the container, or of whatever else is the tightest cgroup; None
            where the machine is the limit.
        full: Use of the container from which on an execution has to end.
    """

    each: int
    total: int
    container: Container | None = None
    full: int = 0

    @classmethod
    def find(cls, wanted: int | None, proc: Path = Path("/proc"), machine: int | None = None) -> Memory:
        """Divides the memory of the container or machine between the server and executions.

        Args:
            wanted: Limit of each execution; None: all that is left.
            proc: Where proc(5) is mounted.
            machine: Bytes of the machine's memory.
        """
        machine = machine or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        container = Container.find(proc / "self")
        if container is not None and container.limit >= machine:
            container = None
        limit = machine if container is None else container.limit
        reserve = min(max(limit // 4, 64 * _MIB), 256 * _MIB)
        total = max(limit - reserve, limit // 4)
        each = wanted or (min(_DEFAULT, total) if container is None else total)
        return cls(min(each, total), total, container, limit - reserve // 4)

    def describe(self) -> str:
        """For the log."""
        where = "this machine" if self.container is None else f"{self.container.directory}"
        return f"{self.each >> 20} MiB for an execution, {self.total >> 20} for all, by the limit of {where}"


@dataclass(frozen=True)
class Container:
    """The tightest memory limit of the cgroups that this process is in.

    Attributes:
        directory: Of the cgroup.
        limit: In bytes.
    """

    directory: Path
    limit: int

    @classmethod
    def find(cls, proc: Path = Path("/proc/self")) -> Container | None:
        """None where there is no limit, or none can be read."""
        try:
            here = find_memory_cgroup(proc)
        except OSError as error:
            log.debug("no memory cgroup: %s", error)
            return None
        found = [cls(path, limit) for path in [here, *here.parents] for limit in _limits(path)]
        return min(found, key=lambda container: container.limit, default=None)

    def used(self) -> int:
        """Bytes in use that the kernel could not reclaim from files."""
        try:
            used = int(_read(self.directory, "memory.current", "memory.usage_in_bytes"))
            stat = dict(line.split() for line in _read(self.directory, "memory.stat").splitlines())
        except (OSError, ValueError) as error:
            log.debug("the use of memory cannot be read: %s", error)
            return 0
        # Version 1 has those of this cgroup alone, and "total_" for the whole hierarchy.
        names = ("active_file", "inactive_file")
        reclaimable = sum(int(stat.get(f"total_{name}", stat.get(name, 0))) for name in names)
        return used - reclaimable - int(stat.get("slab_reclaimable", 0))


def _read(directory: Path, *names: str) -> str:
    for name in names[:-1]:
        with contextlib.suppress(FileNotFoundError):
            return (directory / name).read_text()
    return (directory / names[-1]).read_text()


def _limits(directory: Path) -> Iterator[int]:
    # memory.high is no hard limit, but past it processes all but stand still.
    for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            yield int((directory / name).read_text())


@dataclass(frozen=True, slots=True)
class Inherited:
    """What an execution has from the zygote that it was forked from.

    Attributes:
        data: Bytes of writable memory.
        anonymous: Bytes of it in use.
    """

    data: int = 0
    anonymous: int = 0


_NOTHING = Inherited()


class Watched:
    """An execution that the watch looks at.

    Attributes:
        supervisor: Its root process, which is not counted.
        killed_for: Why it was killed; None as long as it was not.
        inherited: Bytes in use that are its zygote's, not its own.
    """

    def __init__(self, supervisor: int, limit: int, inherited: int) -> None:
        self.supervisor = supervisor
        self.killed_for: str | None = None
        self.inherited = inherited
        self.limits = {limit}
        self.use = 0
        self.pids: list[int] = []


class MemoryWatch:
    """Kills executions that use too much memory; looks more often the less is left.

    A thread of its own, since the event loop may be busy with somebody's output.

    Args:
        memory: What there is.
        own_shared_memory: Whether each execution has a ``/dev/shm`` of its own.
    """

    def __init__(self, memory: Memory, *, own_shared_memory: bool) -> None:
        self._memory = memory
        self._own_shared_memory = own_shared_memory
        self._lock = threading.Lock()
        self._watched: set[Watched] = set()
        self._busy = threading.Event()
        self._thread: threading.Thread | None = None
        self._full = memory.full
        self._last_kill = 0.0

    @contextlib.contextmanager
    def watching(self, supervisor: int, inherited: Inherited = _NOTHING) -> Iterator[Watched]:
        """Watches what is below the supervisor."""
        watched = Watched(supervisor, self._memory.each + inherited.data, inherited.anonymous)
        if self._thread is None or not self._thread.is_alive():
            # Kept only once it runs: the system may refuse it, and the next execution needs one.
            thread = threading.Thread(target=self._run, name="memory-watch", daemon=True)
            thread.start()
            self._thread = thread
        with self._lock:
            if not self._watched and self._memory.container:
                # Files in memory from earlier executions must not keep code from removing them.
                used = self._memory.container.used() + SLACK
                self._full = max(self._memory.full, min(used, self._memory.container.limit - SLACK // 4))
            self._watched.add(watched)
        self._busy.set()
        try:
            yield watched
        finally:
            with self._lock:
                self._watched.discard(watched)
                if not self._watched:
                    self._busy.clear()

    def _run(self) -> None:
        while True:
            self._busy.wait()
            # Most executions end within the first delay.
            delay = min(0.05, self._memory.total / _RATE)
            while self._busy.is_set():
                time.sleep(delay)
                began = time.monotonic()
                try:
                    left = self.look()
                except Exception:  # The only watch there is must not end.
                    log.exception("measuring the memory of executions failed")
                    left = self._memory.total
                took = time.monotonic() - began
                delay = min(max(left / _RATE, _SHORTEST, 5 * took), _LONGEST)

    def look(self) -> int:
        """Kills what has to be killed; returns how many bytes are left until then."""
        with self._lock:
            watched = [one for one in self._watched if one.killed_for is None]
        for one in watched:
            self._measure(one)
            if one.use > self._memory.each + SLACK:
                self._kill(
                    one, f"its processes used more than {self._memory.each >> 20} MiB of memory, {_WHAT}"
                )
        watched = [one for one in watched if one.killed_for is None and one.pids]
        if not watched:
            return self._memory.total
        used = sum(one.use for one in watched)
        biggest = max(watched, key=lambda one: one.use)
        if used > self._memory.total + SLACK:
            text = f"executions together used more than {self._memory.total >> 20} MiB of memory, {_WHAT}"
            self._kill(biggest, f"{text}, and this one most")
        left = self._memory.total + SLACK - used
        if (container := self._memory.container) is not None:
            in_container = container.used()
            if in_container > self._full and biggest.killed_for is None and not self._kill_under_way():
                text = f"the container was about to run out of its {container.limit >> 20} MiB of memory"
                for one in [biggest] if biggest.use > _SMALL else watched:
                    self._kill(one, f"{text}, files in memory included")
            left = min(left, self._full - in_container)
        return max(0, min(left, self._memory.each + SLACK - biggest.use))

    def _kill_under_way(self) -> bool:
        """Whether killed processes may still hold memory, for which no other execution is to be killed."""
        with self._lock:
            ending = any(one.killed_for is not None for one in self._watched)
        return ending and time.monotonic() < self._last_kill + _ENDING

    def _measure(self, one: Watched) -> None:
        """Measures an execution, and lets its processes reserve what is left of its limit."""
        one.pids = _below(one.supervisor)
        processes = {pid: status for pid in one.pids if (status := _status(pid))}
        anonymous = sum(status["RssAnon"] for status in processes.values())
        shared = sum(status["RssShmem"] for status in processes.values())
        in_files = self._shared_memory_files(one.pids)
        inherited = one.inherited
        if anonymous + max(shared, in_files) > min(self._memory.each, self._memory.total // 2):
            # Shared pages count in each process here; exact figures take the kernel longer.
            proportional = {pid: _proportional(pid) for pid in processes}
            if all(proportional.values()):
                inherited = 0
            exact = [figures for pid, known in proportional.items() if (figures := known or _status(pid))]
            anonymous = sum(figures["RssAnon"] for figures in exact)
            shared = sum(figures["RssShmem"] for figures in exact)
        one.use = max(0, anonymous - inherited) + max(shared, in_files)
        left = max(0, self._memory.each - one.use)
        for pid, status in processes.items():
            if "VmData" in status:
                _allow(one, pid, status["VmData"] + left)

    def _shared_memory_files(self, pids: list[int]) -> int:
        if self._own_shared_memory:
            common = _device(_confine.SHARED_MEMORY)
            for pid in pids:
                path = f"/proc/{pid}/root{_confine.SHARED_MEMORY}"
                # A process that was just forked still sees that of the machine or pod.
                if _device(path) in (None, common):
                    continue
                with contextlib.suppress(OSError):
                    usage = os.statvfs(path)
                    return (usage.f_blocks - usage.f_bfree) * usage.f_frsize
        return 0

    def _kill(self, one: Watched, text: str) -> None:
        one.killed_for = f"killed: {text}"
        self._last_kill = time.monotonic()
        log.warning("killing an execution that uses %d MiB: %s", one.use >> 20, text)
        for pid in one.pids:
            _tree.send(pid, signal.SIGKILL)


_WHAT = "which is what --memory-limit-mb or its container leaves it"


def _allow(one: Watched, pid: int, data: int) -> None:
    """Bounds a process's data so that it gets MemoryError when nothing is left.

    RLIMIT_DATA counts writable memory, used or not: for each thread a whole stack. A limit
    that the code has set itself stays.
    """
    with contextlib.suppress(OSError, ValueError):  # ended, or not ours to bound
        soft, hard = resource.prlimit(pid, resource.RLIMIT_DATA)
        if soft in one.limits and abs(soft - data) > _STEP:
            one.limits.add(data)
            resource.prlimit(pid, resource.RLIMIT_DATA, (data, hard))


def _device(path: str) -> int | None:
    """The file system that a path is in; None where there is no such path."""
    try:
        return os.stat(path).st_dev  # noqa: PTH116
    except OSError:
        return None


def _below(root: int) -> list[int]:
    """All processes below one, from what the kernel knows of each one's children."""
    if not _KNOWS_CHILDREN:
        return _tree.descendants([root])[1:]
    found = [root]
    for pid in found:  # grows while it is walked
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            for task in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208
                with open(f"/proc/{pid}/task/{task}/children", "rb") as file:  # noqa: PTH123
                    found += map(int, file.read().split())
    return found[1:]


def _status(pid: int) -> dict[str, int] | None:
    """Bytes of anonymous memory (swap included), shared memory and data; None if the process has ended."""
    try:
        with open(f"/proc/{pid}/status", "rb") as file:  # noqa: PTH123
            found = _figures(file.read(), ("VmData", "VmRSS", "RssAnon", "RssShmem", "VmSwap"))
    except OSError:
        return None
    if "VmRSS" not in found:
        return None
    # gVisor reports no kinds of memory; then pages of files count too.
    found = {"RssAnon": found["VmRSS"], "RssShmem": 0} | found
    found["RssAnon"] += found.get("VmSwap", 0)
    return found


def _proportional(pid: int) -> dict[str, int] | None:
    """The same, each page divided by how many use it; None where that is refused."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as file:  # noqa: PTH123
            figures = _figures(file.read(), ("Pss_Anon", "Pss_Shmem", "SwapPss"))
    except OSError:
        return None
    if not {"Pss_Anon", "Pss_Shmem"} <= figures.keys():
        return None
    anonymous = figures["Pss_Anon"] + figures.get("SwapPss", 0)
    return {"RssAnon": anonymous, "RssShmem": figures["Pss_Shmem"]}


def _figures(data: bytes, names: tuple[str, ...]) -> dict[str, int]:
    found = {}
    for line in data.decode(errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name in names:
            found[name] = int(value.split()[0]) << 10
    return found
