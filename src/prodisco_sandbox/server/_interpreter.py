"""Interpreter processes: starting them, feeding them one job, seeing them all dead."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from . import _confine, _script, _supervisor, _testing, _tree, _usage
from ._cgroup import Cgroup
from ._containment import Containment
from ._memory import Inherited, MemoryWatch
from ._options import Options
from ._pipes import PipeReader, PipeWriter, pipe

if TYPE_CHECKING:
    from ._warm import Supervisor, Warm

log = logging.getLogger(__name__)

OnOutput = Callable[[bytes], None]

_END_TIMEOUT = _supervisor.KILL_TIMEOUT + 2.0
_PIPE_TIMEOUT = 0.5
_REFILL_DELAY = 0.005
_LEAST_FOR_LARGE = 1 << 30
"""Bytes of a container's memory from which on large modules are preloaded unasked."""


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


class NotStartedError(Exception):
    """A supervisor could not be forked; no code has run."""


class Processes:
    """All child processes of this server: starts, reaps and finally kills them.

    There must be one per process, since it reaps every child. It runs in the event
    loop's thread.
    """

    def __init__(self, containment: Containment, options: Options) -> None:
        self.containment = containment
        own = containment.shared_memory.private or bool(containment.prefix)
        self.memory = MemoryWatch(containment.memory, own_shared_memory=own)
        self._prelude = _prelude(_tree, _confine, _testing, _script, _supervisor)
        self._spares: deque[Interpreter] = deque()
        self._most_spares = options.spare_interpreters
        self._exits: dict[int, asyncio.Future[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._options = options
        self._zygotes: list[Warm] = []
        """From the one with the fewest modules to the one with all of them."""
        self._large_names: list[str] = []

    def _make_warm(self, modules: list[str], may_import: Callable[[str], bool], prelude: bytes) -> Warm:
        from ._warm import Warm

        return Warm(
            spawn=self._spawn,
            make_cgroup=self._make_cgroup,
            prelude=prelude,
            modules=modules,
            may_import=may_import,
            home=self.containment.temporary.parent,
            writable=self.containment.writable_by_code,
            most=self._options.max_concurrent if self._options.spare_interpreters else 0,
            ahead=not self.containment.counts_by_user,
            on_ready=self._use_zygote,
        )

    def _zygotes_for(self, job: Job) -> list[Warm]:
        """The zygotes that can fork the job's interpreter, the best one first."""
        text = job.source if job.tests is None else f"import pytest\n{job.source}\n{job.tests}"
        named = _imported(text) | {name for name in self._large_names if name in text}
        ready = self._ready_zygotes()
        fit = [zygote for zygote in ready if all(map(zygote.may_import, named))]
        return fit + [zygote for zygote in reversed(ready) if zygote not in fit]

    def _ready_zygotes(self) -> list[Warm]:
        return [zygote for zygote in self._zygotes if zygote.ready]

    def install(self) -> None:
        """Adopts orphans of killed supervisors, and reaps every child."""
        _confine.become_subreaper()
        _confine.hide_from_same_user()
        asyncio.get_running_loop().add_signal_handler(signal.SIGCHLD, self._reap)

    def take(self, job: Job, *, warm: bool = True) -> Interpreter:
        """An interpreter that has run nothing yet and waits for the job.

        Args:
            job: What it is for.
            warm: Forked by a zygote, if there is one.

        Raises:
            OSError: The system refuses another process or descriptor.
        """
        for zygote in self._zygotes_for(job) if warm else ():
            while (supervisor := zygote.take()) is not None:
                try:
                    return self._given_to(supervisor)
                except ConnectionError:  # It has ended, which its socket will say.
                    supervisor.close()
        while self._spares:
            spare = self._spares.popleft()
            if spare.alive:
                return spare
            spare.discard()
        return self._start()

    def start_zygotes(self) -> None:
        """Starts the zygotes, if there are to be any.

        A fork takes time for each page of its parent's memory, so code is forked from the smallest
        that has what it imports.
        """
        options = self._options
        if not options.zygote or not self.containment.can_fork:
            return
        # Only now, since it is not needed to serve.
        from . import _preloaded, _warm, _zygote

        names = options.preload
        if names is None:
            container = self.containment.memory.container
            enough = container is None or container.limit >= _LEAST_FOR_LARGE
            more = (*_warm.TEST_MODULES, *(_warm.LARGE_MODULES if enough else ()))
            names = (*_warm.STANDARD_MODULES, *(name for name in more if find_spec(name.partition(".")[0])))
        prelude = _prelude(_tree, _confine, _testing, _script, _supervisor, _preloaded, _zygote)
        tops = [name.partition(".")[0] for name in names]
        self._large_names = [top for top in tops if not _is_standard(top)]
        chosen: list[str] = []
        scopes: tuple[Callable[[str], bool], ...] = (
            _warm.SMALL_MODULES.__contains__,
            _is_standard,
            lambda _: True,
        )
        for may_import in scopes:
            wider = [name for name, top in zip(names, tops, strict=True) if may_import(top)]
            if wider == chosen and self._zygotes:
                self._zygotes[-1].may_import = may_import
            else:
                self._zygotes.append(self._make_warm(wider, may_import, prelude))
            chosen = wider
        for zygote in self._zygotes:
            zygote.start()

    def _use_zygote(self) -> None:
        """Starts no more interpreters in advance: forks are faster."""
        while self._spares:
            self._keep(self._spares.popleft().close(), "end-spare")
        self.start_spares()

    def start_spares_soon(self, delay: float = _REFILL_DELAY) -> None:
        """Starts spares, but lets answers go out first."""
        asyncio.get_running_loop().call_later(delay, self.start_spares)

    def start_spares(self) -> None:
        """Starts interpreters in advance, as many as were asked for."""
        ready = self._ready_zygotes()
        for zygote in ready:
            zygote.fill(self._most_spares)
        if ready:
            return
        while len(self._spares) < self._most_spares:
            try:
                self._spares.append(self._start())
            except OSError as error:
                log.warning("could not start a spare interpreter: %s", error)
                return

    def usage(self, enough: int) -> int:
        """Bytes in the workspace, and in what executions hold open. Blocking, in any thread."""
        places = (self.containment.workspace, self.containment.temporary)
        held = _usage.held_open(_tree.descendants(self._own()))
        return held + _usage.disk_usage(places, enough)

    def _own(self) -> set[int]:
        """The children that are to be: also supervisors whose zygote has ended."""
        return {*self._exits, *(pid for zygote in self._zygotes for pid in zygote.pids)}

    async def close(self) -> None:
        """Ends the spares, and whatever else is still a child of this process."""
        self._most_spares = 0
        await asyncio.gather(*(zygote.close() for zygote in self._zygotes))
        self._zygotes.clear()
        spares = list(self._spares)
        self._spares.clear()
        await asyncio.gather(*(spare.close() for spare in spares))
        self._exits.clear()
        await self.kill_orphans()

    def _given_to(self, supervisor: Supervisor) -> Interpreter:
        """An interpreter that the supervisor forks."""
        with contextlib.ExitStack() as undo, contextlib.ExitStack() as theirs:
            ours, given = _pipes(undo, theirs)
            supervisor.supervise(given)
            undo.pop_all()
        return Interpreter(self, *ours, supervisor=supervisor)

    def _start(self) -> Interpreter:
        """An interpreter of its own."""
        with contextlib.ExitStack() as undo, contextlib.ExitStack() as theirs:
            cgroup = self._make_cgroup()
            if cgroup is not None:
                undo.callback(cgroup.remove)
            ours, (control, status, out, err) = _pipes(undo, theirs)
            pid, exited = self._spawn(control, out, err, status, cgroup)
            undo.pop_all()
        interpreter = Interpreter(self, *ours, pid=pid, exited=exited, prelude=self._prelude)
        if cgroup is not None:
            exited.add_done_callback(lambda _: cgroup.remove_soon())
            if not self.containment.prefix:
                interpreter.join(cgroup)
        return interpreter

    def _spawn(
        self, stdin: int, stdout: int, stderr: int, status: int, cgroup: Cgroup | None = None
    ) -> tuple[int, asyncio.Future[None]]:
        """Starts an interpreter that reads its code from standard input.

        Returns:
            Its process id, and what is done when it has ended.
        """
        process = subprocess.Popen(  # noqa: S603
            self._command(status, cgroup),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            pass_fds=(status, *self.containment.descriptors),
            env=self.containment.environ,
            cwd="/",
            start_new_session=True,
        )
        exited = asyncio.get_running_loop().create_future()
        self._exits[process.pid] = exited
        # `_reap` reaps it; this object must not.
        process.returncode = 0
        return process.pid, exited

    def _make_cgroup(self) -> Cgroup | None:
        if self.containment.cgroups is None:
            return None
        return self.containment.cgroups.make(self.containment.max_processes)

    def _command(self, status: int, cgroup: Cgroup | None) -> list[str]:
        # -B, since -I ignores PYTHONDONTWRITEBYTECODE. multiprocessing passes both options on.
        bootstrap = ["-I", "-B", "-X", "utf8", "-c", _supervisor.BOOTSTRAP, "0", "main", str(status)]
        command = [*self.containment.prefix, sys.executable, *bootstrap]
        if cgroup is not None and self.containment.prefix:
            # Bubblewrap forks at once, and must be in its cgroup before.
            step_in = 'echo $$ >"$0" && exec "$@"'
            command[:0] = ["/bin/sh", "-c", step_in, str(cgroup.path / "cgroup.procs")]
        return command

    def _reap(self) -> None:
        for pid in _tree.reap()[0]:
            if (exited := self._exits.pop(pid, None)) and not exited.done():
                exited.set_result(None)

    def kill_tree_soon(self, pid: int, exited: asyncio.Future[None]) -> None:
        """Kills a supervisor that does not end, and everything below it."""
        self._keep(self._kill_tree(pid, exited), f"kill-tree-{pid}")

    def _keep(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _kill_tree(self, pid: int, exited: asyncio.Future[None]) -> None:
        if exited.done():
            return
        log.warning("supervisor %d does not answer; killing it and everything below it", pid)
        _tree.kill_tree(pid)
        await self.kill_orphans()

    async def kill_orphans(self) -> None:
        """Kills processes that killed supervisors left behind: they are our children now."""
        left: list[int] = []
        for _ in range(100):
            self._reap()
            left = _tree.kill_children(self._own())
            if not left:
                return
            await asyncio.sleep(0.02)
        log.error("processes that SIGKILL does not end: %s", left)


_IMPORT = re.compile(r"^[ \t]*(?:from[ \t]+(\w+)|import[ \t]+(.+))", re.MULTILINE)
_LISTED = re.compile(r"(?:^|,)[ \t]*(\w+)")


def _imported(text: str) -> set[str]:
    """The modules that code names in its imports."""
    found = _IMPORT.findall(text)
    return {name for one, several in found for name in (_LISTED.findall(several) if several else [one])}


def _is_standard(name: str) -> bool:
    return name in sys.stdlib_module_names or name in ("pytest", "_pytest")


class Interpreter:
    """A fresh interpreter, to be used once: started for it, or forked by a supervisor."""

    def __init__(
        self,
        processes: Processes,
        control: int,
        status: int,
        out: int,
        err: int,
        *,
        pid: int = 0,
        exited: asyncio.Future[None] | None = None,
        prelude: bytes = b"",
        supervisor: Supervisor | None = None,
    ) -> None:
        self._processes = processes
        self._pid = pid
        self._supervisor = supervisor
        self._control = PipeWriter(control)
        self._control.write(prelude)
        self._status = bytearray()
        self._status_pipe = PipeReader(status, self._status.extend)
        # A supervisor that goes on closes the pipe when everything is gone.
        self._exited = exited or self._status_pipe.closed
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
        self._joining = asyncio.create_task(asyncio.to_thread(cgroup.add, self._pid), name="join-cgroup")

    async def run(self, job: Job, on_output: OnOutput, on_error_output: OnOutput) -> Outcome:
        """Runs the job to its end, or to `kill`, and until nothing of it is left.

        Raises:
            NotStartedError: There is no process to run it; another interpreter may.
        """
        pipes = [PipeReader(self._out, on_output), PipeReader(self._err, on_error_output)]
        self._out = self._err = -1
        inherited = Inherited()
        try:
            if self._joining is not None:
                await self._joining
            if self._supervisor is not None:
                self._pid = await self._supervisor.begun()
                inherited = self._supervisor.zygote.inherited
            fields = asdict(job) | self._processes.containment.job(inherited.data)
            self._control.write(_supervisor.pack(fields))
            with self._processes.memory.watching(self._pid, inherited) as watched:
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
        answer = _supervisor.unpack(self._status)
        if answer is None:
            await self._processes.kill_orphans()
            return Outcome(None, "", lost=True)
        if answer["left"]:
            log.error("processes that SIGKILL does not end: %s", answer["left"])
        elif self._supervisor is not None:
            self._supervisor.give_back()
            self._supervisor = None
        return Outcome(answer["exit"], answer["report"])

    def kill(self) -> None:
        """Has the supervisor kill the code and all its descendants, and end itself."""
        if self._guard is None and not self._exited.done():
            self._control.close()
            self._guard = asyncio.get_running_loop().call_later(_END_TIMEOUT, self._kill_tree)
            self._exited.add_done_callback(lambda _: self._cancel_guard())

    def _kill_tree(self) -> None:
        pid = self._pid if self._supervisor is None else self._supervisor.pid
        if pid:
            self._processes.kill_tree_soon(pid, self._exited)

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
        if self._supervisor is not None:
            self._supervisor.close()
        for descriptor in (self._out, self._err):
            if descriptor >= 0:
                os.close(descriptor)
        self._out = self._err = -1


def _pipes(
    undo: contextlib.ExitStack, theirs: contextlib.ExitStack
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The pipes of an execution, control, status, output and error output: our ends, and the others."""
    ends = [pipe(undo, theirs, ours) for ours in ("write", "read", "read", "read")]
    return tuple(ours for ours, _ in ends), tuple(given for _, given in ends)


def _prelude(*modules: ModuleType) -> bytes:
    """The modules' code, compiled once, as `BOOTSTRAP` expects it."""
    codes = []
    for module in modules:
        loader: Any = module.__spec__ and module.__spec__.loader
        # From its bytecode, if there is any.
        codes.append((module.__name__.rpartition(".")[2], loader.get_code(module.__name__)))
    return _supervisor.pack(codes)
