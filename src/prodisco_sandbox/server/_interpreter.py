"""Interpreter processes: starting them, feeding them one job, seeing them all dead."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import marshal
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from . import _confine, _script, _supervisor, _testing, _tree, _usage
from ._cgroup import Cgroup
from ._containment import Containment
from ._memory import MemoryWatch

log = logging.getLogger(__name__)

OnOutput = Callable[[bytes], None]

_END_TIMEOUT = _supervisor.KILL_TIMEOUT + 2.0
_PIPE_TIMEOUT = 0.5
_REFILL_DELAY = 0.005
_READ = 1 << 18


@dataclass(frozen=True, slots=True)
class Job:
    """The work of one interpreter.

    Attributes:
        source: Python source text.
        tests: Source text of its tests, where these are to be run.
        merge: Whether standard error goes into standard output, in exact order.
    """

    source: str
    tests: str | None = None
    merge: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an interpreter ended.

    Attributes:
        exit: Exit status, minus the number of the signal that killed it, or None where
            it was killed on our order.
        report: The code's own account of how it failed; empty on success.
        lost: The supervisor itself was killed, so nothing more is known.
        killed_for: Why it was killed for its memory; None where it was not.
    """

    exit: int | None
    report: str
    lost: bool = False
    killed_for: str | None = None


