"""The tool's parameters: their types, limits and descriptions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, WrapValidator
from pydantic_core.core_schema import ValidatorFunctionWrapHandler

MAX_TIMEOUT_MS = 120_000
DEFAULT_TIMEOUT_MS = 30_000
"""What servers of the protocol take where no timeout is given."""
MIN_TIMEOUT_MS = 1_000
"""What servers of the protocol make of anything shorter."""
DEFAULT_LIMIT = 20
MAX_NAME = 255
"""Characters of a name: servers repeat an unknown one in the status of the gRPC call, which holds
8 KiB, and what is longer comes back as RESOURCE_EXHAUSTED, as if the sandbox were busy."""
MAX_WITHIN_MS = 2_147_483_000
"""What an int32 of the protocol holds, in whole seconds."""

ABSENT: Any = None


def _pass_none(value: object, check: ValidatorFunctionWrapHandler) -> object:
    return None if value is None else check(value)


def _none_is_execute(value: object, check: ValidatorFunctionWrapHandler) -> object:
    return "execute" if value is None else check(value)


def _shorten(schema: dict[str, Any]) -> None:
    schema.pop("default", None)
    schema.pop("title", None)


def _field(description: str, **limits: Any) -> Any:
    return Field(description=description, json_schema_extra=_shorten, **limits)


# Not `str | None`: what is not plainly str, the SDK parses as JSON first, so that the code
# `[1, 2]` would be a list. Clients that send null for what they leave out are common.
_OPTIONAL = WrapValidator(_pass_none)

Mode = Literal["execute", "stream", "async", "status", "cancel", "list", "test"]
StateName = Literal["PENDING", "RUNNING", "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"]

ModeParameter = Annotated[
    Mode, _field("What to do; see the tool's description"), WrapValidator(_none_is_execute)
]
Code = Annotated[
    str, _field("What to run (execute, stream, async), or the code under test (test)"), _OPTIONAL
]
Cached = Annotated[
    str,
    _field("Instead of `code`: the name of a script that the sandbox has cached", max_length=MAX_NAME),
    _OPTIONAL,
]
TimeoutMs = Annotated[
    int,
    _field(
        f"How long the code may run, or how long status waits; {DEFAULT_TIMEOUT_MS:,} if left out",
        ge=1,
        le=MAX_TIMEOUT_MS,
    ),
    _OPTIONAL,
]
ExecutionId = Annotated[str, _field("Which execution (status, cancel)", max_length=MAX_NAME), _OPTIONAL]
Wait = Annotated[
    bool, _field("status: answer when the execution has ended, or after `timeout_ms`"), _OPTIONAL
]
OutputOffset = Annotated[
    int, _field("status: skip so many characters of `output`; from an earlier result", ge=0), _OPTIONAL
]
ErrorOutputOffset = Annotated[
    int, _field("status: skip so many characters of `error_output`; from an earlier result", ge=0), _OPTIONAL
]
States = Annotated[list[StateName], _field("list: only executions in these states"), _OPTIONAL]
Limit = Annotated[
    int, _field(f"list: at most so many, the newest; {DEFAULT_LIMIT} if left out", ge=1, le=1000), _OPTIONAL
]
Within = Annotated[
    int,
    _field("list: of those that have ended, only what ended within so many ms", ge=0, le=MAX_WITHIN_MS),
    _OPTIONAL,
]
Tests = Annotated[str, _field("test: the tests to run"), _OPTIONAL]
Sandbox = Annotated[
    str,
    _field("The handle from an earlier result, to go on in that sandbox, with its files; keep it secret"),
    _OPTIONAL,
]


@dataclass(slots=True, kw_only=True)
class Call:
    """What a call asks for."""

    mode: Mode
    code: str | None
    cached: str | None
    timeout_ms: int | None
    execution_id: str
    wait: bool
    output_offset: int
    error_output_offset: int
    states: list[StateName]
    limit: int
    include_completed_within_ms: int
    tests: str

    def __post_init__(self) -> None:
        # Models fill parameters that they do not need with empty text; only code may be empty.
        self.cached = self.cached or None
        if self.cached and not self.code:
            self.code = None

    @property
    def timeout(self) -> float | None:
        """For the client, in seconds."""
        return None if self.timeout_ms is None else self.timeout_ms / 1000

    @property
    def limit_ms(self) -> int:
        """How long the code may run."""
        return max(self.timeout_ms or DEFAULT_TIMEOUT_MS, MIN_TIMEOUT_MS)

    @property
    def patience(self) -> float:
        """How long to wait for the end of an execution, in seconds."""
        return (self.timeout_ms or DEFAULT_TIMEOUT_MS) / 1000

    def problem(self) -> str | None:
        """What is wrong with the call, for the model; None: nothing."""
        match self.mode:
            case "execute" | "stream" | "async":
                if self.code is None and self.cached is None:
                    return f"Mode {self.mode!r} needs `code`, or `cached` with the name of a cached script."
                if self.code is not None and self.cached is not None:
                    return "Both `code` and `cached` were given: pass one of them."
            case "status" | "cancel":
                if not self.execution_id:
                    return f"Mode {self.mode!r} needs `execution_id`; mode 'list' shows which ones there are."
            case "test":
                if not self.tests:
                    return "Mode 'test' needs `tests`."
        return None
