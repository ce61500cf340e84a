"""The calls of one client to one sandbox."""

from __future__ import annotations

import asyncio
import contextlib
import math
import weakref
from collections.abc import Awaitable, Callable, Container, Coroutine
from typing import Any, Protocol, TypeVar

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from .. import _telemetry
from ..config import TlsConfig
from ..errors import SandboxError, SandboxTimeoutError, SandboxUnavailableError
from ..proto import files_pb2, files_pb2_grpc
from ..proto import metadata as names
from ..proto import sandbox_pb2 as pb
from ..proto import sandbox_pb2_grpc as pb_grpc
from ..proto.pieces import data_of
from ..results import HealthStatus
from .channel import Channel, within
from .execution_call import ExecutionCall
from .failures import SUSPICIOUS, failure
from .fence import Fence, Metadata, features
from .file_call import FileCall
from .usage import Usage

_T = TypeVar("_T")

BEAT = 5.0
"""Seconds without a word from the server after which it is asked for its health."""
_PATIENCE = (0.2, 0.4, 0.8)
"""How often it is asked before that counts as a miss, and how long each time, in beats."""


def _makers(stub: Callable[[Any], object], kind: str | None = None) -> dict[str, Callable[[Any], Any]]:
    """How each method of a stub is made, by name; all of them would be some 15 KiB a channel."""

    class Recorder:
        def __getattr__(self, own: str) -> Any:
            return lambda *args, **kwargs: lambda channel: getattr(channel, kind or own)(*args, **kwargs)

    return vars(stub(Recorder()))


def _read_file(channel: Any) -> Any:
    """Reading a file; its pieces come without the copies that protobuf would make of them."""
    method = files_pb2.DESCRIPTOR.services_by_name["FileService"].methods_by_name["Read"]
    path = f"/{method.containing_service.full_name}/{method.name}"
    return channel.unary_stream(path, files_pb2.ReadRequest.SerializeToString, _decode_piece)


def _decode_piece(message: bytes) -> Any:
    data = data_of(message)
    return files_pb2.ReadResponse.FromString(message) if data is None else bytes(data)


_HEALTH = frozenset({"Check", "HealthCheck"})
_METHODS = (
    _makers(pb_grpc.SandboxServiceStub)
    | _makers(health_pb2_grpc.HealthStub)
    | _makers(files_pb2_grpc.FileServiceStub)
)
_METHODS["Read"] = _read_file
# On the wire one answer is a stream of one. gRPC gives the initial metadata ahead of the answer
# only of a stream.
_STREAMS = _makers(pb_grpc.SandboxServiceStub, "unary_stream")


class StreamCall(Protocol):
    """A call of several messages, which the connection keeps until its end.

    Attributes:
        rpc: Its method.
        is_use: Whether it counts as a use of its own.
        has_ended: Whether its end is noted.
    """

    rpc: str
    is_use: bool
    has_ended: bool

    async def read(self) -> Any:
        """The next message; None at the end."""

    def end(self, failure: SandboxError | None = None) -> None:
        """Cancels the call if it has not ended; `failure` is what its reader gets."""


