"""Executions: queued, running, and for a while afterwards."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from enum import IntEnum
from typing import Any

from ._beneath import file_time
from ._cache import CacheEntry, ScriptCache
from ._interpreter import Job, NotStartedError, Outcome, Processes
from ._options import Options
from ._output import Output

log = logging.getLogger(__name__)

PREVIEW = 100
"""Characters of the code that a list of executions shows."""
_OVERHEAD = 2048
_QUEUED_BYTES = 256 << 20
"""Bytes of queued code past which nothing more is queued, even below --max-queued."""
_ERROR = 65536
_USAGE_INTERVAL = 0.5
_SCRIPT = 16_384
"""Bytes that an execution's own file in TMPDIR may take, besides its text."""
_WHY: dict[int, str] = {
    signal.SIGXCPU: " (SIGXCPU): it used up its CPU time (--cpu-limit)",
    signal.SIGKILL: " (SIGKILL): by itself, or by the kernel for want of CPU time or memory",
    signal.SIGSEGV: " (SIGSEGV)",
    signal.SIGABRT: " (SIGABRT)",
}


class State(IntEnum):
    """ExecutionState of the wire protocol."""

    PENDING = 1
    RUNNING = 2
    COMPLETED = 3
    FAILED = 4
    CANCELLED = 5
    TIMEOUT = 6

    @property
    def final(self) -> bool:
        return self >= State.COMPLETED


class QueueFullError(Exception):
    """The limits on running and queued executions are reached."""


class DrainingError(Exception):
    """The server is shutting down."""


class Execution:
    """One run of some code. Changed by `Executions` alone."""

    def __init__(
        self,
        source: str,
        timeout_ms: int,
        limit: int,
        *,
        merge: bool = False,
        tests: str | None = None,
        cached_name: str | None = None,
    ) -> None:
        self.id = uuid.uuid4().hex
        self.source = source
        self.timeout_ms = timeout_ms
        self.merge = merge
        self.tests = tests
        self.cached_name = cached_name
        self.cached_entry: CacheEntry | None = None
        self.state = State.PENDING
        self.output = Output(limit)
        self.error_output = Output(limit)
        self.error: str | None = None
        self.report = ""
        self.started_at_ms = now_ms()
        self.file_time: int | None = None
        self.finished_at_ms: int | None = None
        self.retained = 0
        self._changed = asyncio.Event()

    @property
    def execution_time_ms(self) -> int:
        return (self.finished_at_ms or now_ms()) - self.started_at_ms

    @property
    def size(self) -> int:
        """About how many bytes it holds."""
        texts = (self.source, self.tests or "", self.error or "", self.report)
        return sum(map(sys.getsizeof, texts)) + self.output.size + self.error_output.size + _OVERHEAD

    async def changed(self) -> None:
        """Returns at the next output or change of state."""
        await self._changed.wait()

    async def begun(self) -> None:
        """Returns once it is no longer queued. Safe to cancel."""
        while self.state == State.PENDING:
            await self.changed()

    async def finished(self) -> None:
        """Returns once the state is final. Safe to cancel."""
        while not self.state.final:
            await self.changed()

    def notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def follow(self) -> AsyncIterator[tuple[str, str]]:
        """Output and error output as they arrive, to the end of the execution."""
        seen = errors_seen = 0
        while True:
            # Read before the texts: a final execution has all of its output.
            final = self.state.final
            text, errors = self.output.since(seen), self.error_output.since(errors_seen)
            seen, errors_seen = seen + len(text), errors_seen + len(errors)
            if text or errors:
                yield text, errors
            elif final:
                return
            else:
                await self.changed()


