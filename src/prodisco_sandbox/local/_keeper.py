"""The process between a `LocalCluster` and its servers, which leaves nothing of them behind.

It is a program of its own, which the cluster starts. It has one socket as
standard input, for orders and reports as lines of JSON. It makes the cluster's directory,
starts the servers, and ends once the cluster says so or is gone, however that came about.
It ends only when none of its descendants is left: it is a child subreaper, so whatever
the servers leave behind, double forks and new sessions too, becomes its own child.

Standard library only, and what the server has for processes: the package's other modules
take half a second to import.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

from ..server import _confine, _tree
from ..server._removal import remove_tree

STOP_GRACE = 1.0
"""Seconds that a server gets to end by itself."""
KILL_GRACE = 2.0
"""Seconds to look for survivors: only what sleeps in the kernel survives SIGKILL."""
LOG = "server.log"
"""A server's standard error, in its directory."""
LOG_TAIL = 2000
"""Bytes of a dead server's log that are reported."""

MAX_FIRST_LINE = 4096
"""Bytes of a server's first line that are reported."""

_LOOK_AGAIN = 0.02
_READ = 1 << 16


class Server:
    """One server process."""

    def __init__(self, key: str, directory: Path) -> None:
        self.key = key
        self.directory = directory
        self.pid = 0
        self.input = -1
        self.output = -1
        self.first_line = b""
        self.kill_at: float | None = None
        self.exit: int | None = None


