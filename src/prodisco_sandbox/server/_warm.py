"""Supervisors that a zygote has forked: the zygote's life, and theirs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import _script, _supervisor, _tree, _zygote
from ._cgroup import Cgroup
from ._interpreter import NotStartedError
from ._memory import Inherited
from ._pipes import PipeReader, PipeWriter, pipe

log = logging.getLogger(__name__)

Spawn = Callable[[int, int, int, int], tuple[int, asyncio.Future[None]]]
"""Starts a child process, with its standard descriptors, and one for its answer. Returns its process id,
and what is done when it has ended."""

STANDARD_MODULES = (
    *("argparse", "ast", "asyncio", "base64", "calendar", "cmath", "collections", "concurrent.futures"),
    *("configparser", "contextlib", "copy", "csv", "ctypes", "dataclasses", "datetime", "decimal"),
    *("difflib", "email", "enum", "fractions", "functools", "glob", "gzip", "hashlib", "heapq", "html"),
    *("http.client", "importlib", "inspect", "io", "ipaddress", "itertools", "json", "logging", "math"),
    *("mimetypes", "multiprocessing", "operator", "pathlib", "pickle", "platform", "pprint", "queue"),
    *("random", "re", "secrets", "shlex", "shutil", "signal", "socket", "sqlite3", "ssl", "statistics"),
    *("string", "struct", "subprocess", "tempfile", "textwrap", "threading", "time", "traceback", "typing"),
    *("unittest", "urllib.request", "uuid", "warnings", "xml.etree.ElementTree", "zipfile", "zoneinfo"),
)
SMALL_MODULES = frozenset(
    (
        *("base64", "collections", "contextlib", "copy", "csv", "datetime", "decimal", "enum", "errno"),
        *("fractions", "functools", "gc", "glob", "hashlib", "heapq", "io", "itertools", "json", "math"),
        *("operator", "os", "pathlib", "random", "re", "shutil", "statistics", "string", "struct", "sys"),
        *("tempfile", "textwrap", "time", "traceback", "typing", "warnings"),
    )
)
"""Of the standard library, what most code makes do with: two fifths of its memory."""
TEST_MODULES = ("pytest", "_pytest.assertion.rewrite")
LARGE_MODULES = ("numpy", "pandas", "matplotlib.pyplot")
"""Preloaded by default, as the others, where they are installed and where there is memory for them."""

_BEGIN_TIMEOUT = 2.0
"""Seconds until a zygote that forks nothing is given up."""
_COARSE = 20_000_000
"""Nanoseconds by which the file system's times may be late."""
_FIRST_DELAY, _LONGEST_DELAY = 1.0, 60.0
"""Seconds until another zygote is started in the place of one that has ended."""
_LOOK_INTERVAL = 2.0
"""Seconds between looks at files that executions cannot change."""
_LOGGED = 2000


class Supervisor:
    """The server's side of a supervisor that a zygote forks."""

    def __init__(
        self, zygote: Zygote, ours: socket.socket, cgroup: Cgroup | None, keep: Callable[[Supervisor], None]
    ) -> None:
        self.zygote = zygote
        self._keep = keep
        self._loop = asyncio.get_running_loop()
        self._socket = ours
        self._pid: asyncio.Future[int] = self._loop.create_future()
        self._cgroup = cgroup
        self._loop.add_reader(ours, self._read)
        self._begun = self._loop.create_task(self._begin(), name="begin-supervisor")
        # It is of no interest where nobody waits for it.
        self._begun.add_done_callback(lambda task: task.cancelled() or task.exception())

    @property
    def pid(self) -> int | None:
        return self._pid.result() if self._pid.done() and not self._pid.exception() else None

    async def begun(self) -> int:
        """Its process id, once it is there.

        Raises:
            NotStartedError: It could not be forked.
        """
        return await asyncio.shield(self._begun)

    async def _begin(self) -> int:
        await asyncio.wait([self._pid], timeout=_BEGIN_TIMEOUT)
        if not self._pid.done():
            self.zygote.give_up("it does not answer")
            raise NotStartedError("the zygote does not answer")
        pid = self._pid.result()
        if self._cgroup is not None:
            # In a thread: the kernel may take 10 ms over it.
            await asyncio.to_thread(self._cgroup.add, pid)
        if not self.ended:
            # It may fork now.
            with contextlib.suppress(ConnectionError):
                self._socket.send(b"x")
        return pid

    def _read(self) -> None:
        try:
            data = self._socket.recv(8)
        except BlockingIOError:
            return
        except ConnectionError:
            data = b""
        if data:
            self._pid.set_result(int.from_bytes(data, "big"))
        else:
            self.close()

    def supervise(self, descriptors: Sequence[int]) -> None:
        """Hands it an execution's pipes.

        Raises:
            OSError: It has ended.
        """
        socket.send_fds(self._socket, [b"x"], descriptors)

    def give_back(self) -> None:
        """Says that its execution is over, so that it can have another one."""
        self._keep(self)

    @property
    def ended(self) -> bool:
        return self._socket.fileno() < 0

    def close(self) -> None:
        """Has it end, if it supervises nothing. Idempotent."""
        if self.ended:
            return
        self._loop.remove_reader(self._socket)
        self._socket.close()
        if not self._pid.done():
            self._pid.set_exception(NotStartedError("the zygote could not fork"))
            self._pid.exception()
        if self._cgroup is not None:
            self._cgroup.remove_soon()


