"""The tool's parameters: their schema, for the model."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, WrapValidator

MAX_TIMEOUT_MS = 120_000
DEFAULT_TIMEOUT_MS = 30_000
"""The timeout that servers use where none is given."""
MIN_TIMEOUT_MS = 1_000
"""The shortest timeout; servers raise shorter ones to it."""
DEFAULT_LIMIT = 20
MAX_LIMIT = 1_000
MAX_NAME = 255
"""Characters of a name: servers repeat an unknown one in the status of the gRPC call, which holds
8 KiB, and what is longer comes back as RESOURCE_EXHAUSTED, as if the sandbox were busy."""
MAX_WITHIN_MS = 2_147_483_000
"""The most whole seconds that an int32 of milliseconds holds."""

ABSENT: Any = None


def _shorten(schema: dict[str, Any]) -> None:
    schema.pop("default", None)
    schema.pop("title", None)


def _field(description: str, **limits: Any) -> Any:
    return Field(description=description, json_schema_extra=_shorten, **limits)


# Types and limits as the model sees them. _reading.py reads other values that the model sends, or
# refuses them with a sentence. Code is plain `str`: any other type the SDK parses as JSON first, so
# the code `[1, 2]` would become a list.
_AS_SENT = WrapValidator(lambda value, _: value)

Mode = Literal["execute", "stream", "async", "status", "cancel", "list", "test", "close"]
StateName = Literal["PENDING", "RUNNING", "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"]
MODES: tuple[Mode, ...] = get_args(Mode)
STATES: tuple[StateName, ...] = get_args(StateName)

ModeParameter = Annotated[Mode, _field("What to do; see the tool's description"), _AS_SENT]
Code = Annotated[str, _field("What to run (execute, stream, async), or the code under test (test)"), _AS_SENT]
Cached = Annotated[
    str,
    _field("Instead of `code`: the name of a script that the sandbox has cached"),
    _AS_SENT,
]
TimeoutMs = Annotated[
    int,
    _field(
        f"How long the code may run, or how long status waits; {DEFAULT_TIMEOUT_MS:,} if left out",
        ge=1,
        le=MAX_TIMEOUT_MS,
    ),
    _AS_SENT,
]
ExecutionId = Annotated[str, _field("Which execution (status, cancel)"), _AS_SENT]
Wait = Annotated[bool, _field("status: answer when the execution has ended, or after `timeout_ms`"), _AS_SENT]
OutputOffset = Annotated[
    int, _field("status: skip so many characters of `output`; from an earlier result", ge=0), _AS_SENT
]
ErrorOutputOffset = Annotated[
    int, _field("status: skip so many characters of `error_output`; from an earlier result", ge=0), _AS_SENT
]
States = Annotated[list[StateName], _field("list: only executions in these states"), _AS_SENT]
Limit = Annotated[
    int,
    _field(f"list: at most so many, the newest; {DEFAULT_LIMIT} if left out", ge=1, le=MAX_LIMIT),
    _AS_SENT,
]
Within = Annotated[
    int,
    _field("list: of those that have ended, only what ended within so many ms", ge=0, le=MAX_WITHIN_MS),
    _AS_SENT,
]
Tests = Annotated[str, _field("test: the tests to run"), _AS_SENT]
Path = Annotated[str, _field("The file, relative to the working directory of the code"), _AS_SENT]
Directory = Annotated[str, _field("The directory; the working directory of the code if left out"), _AS_SENT]
Text = Annotated[str, _field("The content, if it is text"), _AS_SENT]
Base64 = Annotated[str, _field("Instead of `text`: the content's bytes, in base64"), _AS_SENT]
Sandbox = Annotated[
    str,
    _field(
        "The handle from an earlier result, to go on there; keep it secret. 'new': another, empty sandbox"
    ),
    _AS_SENT,
]
