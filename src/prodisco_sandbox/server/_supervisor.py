"""The process above one execution, and the fresh interpreter that runs its code.

The server starts it with `BOOTSTRAP` as ``python -I -c``, so that the interpreter is
fresh, and feeds it this file's compiled code. It reads one job from its standard input,
forks, and runs the code in the child. Being a child subreaper it inherits whatever the
code leaves behind, double forks and new sessions too, and it ends only once nothing of
that is left: when the code has ended, and at once when its standard input closes, which
is how the server cancels, and what happens when the server dies.

On the pipes: marshalled objects behind their length; first the code, then the job, and
one answer on the descriptor named by the last argument. Standard library only, and of that
only what starts fast: this is part of every execution's latency.

The interpreter is isolated (-I), because it runs with the server's rights until it has
confined itself: no variable that the code's environment sets may lead it to other modules.
Where that environment has variables for Python, the confined child replaces itself by an
interpreter that reads them.
"""

from __future__ import annotations

import _signal as signal  # type: ignore[import-not-found]
import gc
import marshal
import os
import resource
import select
import sys

from . import _confine, _script, _tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import CodeType
    from typing import Any

BOOTSTRAP = """\
import marshal, os, sys
source, entry = int(sys.argv[1]), sys.argv[2]
def read(n):
    data = bytearray()
    while len(data) < n:
        more = os.read(source, n - len(data))
        if not more: os._exit(0)
        data += more
    return bytes(data)
def load():
    return marshal.loads(read(int.from_bytes(read(8), "big")))
package = sys.modules["_sandbox"] = type(sys)("_sandbox")
package.__path__ = []
codes = load()
for name, code in codes:
    module = sys.modules["_sandbox." + name] = type(sys)("_sandbox." + name)
    module.__package__ = "_sandbox"
    setattr(package, name, module)
    exec(code, module.__dict__)
sys.exit(getattr(module, entry)(load, codes))
"""
"""Run with the descriptor to read from, the function of the last module to call, and its arguments."""

KILL_TIMEOUT = 5.0
"""Seconds to look for survivors: only what sleeps in the kernel survives SIGKILL."""

_READ = 65536
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)


def main(load: Callable[[], dict[str, Any]], codes: list[tuple[str, CodeType]]) -> object:
    """Supervises one execution, in an interpreter that was started for it."""
    status = close_all_but_status()
    wake = become_supervisor()
    supervise(load(), codes, wake, Ends(0, status, 1, 2))
    os._exit(0)


def close_all_but_status() -> int:
    """Closes all inherited descriptors above standard error but the one for the answer, and returns that."""
    status = int(sys.argv[3])
    # Among them may be bubblewrap's, of directories outside: ``..`` of these leads out of its namespace.
    os.closerange(3, status)
    os.closerange(status + 1, os.sysconf("SC_OPEN_MAX"))
    return status


class Ends:
    """The supervisor's ends of an execution's pipes.

    Attributes:
        control: Gives the job; closed when the execution is to end.
        status: Takes the answer.
        out: The code's output.
        err: Its error output.
    """

    def __init__(self, control: int, status: int, out: int, err: int) -> None:
        self.control, self.status, self.out, self.err = control, status, out, err

    def close(self) -> None:
        for descriptor in (self.control, self.status, self.out, self.err):
            os.close(descriptor)


def become_supervisor() -> int:
    """Adopts what its descendants leave behind.

    Returns:
        The descriptor to read from when children may have ended.
    """
    _confine.become_subreaper()
    ignore_signals()
    return _tree.signal_pipe(signal.SIGCHLD)