class Zygote:
    """The server's side of one zygote.

    Args:
        spawn: Starts it.
        prelude: Its code.
        settings: What it is to import.
        home: A directory for its files while it imports, which goes when it has.
    """

    def __init__(self, spawn: Spawn, prelude: bytes, settings: dict[str, Any], home: str) -> None:
        loop = asyncio.get_running_loop()
        self.inherited = Inherited()
        self.answer: asyncio.Future[dict[str, Any] | None] = loop.create_future()
        """What it has imported, once it has; None where it has ended before."""
        self.over: asyncio.Future[str] = loop.create_future()
        """Why it is of no more use, once it is not."""
        self._began = time.time_ns() - _COARSE
        self._home = home
        self._data = bytearray()
        with contextlib.ExitStack() as undo, contextlib.ExitStack() as theirs:
            self._socket, child_socket = socket.socketpair()
            undo.enter_context(self._socket)
            theirs.enter_context(child_socket)
            status, child_status = pipe(undo, theirs, "read")
            printed, child_printed = pipe(undo, theirs, "read")
            ends = child_socket.fileno(), child_printed, child_printed, child_status
            self.pid, self.ended = spawn(*ends)
            undo.pop_all()
        self.ended.add_done_callback(lambda _: self.give_up("it has ended"))
        self._socket.setblocking(False)
        self._feeder = PipeWriter(os.dup(self._socket.fileno()))
        settings = settings | {"server": os.getpid(), "home": home}
        self._feeder.write(prelude + _supervisor.pack(settings))
        self._printed = PipeReader(printed, self._on_printed)
        self._status = PipeReader(status, self._on_status)
        self._status.closed.add_done_callback(lambda _: self._on_status(b""))

    def _on_printed(self, data: bytes) -> None:
        log.info("printed while modules were imported: %s", data[:_LOGGED].decode(errors="replace"))

    def _on_status(self, data: bytes) -> None:
        self._data += data
        if self.answer.done():
            return
        if (answer := _supervisor.unpack(self._data)) is not None:
            self.inherited = Inherited(answer["data"], answer["anonymous"])
            self.answer.set_result(answer)
        elif not data:
            self.answer.set_result(None)

    def fork(self, cgroup: Cgroup | None, keep: Callable[[Supervisor], None]) -> Supervisor:
        """Has it fork a supervisor, which can be given an execution at once.

        Raises:
            OSError: It has ended, or does not answer.
        """
        with contextlib.ExitStack() as undo:
            ours, theirs = socket.socketpair()
            undo.enter_context(ours)
            with theirs:
                socket.send_fds(self._socket, [b"x"], [theirs.fileno()])
            undo.pop_all()
        ours.setblocking(False)
        return Supervisor(self, ours, cgroup, keep)

    def changed(self, paths: Sequence[tuple[str, int, int]]) -> str | None:
        """The first of the paths that is not as it was before this zygote read it."""
        for path, *known in paths:
            now = _zygote.seen(path)
            if now != tuple(known) or now[1] >= self._began:
                return path
        return None

    def give_up(self, why: str) -> None:
        """Has it replaced. Idempotent."""
        if not self.over.done():
            self.over.set_result(why)

    def end(self) -> None:
        """Has it end; its supervisors go on. Idempotent."""
        self.give_up("it is not needed")
        if not self.ended.done():
            _tree.send(self.pid, signal.SIGKILL)  # It may be stopped.
        self._feeder.close()
        self._printed.close()
        self._status.close()
        self._socket.close()
        shutil.rmtree(self._home, ignore_errors=True)


