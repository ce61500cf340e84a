"""A call that waits for code: how long it may take, and what ended it."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from ..errors import SandboxError, SandboxTimeoutError, SandboxUnavailableError
from .codec import outcome

if TYPE_CHECKING:
    from .._telemetry.otel import Execution
    from .connection import Connection

MISSES = 2
"""Misses in a row that make a server stuck."""

EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]


class ExecutionCall:
    """A call that waits for code; it is ended once the code has had its time.

    A server with the feature ``queue`` sends the initial metadata when the code begins:
    the time counts from there, however long the code was queued. With other servers it
    counts from the call. The time that the caller spends between two messages does not
    count until it is as long as the code's time: then the call is taken to be abandoned.

    While the server is silent it has to answer health checks. One that says when code begins
    can answer them however full its queue is, so it is given up after some misses. Code may keep
    other servers from answering: they have until the code's time is over.

    Args:
        connection: What the call was made with.
        rpc: Its method.
        call: gRPC's object. It is released at the end, also where this one is kept: as long as
            something refers to it, its channel goes on connecting, even a closed one.
        limit: Seconds for the code, margin included; None: the call has a deadline that says
            nothing of the server.
        execution: Told its outcome, for telemetry.

    Attributes:
        is_use: Whether it counts as a use of its own.
        has_ended: Whether its end is noted.
        minder: The task that ends it when it is time.
    """

    def __init__(
        self,
        connection: Connection,
        rpc: str,
        call: Any,
        limit: float | None,
        execution: Execution | None = None,
    ) -> None:
        self._connection = connection
        self.rpc = rpc
        self._call = call
        self._limit = limit
        self._execution = execution
        self.is_use = self.has_ended = False
        self._failure: SandboxError | None = None
        loop = asyncio.get_running_loop()
        self._made_at = self._paused_at = loop.time()
        self._begun_at: float | None = None
        self._paused = 0.0
        self._reading = False
        self._unverified = True
        self.minder = loop.create_task(self._mind(call), name=f"{rpc} on {connection.target}")

    async def read(self) -> Any:
        """The next message; None at the end.

        Raises:
            SandboxError: The call failed, or was ended from this side.
        """
        if self._execution is None:
            return await self._read()
        try:
            message = await self._read()
        except BaseException as error:
            self._execution.end(error=error)
            raise
        if message is None:
            self._execution.end("error")
        else:
            self._execution.saw(outcome(message))
        return message

    async def _read(self) -> Any:
        if self._call is None:
            if self._failure is not None:
                raise self._failure.copy_for_waiter()
            return None
        message = await self._read_call()
        if message is EOF or message is None:
            self._release()
            if message is None:
                raise self._connection.undecodable(self.rpc)
            return None
        self._connection.heard()
        if self._unverified:
            self._unverified = False
            if self._call is None:  # It was ended in the same moment.
                return await self._read()
            self._connection.verify(self.rpc, await self._call.initial_metadata())
        return message

    async def _read_call(self) -> Any:
        loop = asyncio.get_running_loop()
        self._paused += loop.time() - self._paused_at
        self._reading = True
        before = cancellations()
        try:
            return await self._call.read()
        except grpc.aio.AioRpcError as error:
            self._release()
            failure = self._connection.failure(self.rpc, error, ("UNAVAILABLE",))
            late = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and self._limit is not None
            if late and not await self._connection.answers():
                self._connection.suspect()
            # Without gRPC's frames, which refer to the call.
            raise failure from error.with_traceback(None)
        except asyncio.CancelledError as error:
            self._release()
            if self._failure is not None and cancellations() == before:
                raise self._failure.copy_for_waiter() from None
            error.__traceback__ = None
            raise
        finally:
            self._reading = False
            self._paused_at = loop.time()

    def end(self, failure: SandboxError | None = None) -> None:
        """Cancels the call if it has not ended; `failure` is what its reader gets."""
        self._release(failure)
        if self._execution is not None and not self._reading:
            self._execution.end()

    def _release(self, failure: SandboxError | None = None) -> None:
        call, self._call = self._call, None
        if call is not None:
            self._failure = failure
            call.cancel()
            self._connection.call_ended(self)

    async def begun(self) -> None:
        """Waits until the code begins, or the call ends. Safe to cancel."""
        if self._call is not None:
            await self._call.initial_metadata()

    async def _mind(self, call: Any) -> None:
        await self._watch(call.initial_metadata, call)
        metadata = await call.initial_metadata()
        if metadata or not call.done():
            self._connection.heard(metadata)
        queues = self._connection.queues
        self._begun_at = asyncio.get_running_loop().time() if queues else self._made_at
        await self._watch(call.code, call)
        self._connection.call_ended(self)
        if not self._reading:
            with contextlib.suppress(grpc.RpcError, asyncio.CancelledError):
                # Else a cancellation stays in a task that refers to the call, and the call to it.
                await call.wait_for_connection()

    async def _watch(self, event: Any, call: Any) -> None:
        """Waits for an event of the call, which its end is too, and ends the call when it is time."""
        while True:
            due = self._due()
            beat = self._connection.next_beat(self._made_at)
            try:
                async with asyncio.timeout_at(beat if due is None else min(due, beat)):
                    await event()
                return
            except TimeoutError:
                alive = await self._connection.answers()
            if not call.done():
                self._judge(alive=alive)

    def _due(self) -> float | None:
        """When the code has had its time; None: it may be queued."""
        if self._limit is None or (self._begun_at is None and self._connection.queues):
            return None
        if self._begun_at is None:
            return self._made_at + self._limit
        if self._reading:
            return self._begun_at + self._limit + self._paused
        return self._paused_at + self._limit

    def _judge(self, *, alive: bool) -> None:
        due, now = self._due(), asyncio.get_running_loop().time()
        where = f"{self.rpc} on {self._connection.target}"
        failure: SandboxError
        if due is not None and due <= now:
            text = f"{where}: DEADLINE_EXCEEDED: the code had {self._limit:.3g} s"
            failure = SandboxTimeoutError(text, status="DEADLINE_EXCEEDED")
        elif self._connection.queues and self._connection.misses >= MISSES:
            text = f"{where}: UNAVAILABLE: the server does not answer health checks"
            failure = SandboxUnavailableError(text, status="UNAVAILABLE")
        else:
            return
        self.end(failure)
        if not alive:
            self._connection.suspect()


def cancellations() -> int:
    """How often this task has been cancelled: gRPC raises CancelledError for its calls too.

    A task that cleans up behind itself has been cancelled already, and may be once more.
    """
    task = asyncio.current_task()
    return 0 if task is None else task.cancelling()