class Keeper:
    """Starts servers, reaps them, and removes what they leave."""

    def __init__(self, control: socket.socket, wake: int, root: Path) -> None:
        self._control = control
        self._root = root
        self._orders = b""
        self._servers: dict[str, Server] = {}
        self._ending = False
        self._give_up_at: float | None = None
        self._selector = selectors.DefaultSelector()
        self._selector.register(wake, selectors.EVENT_READ, lambda: os.read(wake, _READ))
        self._selector.register(control, selectors.EVENT_READ, self._read_orders)

    def end_with(self, parent: int) -> None:
        """Ends when that process does, even if another one holds a copy of its socket."""
        try:
            descriptor = os.pidfd_open(parent)
        except (OSError, AttributeError):  # Not supported; the end of the socket shows it too.
            pass
        else:
            self._selector.register(descriptor, selectors.EVENT_READ, self._end)
        if os.getppid() != parent:
            self._end()

    def run(self) -> None:
        """Returns when the cluster is gone and no server is left."""
        self.report(event="ready", root=str(self._root))
        while self._servers or not self._ending:
            for key, _ in self._selector.select(self._pause()):
                key.data()
            self._reap()
            self._kill_overdue()
            self._clear_away()

    def report(self, **report: object) -> None:
        try:
            self._control.sendall(json.dumps(report).encode() + b"\n")
        except OSError:
            self._end()

    def _pause(self) -> float | None:
        """Seconds until there is something to do that no descriptor announces."""
        if self._give_up_at is not None:
            return _LOOK_AGAIN
        times = [s.kill_at for s in self._servers.values() if s.kill_at is not None]
        return max(0.0, min(times) - time.monotonic()) if times else None

    # Orders

    def _read_orders(self) -> None:
        try:
            data = self._control.recv(_READ)
        except ConnectionError:
            data = b""
        if not data:
            self._end()
            return
        *lines, self._orders = (self._orders + data).split(b"\n")
        for line in lines:
            self._carry_out(json.loads(line))

    def _carry_out(self, order: dict[str, Any]) -> None:
        if order["do"] == "remove":
            self._remove(self._root / order["workspace"])
            return
        server = self._servers.get(order["server"])
        if order["do"] == "start":
            if not self._ending:  # Else nobody would stop it.
                self._start(order)
        elif server is None or server.exit is not None:
            return  # It has ended meanwhile.
        elif order["do"] == "stop":
            self._stop(server)
        elif order["do"] == "kill":
            _tree.send(server.pid, signal.SIGKILL)

    def _end(self) -> None:
        if self._ending:
            return
        self._ending = True
        for key in list(self._selector.get_map().values()):
            if key.data in (self._read_orders, self._end):
                self._selector.unregister(key.fileobj)
        for server in self._servers.values():
            self._stop(server)

    # Servers

    def _start(self, order: dict[str, Any]) -> None:
        server = Server(order["server"], self._root / order["server"])
        log = theirs = out = -1
        # SIGTERM must not be lost between fork and exec.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            server.directory.mkdir(0o700)
            (server.directory / "tmp").mkdir(0o700)
            if workspace := order.get("workspace"):
                _provide(self._root / workspace)
            log = os.open(server.directory / LOG, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            theirs, server.input = os.pipe2(os.O_CLOEXEC)
            if token := order.get("token"):
                os.write(server.input, f"{token}\n".encode())
            server.output, out = os.pipe2(os.O_CLOEXEC)
            keeper = os.getpid()
            server.pid = os.fork()
            if server.pid == 0:
                _become_server(keeper, order["argv"], order["env"], server.directory, (theirs, out, log))
        except OSError as e:
            self._finish(server, 127, f"it could not be started: {e}")
            return
        finally:
            _close(log, theirs, out)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self._servers[server.key] = server
        self._selector.register(server.output, selectors.EVENT_READ, lambda: self._read_output(server))

    def _read_output(self, server: Server) -> None:
        data = os.read(server.output, _READ)
        if not data:
            self._selector.unregister(server.output)
            _close(server.output)
            server.output = -1
            return
        if b"\n" in server.first_line:
            return  # Read and dropped, so that the server never blocks.
        server.first_line += data[: MAX_FIRST_LINE - len(server.first_line)]
        if len(server.first_line) == MAX_FIRST_LINE:
            server.first_line += b"\n"
        line, newline, _ = server.first_line.partition(b"\n")
        if newline:
            self.report(event="first_line", server=server.key, line=line.decode("utf-8", "replace"))

    def _stop(self, server: Server) -> None:
        """Asks the server to end, and gives it a moment."""
        if server.kill_at is None:
            server.kill_at = time.monotonic() + STOP_GRACE
            # The signal ends one that is still starting, the end of its input one that serves.
            _tree.send(server.pid, signal.SIGTERM)
            _close(server.input)
            server.input = -1

    def _reap(self) -> None:
        ended, _ = _tree.reap()
        for server in self._servers.values():
            if server.exit is None and server.pid in ended:
                server.exit = ended[server.pid]
                server.kill_at = None

    def _kill_overdue(self) -> None:
        now = time.monotonic()
        for server in self._servers.values():
            if server.kill_at is not None and server.kill_at <= now:
                _tree.kill_tree(server.pid)
                server.kill_at = now + KILL_GRACE

    def _clear_away(self) -> None:
        """Removes what dead servers have left: their processes first, then their files."""
        dead = [server for server in self._servers.values() if server.exit is not None]
        if not dead:
            return
        living = {server.pid for server in self._servers.values() if server.exit is None}
        now = time.monotonic()
        if orphans := _tree.kill_children(living):
            self._give_up_at = self._give_up_at or now + KILL_GRACE
            if now < self._give_up_at:
                return
            self.report(event="left", what=f"processes that SIGKILL does not end: {sorted(orphans)}")
        self._give_up_at = None
        for server in dead:
            del self._servers[server.key]
            if server.output >= 0:
                self._selector.unregister(server.output)
            self._finish(server, server.exit or 0, _tail(server.directory / LOG))

    def _finish(self, server: Server, status: int, log: str) -> None:
        _close(server.input, server.output)
        self._remove(server.directory)
        self.report(event="ended", server=server.key, exit=status, log=log)

    def _remove(self, directory: Path) -> None:
        if not remove(directory):
            self.report(event="left", what=f"files that cannot be removed, in {directory}")


def _become_server(
    keeper: int, argv: list[str], env: dict[str, str], directory: Path, stdio: tuple[int, ...]
) -> NoReturn:  # pragma: no cover - exec ends the measuring
    """Turns the child of a fork into a server."""
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        # Out of the terminal's reach: Ctrl-C is the cluster's to handle.
        os.setsid()
        for number, descriptor in enumerate(stdio):
            os.dup2(descriptor, number)
        _confine.die_with(keeper)
        # So that what it leaves behind stays below it, and not below other servers' keeper.
        _confine.become_subreaper()
        os.chdir(directory)
        os.execve(argv[0], argv, env)  # noqa: S606
    except BaseException as e:  # noqa: BLE001
        os.write(2, f"cannot run {argv[0]}: {e}\n".encode(errors="replace"))
    finally:
        os._exit(127)


def _provide(workspace: Path) -> None:
    """Makes a workspace that outlives its servers, unless it is there."""
    # A link that code has put there would let the next server's code out.
    if workspace.is_symlink() or not workspace.is_dir():
        workspace.unlink(missing_ok=True)
        workspace.mkdir(0o700)


def remove(directory: Path) -> bool:
    """Removes a directory and all in it; returns whether it is gone."""
    if directory.is_symlink():  # Code put it there; its target is not ours.
        directory.unlink()
    with contextlib.suppress(OSError, RecursionError):
        remove_tree(directory)
    return not directory.exists()


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - LOG_TAIL))
            return file.read().decode("utf-8", "replace").strip()
    except OSError as e:
        return f"its log cannot be read: {e}"


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        if descriptor >= 0:
            os.close(descriptor)


def main(base: str, parent: str) -> int:
    """Keeps the servers of one cluster; returns the exit status.

    Args:
        base: Where to make the cluster's directory.
        parent: Process id of the cluster.
    """
    wake = _tree.signal_pipe(signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)
    # Signals that the cluster's process blocks would be blocked here and in the servers.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    _confine.become_subreaper()
    # The environment of the cluster's process is not for code in a sandbox to read.
    _confine.hide_from_same_user()
    os.chdir("/")
    control = socket.socket(fileno=0)
    root = None
    try:
        root = Path(tempfile.mkdtemp(prefix="prodisco-", dir=base))
        keeper = Keeper(control, wake, root)
        keeper.end_with(int(parent))
        keeper.run()
    except BaseException:  # noqa: BLE001
        report = {"event": "broken", "text": traceback.format_exc()}
        with contextlib.suppress(OSError):  # The cluster may be what broke.
            control.sendall(json.dumps(report).encode() + b"\n")
        return 1
    finally:
        _tree.leave_no_child(KILL_GRACE, wake)
        if root is not None:
            remove(root)
    return 0
