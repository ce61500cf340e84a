"""The server's life: start, serve, drain, end, leaving nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import importlib.util
import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from prodisco_sandbox.proto import files_pb2, metadata, sandbox_pb2, sandbox_pb2_grpc

from . import _transport
from ._cache import ScriptCache
from ._confine import identity
from ._containment import Containment
from ._executions import Executions
from ._fence import Fence
from ._files import FileService, add_to_server
from ._interpreter import Processes
from ._options import Options, OptionsError
from ._removal import remove_tree
from ._service import SandboxService
from ._token import RequireToken, read_token
from ._tracing import tracing
from ._undecodable import Undecodable

log = logging.getLogger(__name__)

PRIVATE_PREFIX = "prodisco-sandbox-"

MAX_MESSAGE = 64 << 20
"""Bytes of one message, each way."""

CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE),
    ("grpc.max_send_message_length", MAX_MESSAGE),
    # A port that is taken is an error, not a server that gets half of the calls.
    ("grpc.so_reuseport", 0),
    # Our client pings every 330 s while calls run; others may do so more often.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_permit_without_calls", 1),
]

FEATURES = (metadata.QUEUE, metadata.FILES)

_REFLECTION = "grpc.reflection.v1alpha.ServerReflection"
_KILL_TIMEOUT = 15.0
_LINGER = 0.2
"""Seconds that connections stay open after the last answer, for clients to read it: closing a
connection on which a client still sends discards what it has not read yet."""
_KEPT_FREE = 16 << 20
"""Bytes of freed memory, at the end of each heap, that the allocator keeps for the next messages."""
_LARGEST_KEPT = 8 << 20
"""Bytes from which a single allocation goes back to the kernel as soon as it is freed."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_FIRST_SPARES = 0.1
"""Seconds before spares are started, so that the first health check is answered quickly."""
_LAST_ANSWERS = 1.0
"""Seconds for the answers of executions that were killed at the end to be sent."""


class Directories:
    """The server's directories; it removes those that it made."""

    def __init__(self, options: Options) -> None:
        # Held open, to recognise them: code may be able to put something else in their places.
        self._made: list[tuple[Path, int]] = []
        try:
            if options.host is None:
                self._make(options.socket.parent)
            private = self._private(options)
            self.temporary = private / "tmp"
            self._make(self.temporary)
            kept = list(self._made)
            self._make(options.cache_dir)
            self.workspace = options.workspace or private / "workspace"
            self._make(self.workspace)
        except OSError as error:
            self.remove()
            raise OptionsError(f"a directory cannot be made: {error}") from error
        self.workspace = self.workspace.resolve()
        if not options.exit_with_parent:
            # Directories that were given by name outlive the server, unless it belongs to its
            # parent.
            for _, held in self._made[len(kept) :]:
                os.close(held)
            self._made = kept

    def _private(self, options: Options) -> Path:
        """A private directory, on a read-only root file system where the cache is."""
        try:
            path = tempfile.mkdtemp(prefix=PRIVATE_PREFIX)
        except FileNotFoundError:
            path = tempfile.mkdtemp(prefix=PRIVATE_PREFIX, dir=options.cache_dir)
        self._note(Path(path))
        return Path(path).resolve()

    def _make(self, path: Path) -> None:
        if path.is_dir():
            return
        self._make(path.parent)
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            if not path.is_dir():
                raise
            return  # Another server was quicker.
        self._note(path)

    def _note(self, path: Path) -> None:
        self._made.append((path, os.open(path, os.O_PATH | os.O_CLOEXEC)))

    def remove(self) -> None:
        """Removes the directories that this server made; gRPC has removed the socket."""
        for path, held in reversed(self._made):
            try:
                if path.is_symlink() or identity(path) != identity(held):
                    log.warning("%s was replaced meanwhile; it is not removed", path)
                    continue
                remove_tree(path)
            except (OSError, RecursionError) as error:
                log.warning("could not remove all of %s: %s", path, error)
            finally:
                os.close(held)


async def serve(options: Options) -> None:
    """Serves until a signal, or the parent's end, says stop.

    Raises:
        OptionsError: A setting cannot be carried out here.
    """
    if sys.platform != "linux":
        raise OptionsError(f"the server needs Linux, not {sys.platform}: its kernel confines the code")
    _keep_freed_memory()
    stop = _Stop()
    stop.on_signals()
    guard = [RequireToken(read_token())] if options.require_token else []
    directories = Directories(options)
    try:
        await _serve(options, directories, stop, guard)
    finally:
        directories.remove()


