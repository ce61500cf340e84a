"""What `SandboxClient` sends and returns: checked requests, and frozen dataclasses.

Times ending in ``_ms`` are milliseconds, as on the wire: since the Unix epoch where the
name says "at" or "timestamp", else durations.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar, Literal, Self

from .errors import SandboxError
from .proto import sandbox_pb2 as pb

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
_INT32_MAX = 2**31 - 1


class _OpenEnum(IntEnum):
    """Keeps a number that this version does not know: a server may be newer."""

    @classmethod
    def _missing_(cls, value: object) -> Self | None:
        if not isinstance(value, int):
            return None
        member = int.__new__(cls, value)
        member._name_, member._value_ = f"UNKNOWN_{value}", value
        return member


class ExecutionState(_OpenEnum):
    """Where an execution stands."""

    UNSPECIFIED = 0
    PENDING = 1
    RUNNING = 2
    COMPLETED = 3
    FAILED = 4
    CANCELLED = 5
    TIMEOUT = 6

    @property
    def is_final(self) -> bool:
        """Whether the execution has ended: the protocol's states of three and above."""
        return self >= 3


class LspSymbolKind(_OpenEnum):
    """What a symbol is; the Language Server Protocol's own numbers."""

    UNSPECIFIED = 0
    FILE = 1
    MODULE = 2
    NAMESPACE = 3
    PACKAGE = 4
    CLASS = 5
    METHOD = 6
    PROPERTY = 7
    FIELD = 8
    CONSTRUCTOR = 9
    ENUM = 10
    INTERFACE = 11
    FUNCTION = 12
    VARIABLE = 13
    CONSTANT = 14
    STRING = 15
    NUMBER = 16
    BOOLEAN = 17
    ARRAY = 18
    OBJECT = 19
    KEY = 20
    NULL = 21
    ENUM_MEMBER = 22
    STRUCT = 23
    EVENT = 24
    OPERATOR = 25
    TYPE_PARAMETER = 26


@dataclass(frozen=True, slots=True)
class SandboxRef:
    """Which machine a client leads to: one that compares unequal has none of the old state."""

    name: str
    uid: str
    """The Sandbox object's, for preconditions and kubectl."""
    incarnation: int
    """Which incarnation under this uid: it goes up when the machine is replaced under the Sandbox
    (another pod, or a container that was restarted in its pod), and when a name was still taken
    by a predecessor that was being deleted."""
    boot_id: str | None = None
    """Of the server's life, as it says; None: it has no fences, and a restart in place goes unnoticed."""


@dataclass(frozen=True, slots=True)
class HealthStatus:
    """What a server said about itself."""

    healthy: bool
    kubernetes_context: str | None = None
    """Only where the server's own health call answered: the context that it uses."""


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """A script that the server keeps because it succeeded."""

    name: str
    """What `SandboxClient.execute` takes as ``cached``."""
    description: str = ""
    created_at_ms: int = 0
    content_hash: str = ""


@dataclass(frozen=True, slots=True)
class ExecutionResult:
    """The end of a plain execution. A failing script is a result, not an exception."""

    success: bool
    output: str = ""
    error: str | None = None
    """Why it failed; None where it succeeded."""
    execution_time_ms: int = 0
    cached: CacheEntry | None = None
    """Only where this run added the script to the server's cache."""


@dataclass(frozen=True, slots=True)
class ExecutionOutcome:
    """How a streamed or asynchronous execution ended; its output comes beside it."""

    success: bool
    state: ExecutionState = ExecutionState.UNSPECIFIED
    error: str | None = None
    execution_time_ms: int = 0
    cached: CacheEntry | None = None


@dataclass(frozen=True, slots=True)
class ExecutionChunk:
    """One piece of a stream; the last one is of kind ``"result"``."""

    execution_id: str
    kind: Literal["output", "error_output", "result"]
    text: str = ""
    """The output of the kinds "output" and "error_output"; else empty."""
    result: ExecutionOutcome | None = None
    """The end, of the kind "result"; else None."""
    timestamp_ms: int = 0


@dataclass(frozen=True, slots=True)
class StartedExecution:
    """An asynchronous execution that has been accepted."""

    execution_id: str
    state: ExecutionState


@dataclass(frozen=True, slots=True)
class ExecutionStatus:
    """State and buffered output of an execution."""

    execution_id: str
    state: ExecutionState
    output: str = ""
    """From the asked offset on, as `error_output`."""
    error_output: str = ""
    output_length: int = 0
    """Length of the whole output, in the server's units: the next ``output_offset``."""
    error_output_length: int = 0
    result: ExecutionOutcome | None = None
    """Only once the execution has ended."""


@dataclass(frozen=True, slots=True)
class CancelResult:
    """What became of a request to cancel."""

    success: bool
    state: ExecutionState
    message: str | None = None


@dataclass(frozen=True, slots=True)
class ExecutionInfo:
    """One line of the list of executions."""

    execution_id: str
    state: ExecutionState
    started_at_ms: int = 0
    finished_at_ms: int | None = None
    code_preview: str = ""
    """The first 100 characters of the code."""
    is_cached: bool = False
    cached_name: str | None = None