class Warm:
    """Keeps a zygote, and supervisors that wait for executions.

    Args:
        spawn: Starts a zygote.
        make_cgroup: Makes a cgroup for a supervisor and what it starts, or None.
        prelude: The zygote's code.
        modules: What it imports.
        may_import: Whether code that imports a module gets it from here.
        home: Where its directories are made.
        writable: Directories that executions may write to; None: they may write anywhere.
        most: Supervisors that are kept while they have nothing to do.
        ahead: Whether each of them forks a child before there is an execution.
        on_ready: Called when supervisors can be had.
    """

    def __init__(
        self,
        *,
        spawn: Spawn,
        make_cgroup: Callable[[], Cgroup | None],
        prelude: bytes,
        modules: Sequence[str],
        may_import: Callable[[str], bool],
        home: Path,
        writable: Sequence[str] | None,
        most: int,
        ahead: bool,
        on_ready: Callable[[], None],
    ) -> None:
        self._spawn = spawn
        self._make_cgroup = make_cgroup
        self._prelude = prelude
        self._modules = list(modules)
        self.may_import = may_import
        self._home = home
        self._writable = list(writable or ())
        self._below = _script.prefixes(["/"] if writable is None else writable)
        self._most = most
        self._ahead = ahead
        self._on_ready = on_ready
        self._zygote: Zygote | None = None
        self._files: list[tuple[str, int, int]] = []
        self._near: list[tuple[str, int, int]] = []
        """What executions can change, and the directories that modules are looked for in."""
        self._idle: list[Supervisor] = []
        self._supervisors: set[Supervisor] = set()
        self._looked = 0.0
        self._look: asyncio.Task[None] | None = None
        self._life: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._life = asyncio.get_running_loop().create_task(self._live(), name="zygote")

    @property
    def ready(self) -> bool:
        return self._zygote is not None and not self._zygote.over.done()

    @property
    def pids(self) -> set[int]:
        """The supervisors' process ids. In any thread: the set is copied at once, and not changed."""
        living = [supervisor for supervisor in list(self._supervisors) if not supervisor.ended]
        return {pid for supervisor in living if (pid := supervisor.pid) is not None}

    def take(self) -> Supervisor | None:
        """A supervisor to run an execution; None where there is no zygote, or it is out of date.

        Raises:
            OSError: The system refuses another descriptor or cgroup.
        """
        self._idle = [supervisor for supervisor in self._idle if not supervisor.ended]
        zygote = self._zygote
        if zygote is None or zygote.over.done():
            return None
        if changed := zygote.changed(self._near):
            zygote.give_up(f"{changed} has changed")
            return None
        self._look_at_files(zygote)
        try:
            return self._idle.pop() if self._idle else self._fork(zygote)
        except (ConnectionError, BlockingIOError) as error:
            zygote.give_up(str(error))
            return None

    def _fork(self, zygote: Zygote) -> Supervisor:
        cgroup = self._make_cgroup()
        try:
            supervisor = zygote.fork(cgroup, self._keep)
        except OSError:
            if cgroup is not None:
                cgroup.remove()
            raise
        self._supervisors = {other for other in self._supervisors if not other.ended} | {supervisor}
        return supervisor

    def fill(self, count: int) -> None:
        """Has supervisors wait, at least as many."""
        while self._zygote is not None and self.ready and len(self._idle) < count:
            try:
                self._idle.append(self._fork(self._zygote))
            except OSError as error:
                log.warning("could not fork a supervisor: %s", error)
                return

    def _keep(self, supervisor: Supervisor) -> None:
        if supervisor.zygote is self._zygote and self.ready and len(self._idle) < self._most:
            self._idle.append(supervisor)
        else:
            supervisor.close()

    def _look_at_files(self, zygote: Zygote) -> None:
        """Looks at all files from time to time, after what executions can change."""
        now = time.monotonic()
        if now < self._looked + _LOOK_INTERVAL or (self._look is not None and not self._look.done()):
            return

        async def look() -> None:
            if changed := await asyncio.to_thread(zygote.changed, self._files):
                zygote.give_up(f"{changed} has changed")
            self._looked = time.monotonic()

        self._look = asyncio.get_running_loop().create_task(look(), name="look-at-modules")

    async def _live(self) -> None:
        """Keeps a zygote: starts another one where one has ended or is out of date."""
        delay = _FIRST_DELAY
        while True:
            began = time.monotonic()
            try:
                why = await self._one_life()
            except OSError as error:
                why = str(error)
            if why is None:
                continue
            log.warning("the zygote is replaced: %s", why)
            # One that lasted was not at fault.
            delay = _FIRST_DELAY if time.monotonic() > began + _LONGEST_DELAY else delay
            await asyncio.sleep(delay)
            delay = min(2 * delay, _LONGEST_DELAY)

    async def _one_life(self) -> str | None:
        """Why the zygote is of no more use; None where another one is to be started at once."""
        settings = {"modules": self._modules, "writable": self._writable, "ahead": self._ahead}
        zygote = Zygote(self._spawn, self._prelude, settings, tempfile.mkdtemp(dir=self._home))
        try:
            answer = await zygote.answer
            if answer is None:
                return await zygote.over
            for name, reason in answer["problems"]:
                log.warning("%s is not preloaded: %s", name, reason)
            for name, reason in answer["unfit"]:
                log.warning("%s is not preloaded: %s when it is imported", name, reason)
                self._modules = [other for other in self._modules if other != name]
                return None
            self._files = answer["files"]
            self._near = [*answer["places"], *(f for f in self._files if f[0].startswith(self._below))]
            log.info("executions are forked from process %d, with %d modules", zygote.pid, len(self._files))
            self._zygote = zygote
            self._on_ready()
            return await zygote.over
        finally:
            self._zygote = None
            zygote.end()
            for supervisor in self._idle:
                supervisor.close()
            self._idle.clear()

    async def close(self) -> None:
        """Ends the zygote and the supervisors that wait."""
        tasks = [task for task in (self._life, self._look) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for supervisor in self._supervisors:
            supervisor.close()
