"""The process above one execution, and the fresh interpreter that runs its code.

The server starts it with `BOOTSTRAP` as ``python -I -c``, so that the interpreter is
fresh, and feeds it this file's compiled code. It reads one job from its standard input,
forks, and runs the code in the child. Being a child subreaper it inherits whatever the
code leaves behind, double forks and new sessions too, and it ends only once nothing of
that is left: when the code has ended, and at once when its standard input closes, which
is how the server cancels, and what happens when the server dies.

On the wire: the job is a line of JSON, followed by the source as UTF-8; the answer is
one line of JSON on the descriptor named by argv[1]. Standard library only.
"""

from __future__ import annotations

import json
import linecache
import os
import select
import signal
import sys
from typing import Any

from . import _confine, _tree

BOOTSTRAP = """\
import marshal, os, sys
def read(n):
    data = b""
    while len(data) < n:
        more = os.read(0, n - len(data))
        if not more: os._exit(0)
        data += more
    return data
package = sys.modules["_sandbox"] = type(sys)("_sandbox")
package.__path__ = []
for name, code in marshal.loads(read(int.from_bytes(read(4), "big"))):
    module = sys.modules["_sandbox." + name] = type(sys)("_sandbox." + name)
    module.__package__ = "_sandbox"
    setattr(package, name, module)
    exec(code, module.__dict__)
sys.exit(module.main())
"""

MAX_REPORT = 4 << 20
"""Bytes of a child's report that are read."""
KILL_TIMEOUT = 5.0
"""Seconds to look for survivors: only what sleeps in the kernel survives SIGKILL."""

_READ = 65536


def main() -> object:
    status = int(sys.argv[1])
    _confine.become_subreaper()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    wake, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)

    header = b""
    while not header.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            return 0
        header += byte
    job = json.loads(header)
    source = _read_exactly(job["length"])
    if source is None:
        return 0
    report_read, report_write = os.pipe2(os.O_CLOEXEC)
    supervisor = os.getpid()
    child = os.fork()
    if child == 0:
        return _child(job, source, supervisor, report_write)
    os.close(report_write)
    devnull = os.open(os.devnull, os.O_RDWR)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)
    answer = _Watch(child, report_read, wake).until_all_is_over()
    os.write(status, json.dumps(answer).encode() + b"\n")
    os._exit(0)


def _read_exactly(length: int) -> bytes | None:
    data = bytearray()
    while len(data) < length:
        more = os.read(0, min(length - len(data), 1 << 20))
        if not more:
            return None
        data += more
    return bytes(data)


class _Watch:
    """Waits for the end of the child, or for the order to end it; then ends the rest."""

    def __init__(self, child: int, report: int, wake: int) -> None:
        self._child = child
        self._report_fd = report
        self._wake = wake
        self._report = bytearray()
        self._exit: int | None = None
        self._childless = False

    def until_all_is_over(self) -> dict[str, Any]:
        poll = select.poll()
        for descriptor in (0, self._wake, self._report_fd):
            poll.register(descriptor, select.POLLIN)
        while self._exit is None:
            ready = dict(poll.poll())
            if 0 in ready:  # closed: there is nothing more to be said than "stop"
                break
            if self._report_fd in ready and not self._read_report():
                poll.unregister(self._report_fd)
            if self._wake in ready:
                os.read(self._wake, _READ)
                self._reap()
        self._reap()
        ended = self._exit
        left = self._kill_all()
        os.set_blocking(self._report_fd, False)
        while self._read_report():
            pass
        return {"exit": ended, "report": self._report.decode("utf-8", "replace"), "left": left}

    def _read_report(self) -> bool:
        try:
            data = os.read(self._report_fd, _READ)
        except BlockingIOError:
            return False
        self._report += data[: MAX_REPORT - len(self._report)]
        return bool(data)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                self._childless = True
                return
            if not pid:
                return
            if pid == self._child:
                self._exit = os.waitstatus_to_exitcode(status)

    def _kill_all(self) -> list[int]:
        """Leaves no descendant; returns those that could not be killed."""
        me = os.getpid()
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        left: list[int] = []
        for _ in range(int(KILL_TIMEOUT / 0.05)):
            # Without a child there is no descendant: orphans become children at once.
            self._reap()
            if self._childless:
                return []
            left = _tree.kill_once(lambda table: table.get(me, ()))
            if poll.poll(50):
                os.read(self._wake, _READ)
        return left


def _child(job: dict[str, Any], source: bytes, supervisor: int, report: int) -> object:
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setsid()
    _confine.die_with(supervisor)
    devnull = os.open(os.devnull, os.O_RDONLY)
    os.dup2(devnull, 0)
    # The report keeps a number; everything else above standard error goes.
    os.dup2(report, 3, inheritable=False)
    os.closerange(4, os.sysconf("SC_OPEN_MAX"))
    if job["merge"]:
        os.dup2(1, 2)
    os.chdir(job["cwd"])
    _confine.set_limits(job["limits"])
    _confine.give_up_privileges()
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)  # type: ignore[union-attr]
    sys.stderr.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]
    return _run(source.decode(), job["cwd"], 3)


def _run(source: str, cwd: str, report: int) -> object:
    """Runs the code as ``__main__`` and returns what `sys.exit` is to be called with."""
    name = "<sandbox>"
    main = sys.modules["__main__"] = type(sys)("__main__")
    main.__dict__["__builtins__"] = __builtins__
    sys.argv[:] = [name]
    sys.path.append(cwd)
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    try:
        exec(compile(source, name, "exec", dont_inherit=True), main.__dict__)  # noqa: S102
    except SystemExit as error:
        if error.code not in (None, 0):
            _tell(report, f"SystemExit: {error.code}")
        return error.code
    except BaseException as error:  # noqa: BLE001
        _fail(error, report)
        return 1
    return 0


def _fail(error: BaseException, report: int) -> None:
    import traceback

    frames = error.__traceback__
    error.__traceback__ = frames and frames.tb_next  # without the frame of this file
    traceback.print_exception(error)
    _tell(report, "".join(traceback.format_exception_only(error)).strip())


def _tell(report: int, text: str) -> None:
    data = text.encode("utf-8", "replace")[:MAX_REPORT]
    while data:
        data = data[os.write(report, data) :]