class Executions:
    """Runs executions, at most `max_concurrent` at once, first come first served."""

    def __init__(self, options: Options, processes: Processes, cache: ScriptCache) -> None:
        self._options = options
        self._processes = processes
        self._cache = cache
        self._used = 0
        self._watch: asyncio.Task[None] | None = None
        self._all: dict[str, Execution] = {}
        self._pending: dict[str, Execution] = {}
        self._running: dict[str, _Run] = {}
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._retained = 0

    def submit(self, source: str, timeout_ms: int, **kind: Any) -> Execution:
        """Starts or queues code; `kind` goes to `Execution`.

        Raises:
            QueueFullError: No room.
            DrainingError: The server is shutting down.
        """
        if self._draining:
            raise DrainingError
        full = len(self._running) >= self._options.max_concurrent
        waiting = sum(pending.size for pending in self._pending.values()) if full else 0
        if full and (len(self._pending) >= self._options.max_queued or waiting > _QUEUED_BYTES):
            raise QueueFullError
        execution = Execution(source, timeout_ms, self._options.max_output, **kind)
        self._all[execution.id] = execution
        if full:
            self._pending[execution.id] = execution
        else:
            self._start(execution)
        return execution

    def get(self, execution_id: str) -> Execution | None:
        return self._all.get(execution_id)

    def began(self, execution_id: str) -> int | None:
        """The `file_time` when an execution began; None: it has not, or is not known."""
        execution = self._all.get(execution_id)
        return None if execution is None else execution.file_time

    def newest_first(self) -> list[Execution]:
        return list(reversed(self._all.values()))

    def cancel(self, execution: Execution, why: str = "cancelled") -> bool:
        """Ends a queued or running execution; False where it had ended already."""
        if self._pending.pop(execution.id, None):
            self._finish(execution, State.CANCELLED, why)
            return True
        run = self._running.get(execution.id)
        return run is not None and run.stop(State.CANCELLED, why)

    @property
    def busy(self) -> bool:
        """Whether something runs."""
        return not self._idle.is_set()

    async def drain(self, grace: float) -> None:
        """Takes nothing new, gives what runs `grace` seconds, then kills it."""
        self._draining = True
        for execution in list(self._pending.values()):
            self.cancel(execution, "the server is shutting down")
        try:
            async with asyncio.timeout(grace):
                await self._idle.wait()
        except TimeoutError:
            log.info("%d executions outlived the grace period of %.1f s", len(self._running), grace)
            self.kill_all()
        await self._idle.wait()

    def kill_all(self) -> None:
        """Begins to kill what runs; `drain` returns when that is done."""
        for run in list(self._running.values()):
            run.stop(State.CANCELLED, "the server is shutting down")

    def _start(self, execution: Execution) -> None:
        execution.state = State.RUNNING
        execution.started_at_ms, execution.file_time = now_ms(), file_time()
        try:
            if not self._running:
                self._processes.containment.shared_memory.begin()
            run = _Run(self._processes, self._cache, execution, self._check_full_workspace)
        except OSError as error:
            log.warning("cannot start an interpreter: %s", error)
            self._finish(execution, State.FAILED, f"the server cannot start an interpreter: {error}")
            return
        self._running[execution.id] = run
        self._idle.clear()
        run.task.add_done_callback(lambda _: self._ended(run))
        if self._watch is None or self._watch.done():
            self._watch = asyncio.create_task(self._watch_usage(), name="watch-usage")
        execution.notify()

    async def _watch_usage(self) -> None:
        """Ends everything that runs when the workspace overflows.

        A workspace that is over its limit already may stay as full as it is, so that code
        which removes files can still run.
        """
        while self._running:
            await asyncio.sleep(_USAGE_INTERVAL)
            bound = max(self._options.workspace_limit, self._used)
            scripts = sum(_script_size(run.execution) for run in self._running.values())
            used = await asyncio.to_thread(self._processes.usage, bound + scripts)
            if used > bound + scripts:
                await self._overflow(bound)
            else:
                self._used = min(used, bound)  # Without the files that go with the executions.

    async def _overflow(self, bound: int) -> None:
        text = self._overflow_text(bound)
        runs = list(self._running.values())
        log.warning("ending %d executions: %s", len(runs), text)
        for run in runs:
            run.stop(State.FAILED, text)
        if runs:  # They may have ended meanwhile.
            await asyncio.wait([run.task for run in runs])
        await self.measure()

    async def _check_full_workspace(self) -> str | None:
        """An error if a workspace that was full already has grown; asked when an execution ends.

        It may have ended before the watch looked. A workspace below its limit is left to the
        watch, so that not every execution counts files.
        """
        bound = self._used
        if bound <= self._options.workspace_limit:
            return None
        scripts = sum(_script_size(run.execution) for run in self._running.values())
        used = await asyncio.to_thread(self._processes.usage, bound + scripts)
        return self._overflow_text(bound) if used > bound + scripts else None

    def _overflow_text(self, bound: int) -> str:
        return (
            f"more than {bound >> 20} MiB in the workspace (--workspace-limit-mb is"
            f" {self._options.workspace_limit >> 20}): remove files first"
        )

    async def measure(self) -> None:
        """Lets the workspace be as full as it is now."""
        self._used = await asyncio.to_thread(self._processes.usage, sys.maxsize)

    def _ended(self, run: _Run) -> None:
        execution = run.execution
        del self._running[execution.id]
        if (failure := run.task.exception()) is not None:
            log.error("execution %s failed in the server", execution.id, exc_info=failure)
            self._finish(execution, State.FAILED, f"the server could not run it: {failure}")
        else:
            self._finish(execution, *run.task.result())
        if not self._running:
            try:
                self._processes.containment.shared_memory.end()
            except Exception:  # Queued executions have to start all the same.
                log.exception("cleaning up shared memory failed")
        while self._pending and len(self._running) < self._options.max_concurrent:
            self._start(self._pending.pop(next(iter(self._pending))))
        if not self._running:
            self._idle.set()

    def _finish(self, execution: Execution, state: State, error: str | None) -> None:
        execution.state, execution.error = state, error
        execution.finished_at_ms = now_ms()
        execution.notify()
        # Remembered: Python caches a text's UTF-8 when it is first sent, and the size grows.
        execution.retained = execution.size
        self._retained += execution.retained
        asyncio.get_running_loop().call_later(self._options.retain_for, self._forget, execution.id)
        if self._retained > self._options.retain_limit:
            for old in [e for e in self._all.values() if e.state.final]:
                if self._retained <= self._options.retain_limit:
                    break
                self._forget(old.id)

    def _forget(self, execution_id: str) -> None:
        if execution := self._all.pop(execution_id, None):
            self._retained -= execution.retained