class Processes:
    """All child processes of this server: starts, reaps and finally kills them.

    There must be one per process, since it reaps every child. It runs in the event
    loop's thread.
    """

    def __init__(self, containment: Containment, spares: int) -> None:
        self.containment = containment
        own = containment.shared_memory.private or bool(containment.prefix)
        self.memory = MemoryWatch(containment.memory, own_shared_memory=own)
        self._prelude = _prelude()
        self._spares: deque[Interpreter] = deque()
        self._most_spares = spares
        self._exits: dict[int, asyncio.Future[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def install(self) -> None:
        """Adopts orphans of killed supervisors, and reaps every child."""
        _confine.become_subreaper()
        _confine.hide_from_same_user()
        asyncio.get_running_loop().add_signal_handler(signal.SIGCHLD, self._reap)

    def take(self) -> Interpreter:
        """An interpreter that has run nothing yet and waits for its job.

        Raises:
            OSError: The system refuses another process or descriptor.
        """
        while self._spares:
            spare = self._spares.popleft()
            if spare.alive:
                return spare
            spare.discard()
        return self._start()

    def start_spares_soon(self, delay: float = _REFILL_DELAY) -> None:
        """Starts spares, but lets answers go out first."""
        asyncio.get_running_loop().call_later(delay, self.start_spares)

    def start_spares(self) -> None:
        """Starts interpreters in advance, as many as were asked for."""
        while len(self._spares) < self._most_spares:
            try:
                self._spares.append(self._start())
            except OSError as error:
                log.warning("could not start a spare interpreter: %s", error)
                return

    def usage(self, enough: int) -> int:
        """Bytes in the workspace, and in what executions hold open. Blocking, in any thread."""
        places = (self.containment.workspace, self.containment.temporary)
        held = _usage.held_open(_tree.descendants(list(self._exits)))
        return held + _usage.disk_usage(places, enough)

    async def close(self) -> None:
        """Ends the spares, and whatever else is still a child of this process."""
        self._most_spares = 0
        spares = list(self._spares)
        self._spares.clear()
        await asyncio.gather(*(spare.close() for spare in spares))
        await self.kill_orphans()

    def _start(self) -> Interpreter:
        with contextlib.ExitStack() as undo, contextlib.ExitStack() as theirs:
            cgroup = self._make_cgroup(undo)
            ends = [_pipe(undo, theirs, ours) for ours in ("write", "read", "read", "read")]
            (control, status, out, err), (child_control, child_status, child_out, child_err) = zip(
                *ends, strict=True
            )
            process = subprocess.Popen(  # noqa: S603
                self._command(child_status, cgroup),
                stdin=child_control,
                stdout=child_out,
                stderr=child_err,
                pass_fds=(child_status, *self.containment.descriptors),
                env=self.containment.environ,
                cwd="/",
                start_new_session=True,
            )
            undo.pop_all()
        exited = asyncio.get_running_loop().create_future()
        self._exits[process.pid] = exited
        # `_reap` reaps it; this object must not.
        process.returncode = 0
        interpreter = Interpreter(self, process.pid, exited, self._prelude, control, status, out, err)
        if cgroup is not None:
            exited.add_done_callback(lambda _: self._remove_cgroup(cgroup))
            if not self.containment.prefix:
                interpreter.join(cgroup)
        return interpreter

    def _make_cgroup(self, undo: contextlib.ExitStack) -> Cgroup | None:
        if self.containment.cgroups is None:
            return None
        cgroup = self.containment.cgroups.make(self.containment.max_processes)
        undo.callback(cgroup.remove)
        return cgroup

    def _command(self, status: int, cgroup: Cgroup | None) -> list[str]:
        # -B, since -I ignores PYTHONDONTWRITEBYTECODE. multiprocessing passes both options on.
        bootstrap = ["-I", "-B", "-X", "utf8", "-c", _supervisor.BOOTSTRAP, "0", "main", str(status)]
        command = [*self.containment.prefix, sys.executable, *bootstrap]
        if cgroup is not None and self.containment.prefix:
            # Bubblewrap forks at once, and must be in its cgroup before.
            step_in = 'echo $$ >"$0" && exec "$@"'
            command[:0] = ["/bin/sh", "-c", step_in, str(cgroup.path / "cgroup.procs")]
        return command

    def _remove_cgroup(self, cgroup: Cgroup) -> None:
        if not cgroup.remove():
            # Dead processes leave a cgroup a little after they are reaped.
            asyncio.get_running_loop().call_later(0.1, cgroup.remove)

    def _reap(self) -> None:
        for pid in _tree.reap()[0]:
            if (exited := self._exits.pop(pid, None)) and not exited.done():
                exited.set_result(None)

    def kill_tree_soon(self, pid: int) -> None:
        """Kills a supervisor that does not end, and everything below it."""
        task = asyncio.get_running_loop().create_task(self._kill_tree(pid), name=f"kill-tree-{pid}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _kill_tree(self, pid: int) -> None:
        if pid not in self._exits:
            return
        log.warning("supervisor %d does not answer; killing it and everything below it", pid)
        _tree.kill_tree(pid)
        await self.kill_orphans()

    async def kill_orphans(self) -> None:
        """Kills processes that killed supervisors left behind: they are our children now."""
        left: list[int] = []
        for _ in range(100):
            self._reap()
            left = _tree.kill_children(self._exits)
            if not left:
                return
            await asyncio.sleep(0.02)
        log.error("processes that SIGKILL does not end: %s", left)


class Interpreter:
    """A fresh interpreter, to be used once."""

    def __init__(
        self,
        processes: Processes,
        pid: int,
        exited: asyncio.Future[None],
        prelude: bytes,
        control: int,
        status: int,
        out: int,
        err: int,
    ) -> None:
        self.pid = pid
        self._processes = processes
        self._exited = exited
        self._control = _PipeWriter(control)
        self._control.write(prelude)
        self._status = bytearray()
        self._status_pipe = _PipeReader(status, self._status.extend)
        self._out, self._err = out, err
        self._joining: asyncio.Task[None] | None = None
        self._guard: asyncio.TimerHandle | None = None

    @property
    def alive(self) -> bool:
        return not self._exited.done()

    def join(self, cgroup: Cgroup) -> None:
        """Puts the process into the cgroup, before it gets its job.

        In a thread: the kernel may take 10 ms over it, while the interpreter starts.
        """
        self._joining = asyncio.create_task(asyncio.to_thread(cgroup.add, self.pid), name="join-cgroup")

    async def run(self, job: Job, on_output: OnOutput, on_error_output: OnOutput) -> Outcome:
        """Runs the job to its end, or to `kill`, and until nothing of it is left."""
        pipes = [_PipeReader(self._out, on_output), _PipeReader(self._err, on_error_output)]
        self._out = self._err = -1
        try:
            if self._joining is not None:
                await self._joining
            fields = asdict(job) | self._processes.containment.job()
            self._control.write(_supervisor.pack(fields))
            with self._processes.memory.watching(self.pid) as watched:
                await self._exited
            # The pipes hold all output by now. A process that still has them open is no
            # descendant: it got them over a socket.
            await asyncio.wait([pipe.closed for pipe in pipes], timeout=_PIPE_TIMEOUT)
        finally:
            for pipe in pipes:
                pipe.close()
        return replace(await self._outcome(), killed_for=watched.killed_for)

    async def _outcome(self) -> Outcome:
        await asyncio.wait([self._status_pipe.closed], timeout=_PIPE_TIMEOUT)
        self._status_pipe.close()
        length = int.from_bytes(self._status[:8], "big")
        if not length or len(self._status) < 8 + length:
            await self._processes.kill_orphans()
            return Outcome(None, "", lost=True)
        answer: dict[str, Any] = marshal.loads(self._status[8:])  # noqa: S302
        if answer["left"]:
            log.error("processes that SIGKILL does not end: %s", answer["left"])
        return Outcome(answer["exit"], answer["report"])

    def kill(self) -> None:
        """Has the supervisor kill the code and all its descendants, and end itself."""
        if self._guard is None and not self._exited.done():
            self._control.close()
            loop = asyncio.get_running_loop()
            self._guard = loop.call_later(_END_TIMEOUT, self._processes.kill_tree_soon, self.pid)
            self._exited.add_done_callback(lambda _: self._cancel_guard())

    def _cancel_guard(self) -> None:
        if self._guard is not None:
            self._guard.cancel()

    async def close(self) -> None:
        """Returns when the supervisor and everything below it is gone. Idempotent."""
        self.kill()
        await asyncio.wait([self._exited] if self._joining is None else [self._exited, self._joining])
        self.discard()

    def discard(self) -> None:
        """Closes the pipes. Idempotent."""
        self._control.close()
        self._status_pipe.close()
        for descriptor in (self._out, self._err):
            if descriptor >= 0:
                os.close(descriptor)
        self._out = self._err = -1


class _PipeReader:
    """Hands what arrives in a pipe to a callback."""

    def __init__(self, descriptor: int, on_data: Callable[[bytes], Any]) -> None:
        self._loop = asyncio.get_running_loop()
        self._descriptor = descriptor
        self._on_data = on_data
        self.closed: asyncio.Future[None] = self._loop.create_future()
        os.set_blocking(descriptor, False)
        self._loop.add_reader(descriptor, self._read)

    def _read(self) -> None:
        try:
            data = os.read(self._descriptor, _READ)
        except BlockingIOError:
            return
        if data:
            self._on_data(data)
        else:
            self.close()

    def close(self) -> None:
        if not self.closed.done():
            self._loop.remove_reader(self._descriptor)
            os.close(self._descriptor)
            self.closed.set_result(None)


class _PipeWriter:
    """Writes to a pipe without blocking. Its reader may vanish at any time."""

    def __init__(self, descriptor: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._descriptor = descriptor
        self._queue: deque[memoryview] = deque()
        self._closed = False
        os.set_blocking(descriptor, False)

    def write(self, data: bytes) -> None:
        if self._closed:
            return
        self._queue.append(memoryview(data))
        if len(self._queue) == 1:
            self._loop.add_writer(self._descriptor, self._flush)
            self._flush()

    def _flush(self) -> None:
        try:
            while self._queue:
                written = os.write(self._descriptor, self._queue[0])
                rest = self._queue[0][written:]
                if rest:
                    self._queue[0] = rest
                else:
                    self._queue.popleft()
        except BlockingIOError:
            return
        except BrokenPipeError:
            self._queue.clear()
        self._loop.remove_writer(self._descriptor)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._loop.remove_writer(self._descriptor)
            os.close(self._descriptor)


def _pipe(undo: contextlib.ExitStack, theirs: contextlib.ExitStack, ours: str) -> tuple[int, int]:
    """A pipe: our end, which `undo` closes, and the child's, which `theirs` closes."""
    read, write = os.pipe2(os.O_CLOEXEC)
    mine, its = (read, write) if ours == "read" else (write, read)
    undo.callback(os.close, mine)
    theirs.callback(os.close, its)
    return mine, its


def _prelude() -> bytes:
    """The supervisor's code, compiled once, as its bootstrap expects it."""
    codes = []
    for module in (_tree, _confine, _testing, _script, _supervisor):
        loader: Any = module.__spec__ and module.__spec__.loader
        # From its bytecode, if there is any.
        codes.append((module.__name__.rpartition(".")[2], loader.get_code(module.__name__)))
    return _supervisor.pack(codes)
