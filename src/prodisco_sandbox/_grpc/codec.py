"""Messages of the wire: requests that are checked, and answers as the dataclasses of `results`."""

from __future__ import annotations

import re
from typing import Any

from .._checks import INT32_MAX, integer, seconds
from ..errors import SandboxError
from ..proto import sandbox_pb2 as pb
from ..results import (
    CacheEntry,
    CancelResult,
    ExecutionChunk,
    ExecutionInfo,
    ExecutionOutcome,
    ExecutionResult,
    ExecutionState,
    ExecutionStatus,
    LspDocumentSymbol,
    LspHover,
    LspLocation,
    LspRange,
    LspSymbolInfo,
    LspSymbolKind,
    LspWorkspaceSymbols,
    StartedExecution,
    TestReport,
    TestResult,
    TestSummary,
)

MAX_MESSAGE_BYTES = 64 * 1024 * 1024


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


def call_seconds(name: str, value: object, *, zero: bool = False) -> float:
    """Checks a duration that an int32 of milliseconds can hold."""
    return seconds(name, value, zero=zero, most=INT32_MAX // 1000)


def timeout_ms(timeout: object) -> int | None:
    return None if timeout is None else max(1, round(call_seconds("timeout", timeout) * 1000))


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
