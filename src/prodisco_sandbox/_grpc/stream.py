"""What a call streams, as it comes."""

from __future__ import annotations

import asyncio
import weakref
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from ..errors import SandboxError
from ..proto import sandbox_pb2 as pb
from ..results import ExecutionChunk
from .codec import read_chunk
from .connection import Connection, StreamCall

_T = TypeVar("_T")


class CallStream(ABC, Generic[_T]):
    """An async iterator over what a call streams, and an async context manager."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._call: StreamCall | None = None
        self._finalizer: weakref.finalize[..., CallStream[_T]] | None = None
        self._over = self._reading = False

    @abstractmethod
    async def _begin(self) -> StreamCall:
        """Makes the call."""

    @abstractmethod
    def _take(self, message: Any) -> _T | None:
        """What a message holds; None: nothing for the caller."""

    def _check_end(self) -> None:
        """Raises `SandboxError` if the call must not end here."""

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> _T:
        """The next one.

        Raises:
            SandboxError: The call failed (see the error tree), or the server ended it too early.
        """
        self._claim()
        try:
            while not self._over:
                message = await (self._call or await self._start()).read()
                if message is None:
                    self._finish()
                    self._check_end()
                elif (taken := self._take(message)) is not None:
                    return taken
        except BaseException:
            self._finish()
            raise
        finally:
            self._reading = False
        raise StopAsyncIteration

    async def __aenter__(self) -> Self:
        self._claim()
        try:
            if not self._over and self._call is None:
                await self._start()
        finally:
            self._reading = False
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Cancels the call if it has not ended. Idempotent; never suspends."""
        self._finish()

    def _claim(self) -> None:
        if self._reading:
            raise SandboxError("this stream is already being read by another task")
        self._reading = True

    async def _start(self) -> StreamCall:
        call = await self._begin()
        if self._over:
            call.end()
            raise self._closed_under()
        self._call = call
        self._finalizer = weakref.finalize(self, self._connection.drop, call, asyncio.get_running_loop())
        self._finalizer.atexit = False
        return call

    def _closed_under(self) -> SandboxError:
        return SandboxError("the stream was closed while it was being read")

    def _finish(self) -> None:
        self._over = True
        if self._call is not None and self._finalizer is not None and self._finalizer.detach() is not None:
            self._call.end(self._closed_under())


class ExecutionStream(CallStream[ExecutionChunk]):
    """The chunks of one execution, as they come: what `SandboxClient.execute_stream` returns.

    An async iterator of `ExecutionChunk`, and an async context manager::

        async with client.execute_stream("...") as stream:
            async for chunk in stream:
                print(chunk.text, end="")

    The execution starts when the stream is entered or first iterated. Leaving the
    context, `aclose`, or cancelling the task that iterates cancels the call. Without
    ``async with``, a ``break`` out of the loop cancels it as soon as nothing refers to
    the stream any more: at once in ``async for chunk in client.execute_stream(...)``,
    but only later where a variable still holds it. Can be iterated once, by one task at
    a time; after its end or an error it is exhausted.
    """

    def __init__(self, connection: Connection, request: pb.ExecuteRequest, timeout: float) -> None:
        super().__init__(connection)
        self._request = request
        self._timeout = timeout
        self._complete = False

    async def _begin(self) -> StreamCall:
        return await self._connection.start_stream(self._request, self._timeout)

    def _take(self, message: Any) -> ExecutionChunk | None:
        chunk = read_chunk(message)
        self._complete = self._complete or (chunk is not None and chunk.kind == "result")
        return chunk

    def _check_end(self) -> None:
        if not self._complete:
            raise SandboxError(f"ExecuteStream on {self._connection.target}: ended without a result")