class _Run:
    """A running execution: its task, and why it has to end early, if it has to."""

    def __init__(
        self,
        processes: Processes,
        cache: ScriptCache,
        execution: Execution,
        check_full_workspace: Callable[[], Awaitable[str | None]],
    ) -> None:
        self.execution = execution
        self._cache = cache
        self._processes = processes
        self._check_full_workspace = check_full_workspace
        self._job = Job(execution.source, execution.tests, execution.merge)
        self._interpreter = processes.take(self._job)
        self._verdict: tuple[State, str] | None = None
        self.task = asyncio.create_task(self._run(), name=f"execution-{execution.id}")

    def stop(self, state: State, why: str) -> bool:
        if self._verdict is not None:
            return False
        self._verdict = state, why
        self._interpreter.kill()
        return True

    async def _run(self) -> tuple[State, str | None]:
        execution = self.execution
        text = f"timed out after {execution.timeout_ms} ms"
        timer = asyncio.get_running_loop().call_later(
            execution.timeout_ms / 1000, self.stop, State.TIMEOUT, text
        )
        try:
            outcome = await self._run_job()
        finally:
            timer.cancel()
            await self._interpreter.close()
            self._processes.start_spares_soon()
        execution.output.feed(b"", final=True)
        execution.error_output.feed(b"", final=True)
        if execution.tests is not None:
            execution.report = outcome.report
        state, error = self._judge(outcome)
        if state == State.COMPLETED and (problem := await self._check_full_workspace()):
            state, error = State.FAILED, problem
        if state == State.COMPLETED and execution.cached_name is None and execution.tests is None:
            try:
                execution.cached_entry = await asyncio.to_thread(self._cache.add, execution.source)
            except OSError as refusal:
                log.warning("could not cache a script: %s", refusal)
        return state, error

    async def _run_job(self) -> Outcome:
        try:
            return await self._interpreter.run(self._job, self._on_output, self._on_error_output)
        except NotStartedError as failure:
            log.warning("an execution is not forked: %s", failure)
            await self._interpreter.close()
        self._interpreter = self._processes.take(self._job, warm=False)
        if self._verdict is not None:
            self._interpreter.kill()
        return await self._interpreter.run(self._job, self._on_output, self._on_error_output)

    def _on_output(self, data: bytes) -> None:
        self.execution.output.feed(data)
        self.execution.notify()

    def _on_error_output(self, data: bytes) -> None:
        self.execution.error_output.feed(data)
        self.execution.notify()

    def _judge(self, outcome: Outcome) -> tuple[State, str | None]:
        if outcome.killed_for is not None and outcome.exit != 0:
            return State.FAILED, outcome.killed_for
        if outcome.exit is None:
            return self._verdict or (State.FAILED, "its processes were killed from outside")
        if outcome.exit == 0:
            return State.COMPLETED, None
        if outcome.report and self.execution.tests is None:
            return State.FAILED, shortened(outcome.report)
        if outcome.exit > 0:
            return State.FAILED, f"exit status {outcome.exit}"
        number = -outcome.exit
        return State.FAILED, f"killed by signal {number}{_WHY.get(number, '')}"


def _script_size(execution: Execution) -> int:
    """About how many bytes on disk the execution's own script takes, which do not count as the code's."""
    return 4 * (len(execution.source) + len(execution.tests or "")) + _SCRIPT


def shortened(text: str) -> str:
    """An error text of bounded length, which says so where it was cut."""
    return text if len(text) <= _ERROR else f"{text[:_ERROR]}\n[cut: {len(text):,} characters]"


def now_ms() -> int:
    return time.time_ns() // 1_000_000
