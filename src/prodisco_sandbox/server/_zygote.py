"""A warm interpreter that forks supervisors, each of which runs one execution after another.

The server starts it as it starts a supervisor, with a Unix socket as standard input, and feeds it
its code and its settings. It imports what it is told to, answers on its status pipe, and from then
on forks: a message on the socket carries a descriptor, the new supervisor's own socket.

It has nothing of the server's but these descriptors: no thread, no secret, no file. No code of an
execution runs in it, and none in the supervisors, which fork a child for each. Everything that an
execution gives up is given up in that child.
"""

from __future__ import annotations

import _frozen_importlib_external as importlib_external
import _signal as signal  # type: ignore[import-not-found]
import _socket
import gc
import os
import sys

from . import _confine, _script, _supervisor
from ._preloaded import WITHOUT_THREADS, Preloaded, find_blas

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import CodeType
    from typing import Any


def main(load: Callable[[], dict[str, Any]], codes: list[tuple[str, CodeType]]) -> None:
    status = _supervisor.close_all_but_status()
    settings = load()
    _confine.die_with(settings["server"])
    _confine.hide_from_same_user()
    _supervisor.ignore_signals()
    _script.write_all(status, _supervisor.pack(_preload(settings)))
    # The supervisors' ends are seen by the server; here nobody waits for them.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    requests = _socket.socket(fileno=0)
    while descriptors := _receive(requests, 1):
        if _fork() == 0:
            try:
                _supervise(descriptors[0], codes, ahead=settings["ahead"])
            finally:
                os._exit(1)
        os.close(descriptors[0])
    os._exit(0)


def _preload(settings: dict[str, Any]) -> dict[str, Any]:
    """Imports the modules, in an environment that leads to no file that code may have written."""
    before = _memory()
    environment = dict(os.environ)
    os.environ.update(WITHOUT_THREADS)
    os.environ.update(dict.fromkeys(("HOME", "TMPDIR"), settings["home"]))
    preloaded = Preloaded()
    # What executions can write is theirs to run, confined as they are; here it is not even found.
    hook = _find_nothing_below(settings["writable"])
    sys.path_hooks.insert(0, hook)
    sys.path_importer_cache.clear()
    problems, unfit = preloaded.load(settings["modules"])
    sys.path_hooks.remove(hook)
    sys.path_importer_cache.clear()
    # Executions know what is in the directories, until these change.
    importlib_external.PathFinder.find_spec("sandbox")
    # The first makes a type for each kind of syntax, for 2 ms.
    compile("", "nothing", "exec")
    find_blas()
    # What is left in their buffers, executions would print.
    sys.stdout.flush()
    sys.stderr.flush()
    _confine.flush_c_streams()
    os.environ.clear()
    os.environ.update(environment)
    sys.meta_path.insert(0, preloaded)
    gc.collect()
    gc.freeze()
    after = _memory()
    return {
        "problems": problems,
        "unfit": unfit,
        "files": [(path, *seen(path)) for path in map(os.path.realpath, preloaded.files())],
        "places": [(path, *seen(path)) for path in sys.path],
        "data": max(0, after["VmData"] - before["VmData"]),
        "anonymous": max(0, after.get("RssAnon", after["VmRSS"]) - before.get("RssAnon", before["VmRSS"])),
    }


class _Nothing:
    """Finds no module."""

    def find_spec(self, _name: str, _target: object = None) -> None:
        return None


def _find_nothing_below(directories: list[str]) -> Callable[[str], _Nothing]:
    below = _script.prefixes(directories)

    def hook(path: str) -> _Nothing:
        if not f"{os.path.realpath(path)}/".startswith(below):
            raise ImportError(path)
        return _Nothing()

    return hook


def seen(path: str) -> tuple[int, int]:
    """What differs once a file was written or replaced, or a directory has other entries: inode and time."""
    try:
        status = os.stat(path)  # noqa: PTH116
    except OSError:
        return 0, 0
    return status.st_ino, status.st_ctime_ns


def _memory() -> dict[str, int]:
    """Bytes of memory by the kernel's names."""
    with open("/proc/self/status", "rb") as file:  # noqa: PTH123
        fields = [line.split() for line in file.read().decode(errors="replace").splitlines()]
    return {words[0].rstrip(":"): int(words[1]) << 10 for words in fields if words[2:] == ["kB"]}


def _fork() -> int:
    """Forks; where that is refused, the server sees the end of the supervisor's socket."""
    try:
        return os.fork()
    except OSError:
        return -1


def _receive(requests: Any, most: int) -> list[int] | None:
    """The descriptors of the next message; None at the end."""
    size = most * 4
    data, ancillary, *_ = requests.recvmsg(1, _socket.CMSG_SPACE(size), _socket.MSG_CMSG_CLOEXEC)
    found = [list(memoryview(payload[: len(payload) // 4 * 4]).cast("i")) for *_, payload in ancillary]
    return [*found[0]] if found else [] if data else None


def _supervise(descriptor: int, codes: list[tuple[str, CodeType]], *, ahead: bool) -> None:
    """Supervises the executions that come on its socket, one after another.

    Args:
        ahead: Forks each one's child before there is a job, once a message without descriptors has
            said that this process is in its cgroup.
    """
    os.setsid()
    if descriptor != 3:
        os.dup2(descriptor, 3, inheritable=False)
    os.closerange(4, os.sysconf("SC_OPEN_MAX"))
    devnull = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(devnull, standard)
    os.close(devnull)
    requests = _socket.socket(fileno=3)
    wake = _supervisor.become_supervisor()
    os.write(3, os.getpid().to_bytes(8, "big"))
    child: _Ahead | None = None
    joined = False
    while (descriptors := _receive(requests, 4)) is not None:
        if descriptors:
            ends = _supervisor.Ends(*descriptors)
            job = _supervisor.read_job(ends.control)
            if job is not None:
                started = None if child is None else child.give(job, ends)
                child = None
                if not _supervisor.supervise(job, codes, wake, ends, started):
                    return
            ends.close()
        else:
            joined = True
        if ahead and joined and child is None:
            child = _Ahead.fork(codes)


class _Ahead:
    """A child that waits for a job."""

    def __init__(self, codes: list[tuple[str, CodeType]]) -> None:
        self._socket, self._theirs = _socket.socketpair()
        self._started = _supervisor.start(codes, self._wait)
        self._theirs.close()

    @classmethod
    def fork(cls, codes: list[tuple[str, CodeType]]) -> _Ahead | None:
        """None where the system refuses; the next execution may be luckier."""
        try:
            return cls(codes)
        except OSError:
            return None

    def _wait(self) -> tuple[dict[str, Any], int, int] | None:
        self._socket.close()
        if not (output := _receive(self._theirs, 2)):
            return None
        job = _supervisor.read_job(self._theirs.fileno())
        return None if job is None else (job, output[0], output[1])

    def give(self, job: dict[str, Any], ends: _supervisor.Ends) -> tuple[int, int] | None:
        """Has the job run; None where the child has ended."""
        descriptors = ends.out.to_bytes(4, sys.byteorder) + ends.err.to_bytes(4, sys.byteorder)
        try:
            self._socket.sendmsg([b"x"], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, descriptors)])
            _script.write_all(self._socket.fileno(), _supervisor.pack(job))
        except ConnectionError:
            os.close(self._started[1])
            return None
        finally:
            self._socket.close()
        return self._started
