"""FakeSandboxServer: a real gRPC server on loopback with scripted answers."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import inspect
import os
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal, Self
from urllib.parse import quote

import grpc
import grpc.aio
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2

from ..proto import files_pb2, metadata
from ..proto import sandbox_pb2 as pb
from ..results import (
    CancelResult,
    ExecutionChunk,
    ExecutionOutcome,
    ExecutionResult,
    ExecutionState,
    ExecutionStatus,
    FileInfo,
    FileList,
    HealthStatus,
    StartedExecution,
)
from ..server._fence import Fence

if TYPE_CHECKING:
    from ..server._files import FileService

Health = Literal["standard", "own"]
"""Which health service a server has: ``grpc.health.v1``, or only its own HealthCheck."""

NEVER: Final = object()
"""An answer, or an item of a stream, that never comes."""

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

_MAX_MESSAGE_BYTES = 64 * 1024 * 1024
_OPTIONS = (
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    # GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, whose string lacks the "recv":
    # without it, a client's keepalive every 10 s would be too_many_pings and cut long calls.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    # A second server on the same port is an error: the two would share the calls.
    ("grpc.so_reuseport", 0),
)

_METHODS: dict[str, MethodDescriptor] = {
    method.name: method
    for file, service in ((pb, "SandboxService"), (files_pb2, "FileService"), (health_pb2, "Health"))
    for method in file.DESCRIPTOR.services_by_name[service].methods
    if service != "Health" or method.name == "Check"
}
_FILE_KINDS = {"file": files_pb2.FILE_KIND_FILE, "directory": files_pb2.FILE_KIND_DIRECTORY}


@dataclasses.dataclass(frozen=True, slots=True)
class FakeStatus:
    """An answer that ends the call with a gRPC status, such as ``"NOT_FOUND"``."""

    code: str
    details: str = ""

    def __post_init__(self) -> None:
        if self.code not in grpc.StatusCode.__members__ or self.code == "OK":
            names = ", ".join(name for name in grpc.StatusCode.__members__ if name != "OK")
            raise ValueError(f"code is {self.code!r}: it must be one of {names}")


@dataclasses.dataclass(eq=False, slots=True)
class FakeCall:
    """A call that the server got.

    Attributes:
        rpc: Its name, such as ``"Execute"``; ``"Check"`` is the standard health service's.
        request: The protobuf message that came; of Write a list of them, as far as they came.
        timeout: Seconds that were left until the client's deadline; None: it set none.
        outcome: How it ended; "cancelled" by the client, by a broken connection, or
            by the end of the server.
        ended: Set once `outcome` is no longer "running".
    """

    rpc: str
    request: Any
    timeout: float | None = None
    outcome: Literal["running", "answered", "failed", "cancelled"] = "running"
    ended: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)


class FakeSandboxServer:
    """A scripted sandbox server, for tests of programs that talk to sandboxes.

    ::

        async with FakeSandboxServer() as server:
            server.script("Execute", ExecutionResult(success=True, output="42\\n"))
            async with SandboxClient(server.target) as client:
                result = await client.execute("print(6 * 7)")
            assert server.calls[0].request.code == "print(6 * 7)"

    Calls that are not scripted succeed with an empty result: no output, no symbols.

    It needs real sockets and therefore real time: under a virtual clock its calls would
    time out.

    Args:
        port: TCP port on 127.0.0.1; 0 picks a free one, which is kept over restarts.
        socket_path: Listen on this Unix socket instead.
        health: ``"standard"``: ``grpc.health.v1`` beside its own HealthCheck; ``"own"``:
            only the latter, as the stock Node server.
        certificate: PEM certificate chain: serve TLS, together with `private_key`.
        private_key: PEM private key.
        client_ca: PEM authorities: demand a certificate of theirs from clients (mTLS).
        fences: Whether it says which machine it is, by a boot id that each `start` draws
            anew, and refuses calls that are meant for another one; refused calls are not
            in `calls`. False: as the stock Node server.
        pod_name: The pod that it is in; None: it was not told.
        queues: Whether it says that code begins with the answer, or with the first chunk:
            until then the code is queued. Needs `fences`.
        workspace: A directory: it has the calls on files too, which act on that as a real server's do,
            except that no execution is known to it.
        files: Whether it has these calls; without a `workspace` they are to be scripted.

    Attributes:
        calls: The calls so far, in the order of arrival.
        boot_id: Its boot id; None: without fences, or not started yet.
        fences: As given; counts from the next `start`.
        pod_name: Likewise.
    """

    def __init__(
        self,
        *,
        port: int = 0,
        socket_path: str | os.PathLike[str] | None = None,
        health: Health = "standard",
        certificate: bytes | None = None,
        private_key: bytes | None = None,
        client_ca: bytes | None = None,
        fences: bool = True,
        pod_name: str | None = None,
        queues: bool = False,
        workspace: str | os.PathLike[str] | None = None,
        files: bool = False,
    ) -> None:
        if health not in ("standard", "own"):
            raise ValueError(f'health is {health!r}: it must be "standard" or "own"')
        if (certificate is None) != (private_key is None) or (client_ca and not certificate):
            raise ValueError("TLS needs both certificate and private_key")
        self.calls: list[FakeCall] = []
        self.boot_id: str | None = None
        self.fences, self.pod_name = fences, pod_name
        self._has_files = files or workspace is not None
        self._features = (metadata.QUEUE,) * queues + (metadata.FILES,) * self._has_files
        self._workspace = None if workspace is None else Path(workspace)
        self._file_service: FileService | None = None
        self._port = port
        self._socket_path = socket_path
        self._has_standard_health = health == "standard"
        self._certificate, self._private_key, self._client_ca = certificate, private_key, client_ca
        self._serving = True
        self._scripts: dict[str, list[Any]] = {}
        self._arrived = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._server: grpc.aio.Server | None = None

    @property
    def target(self) -> str:
        """The target for `SandboxClient`; the port is known once the server has started."""
        if self._socket_path is not None:
            return f"unix:{os.fspath(self._socket_path)}"
        return f"127.0.0.1:{self._port}"

    def script(self, rpc: str, *answers: Any) -> None:
        """Sets the answers of a method: one per call, the last one from then on.

        An answer is one of

        - what the `SandboxClient` method returns, such as an `ExecutionResult`, or the
          response as a protobuf message;
        - a `FakeStatus`: the call ends with it;
        - `NEVER`: no answer comes until the client gives up;
        - ``bytes``: sent as they are, which need be no message at all;
        - a callable, sync or async, that takes the request and returns one of these;
        - for ExecuteStream, an iterable of `ExecutionChunk` and of all of the above, or
          a callable that returns one, such as an async generator function. An
          `asyncio.Event` in it is waited for. The stream ends with the iterable or a
          `FakeStatus`. For Read likewise, of a `FileInfo` and of messages.

        A callable for Write is called once all of the file has come.

        Args:
            rpc: A method of SandboxService or FileService, or ``"Check"`` of the standard health service.
            answers: At least one.
        """
        if rpc not in _METHODS:
            raise ValueError(f"rpc is {rpc!r}: it must be one of {', '.join(_METHODS)}")
        if not answers:
            raise ValueError(f"no answers given for {rpc}")
        self._scripts[rpc] = list(answers)

    def set_serving(self, serving: bool) -> None:
        """Sets what the health services answer from now on; True at first."""
        self._serving = serving

    async def wait_for_call(self, rpc: str, *, count: int = 1, timeout: float = 60.0) -> FakeCall:
        """Waits until `rpc` has been called `count` times; returns the call of that number.

        Raises:
            TimeoutError: It has not within `timeout` seconds.
        """

        async with asyncio.timeout(timeout):
            while len(calls := [call for call in self.calls if call.rpc == rpc]) < count:
                await self._arrived.wait()
        return calls[count - 1]

    async def start(self) -> None:
        """Starts serving; after `stop` or `kill` again, at the same target, with another boot id.

        Raises:
            RuntimeError: It is running, or the port is taken.
        """
        if self._server is not None:
            raise RuntimeError(f"the server of {self.target} is running")
        self.boot_id = uuid.uuid4().hex if self.fences else None
        interceptors = [] if self.boot_id is None else [Fence(self.boot_id, self.pod_name, self._features)]
        server = grpc.aio.server(options=_OPTIONS, interceptors=interceptors)
        if self._workspace is not None:
            from ..server._files import FileService  # It needs Linux.

            self._file_service = FileService(self._workspace, 1 << 40, lambda _: 0, lambda _: None)
        server.add_generic_rpc_handlers(tuple(self._handlers()))
        if self._socket_path is None:
            address = f"127.0.0.1:{self._port}"
        else:
            address = "unix:" + quote(os.fspath(self._socket_path))
        if self._certificate is None or self._private_key is None:
            port = server.add_insecure_port(address)
        else:
            pairs = [(self._private_key, self._certificate)]
            demand = self._client_ca is not None
            credentials = grpc.ssl_server_credentials(pairs, self._client_ca, require_client_auth=demand)
            port = server.add_secure_port(address, credentials)
        if self._socket_path is None:
            self._port = port
        await server.start()
        self._server = server

    async def stop(self, grace: float | None = 1.0) -> None:
        """Stops serving; calls get `grace` seconds to end. Idempotent."""
        server, self._server = self._server, None
        if server is not None:
            await server.stop(grace)
            # gRPC does not wait for the tasks that run them.
            if tasks := self._tasks - {asyncio.current_task()}:
                await asyncio.wait(tasks, timeout=1)
            if self._file_service is not None:
                self._file_service.close()

    async def kill(self) -> None:
        """Stops at once: calls in flight break off."""
        await self.stop(None)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.kill()

    def _handlers(self) -> Iterable[Any]:
        services: dict[str, dict[str, Any]] = {}
        for name, method in _METHODS.items():
            own = method.containing_service.name
            if (name == "Check" and not self._has_standard_health) or (
                own == "FileService" and not self._has_files
            ):
                continue
            make = grpc.unary_unary_rpc_method_handler
            if method.server_streaming:
                make = grpc.unary_stream_rpc_method_handler
            elif method.client_streaming:
                make = grpc.stream_unary_rpc_method_handler
            services.setdefault(method.full_name.rpartition(".")[0], {})[name] = make(
                self._handler(method),
                request_deserializer=GetMessageClass(method.input_type).FromString,
                response_serializer=_serialized,
            )
        for service, handlers in services.items():
            yield grpc.method_handlers_generic_handler(service, handlers)

    def _handler(self, method: MethodDescriptor) -> Any:
        async def unary(request: Any, context: Any) -> Any:
            service = self._service_of(method)
            if service is not None:
                async with self._recorded(method.name, request, context):
                    return await getattr(service, method.name)(request, context)
            async with self._recorded(method.name, request, context):
                return await self._said(await self._answer(method.name, request), method, context)

        async def upload(requests: Any, context: Any) -> Any:
            arrived: list[Any] = []

            async def noted() -> AsyncIterator[Any]:
                async for request in requests:
                    arrived.append(request)
                    yield request

            service = self._service_of(method)
            async with self._recorded(method.name, arrived, context):
                if service is not None:
                    return await getattr(service, method.name)(noted(), context)
                script = self._scripts.get(method.name, [None])[0]
                if callable(script):
                    async for _ in noted():
                        pass
                return await self._said(await self._answer(method.name, arrived), method, context)

        async def stream(request: Any, context: Any) -> None:
            service = self._service_of(method)
            if service is not None:
                async with self._recorded(method.name, request, context):
                    async for message in getattr(service, method.name)(request, context):
                        await context.write(message)
                return
            async with (
                self._recorded(method.name, request, context),
                _items(await self._answer(method.name, request)) as items,
            ):
                async for item in items:
                    if isinstance(item, asyncio.Event):
                        await item.wait()
                    else:
                        await context.write(await self._said(item, method, context))

        if method.client_streaming:
            return upload
        return stream if method.server_streaming else unary

    def _service_of(self, method: MethodDescriptor) -> FileService | None:
        """What answers a call on files that has no script."""
        is_file_call = method.containing_service.name == "FileService"
        return self._file_service if is_file_call and method.name not in self._scripts else None

    @contextlib.asynccontextmanager
    async def _recorded(self, rpc: str, request: Any, context: Any) -> AsyncIterator[None]:
        call = FakeCall(rpc, request, context.time_remaining())
        self.calls.append(call)
        arrived, self._arrived = self._arrived, asyncio.Event()
        arrived.set()
        if (task := asyncio.current_task()) is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        try:
            yield
            call.outcome = "answered"
        except asyncio.CancelledError:
            call.outcome = "cancelled"
            raise
        except BaseException:
            call.outcome = "failed"
            raise
        finally:
            call.ended.set()

    async def _answer(self, rpc: str, request: Any) -> Any:
        script = self._scripts.get(rpc)
        if script is None:
            return self._default(rpc, request)
        answer = script.pop(0) if len(script) > 1 else script[0]
        if callable(answer):
            answer = answer(request)
        if inspect.isawaitable(answer):
            answer = await answer
        return answer

    async def _said(self, answer: Any, method: MethodDescriptor, context: Any) -> Any:
        """The answer as a message or bytes; ends the call, or waits for ever, as it says."""
        if answer is NEVER:
            await asyncio.get_running_loop().create_future()
        if isinstance(answer, FakeStatus):
            await context.abort(grpc.StatusCode[answer.code], answer.details)
        return answer if isinstance(answer, bytes) else to_message(answer, method.output_type)

    def _default(self, rpc: str, request: Any) -> Any:
        done = ExecutionOutcome(success=True, state=ExecutionState.COMPLETED)
        return {
            "Check": HealthStatus(self._serving),
            "HealthCheck": HealthStatus(self._serving),
            "Execute": ExecutionResult(success=True),
            "ExecuteStream": [ExecutionChunk("execution-1", "result", result=done)],
            "ExecuteAsync": StartedExecution("execution-1", ExecutionState.PENDING),
            "GetExecution": ExecutionStatus(
                getattr(request, "execution_id", ""), ExecutionState.COMPLETED, result=done
            ),
            "CancelExecution": CancelResult(True, ExecutionState.CANCELLED),
            "ExecuteTest": pb.ExecuteTestResponse(success=True),
        }.get(rpc) or GetMessageClass(_METHODS[rpc].output_type)()


@contextlib.asynccontextmanager
async def _items(answer: Any) -> AsyncIterator[AsyncGenerator[Any]]:
    """The items of a stream; a generator of the test's is closed in the end."""

    async def one_by_one() -> AsyncGenerator[Any]:
        single = isinstance(answer, bytes) or not isinstance(answer, Iterable)
        for item in (answer,) if single else answer:
            yield item

    items = answer if isinstance(answer, AsyncGenerator) else one_by_one()
    async with contextlib.aclosing(items):
        yield items


