"""What the calls of `SandboxClient` return: frozen dataclasses and open enums.

Times ending in ``_ms`` are milliseconds, as on the wire: since the Unix epoch where the
name says "at" or "timestamp", else durations.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import ClassVar, Literal, Self


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
    """Which machine a client leads to: one that compares unequal has none of the old state, except what
    is on volumes where `uid` is the same."""

    name: str
    uid: str
    """The Sandbox object's, for preconditions and kubectl."""
    incarnation: int
    """Which incarnation under this uid: it goes up when the machine is replaced under the Sandbox
    (another pod, or a container that was restarted in its pod), and when a name was still taken
    by a predecessor that was being deleted. With `shared`, 0 where there is a `boot_id`."""
    boot_id: str | None = None
    """Of the server's life, as it says; None: it has no fences, and a restart in place goes unnoticed."""
    after_eviction: bool = field(default=False, compare=False)
    """Whether the session's machine before this one was given up to make room for another session
    (``when_full="evict"``), as far as the manager remembers."""


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


FileKind = Literal["file", "directory", "other"]
"""What a file is; "other": a link, a device, a FIFO, a socket, or what has a name that is not UTF-8."""


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A file or directory in a sandbox's workspace."""

    path: str
    """Relative to the workspace, with ``/`` between names; a name that is not UTF-8 has ``\\xNN`` for its
    bytes, and cannot be used in calls."""
    size: int = 0
    """In bytes; 0 unless it is a file."""
    kind: FileKind = "file"
    modified_at: float = 0.0
    """When its content was changed, in seconds since the Unix epoch; code can set this to anything."""


class FileList(tuple[FileInfo, ...]):
    """What is in a directory, in order of path.

    Attributes:
        truncated: Whether there is more.
    """

    truncated: bool

    def __new__(cls, files: Iterable[FileInfo] = (), *, truncated: bool = False) -> Self:
        self = super().__new__(cls, files)
        self.truncated = truncated
        return self


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