@dataclass(frozen=True, slots=True)
class TestResult:
    """One test."""

    __test__: ClassVar[bool] = False  # pytest would collect a class of this name.

    name: str
    passed: bool
    error: str | None = None
    duration_ms: int = 0


@dataclass(frozen=True, slots=True)
class TestSummary:
    """How many tests there were, and what became of them."""

    __test__: ClassVar[bool] = False

    total: int = 0
    passed: int = 0
    failed: int = 0
    skipped: int = 0


@dataclass(frozen=True, slots=True)
class TestReport:
    """What `SandboxClient.execute_test` found."""

    __test__: ClassVar[bool] = False

    success: bool
    summary: TestSummary = TestSummary()
    tests: tuple[TestResult, ...] = ()
    output: str = ""
    execution_time_ms: int = 0
    error: str | None = None
    """Why the tests could not be run; None where they ran."""


@dataclass(frozen=True, slots=True)
class LspRange:
    """A stretch of a file; lines count from 1, characters from 0."""

    start_line: int
    start_character: int
    end_line: int
    end_character: int


@dataclass(frozen=True, slots=True)
class LspLocation:
    """A stretch of a file, and which file."""

    uri: str
    range: LspRange


@dataclass(frozen=True, slots=True)
class LspSymbolInfo:
    """A symbol found by name."""

    name: str
    kind: LspSymbolKind
    library: str
    container_name: str
    location: LspLocation


@dataclass(frozen=True, slots=True)
class LspWorkspaceSymbols:
    """The symbols that matched, as many as were asked for."""

    symbols: tuple[LspSymbolInfo, ...]
    total_matches: int


@dataclass(frozen=True, slots=True)
class LspHover:
    """Type and documentation at a position."""

    contents: str
    """Markdown."""
    range: LspRange | None = None


@dataclass(frozen=True, slots=True)
class LspDocumentSymbol:
    """One entry of a file's outline."""

    name: str
    kind: LspSymbolKind
    detail: str
    range: LspRange
    selection_range: LspRange
    children: tuple[LspDocumentSymbol, ...] = ()


def read_cache_entry(message: pb.CacheEntry) -> CacheEntry:
    return CacheEntry(message.name, message.description, message.created_at_ms, message.content_hash)


def read_cache(message: pb.ListCacheResponse) -> tuple[CacheEntry, ...]:
    return tuple(map(read_cache_entry, message.entries))


def read_deleted_count(message: pb.ClearCacheResponse) -> int:
    return message.deleted_count


def read_result(message: pb.ExecuteResponse) -> ExecutionResult:
    return ExecutionResult(
        message.success,
        message.output,
        message.error if message.HasField("error") else None,
        message.execution_time_ms,
        read_cache_entry(message.cached) if message.HasField("cached") else None,
    )


def read_outcome(message: pb.ExecuteResult) -> ExecutionOutcome:
    return ExecutionOutcome(
        message.success,
        ExecutionState(message.state),
        message.error if message.HasField("error") else None,
        message.execution_time_ms,
        read_cache_entry(message.cached) if message.HasField("cached") else None,
    )


def read_chunk(message: pb.ExecuteChunk) -> ExecutionChunk | None:
    """None where the chunk is of a kind that this version does not know."""
    kind = message.WhichOneof("chunk")
    if kind == "output":
        return ExecutionChunk(message.execution_id, kind, message.output, None, message.timestamp_ms)
    if kind == "error_output":
        return ExecutionChunk(message.execution_id, kind, message.error_output, None, message.timestamp_ms)
    if kind == "result":
        outcome = read_outcome(message.result)
        return ExecutionChunk(message.execution_id, kind, "", outcome, message.timestamp_ms)
    return None


def read_started(message: pb.ExecuteAsyncResponse) -> StartedExecution:
    return StartedExecution(message.execution_id, ExecutionState(message.state))


def read_status(message: pb.GetExecutionResponse) -> ExecutionStatus:
    return ExecutionStatus(
        message.execution_id,
        ExecutionState(message.state),
        message.output,
        message.error_output,
        message.output_length,
        message.error_output_length,
        read_outcome(message.result) if message.HasField("result") else None,
    )


def read_cancel(message: pb.CancelExecutionResponse) -> CancelResult:
    text = message.message if message.HasField("message") else None
    return CancelResult(message.success, ExecutionState(message.state), text)


def read_executions(message: pb.ListExecutionsResponse) -> tuple[ExecutionInfo, ...]:
    return tuple(
        ExecutionInfo(
            info.execution_id,
            ExecutionState(info.state),
            info.started_at_ms,
            info.finished_at_ms if info.HasField("finished_at_ms") else None,
            info.code_preview,
            info.is_cached,
            info.cached_name if info.HasField("cached_name") else None,
        )
        for info in message.executions
    )


def read_report(message: pb.ExecuteTestResponse) -> TestReport:
    summary = message.summary
    return TestReport(
        message.success,
        TestSummary(summary.total, summary.passed, summary.failed, summary.skipped),
        tuple(
            TestResult(
                test.name, test.passed, test.error if test.HasField("error") else None, test.duration_ms
            )
            for test in message.tests
        ),
        message.output,
        message.execution_time_ms,
        message.error if message.HasField("error") else None,
    )


