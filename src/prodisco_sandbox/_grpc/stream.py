"""The output of one execution, as it comes."""

from __future__ import annotations

import asyncio
import weakref
from types import TracebackType
from typing import Self

from ..errors import SandboxError
from ..proto import sandbox_pb2 as pb
from ..results import ExecutionChunk
from .codec import read_chunk
from .connection import Connection
from .execution_call import ExecutionCall


class ExecutionStream:
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
        self._connection = connection
        self._request = request
        self._timeout = timeout
        self._call: ExecutionCall | None = None
        self._finalizer: weakref.finalize[..., ExecutionStream] | None = None
        self._over = self._reading = self._complete = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> ExecutionChunk:
        """The next chunk.

        Raises:
            SandboxError: The call failed (see the error tree), or the server ended the
                stream without a result.
        """
        self._claim()
        try:
            while not self._over:
                message = await (self._call or await self._start()).read()
                if message is None:
                    self._finish()
                    if not self._complete:
                        raise SandboxError(
                            f"ExecuteStream on {self._connection.target}: ended without a result"
                        )
                elif (chunk := read_chunk(message)) is not None:
                    self._complete = self._complete or chunk.kind == "result"
                    return chunk
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

    async def _start(self) -> ExecutionCall:
        call = await self._connection.start_stream(self._request, self._timeout)
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
