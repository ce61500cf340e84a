"""A call that carries the content of a file, in either direction."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
import grpc.aio

from ..errors import SandboxError, SandboxTimeoutError
from .execution_call import EOF, cancellations
from .failures import SUSPICIOUS

if TYPE_CHECKING:
    from .._telemetry.otel import Call
    from .connection import Connection

_T = TypeVar("_T")


class FileCall:
    """A call that carries the content of a file; it is ended at its first failure.

    A whole file may take as long as it takes: the server has `patience` seconds for each message.

    Attributes:
        rpc: Its method.
        is_use: It counts as a use of its own.
        has_ended: Whether its end is noted.
    """

    def __init__(
        self, connection: Connection, rpc: str, call: Any, patience: float, span: Call | None
    ) -> None:
        self._connection = connection
        self.rpc = rpc
        self._call = call
        self._patience = patience
        self._span = span
        self._stepping = False
        self.is_use, self.has_ended = True, False
        self._failure: SandboxError | None = None
        self._unverified = True

    async def read(self) -> Any:
        """The next message; None at the end.

        Raises:
            SandboxError: The call failed, or was ended from this side.
        """
        message = await self._step(self._receive)
        if message is EOF:
            self.end()
            return None
        return message

    async def write(self, message: bytes) -> None:
        """Sends a message, as it is on the wire. Raises as `read` does."""
        await self._step(lambda call: _send(call, message))

    async def answer(self) -> Any:
        """The server's answer, after the last message. Raises as `read` does."""
        answer = await self._step(self._finish)
        self.end()
        return answer

    def end(self, failure: SandboxError | None = None) -> None:
        """Cancels the call if it has not ended; `failure` is what its reader gets."""
        self._release(failure)
        if self._span is not None and not self._stepping:
            self._span.end()

    def _release(self, failure: SandboxError | None = None) -> None:
        call, self._call = self._call, None
        if call is not None:
            self._failure = failure
            call.cancel()
            self._connection.call_ended(self)

    async def _step(self, step: Callable[[Any], Awaitable[_T]]) -> _T:
        self._stepping = True
        try:
            return await self._attempt(step)
        except BaseException as error:
            if self._span is not None:
                self._span.end(error=error)
            raise
        finally:
            self._stepping = False

    async def _attempt(self, step: Callable[[Any], Awaitable[_T]]) -> _T:
        where = f"{self.rpc} on {self._connection.target}"
        cancelled_before = cancellations()
        try:
            if self._call is None:
                raise asyncio.CancelledError  # Ended between two steps.
            async with asyncio.timeout(self._patience):
                return await step(self._call)
        except grpc.aio.AioRpcError as error:
            self._release()
            raise self._connection.failure(self.rpc, error, SUSPICIOUS) from error.with_traceback(None)
        except SandboxError:
            self._release()
            raise
        except TimeoutError:
            self._release()
            self._connection.suspect()
            text = f"{where}: DEADLINE_EXCEEDED: the server was silent for {self._patience:.3g} s"
            raise SandboxTimeoutError(text, status="DEADLINE_EXCEEDED") from None
        except asyncio.CancelledError as error:
            self._release()
            if cancellations() == cancelled_before:
                failure = self._failure or SandboxError(f"{where}: the call was ended")
                raise failure.copy_for_waiter() from None
            error.__traceback__ = None
            raise

    async def _receive(self, call: Any) -> Any:
        message = await call.read()
        await self._verify(call)
        if message is None:
            raise self._connection.undecodable(self.rpc)
        return message

    async def _finish(self, call: Any) -> Any:
        with contextlib.suppress(
            grpc.aio.InternalError
        ):  # The server has ended the call: its status says why.
            await call.done_writing()
        # Awaiting the call itself would hide the source of a cancellation.
        await call.code()
        answer = await call
        await self._verify(call)
        if answer is None:
            raise self._connection.undecodable(self.rpc)
        return answer

    async def _verify(self, call: Any) -> None:
        if self._unverified:
            self._unverified = False
            metadata = await call.initial_metadata()
            self._connection.heard(metadata)
            self._connection.verify(self.rpc, metadata)


async def _send(call: Any, message: bytes) -> None:
    await call.wait_for_connection()
    try:
        if not call.done():
            # `write` would do the same, but replace the status of a server that ends the call
            # meanwhile by INTERNAL.
            await call._cython_call.send_serialized_message(message)
            return
    except grpc.aio.InternalError:
        pass
    await call.code()
    await call