class Connection:
    """The calls of one client, and the account of their use.

    Attributes:
        fence: Which machine the calls are meant for; None: whichever answers.
        pace: Awaited by answers to health checks.
        misses: How often in a row the server has not told its health while calls waited for code.
    """

    def __init__(self, target: str, tls: TlsConfig | None) -> None:
        self.target = target
        self.channel = Channel(target, tls)
        self.usage = Usage(self.channel.now)
        self.health_error: SandboxError | None = None
        self.on_suspect: Callable[[], None] | None = None
        self.on_close: Callable[[], None] | None = None
        self.pace: Callable[[], Awaitable[None]] | None = None
        self.fence: Fence | None = None
        self.beat = BEAT
        self.misses = 0
        self._calls: set[Any] = set()
        self._stream_calls: weakref.WeakSet[StreamCall] | None = None  # 0.8 KiB, once there is one
        self._tasks: set[asyncio.Task[Any]] = set()
        self._asking: asyncio.Task[bool] | None = None
        self._next_beat = 0.0

    # Calls that are answered at once

    async def use(self, rpc: str, request: Any, timeout: float, lasts: float | None = None) -> Any:
        """A unary call of the user's: counted, and one whose failure is suspicious.

        Args:
            rpc: Its method.
            request: Its message.
            timeout: Deadline in seconds.
            lasts: How long what it begins may last; None: until its answer.
        """
        with self.usage.call():
            return await self._call(rpc, request, timeout, lasts)

    async def check_health(self, timeout: float) -> HealthStatus:
        """Asks the standard health service, or the server's own where it has none."""
        deadline = asyncio.get_running_loop().time() + timeout
        if not self.channel.has_own_health_only:
            try:
                answer = await self._call("Check", health_pb2.HealthCheckRequest(), timeout)
                return HealthStatus(answer.status == health_pb2.HealthCheckResponse.SERVING)
            except SandboxError as error:
                if error.status != "UNIMPLEMENTED":
                    raise
                self.channel.has_own_health_only = True
        remaining = deadline - asyncio.get_running_loop().time()
        answer = await self._call("HealthCheck", pb.HealthCheckRequest(), remaining)
        return HealthStatus(answer.healthy, answer.kubernetes_context or None)

    async def _call(self, rpc: str, request: Any, timeout: float, lasts: float | None = None) -> Any:
        method = await self._method(_METHODS[rpc], rpc, timeout, lasts)
        call = method(request, timeout=timeout, metadata=self._metadata())
        self._calls.add(call)
        try:
            # Awaiting the call itself would hide the source of a cancellation: gRPC raises a
            # CancelledError of its own in place of anyio's, which its cancel scope then lets out.
            await call.code()
            if self.pace is not None and rpc in _HEALTH:
                await self.pace()
            if self.channel.closed and call.cancelled():
                raise self.closed_under(rpc)
            answer = await call
            metadata = await call.initial_metadata()
            self.heard(metadata)
            self.verify(rpc, metadata)
        except grpc.aio.AioRpcError as error:
            # Without gRPC's frames: a channel goes on connecting, closed or not, as long as
            # anything refers to a call of it.
            suspicious = () if rpc in _HEALTH else SUSPICIOUS
            raise self.failure(rpc, error, suspicious) from error.with_traceback(None)
        except asyncio.CancelledError as error:
            call.cancel()
            self._own(_settled(call))
            error.__traceback__ = None
            raise
        finally:
            self._calls.discard(call)
            del call
        if answer is None:
            raise self.undecodable(rpc)
        return answer

    async def _method(
        self, make: Callable[[Any], Any], rpc: str, timeout: float, lasts: float | None = None
    ) -> Any:
        """The method of the channel, once a call to this machine may go out."""
        fence = self.fence
        if fence is not None:
            self._check_usable(fence, rpc)
            if fence.admit is not None and rpc not in _HEALTH:
                admission = fence.admit(lasts or timeout)
                if admission is not None:
                    await admission
                    self._check_usable(fence, rpc)
            # A connection to a server without fences has broken: the next may lead anywhere.
            lost = fence.pinned and fence.boot_id is None and not self.channel.is_connected
            if lost and rpc not in _HEALTH:
                text = "nothing was run: the connection broke, and the sandbox was not looked up"
                await within(timeout, fence.look(), f"{self._named(rpc)}: {text}")
        return await self.channel.method(make, timeout)

    def _check_usable(self, fence: Fence, rpc: str) -> None:
        if fence.broken is not None:
            raise fence.refusal(self._named(rpc))
        self.channel.check_usable()

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        expectations = () if self.fence is None else self.fence.expectations()
        return self.channel.metadata + expectations + _telemetry.headers()

    # Calls that wait for code

    async def wait(
        self, rpc: str, request: Any, limit: float | None = None, patience: float | None = None
    ) -> Any:
        """A unary call of the user's that waits for code.

        Args:
            rpc: Its method.
            request: Its message.
            limit: Seconds for the code, from its begin.
            patience: Instead of `limit`, how long the caller waits. That it ends says nothing
                of the server.
        """
        with self.usage.call():
            call = await self._start(rpc, request, limit, patience)
            try:
                answer = await call.read()
                if answer is None or await call.read() is not None:
                    raise self.undecodable(rpc)
                return answer
            finally:
                call.end()

    async def start_stream(self, request: pb.ExecuteRequest, limit: float) -> ExecutionCall:
        """Begins to run code; counted until its end."""
        call = await self._start("ExecuteStream", request, limit)
        call.is_use = True
        self.usage.begin()
        return call

    async def _start(
        self, rpc: str, request: Any, limit: float | None, patience: float | None = None
    ) -> ExecutionCall:
        with _telemetry.execution(rpc) as execution:
            method = await self._method(_STREAMS[rpc], rpc, patience or limit or self.beat)
            timeout = patience
            if patience is None and self.channel.features is not None and not self.queues:
                timeout = limit
            call = ExecutionCall(
                self, rpc, method(request, timeout=timeout, metadata=self._metadata()), limit, execution
            )
        self._add(call)
        self._keep(call.minder)
        return call

    async def start_transfer(self, rpc: str, patience: float, *request: Any) -> FileCall:
        """Begins to read or write a file; counted until its end."""
        with _telemetry.transfer(rpc) as span:
            method = await self._method(_METHODS[rpc], rpc, patience)
            call = FileCall(self, rpc, method(*request, metadata=self._metadata()), patience, span)
        self._add(call)
        self.usage.begin()
        return call

    def _add(self, call: StreamCall) -> None:
        if self._stream_calls is None:
            self._stream_calls = weakref.WeakSet()
        self._stream_calls.add(call)

    def call_ended(self, call: StreamCall) -> None:
        """Notes the end of a call, once."""
        if not call.has_ended:
            call.has_ended = True
            if call.is_use:
                self.usage.end()

    def drop(self, call: StreamCall, loop: asyncio.AbstractEventLoop) -> None:
        """Ends a call for the garbage collector: from whatever thread it runs in."""
        self.call_ended(call)
        with contextlib.suppress(RuntimeError):  # The loop is closed, and the call with it.
            loop.call_soon_threadsafe(call.end)

    def count_execution(self, execution_id: str, limit: float, *, queued: bool = False) -> None:
        """Counts an asynchronous execution until it is seen ended, or for `limit` from its begin."""
        if queued and self.queues:
            self.usage.executions[execution_id] = math.inf
            self._own(self._follow(execution_id, limit))
        else:
            self.usage.executions[execution_id] = self.channel.now() + limit

    async def _follow(self, execution_id: str, limit: float) -> None:
        """Waits until an execution is no longer queued."""
        request = pb.GetExecutionRequest(execution_id=execution_id, wait=True, output_offset=2**63 - 1)
        with contextlib.suppress(SandboxError):
            call = await self._start("GetExecution", request, limit)
            await call.begun()
            call.end()
        if execution_id in self.usage.executions:
            self.count_execution(execution_id, limit)

    # Signs of life

    @property
    def queues(self) -> bool:
        """Whether the server is known to say when code begins."""
        return names.QUEUE in (self.channel.features or ())

    def heard(self, metadata: Metadata | None = None) -> None:
        """Notes that the server has answered, and the features that its initial metadata name."""
        self._next_beat = self.channel.now() + self.beat
        self.misses = 0
        if metadata is not None:
            self.channel.features = features(dict(iter(metadata)))

    def next_beat(self, waiting_since: float) -> float:
        """When a server that stays silent has to answer a health check."""
        return max(self._next_beat, waiting_since + self.beat)

    async def answers(self) -> bool:
        """Whether the server answers a health check, whatever it says; all callers share one check."""
        if self._asking is None or self._asking.done():
            self._asking = self._own(self._ask())
        asking = self._asking
        await asyncio.wait({asking})
        return not asking.cancelled() and asking.result()

    async def _ask(self) -> bool:
        self._next_beat = self.channel.now() + self.beat
        for beats in _PATIENCE:
            try:
                await self.check_health(beats * self.beat)
            except SandboxTimeoutError:
                continue
            except SandboxError as error:
                if error.status in (None, "UNAVAILABLE"):
                    break
            self.misses = 0
            return True
        self.misses += 1
        return False

    # Errors

    def failure(self, rpc: str, error: grpc.aio.AioRpcError, suspicious: Container[str]) -> SandboxError:
        """The error of this library for a gRPC status; calls `on_suspect` for a suspicious one."""
        status = error.code().name
        if self.fence is not None:
            # grpc.aio loses the initial metadata of a stream that ends before they are read.
            metadata = error.initial_metadata(), error.trailing_metadata()
            replaced = self.fence.judge(self._named(rpc), status, *metadata)
            if replaced is not None:
                return replaced
        if status in suspicious:
            self.suspect()
        return failure(self._named(rpc), error)

    def verify(self, rpc: str, metadata: Metadata) -> None:
        """Checks by its initial metadata which machine has answered.

        Raises:
            SandboxReplacedError: One without fences: the call ran there.
        """
        if self.fence is not None and (replaced := self.fence.judge(self._named(rpc), "OK", metadata)):
            raise replaced

    def suspect(self) -> None:
        if self.on_suspect is not None:
            self.on_suspect()

    def undecodable(self, rpc: str) -> SandboxError:
        # gRPC logs the reason and hands out None.
        return SandboxError(f"{self._named(rpc)}: the answer cannot be decoded", status="INTERNAL")

    def closed_under(self, rpc: str) -> SandboxError:
        return SandboxUnavailableError(f"{self._named(rpc)}: the client was closed meanwhile")

    def _named(self, rpc: str) -> str:
        return f"{rpc} on {self.target}"

    # Its end

    async def renew(self) -> None:
        """Lets the next call make a channel anew, if this one is unconnected and unused."""
        if not self._calls and all(call.has_ended for call in self._stream_calls or ()):
            await self.channel.renew()

    async def close(self) -> None:
        was_closed = self.channel.closed
        here = self.channel.mark_closed()
        if self.on_close is not None and not was_closed:
            self.on_close()
        self.usage.executions.clear()
        if here:
            for call in list(self._calls):
                call.cancel()
            for waiting in list(self._stream_calls or ()):
                waiting.end(self.closed_under(waiting.rpc))
            await self.channel.close()
            if self._tasks:  # They have nothing to wait for any more.
                await asyncio.wait(self._tasks, timeout=1)

    def _own(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        return self._keep(asyncio.create_task(work, name=f"call on {self.target}"))

    def _keep(self, task: asyncio.Task[_T]) -> asyncio.Task[_T]:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def _settled(call: Any) -> None:
    """Takes the end of a cancelled call.

    Else it may stay in a task of gRPC's that refers to the call and is referred to by it.
    """
    with contextlib.suppress(grpc.RpcError, asyncio.CancelledError):
        await call
