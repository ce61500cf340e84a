"""SandboxClient: one sandbox, over gRPC."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Self, TypedDict, TypeVar, Unpack

from . import _telemetry
from . import results as r
from ._checks import integer
from ._grpc import codec as m
from ._grpc.connection import Connection
from ._grpc.fence import Fence
from ._grpc.files import FileStream as FileStream
from ._grpc.files import SandboxFiles as SandboxFiles
from ._grpc.health import wait_for_healthy
from ._grpc.stream import ExecutionStream as ExecutionStream
from ._targets import target_from_env
from .config import TlsConfig
from .errors import SandboxError, SandboxTimeoutError
from .proto import sandbox_pb2 as pb

_Found = TypeVar("_Found", r.ExecutionStatus, r.CancelResult)

# How the protocol's servers treat an execution's timeout.
_DEFAULT_TIMEOUT, _LEAST_TIMEOUT = 30.0, 1.0


class _Options(TypedDict, total=False):
    tls: TlsConfig | None
    call_timeout: float
    deadline_margin: float


class SandboxClient:
    """A client of one sandbox.

    ::

        async with SandboxClient("localhost:50051") as client:
            result = await client.execute("print(6 * 7)")
            print(result.output)

    The channel is made on first use, in the running event loop; from then on the client
    belongs to that loop and that process. Making a client does no I/O and needs no loop.

    Every call has a deadline, so none hangs. All of them may be called at the same time
    and are safe to cancel: that cancels the call on the server, but not what the server
    may have begun for it. They raise

    - `ValueError` for a wrong argument, before anything is sent;
    - `SandboxUnavailableError` where the sandbox cannot be reached, TLS does not match
      (never a downgrade), or the client was closed under the call;
    - `SandboxReplacedError` where another machine answers at the sandbox's address, for a
      client that a manager handed out; nothing ran, unless ``ran`` says so;
    - `SandboxTimeoutError` for a call's own deadline. That a script ran into its timeout
      is no error of the call but a result, like any failure of a script;
    - `SandboxPermissionError` and `SandboxCapacityError` where the server says so;
    - `SandboxError` for every other gRPC status, whose name is in ``status``
      (``"NOT_FOUND"`` for an unknown execution id, ``"UNIMPLEMENTED"`` for a server that
      lacks the method), for a message over 64 MiB or over the server's own limit
      (``"RESOURCE_EXHAUSTED"``; many servers have 4 MiB), for a TLS file that cannot be read,
      and for use after `close`, from another event loop or after a fork.

    Subclasses, such as a stand-in for tests, may override any method; `__init__` must be
    called, and starts nothing.

    Args:
        target: ``host:port``, ``[IPv6 address]:port`` or ``unix:PATH``.
        tls: Speak TLS, or mTLS if it has a client certificate; None: plaintext. The name
            that is verified is ``tls.server_name``, else the target's host, which for a
            Unix socket is localhost.
        call_timeout: Deadline in seconds of every call that does not run code.
        deadline_margin: Seconds between an execution's timeout, which the server
            enforces, and the deadline of its call.

    Raises:
        ValueError: An argument is wrong; the message names it.

    Attributes:
        sandbox: Which sandbox this is, for a client that a manager handed out: compare
            it to see that the sandbox was replaced and its state is gone. None in single
            mode.
    """

    _greatest_timeout = 120.0  # of an execution, on the protocol's servers

    def __init__(
        self,
        target: str,
        *,
        tls: TlsConfig | None = None,
        call_timeout: float = 30.0,
        deadline_margin: float = 5.0,
    ) -> None:
        if tls is not None and not isinstance(tls, TlsConfig):
            raise ValueError(f"tls is {tls!r}: it must be a TlsConfig or None")
        self.sandbox: r.SandboxRef | None = None
        self._connection = Connection(target, tls)
        self._call_timeout = m.call_seconds("call_timeout", call_timeout)
        self._margin = m.call_seconds("deadline_margin", deadline_margin)

    @classmethod
    def from_env(
        cls,
        environ: Mapping[str, str] | None = None,
        *,
        tcp_host: str | None = None,
        tcp_port: int | None = None,
        socket_path: str | os.PathLike[str] | None = None,
        **options: Unpack[_Options],
    ) -> Self:
        """Makes a client from the environment; an explicit argument beats it.

        A TCP host or port (``tcp_host``, ``tcp_port``, SANDBOX_TCP_HOST, default
        localhost, SANDBOX_TCP_PORT, default 50051) or SANDBOX_USE_TCP=true selects TCP,
        otherwise the Unix socket is used (``socket_path``, SANDBOX_SOCKET_PATH, default
        /tmp/prodisco-sandbox.sock). TLS is read by `TlsConfig.from_env`; ``tls`` and the
        other ``options`` are those of the class.

        Raises:
            ValueError: A variable or an argument is wrong; the message names it.
        """
        env = os.environ if environ is None else environ
        target = target_from_env(env, tcp_host, tcp_port, socket_path)
        if "tls" not in options:
            options["tls"] = TlsConfig.from_env(env)
        return cls(target, **options)

    def __repr__(self) -> str:
        state = "closed" if self._connection.channel.closed else "open"
        return f"<{type(self).__name__} {self.target} {state}>"

    @property
    def target(self) -> str:
        """The target that was given."""
        return self._connection.target

    @property
    def in_flight(self) -> int:
        """How much is going on: calls, open streams and asynchronous executions; no health checks.

        An asynchronous execution counts until a call of this client shows that it has
        ended, at most until its timeout and the margin have passed.
        """
        return self._connection.usage.in_flight

    @property
    def last_used(self) -> float:
        """When the last use ended, by the event loop's clock; 0.0 before the first.

        Health checks do not count. An asynchronous execution that was not asked about again
        ends when it stops counting as in flight.
        """
        return self._connection.usage.last_used

    @property
    def on_suspect(self) -> Callable[[], None] | None:
        """Called, synchronously, when a call failed as calls to a dead sandbox do.

        That is, with UNAVAILABLE or DEADLINE_EXCEEDED; health checks excepted, and the
        deadline of a wait for an execution, which is only the caller's patience.
        """
        return self._connection.on_suspect

    @on_suspect.setter
    def on_suspect(self, callback: Callable[[], None] | None) -> None:
        self._connection.on_suspect = callback

    def _expect(
        self,
        pod: str,
        on_other: Callable[[str], None],
        look: Callable[[], Awaitable[None]],
        admit: Callable[[float], Awaitable[None] | None] | None = None,
        on_close: Callable[[], None] | None = None,
        pace: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Means every call for one machine: this pod, as it is at its first answer. See `Fence`.

        `close` calls `on_close`, so that a closed client is not handed out again; answers to health checks
        await `pace`, so that many do not come in one pass of the loop.
        """
        self._connection.fence = Fence(pod, on_other, look, admit)
        self._connection.on_close, self._connection.pace = on_close, pace

    @property
    def _found_unused(self) -> bool | None:
        """Whether the machine had been used by nobody before this client; None: it does not say."""
        return None if self._connection.fence is None else self._connection.fence.first

    @property
    def _boot_id(self) -> str | None:
        """Of the machine that calls are meant for; None: it has not answered yet, or has no fences."""
        fence = self._connection.fence
        return None if fence is None else fence.boot_id

    @property
    def _has_met(self) -> bool:
        """Whether the machine that calls are meant for has answered."""
        return self._connection.fence is not None and self._connection.fence.pinned

    @property
    def health_error(self) -> SandboxError | None:
        """Why the last attempt of `wait_for_healthy` failed; None after a success."""
        return self._connection.health_error

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the client for good and cancels the calls in flight.

        They raise `SandboxUnavailableError`. Waits for nothing; idempotent; safe to
        cancel and repeat.

        Raises:
            SandboxError: Called in another event loop than the calls, which still runs.
        """
        await self._connection.close()

    async def aclose(self) -> None:
        """The same as `close`."""
        await self.close()

    async def health_check(self, *, timeout: float = 5.0) -> r.HealthStatus:
        """Asks once whether the server is healthy.

        Asks ``grpc.health.v1.Health/Check``, and the server's own ``HealthCheck`` where
        that is unimplemented, which is remembered.

        Raises:
            ValueError, SandboxError: See the class; a server that says that it is
                unhealthy is a result.
        """
        return await self._connection.check_health(m.call_seconds("timeout", timeout))

    async def wait_for_healthy(self, timeout: float) -> bool:
        """Waits until the server is healthy.

        The first attempt goes out at once. Each has a deadline of its own, of one second
        at first, so that a server which accepts and never answers does not hold it.

        Returns:
            Whether it is. False after `timeout` seconds (at once if that is zero or
            less), or where waiting cannot help: the client is closed, a TLS file cannot
            be read. `health_error` then says why.

        Raises:
            ValueError: `timeout` is no number of seconds.
        """
        return await wait_for_healthy(self._connection, timeout)

    # Running code

    async def execute(
        self, code: str | None = None, *, cached: str | None = None, timeout: float | None = None
    ) -> r.ExecutionResult:
        """Runs code to its end and returns the whole output.

        Args:
            code: What to run; may be empty.
            cached: Instead of `code`, the name of a script in the server's cache.
            timeout: How long it may run, in seconds; None: the server's default of 30.
                Servers may clamp it, to 1 to 120.
        """
        request = m.execute_request(code, cached, timeout)
        answer = await self._connection.wait("Execute", request, self._deadline(timeout))
        return m.read(r.ExecutionResult, answer)

    def execute_stream(
        self, code: str | None = None, *, cached: str | None = None, timeout: float | None = None
    ) -> ExecutionStream:
        """Runs code and gives its output as it comes; arguments as for `execute`.

        Returns:
            An object that is both an async iterator of `ExecutionChunk` and an async
            context manager; the last chunk holds the result. Best used in ``async with``,
            whose exit cancels the call.
        """
        request = m.execute_request(code, cached, timeout)
        return ExecutionStream(self._connection, request, self._deadline(timeout))

    async def execute_async(
        self, code: str | None = None, *, cached: str | None = None, timeout: float | None = None
    ) -> r.StartedExecution:
        """Starts code and returns at once; arguments as for `execute`.

        Raises:
            ValueError, SandboxError: See the class; status "INVALID_ARGUMENT" for an
                unknown cached script.
        """
        request = m.execute_request(code, cached, timeout)
        with _telemetry.span("sandbox.execute", attributes={"rpc.method": "ExecuteAsync"}):
            answer = await self._connection.use(
                "ExecuteAsync", request, self._call_timeout, self._deadline(timeout)
            )
        started = m.read(r.StartedExecution, answer)
        if not started.state.is_final:
            queued = started.state is r.ExecutionState.PENDING
            self._connection.count_execution(started.execution_id, self._deadline(timeout), queued=queued)
        return started

    async def get_execution(
        self, execution_id: str, *, wait: bool = False, output_offset: int = 0, timeout: float | None = None
    ) -> r.ExecutionStatus:
        """State and buffered output of an execution.

        Args:
            execution_id: As `execute_async` returned it.
            wait: Let the server answer only once the execution has ended.
            output_offset: Skip this much of both outputs: an ``output_length`` that the
                server returned before. Its unit is the server's affair.
            timeout: Deadline of the call in seconds; None: long enough for any execution,
                however long it is queued, where `wait` is set, else ``call_timeout``.
        """
        request = pb.GetExecutionRequest(
            execution_id=m.text("execution_id", execution_id),
            wait=bool(wait),
            output_offset=integer("output_offset", output_offset, most=2**63 - 1),
        )
        if timeout is not None:
            m.call_seconds("timeout", timeout)
        if wait:
            limit = self._longest if timeout is None else None
            answer = self._connection.wait("GetExecution", request, limit, timeout)
        else:
            answer = self._call("GetExecution", request, timeout)
        return await self._noted(execution_id, r.ExecutionStatus, answer)

    async def wait_for_execution(
        self, execution_id: str, *, timeout: float | None = None
    ) -> r.ExecutionStatus:
        """Waits for the end of an execution; ``result`` of what it returns is set.

        Args:
            execution_id: As `execute_async` returned it.
            timeout: How long to wait, in seconds; None: long enough for any execution,
                however long it is queued.

        Raises:
            SandboxTimeoutError: It has not ended by then; it runs on.
        """
        loop = asyncio.get_running_loop()
        patience = self._longest if timeout is None else m.call_seconds("timeout", timeout)
        remaining, deadline = timeout, loop.time() + patience
        while True:
            try:
                status = await self.get_execution(execution_id, wait=True, timeout=remaining)
            except SandboxTimeoutError as error:
                text = f"execution {execution_id} has not ended within {patience:.3g} s"
                raise SandboxTimeoutError(text, status=error.status) from error
            if status.state.is_final:
                return status
            if timeout is None and status.state is r.ExecutionState.PENDING:
                deadline = loop.time() + patience
            # A server that cuts long polls short must not be asked in a busy loop.
            await asyncio.sleep(min(0.1, max(0.0, deadline - loop.time())))
            if self._connection.channel.closed:
                raise self._connection.closed_under("GetExecution")
            left = deadline - loop.time()
            if left < 1e-6:  # The loop wakes up to a clock tick early.
                raise SandboxTimeoutError(
                    f"execution {execution_id} is still {status.state.name} after {patience:.3g} s"
                )
            remaining = None if timeout is None else left

    async def cancel_execution(self, execution_id: str) -> r.CancelResult:
        """Cancels a running execution. Idempotent; some servers' scripts go on for a while."""
        request = pb.CancelExecutionRequest(execution_id=m.text("execution_id", execution_id))
        return await self._noted(execution_id, r.CancelResult, self._call("CancelExecution", request))

    async def list_executions(
        self, *, states: Iterable[r.ExecutionState] = (), limit: int = 0, include_completed_within: float = 0
    ) -> tuple[r.ExecutionInfo, ...]:
        """Running and recently finished executions; plain `execute` calls are not listed.

        Args:
            states: Only these; none: all.
            limit: At most so many, which may be the oldest ones; 0: the server's default.
            include_completed_within: Also those that ended within so many seconds; 0: the
                server's default.
        """
        if not isinstance(states, Iterable):
            raise ValueError(f"states is {states!r}: it must be an iterable of ExecutionState")  # noqa: TRY004
        since = m.call_seconds("include_completed_within", include_completed_within, zero=True)
        request = pb.ListExecutionsRequest(
            states=[integer("states", state) for state in states],  # type: ignore[misc]
            limit=integer("limit", limit),
            include_completed_within_ms=round(since * 1000),
        )
        answer = await self._call("ListExecutions", request)
        executions = m.read_all(r.ExecutionInfo, answer.executions)
        for info in executions:
            self._note_state(info.execution_id, info.state)
        return executions

    async def execute_test(
        self, *, tests: str, code: str | None = None, timeout: float | None = None
    ) -> r.TestReport:
        """Runs code together with its tests.

        Args:
            tests: The tests.
            code: The code under test; None: the tests alone.
            timeout: As for `execute`.
        """
        request = pb.ExecuteTestRequest(
            code=None if code is None else m.text("code", code, empty=True),
            tests=m.text("tests", tests, empty=True),
            timeout_ms=m.timeout_ms(timeout),
        )
        answer = await self._connection.wait("ExecuteTest", request, self._deadline(timeout))
        return m.read(r.TestReport, answer)

    async def list_cache(self, *, filter: str | None = None) -> tuple[r.CacheEntry, ...]:  # noqa: A002
        """The scripts that the server keeps because they succeeded; `filter` is its affair."""
        request = pb.ListCacheRequest(filter=None if filter is None else m.text("filter", filter, empty=True))
        return m.read_all(r.CacheEntry, (await self._call("ListCache", request)).entries)

    async def clear_cache(self) -> int:
        """Empties the server's cache; returns how many scripts it held. Idempotent."""
        count: int = (await self._call("ClearCache", pb.ClearCacheRequest())).deleted_count
        return count

    @property
    def files(self) -> SandboxFiles:
        """The files in the sandbox's workspace, for servers that have them."""
        return SandboxFiles(self._connection, self._call_timeout)

    # The language server. Lines count from 1, characters from 0.

    async def lsp_workspace_symbol(self, query: str, *, limit: int | None = None) -> r.LspWorkspaceSymbols:
        """Symbols by name; `limit`: at most so many, None: the server's default."""
        request = pb.LspWorkspaceSymbolRequest(
            query=m.text("query", query, empty=True),
            limit=None if limit is None else integer("limit", limit, least=1),
        )
        return m.read(r.LspWorkspaceSymbols, await self._call("LspWorkspaceSymbol", request))

    async def lsp_hover(self, file_path: str, line: int, character: int) -> r.LspHover:
        """Type and documentation at a position."""
        request = pb.LspPositionRequest(**m.position(file_path, line, character))
        return m.read(r.LspHover, await self._call("LspHover", request))

    async def lsp_go_to_definition(
        self, file_path: str, line: int, character: int
    ) -> tuple[r.LspLocation, ...]:
        """Where the symbol at a position is defined."""
        request = pb.LspPositionRequest(**m.position(file_path, line, character))
        return m.read_all(r.LspLocation, (await self._call("LspGoToDefinition", request)).locations)

    async def lsp_find_references(
        self, file_path: str, line: int, character: int, *, include_declaration: bool = False
    ) -> tuple[r.LspLocation, ...]:
        """Where the symbol at a position is used."""
        position = m.position(file_path, line, character)
        request = pb.LspReferencesRequest(**position, include_declaration=bool(include_declaration))
        return m.read_all(r.LspLocation, (await self._call("LspFindReferences", request)).locations)

    async def lsp_document_symbol(self, file_path: str) -> tuple[r.LspDocumentSymbol, ...]:
        """The outline of a file."""
        request = pb.LspDocumentRequest(file_path=m.text("file_path", file_path))
        return m.read_all(r.LspDocumentSymbol, (await self._call("LspDocumentSymbol", request)).symbols)

    async def _call(self, rpc: str, request: Any, timeout: float | None = None) -> Any:
        return await self._connection.use(rpc, request, timeout or self._call_timeout)

    async def _noted(self, execution_id: str, kind: type[_Found], answer: Awaitable[Any]) -> _Found:
        """Reads an answer about one execution, and notes whether that still counts as in flight."""
        try:
            found = m.read(kind, await answer)
        except SandboxError as error:
            if error.status == "NOT_FOUND":
                self._connection.usage.executions.pop(execution_id, None)
            raise
        self._note_state(execution_id, found.state)
        return found

    def _note_state(self, execution_id: str, state: r.ExecutionState) -> None:
        if state.is_final and self._connection.usage.executions.pop(execution_id, None) is not None:
            _telemetry.measure(_telemetry.EXECUTIONS, 1, m.ended_as(state))

    @property
    def _longest(self) -> float:
        """The time that any execution has, from its begin."""
        return self._greatest_timeout + self._margin

    def _deadline(self, timeout: float | None) -> float:
        # Not clamped from above: a server is free to allow more than the stock one.
        return max(timeout or _DEFAULT_TIMEOUT, _LEAST_TIMEOUT) + self._margin