def ignore_signals() -> None:
    """Ignores the signals that end a process by default, and that others may send."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)


def start(
    codes: list[tuple[str, CodeType]],
    receive: Callable[[], tuple[dict[str, Any], int, int] | None],
    most: int | None = None,
) -> tuple[int, int]:
    """Forks a child, which runs the job that it receives, with descriptors for its output.

    Returns:
        Its process id, and the descriptor of its report.
    """
    report_read, report_write = os.pipe2(os.O_CLOEXEC)
    supervisor = os.getpid()
    child = _fork(most)
    if child == 0:
        try:
            _confine.die_with(supervisor)
            if (received := receive()) is not None:
                _child(codes, report_write, *received)
        except BaseException:  # noqa: BLE001
            import traceback

            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(report_write)
    return child, report_read


def supervise(
    job: dict[str, Any],
    codes: list[tuple[str, CodeType]],
    wake: int,
    ends: Ends,
    started: tuple[int, int] | None = None,
) -> bool:
    """Runs the job in a child, and answers when that and everything below it is gone.

    Args:
        started: A child that has the job already, and the descriptor of its report.

    Returns:
        Whether everything is gone, so that there can be another execution.
    """
    child, report_read = started or start(codes, lambda: (job, ends.out, ends.err), most=job["max_processes"])
    # The output ends with the last process that writes to it.
    devnull = os.open(os.devnull, os.O_RDWR)
    os.dup2(devnull, ends.out)
    os.dup2(devnull, ends.err)
    os.close(devnull)
    answer = _Watch(child, ends.control, report_read, wake).until_all_is_over()
    os.close(report_read)
    _remove(f"{job['temporary'][0]}/{job['script']}")
    _script.write_all(ends.status, pack(answer))
    return not answer["left"]


def _remove(path: str) -> None:
    try:
        os.unlink(path)  # noqa: PTH108
    except OSError:
        return  # It was never made, or the code has removed or locked it; then it goes with the server.


def _fork(most: int | None) -> int:
    """Forks a child with room for `most` more processes and threads of this user.

    RLIMIT_NPROC counts all of the user's processes, also those in other containers, which
    cannot be seen from here; their number is found by trying.
    """
    if most is None:
        return os.fork()
    hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    bound = sys.maxsize if hard == resource.RLIM_INFINITY else hard
    others = 1
    while True:
        resource.setrlimit(resource.RLIMIT_NPROC, (min(others, bound), hard))
        try:
            child = os.fork()
        except BlockingIOError:
            if others >= bound:
                raise
            others += others // 4 + 1
            continue
        limit = min(others + most, bound) if child == 0 else hard
        resource.setrlimit(resource.RLIMIT_NPROC, (limit, limit if child == 0 else hard))
        return child


def read_job(control: int) -> dict[str, Any] | None:
    """Reads what `pack` has made; None where it ends early, because the execution was cancelled."""
    data = bytearray()
    while (job := unpack(data)) is None:
        more = os.read(control, _READ)
        if not more:
            return None
        data += more
    return job


def pack(value: Any) -> bytes:
    """The value as `BOOTSTRAP` reads it."""
    data = marshal.dumps(value)
    return len(data).to_bytes(8, "big") + data


def unpack(data: bytearray) -> dict[str, Any] | None:
    """What `pack` was given; None while the data is incomplete."""
    length = int.from_bytes(data[:8], "big")
    if not length or len(data) < 8 + length:
        return None
    value: dict[str, Any] = marshal.loads(memoryview(data)[8:])  # noqa: S302
    return value


class _Watch:
    """Waits for the end of the child, or for the order to end it; then ends the rest."""

    def __init__(self, child: int, control: int, report: int, wake: int) -> None:
        self._child = child
        self._control = control
        self._report_fd = report
        self._wake = wake
        self._report = bytearray()
        self._exit: int | None = None

    def until_all_is_over(self) -> dict[str, Any]:
        poll = select.poll()
        for descriptor in (self._control, self._wake, self._report_fd):
            poll.register(descriptor, select.POLLIN)
        while self._exit is None:
            ready = dict(poll.poll())
            if self._control in ready:  # closed, which means "stop"
                break
            if self._report_fd in ready and not self._read_report():
                poll.unregister(self._report_fd)
            if self._wake in ready:
                os.read(self._wake, _READ)
                self._reap()
        self._reap()
        ended = self._exit
        left = _tree.leave_no_child(KILL_TIMEOUT, self._wake)
        os.set_blocking(self._report_fd, False)
        while self._read_report():
            pass
        return {"exit": ended, "report": self._report.decode("utf-8", "replace"), "left": left}

    def _read_report(self) -> bool:
        try:
            data = os.read(self._report_fd, _READ)
        except BlockingIOError:
            return False
        self._report += data[: _script.MAX_REPORT - len(self._report)]
        return bool(data)

    def _reap(self) -> None:
        self._exit = _tree.reap()[0].get(self._child, self._exit)


def _child(codes: list[tuple[str, CodeType]], report: int, job: dict[str, Any], out: int, err: int) -> None:
    signal.set_wakeup_fd(-1)
    for number in (*_IGNORED, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setsid()
    _confine.let_be_seen()
    devnull = os.open(os.devnull, os.O_RDONLY)
    os.dup2(devnull, 0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    # The report keeps a number; everything else above standard error goes.
    os.dup2(report, _script.REPORT, inheritable=False)
    os.closerange(_script.REPORT + 1, os.sysconf("SC_OPEN_MAX"))
    if job["merge"]:
        os.dup2(1, 2)
    if job["shared_memory"]:
        _confine.own_shared_memory(job["shared_memory"])
        source, target = job["temporary"]
        if source != target:
            _confine.move(source, target, dict(job["writable"]).get(source))
    _confine.set_limits(job["limits"])
    _confine.yield_to_the_server()
    _confine.give_up_privileges()
    # Not before: with privileges, a locked directory is entered and then cannot be used.
    try:
        os.chdir(job["cwd"])
    except PermissionError:  # locked by an earlier execution
        os.chmod(job["cwd"], 0o700)  # noqa: PTH101
        os.chdir(job["cwd"])
    if job["landlock"]:
        writable = [*job["writable"], *job["common"]]
        _confine.landlock(job["landlock"], writable, job["hidden"], job["readable"])
    if job["reads_environment"]:
        _replace(job, codes)
    gc.freeze()
    result = _script.run(job)
    _script.end(result, job, _confine.flush_c_streams)


def _replace(job: dict[str, Any], codes: list[tuple[str, CodeType]]) -> None:
    """Goes on in an interpreter whose PYTHON… variables have their usual effect."""
    needed = [(name, code) for name, code in codes if name in ("_testing", "_script")]
    source = os.memfd_create("job", 0)
    _script.write_all(source, pack(needed) + pack(job))
    os.lseek(source, 0, os.SEEK_SET)
    os.set_inheritable(_script.REPORT, True)
    options = ["-P", "-B"]
    if "PYTHONUSERBASE" not in os.environ:
        options.append("-s")
    if "PYTHONUTF8" not in os.environ:
        options += ["-X", "utf8"]
    os.execv(sys.executable, [sys.executable, *options, "-c", BOOTSTRAP, str(source), "main"])  # noqa: S606