def _keep_freed_memory() -> None:
    """Has glibc keep the memory of a message for the next one: new pages cost more than all copies of it.

    Processes that are started do not inherit it. Other C libraries have no such function.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _KEPT_FREE)
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)


async def _serve(
    options: Options, directories: Directories, stop: _Stop, guard: Sequence[RequireToken]
) -> None:
    with contextlib.ExitStack() as stack:
        containment = Containment(options, directories.workspace, directories.temporary)
        stack.callback(containment.close)
        processes = Processes(containment, options)
        cache = ScriptCache(options.cache_dir, options.cache_limit)
        executions = Executions(options, processes, cache)
        service = SandboxService(options, executions, cache)
        files = FileService(directories.workspace, options.workspace_limit, processes.usage, executions.began)
        stack.callback(files.close)
        fence = Fence(uuid.uuid4().hex, options.pod_name, FEATURES)
        server, standard_health = await _server(service, files, [*guard, *tracing(), fence, Undecodable()])
        target = _transport.bind(server, options)
        processes.install()
        if options.workspace is not None:
            await executions.measure()
        await server.start()
        try:
            if options.exit_with_parent:
                stop.on_end_of_input()
            print(f"listening on {target}", flush=True)  # noqa: T201
            log.info("listening on %s, workspace %s", target, directories.workspace)
            processes.start_spares_soon(_FIRST_SPARES)
            asyncio.get_running_loop().call_later(_FIRST_SPARES, processes.start_zygotes)
            await stop.asked.wait()
            service.healthy = False
            await standard_health.enter_graceful_shutdown()
        finally:
            grace = 0.0 if stop.at_once.is_set() else options.grace_period
            linger = _LINGER if executions.busy else 0.0
            await _drain(executions, grace, stop)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.at_once.wait(), linger)
            await server.stop(_LAST_ANSWERS)
            await processes.close()


async def _server(
    service: SandboxService, files: FileService, interceptors: Sequence[Any]
) -> tuple[grpc.aio.Server, Any]:
    """The gRPC server with all its services, and the one that tells its health."""
    standard_health = health.aio.HealthServicer()  # type: ignore[attr-defined]
    server = grpc.aio.server(options=CHANNEL_OPTIONS, interceptors=interceptors)
    sandbox_pb2_grpc.add_SandboxServiceServicer_to_server(service, server)
    add_to_server(files, server)
    health_pb2_grpc.add_HealthServicer_to_server(standard_health, server)
    services = sandbox_pb2.DESCRIPTOR.services_by_name, files_pb2.DESCRIPTOR.services_by_name
    names = [service.full_name for by_name in services for service in by_name.values()]
    for name in names:
        await standard_health.set(name, health_pb2.HealthCheckResponse.SERVING)
    _reflect(server, [*names, health.SERVICE_NAME])
    return server, standard_health


def _reflect(server: grpc.aio.Server, names: list[str]) -> None:
    """Serves reflection, if grpcio-reflection is installed.

    It is imported on the first request, so that it does not delay the start.
    """
    if importlib.util.find_spec("grpc_reflection") is None:
        log.info("no reflection: grpcio-reflection is not installed")
        return

    @functools.cache
    def servicer() -> Any:
        from grpc_reflection.v1alpha import reflection

        return reflection.aio.ReflectionServicer([*names, _REFLECTION])  # type: ignore[attr-defined]

    def decode(data: bytes) -> Any:
        from grpc_reflection.v1alpha import reflection_pb2

        return reflection_pb2.ServerReflectionRequest.FromString(data)

    async def answer(requests: Any, context: Any) -> AsyncIterator[Any]:
        async for reply in servicer().ServerReflectionInfo(requests, context):
            yield reply

    method = grpc.stream_stream_rpc_method_handler(
        answer, request_deserializer=decode, response_serializer=lambda reply: reply.SerializeToString()
    )
    handler = grpc.method_handlers_generic_handler(_REFLECTION, {"ServerReflectionInfo": method})
    server.add_generic_rpc_handlers((handler,))


async def _drain(executions: Executions, grace: float, stop: _Stop) -> None:
    drained = asyncio.create_task(executions.drain(grace), name="drain")
    hurried = asyncio.create_task(stop.at_once.wait(), name="hurried")
    await asyncio.wait([drained, hurried], return_when=asyncio.FIRST_COMPLETED)
    hurried.cancel()
    executions.kill_all()
    done, _ = await asyncio.wait([drained], timeout=_KILL_TIMEOUT)
    if not done:
        drained.cancel()
        log.error("some executions cannot be killed, and are left behind")


class _Stop:
    """When to stop: at the first signal gracefully; at the second, or orphaned, at once."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.at_once = asyncio.Event()

    def on_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: signal.Signals) -> None:
        log.info("%s: shutting down", number.name)
        if self.asked.is_set():
            self.at_once.set()
        self.asked.set()

    def on_end_of_input(self) -> None:
        loop = asyncio.get_running_loop()

        def read() -> None:
            with contextlib.suppress(OSError):
                if os.read(sys.stdin.fileno(), 4096):
                    return
            loop.remove_reader(sys.stdin.fileno())
            self._on_end_of_input()

        if sys.stdin is None:
            self._on_end_of_input()
            return
        try:
            loop.add_reader(sys.stdin.fileno(), read)
        except PermissionError:  # A file, such as /dev/null: nobody holds the other end.
            self._on_end_of_input()

    def _on_end_of_input(self) -> None:
        log.info("standard input ended: the parent is gone")
        self.at_once.set()
        self.asked.set()