def _serialized(answer: Any) -> bytes:
    return answer if isinstance(answer, bytes) else answer.SerializeToString()


def to_message(value: Any, descriptor: Any) -> Message:
    """Turns a result of `SandboxClient` into the response that it was read from."""
    message = GetMessageClass(descriptor)()
    if isinstance(value, message.__class__):
        return value
    if isinstance(value, ExecutionChunk):
        fields: dict[str, Any] = {"execution_id": value.execution_id, "timestamp_ms": value.timestamp_ms}
        fields[value.kind] = value.text if value.result is None else value.result
    elif isinstance(value, FileInfo):
        fields = {"path": value.path, "size": value.size, "modified_at_ms": round(value.modified_at * 1000)}
        fields["kind"] = _FILE_KINDS.get(value.kind, files_pb2.FILE_KIND_OTHER)
        if "info" in descriptor.fields_by_name:
            fields = {"info": value}
    elif isinstance(value, FileList):
        fields = {"files": tuple(value), "truncated": value.truncated}
    elif isinstance(value, HealthStatus) and "status" in descriptor.fields_by_name:
        fields = {"status": _SERVING if value.healthy else _NOT_SERVING}
    elif dataclasses.is_dataclass(value):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    elif len(descriptor.fields) == 1:  # A bare tuple or number, such as list_cache's.
        fields = {descriptor.fields[0].name: value}
    else:
        fields = {"": value}
    if set(fields) - set(descriptor.fields_by_name):
        raise TypeError(f"{value!r} is no answer for a {descriptor.name}")
    for name, item in fields.items():
        if item is not None:
            _set(message, descriptor.fields_by_name[name], item)
    return message


def _set(message: Any, field: FieldDescriptor, value: Any) -> None:
    nested = field.message_type
    if isinstance(value, tuple | list):
        getattr(message, field.name).extend(to_message(item, nested) for item in value)
    elif nested:
        getattr(message, field.name).CopyFrom(to_message(value, nested))
    else:
        setattr(message, field.name, value)
