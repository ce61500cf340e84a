"""One gRPC channel to one sandbox: its credentials, its calls and their errors.

Together with _execution_call.py this is all that knows grpc.aio.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from .._aio.single_flight import SingleFlight
from .._targets import grpc_address
from ..config import TlsConfig
from ..errors import (
    SandboxCapacityError,
    SandboxError,
    SandboxPermissionError,
    SandboxReplacedError,
    SandboxTimeoutError,
    SandboxUnavailableError,
)
from ..proto import metadata as names
from ..proto import sandbox_pb2 as pb
from ..proto import sandbox_pb2_grpc as pb_grpc
from ..results import HealthStatus
from .codec import MAX_MESSAGE_BYTES, about_size
from .execution_call import BEAT, PATIENCE, ExecutionCall
from .fence import Fence, Metadata

_T = TypeVar("_T")

_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # A pod has just appeared, so what failed a moment ago is worth another try: gRPC
    # would wait up to 30 s between lookups and 120 s between connections. 100 ms is the
    # least that it accepts; "min_reconnect" is how long one attempt to connect may take.
    ("grpc.dns_min_time_between_resolutions_ms", 250),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 250),
    # Else a new channel inherits the backoff of an old one to the same address.
    ("grpc.use_local_subchannel_pool", 1),
    # Servers allow one ping in five minutes unless they are told otherwise, and cut the
    # connection of who sends more. Death is noticed by health checks, and where there are
    # calls, by data that the peer's kernel has not acknowledged for so long as the timeout.
    ("grpc.keepalive_time_ms", 330_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # An http_proxy of the environment must not divert in-cluster targets.
    ("grpc.enable_http_proxy", 0),
)

_ERRORS: dict[grpc.StatusCode, type[SandboxError]] = {
    grpc.StatusCode.UNAVAILABLE: SandboxUnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: SandboxTimeoutError,
    grpc.StatusCode.UNAUTHENTICATED: SandboxPermissionError,
    grpc.StatusCode.PERMISSION_DENIED: SandboxPermissionError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: SandboxCapacityError,
}

SUSPICIOUS = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
"""With these, calls to a dead sandbox fail."""

_FROM_SERVERS = frozenset(grpc.StatusCode) - {
    grpc.StatusCode.OK,
    *SUSPICIOUS,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNKNOWN,
}
"""What gRPC itself never says in place of a server."""


def read_credentials(tls: TlsConfig) -> grpc.ChannelCredentials:
    """Reads the PEM files. Blocks.

    Raises:
        SandboxError: A file cannot be read or is no PEM file; the message names it.
    """
    return grpc.ssl_channel_credentials(_read_pem(tls, "ca"), _read_pem(tls, "key"), _read_pem(tls, "cert"))


def _read_pem(tls: TlsConfig, name: str) -> bytes | None:
    path = getattr(tls, name)
    if path is None:
        return None
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise SandboxError(f"TlsConfig.{name}: cannot read {path}: {error.strerror or error}") from error
    if b"-----BEGIN " not in data:
        raise SandboxError(f"TlsConfig.{name}: {path} is no PEM file: it has no BEGIN line")
    return data


def _makers(stub: Callable[[Any], object], kind: str | None = None) -> dict[str, Callable[[Any], Any]]:
    """How each method of a stub is made, by name; all of them would be some 15 KiB a channel."""

    class Channel:
        def __getattr__(self, own: str) -> Any:
            return lambda *args, **kwargs: lambda channel: getattr(channel, kind or own)(*args, **kwargs)

    return vars(stub(Channel()))


_HEALTH = frozenset({"Check", "HealthCheck"})
_METHODS = _makers(pb_grpc.SandboxServiceStub) | _makers(health_pb2_grpc.HealthStub)
# On the wire one answer is a stream of one. Only of a stream does gRPC tell the initial metadata
# before the answer is there.
_STREAMS = _makers(pb_grpc.SandboxServiceStub, "unary_stream")


class Connection:
    """A channel that is made on first use, its calls, and the account of their use.

    All of it belongs to the event loop, and the process, of the first call.
    """

    def __init__(self, target: str, tls: TlsConfig | None) -> None:
        self.target = target
        self.closed = False
        self.health_error: SandboxError | None = None
        self.on_suspect: Callable[[], None] | None = None
        self.on_close: Callable[[], None] | None = None
        self.pace: Callable[[], Awaitable[None]] | None = None  # for answers to health checks
        self.fence: Fence | None = None
        self._address = grpc_address(target)
        self._tls = tls
        self._credentials: SingleFlight[grpc.ChannelCredentials] | None = None
        if tls is not None:
            self._credentials = SingleFlight(
                f"reading the TLS files for {target}", lambda: asyncio.to_thread(read_credentials, tls)
            )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = 0
        self._channel: grpc.aio.Channel | None = None
        self._methods: dict[Callable[[Any], Any], Any] = {}
        self._has_own_health_only = False
        self._calls: set[Any] = set()
        self._execution_calls: set[ExecutionCall] = set()
        self._kept: weakref.WeakSet[ExecutionCall] = weakref.WeakSet()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._uses = 0
        self._features: frozenset[str] | None = None
        self._asking: asyncio.Task[bool] | None = None
        self._next_beat = 0.0
        self.misses = 0
        """How often in a row the server has not told its health while calls waited for code."""
        self._executions: dict[str, float] = {}
        self._last_used = 0.0

    # The account of use

    @property
    def in_flight(self) -> int:
        if self._executions:
            self._forget_expired()
        return self._uses + len(self._executions)

    @property
    def last_used(self) -> float:
        if self._executions:
            self._forget_expired()
        return self._last_used

    def execution_started(self, execution_id: str, limit: float, *, queued: bool = False) -> None:
        """Counts an asynchronous execution until it is seen ended, or for `limit` from its begin."""
        if queued and self.queues:
            self._executions[execution_id] = math.inf
            self._own(self._follow(execution_id, limit))
        else:
            self._executions[execution_id] = asyncio.get_running_loop().time() + limit

    async def _follow(self, execution_id: str, limit: float) -> None:
        """Waits until an execution is no longer queued."""
        request = pb.GetExecutionRequest(execution_id=execution_id, wait=True, output_offset=2**63 - 1)
        with contextlib.suppress(SandboxError):
            call = await self._start("GetExecution", request, limit)
            await call.begun()
            call.end()
        if execution_id in self._executions:
            self.execution_started(execution_id, limit)

    def execution_ended(self, execution_id: str) -> None:
        self._executions.pop(execution_id, None)

    def _forget_expired(self) -> None:
        if self._loop is not None:
            now = self._loop.time()
            for execution_id, deadline in list(self._executions.items()):
                if deadline <= now:
                    del self._executions[execution_id]
                    self._last_used = max(self._last_used, deadline)

    def _touch(self) -> None:
        if self._loop is not None:
            self._last_used = self._loop.time()

    # Calls

    async def use(self, rpc: str, request: Any, timeout: float) -> Any:
        """A unary call of the user's: counted, and one whose failure is suspicious."""
        self._uses += 1
        try:
            return await self._call(rpc, request, timeout, SUSPICIOUS)
        finally:
            self._uses -= 1
            self._touch()

    async def check_health(self, timeout: float) -> HealthStatus:
        """Asks the standard health service, or the server's own where it has none."""
        deadline = asyncio.get_running_loop().time() + timeout
        if not self._has_own_health_only:
            try:
                answer = await self._call("Check", health_pb2.HealthCheckRequest(), timeout)
                return HealthStatus(answer.status == health_pb2.HealthCheckResponse.SERVING)
            except SandboxError as error:
                if error.status != "UNIMPLEMENTED":
                    raise
                self._has_own_health_only = True
        remaining = deadline - asyncio.get_running_loop().time()
        answer = await self._call("HealthCheck", pb.HealthCheckRequest(), remaining)
        return HealthStatus(answer.healthy, answer.kubernetes_context or None)

    async def _call(
        self, rpc: str, request: Any, timeout: float, suspicious: Sequence[grpc.StatusCode] = ()
    ) -> Any:
        call = (await self._method(rpc, timeout))(request, timeout=timeout, metadata=self._expectations())
        self._calls.add(call)
        try:
            # Awaiting the call itself would hide who cancels: gRPC raises a CancelledError of its
            # own in place of anyio's, which a cancel scope then does not know and lets out.
            await call.code()
            if self.pace is not None and not suspicious:
                await self.pace()
            if self.closed and call.cancelled():
                raise self.closed_under(rpc)
            answer = await call
            metadata = await call.initial_metadata()
            self.heard(metadata)
            self.verify(rpc, metadata)
        except grpc.aio.AioRpcError as error:
            # Without gRPC's frames: a channel goes on connecting, closed or not, as long as
            # anything refers to a call of it.
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

    def _expectations(self) -> tuple[tuple[str, str], ...] | None:
        return None if self.fence is None else self.fence.expectations()

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
        self._uses += 1
        try:
            call = await self._start(rpc, request, limit, patience)
            try:
                answer = await call.read()
                if answer is None or await call.read() is not None:
                    raise self.undecodable(rpc)
                return answer
            finally:
                call.end()
        finally:
            self._uses -= 1
            self._touch()

    async def start_stream(self, request: pb.ExecuteRequest, limit: float) -> ExecutionCall:
        """Begins to run code; counted until its end."""
        call = await self._start("ExecuteStream", request, limit)
        call.is_use = True
        self._uses += 1
        return call

    async def _start(
        self, rpc: str, request: Any, limit: float | None, patience: float | None = None
    ) -> ExecutionCall:
        method = await self._method(rpc, patience or limit or BEAT, _STREAMS)
        says_nothing = self._features is not None and not self.queues
        timeout = limit if says_nothing and patience is None else patience
        call = ExecutionCall(
            self, rpc, method(request, timeout=timeout, metadata=self._expectations()), limit
        )
        self._execution_calls.add(call)
        self._kept.add(call)
        self._keep(call.minder)
        return call

    def call_ended(self, call: ExecutionCall) -> None:
        if call in self._execution_calls:
            self._execution_calls.remove(call)
            if call.is_use:
                self._uses -= 1
                self._touch()

    def drop(self, call: ExecutionCall, loop: asyncio.AbstractEventLoop) -> None:
        """Ends a call for the garbage collector: from whatever thread it runs in."""
        self.call_ended(call)
        with contextlib.suppress(RuntimeError):  # The loop is closed, and the call with it.
            loop.call_soon_threadsafe(call.end)

    @property
    def queues(self) -> bool:
        """Whether the server is known to say when code begins."""
        return names.QUEUE in (self._features or ())

    def heard(self, metadata: Metadata | None = None) -> None:
        """Notes that the server has answered, and what the initial metadata say of it."""
        self._next_beat = asyncio.get_running_loop().time() + BEAT
        self.misses = 0
        if metadata is not None:
            self._features = frozenset(dict(iter(metadata)).get(names.FEATURES, "").split(","))

    def next_beat(self, waiting_since: float) -> float:
        """When a server that stays silent has to answer a health check."""
        return max(self._next_beat, waiting_since + BEAT)

    async def answers(self) -> bool:
        """Whether the server answers a health check, whatever it says; asks once for all who ask."""
        if self._asking is None or self._asking.done():
            self._asking = self._own(self._ask())
        asking = self._asking
        await asyncio.wait({asking})
        return not asking.cancelled() and asking.result()

    async def _ask(self) -> bool:
        self._next_beat = asyncio.get_running_loop().time() + BEAT
        for patience in PATIENCE:
            try:
                await self.check_health(patience)
            except SandboxTimeoutError:
                continue
            except SandboxError as error:
                if error.status in (None, "UNAVAILABLE"):
                    break
            self.misses = 0
            return True
        self.misses += 1
        return False

    def _own(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        return self._keep(asyncio.create_task(work, name=f"call on {self.target}"))

    def _keep(self, task: asyncio.Task[_T]) -> asyncio.Task[_T]:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # Errors

    def failure(
        self, rpc: str, error: grpc.aio.AioRpcError, suspicious: Sequence[grpc.StatusCode]
    ) -> SandboxError:
        """The error of this library for a gRPC status; tells `on_suspect` where it is due."""
        code, details = error.code(), error.details() or "no details"
        fence = self.fence
        if fence is not None:
            trailing = error.trailing_metadata()
            refusal = fence.refusal(trailing)
            if refusal is not None:
                fence.give_up(f"{refusal} answers in its place")
                return self._replaced(rpc, fence, code.name)
            # grpc.aio loses the initial metadata of a stream that ends before they are read.
            metadata = (*error.initial_metadata(), *trailing)
            if code in _FROM_SERVERS and not fence.is_met(metadata, ok=False):
                return self._unfenced(rpc, fence)
        kind = _ERRORS.get(code, SandboxError)
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED and (size := about_size(details)) is not None:
            kind, details = SandboxError, size
        if code in suspicious:
            self.suspect()
        return kind(f"{rpc} on {self.target}: {code.name}: {details}", status=code.name)

    def verify(self, rpc: str, metadata: Metadata) -> None:
        """Checks by its initial metadata which machine has answered.

        Raises:
            SandboxReplacedError: One without fences: the call ran there.
        """
        fence = self.fence
        if fence is not None and not fence.is_met(metadata, ok=True):
            raise self._unfenced(rpc, fence)

    def _unfenced(self, rpc: str, fence: Fence) -> SandboxError:
        fence.give_up("a server without fences answers in its place")
        text = f"the machine was replaced ({fence.broken}): the call ran there"
        return SandboxReplacedError(f"{rpc} on {self.target}: {text}", ran=True)

    def _replaced(self, rpc: str, fence: Fence, status: str | None = None) -> SandboxError:
        text = f"the machine was replaced ({fence.broken}): nothing was run"
        return SandboxReplacedError(f"{rpc} on {self.target}: {text}", status=status)

    def suspect(self) -> None:
        if self.on_suspect is not None:
            self.on_suspect()

    def undecodable(self, rpc: str) -> SandboxError:
        # gRPC logs the reason and hands out None.
        return SandboxError(f"{rpc} on {self.target}: the answer cannot be decoded", status="INTERNAL")

    def closed_under(self, rpc: str) -> SandboxError:
        return SandboxUnavailableError(f"{rpc} on {self.target}: the client was closed meanwhile")

    # The channel

    async def _method(
        self, rpc: str, timeout: float, makers: Mapping[str, Callable[[Any], Any]] = _METHODS
    ) -> Any:
        """One of the channel's methods; makes the channel on first use."""
        if self.fence is not None and self.fence.broken is not None:
            raise self._replaced(rpc, self.fence)
        self._check_open()
        self._check_loop()
        if rpc not in _HEALTH and self._may_lead_elsewhere():
            await self._look(rpc, timeout)
            self._check_open()
        make = makers[rpc]
        method = self._methods.get(make)
        if method is None:
            await self._ready(timeout)
            method = self._methods[make] = make(self._channel)
        return method

    def _may_lead_elsewhere(self) -> bool:
        """Whether a connection to a server without fences has broken: the next may lead anywhere."""
        fence, channel = self.fence, self._channel
        if fence is None or not fence.pinned or fence.boot_id is not None:
            return False
        return channel is None or channel.get_state() is not grpc.ChannelConnectivity.READY

    async def _look(self, rpc: str, timeout: float) -> None:
        if self.fence is None:
            return
        try:
            async with asyncio.timeout(timeout):
                await self.fence.look()
        except SandboxError:  # One of them is a TimeoutError.
            raise
        except TimeoutError:
            raise SandboxTimeoutError(
                f"{rpc} on {self.target}: the connection broke, and where the sandbox is now could not be"
                f" found out within {timeout:.3g} s: nothing was run"
            ) from None

    async def _ready(self, timeout: float) -> None:
        if self._channel is not None:
            return
        credentials = None
        if self._credentials is not None:
            try:
                async with asyncio.timeout(timeout):
                    credentials = await self._credentials()
            except TimeoutError:
                raise SandboxTimeoutError(
                    f"the TLS files for {self.target} could not be read within {timeout:.3g} s",
                    status="DEADLINE_EXCEEDED",
                ) from None
            self._check_open()
        if self._channel is None:
            self._connect(credentials)

    def _check_open(self) -> None:
        if self.closed:
            raise SandboxError(f"the client of {self.target} is closed")

    def _check_loop(self) -> None:
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop, self._pid = loop, os.getpid()
        elif self._pid != os.getpid():
            raise SandboxError(
                f"the client of {self.target} was first used in process {self._pid}, before a fork:"
                " make one in each process"
            )
        elif self._loop is not loop:
            raise SandboxError(
                f"the client of {self.target} was first used in another event loop: make one in each loop"
            )

    def _connect(self, credentials: grpc.ChannelCredentials | None) -> None:
        options: list[tuple[str, Any]] = list(_OPTIONS)
        if self._address.startswith("unix:"):
            # Else it is the path, which some servers refuse and no certificate names.
            options.append(("grpc.default_authority", "localhost"))
        if credentials is None:
            channel = grpc.aio.insecure_channel(self._address, options=options)
        else:
            if self._tls is not None and self._tls.server_name is not None:
                options.append(("grpc.ssl_target_name_override", self._tls.server_name))
            channel = grpc.aio.secure_channel(self._address, credentials, options=options)
        self._channel = channel
        self._has_own_health_only = False
        self._features = None

    async def renew(self) -> None:
        """Lets the next call make a channel anew, if this one is unconnected and unused.

        No option shortens gRPC's wait between failed lookups of a name, which grows to
        two minutes; a new channel looks it up, and connects, at once.
        """
        channel = self._channel
        if channel is None or self._calls or self._execution_calls:
            return
        if channel.get_state() is not grpc.ChannelConnectivity.READY:
            self._channel, self._methods = None, {}
            await channel.close(None)

    async def close(self) -> None:
        channel, credentials = self._channel, self._credentials
        # In a forked process the channel is not ours; with its loop it has ended anyway.
        if self._loop is None or self._loop.is_closed() or self._pid != os.getpid():
            channel = credentials = None
        else:
            self._check_loop()
        was_closed, self.closed = self.closed, True
        if self.on_close is not None and not was_closed:
            self.on_close()
        self._executions.clear()
        if channel is not None:
            for call in list(self._calls):
                call.cancel()
            for waiting in list(self._kept):
                waiting.end(self.closed_under(waiting.rpc))
            self._channel, self._methods = None, {}
            await channel.close(None)
            if self._tasks:  # They have nothing to wait for any more.
                await asyncio.wait(self._tasks, timeout=1)
        if credentials is not None:
            await credentials.aclose()


async def _settled(call: Any) -> None:
    """Takes the end of a cancelled call.

    Else it may stay in a task of gRPC's that refers to the call and is referred to by it.
    """
    with contextlib.suppress(grpc.RpcError, asyncio.CancelledError):
        await call