def read_range(message: pb.LspRange) -> LspRange:
    return LspRange(message.start_line, message.start_character, message.end_line, message.end_character)


def read_location(message: pb.LspLocation) -> LspLocation:
    return LspLocation(message.uri, read_range(message.range))


def read_locations(message: pb.LspLocationsResponse) -> tuple[LspLocation, ...]:
    return tuple(map(read_location, message.locations))


def read_workspace_symbols(message: pb.LspWorkspaceSymbolResponse) -> LspWorkspaceSymbols:
    symbols = tuple(
        LspSymbolInfo(
            symbol.name,
            LspSymbolKind(symbol.kind),
            symbol.library,
            symbol.container_name,
            read_location(symbol.location),
        )
        for symbol in message.symbols
    )
    return LspWorkspaceSymbols(symbols, message.total_matches)


def read_hover(message: pb.LspHoverResponse) -> LspHover:
    return LspHover(message.contents, read_range(message.range) if message.HasField("range") else None)


def read_document_symbol(message: pb.LspDocumentSymbol) -> LspDocumentSymbol:
    return LspDocumentSymbol(
        message.name,
        LspSymbolKind(message.kind),
        message.detail,
        read_range(message.range),
        read_range(message.selection_range),
        tuple(map(read_document_symbol, message.children)),
    )


def read_document_symbols(message: pb.LspDocumentSymbolResponse) -> tuple[LspDocumentSymbol, ...]:
    return tuple(map(read_document_symbol, message.symbols))


# Arguments


def seconds(name: str, value: object, *, zero: bool = False) -> float:
    """Checks a duration: finite and above 0, or at least 0; not beyond an int32 of ms."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (0 if zero else 1e-9) <= value <= _INT32_MAX // 1000:  # type: ignore[operator]
        least = "of at least" if zero else "above"
        raise ValueError(f"{name} is {value!r}: it must be a finite number of seconds {least} 0")
    return float(value)  # type: ignore[arg-type]


def timeout_ms(timeout: object) -> int | None:
    return None if timeout is None else max(1, round(seconds("timeout", timeout) * 1000))


def text(name: str, value: object, *, empty: bool = False) -> str:
    """Checks a string that UTF-8 can encode and a message can hold.

    Raises:
        SandboxError: No message can. gRPC itself says so of what is a little too long, but
            of what it cannot even encode (2 GiB) it sends an empty message.
    """
    if not isinstance(value, str) or not (value or empty):
        raise ValueError(f"{name} is {value!r}: it must be a {'' if empty else 'non-empty '}string")
    if len(value) > MAX_MESSAGE_BYTES:
        limit = f"the size limit of {MAX_MESSAGE_BYTES >> 20} MiB of a message"
        raise SandboxError(f"{name} is over {limit}: nothing was run", status="RESOURCE_EXHAUSTED")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{name} cannot be encoded as UTF-8: {error.reason}") from None
    return value


def integer(name: str, value: object, *, least: int = 0, most: int = _INT32_MAX) -> int:
    """Checks an integer; an int32 unless told otherwise."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{name} is {value!r}: it must be an integer from {least} to {most}")
    return value


# C-core's and Node's words, Go's, and Java's.
_SIZES = re.compile(r"larger than max \((?P<size>\d+) vs\.? (?P<limit>\d+)\)")
_JAVA_SIZES = re.compile(r"exceeds maximum size (?P<limit>\d+): (?P<size>\d+)")


def about_size(details: str) -> str | None:
    """What a RESOURCE_EXHAUSTED says that is about the size of a message; None where it is not.

    Servers have limits of their own, of 4 MiB by default, and refuse a larger request
    before anything runs. An answer is only ever over this client's limit.
    """
    found = _SIZES.search(details) or _JAVA_SIZES.search(details)
    if found is None:
        return None
    size, limit = int(found["size"]), int(found["limit"])
    if limit == MAX_MESSAGE_BYTES and "SERVER: " not in details:
        return f"a message is over the size limit of {MAX_MESSAGE_BYTES >> 20} MiB: {details}"
    return (
        f"a request of {size:,} bytes is over the size limit of {limit / (1 << 20):.3g} MiB of this server's"
        " messages: nothing was run"
    )


def execute_request(code: str | None, cached: str | None, timeout: float | None) -> pb.ExecuteRequest:
    if (code is None) == (cached is None):
        which = "neither" if code is None else "both"
        raise ValueError(f"{which} of code and cached given: give the code, or a cached script's name")
    request = pb.ExecuteRequest(timeout_ms=timeout_ms(timeout))
    if cached is None:
        request.code = text("code", code, empty=True)
    else:
        # An empty name makes the stock server run the first script that it has.
        request.cached = text("cached", cached)
    return request


def position(file_path: str, line: int, character: int) -> dict[str, Any]:
    """The fields that every request about a position has."""
    return {
        "file_path": text("file_path", file_path),
        "line": integer("line", line, least=1),
        "character": integer("character", character),
    }
