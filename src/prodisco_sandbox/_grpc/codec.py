"""Messages of the wire: requests that are checked, and answers read into `results`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from enum import IntEnum
from functools import cache, partial
from types import NoneType
from typing import Any, TypeVar, cast, get_args, get_type_hints

from .._checks import INT32_MAX, integer, seconds
from ..errors import SandboxError
from ..proto import sandbox_pb2 as pb
from ..results import ExecutionChunk, ExecutionOutcome, ExecutionState

MAX_MESSAGE_BYTES = 64 * 1024 * 1024

_T = TypeVar("_T")
_ENDS: dict[int, str] = {state: state.name.lower() for state in ExecutionState if state.is_final}

# Answers


def read(kind: Callable[..., _T], message: Any) -> _T:
    """Reads a message into a dataclass whose fields have the names of its fields.

    A field of type ``X | None`` has explicit presence: it is None where the message lacks it.
    """
    return kind(*[get(message) for get in _getters(kind)])


def read_all(kind: Callable[..., _T], messages: Iterable[Any]) -> tuple[_T, ...]:
    return tuple(read(kind, message) for message in messages)


@cache
def _getters(kind: Any) -> tuple[Callable[[Any], Any], ...]:
    types = get_type_hints(kind)
    return tuple(_getter(field.name, types[field.name]) for field in fields(kind))


def _getter(name: str, type_: Any) -> Callable[[Any], Any]:
    inner, *others = get_args(type_) or (type_,)  # X, X | None or tuple[X, ...]
    convert: Callable[[Any], Any] | None = None
    if is_dataclass(inner):
        convert = partial(read, cast(Any, inner))
    elif issubclass(inner, IntEnum):
        convert = inner

    def get(message: Any) -> Any:
        if optional and not message.HasField(name):
            return None
        value = getattr(message, name)
        if repeated:
            return tuple(map(convert, value)) if convert else tuple(value)
        return convert(value) if convert else value

    optional, repeated = NoneType in others, Ellipsis in others
    return get


def read_chunk(message: pb.ExecuteChunk) -> ExecutionChunk | None:
    """None where the chunk is of a kind that this version does not know."""
    kind = message.WhichOneof("chunk")
    if kind is None:
        return None
    if kind == "result":
        text, result = "", read(ExecutionOutcome, message.result)
    else:
        text, result = getattr(message, kind), None
    return ExecutionChunk(message.execution_id, kind, text, result, message.timestamp_ms)


def outcome(message: Any) -> str | None:
    """How an execution has ended, as its answer, or the last message of its stream, tells."""
    if isinstance(message, pb.ExecuteChunk):
        return ended_as(message.result.state) if message.HasField("result") else None
    return "completed" if message.success else "failed"


def ended_as(state: int) -> str:
    """A final state as the label of a metric, which no server can add values to."""
    return _ENDS.get(state, "unknown")


# Requests


def call_seconds(name: str, value: object, *, zero: bool = False) -> float:
    """Checks a duration that an int32 of milliseconds can hold."""
    return seconds(name, value, zero=zero, most=INT32_MAX // 1000)


def timeout_ms(timeout: object) -> int | None:
    return None if timeout is None else max(1, round(call_seconds("timeout", timeout) * 1000))


def text(name: str, value: object, *, empty: bool = False) -> str:
    """Checks a string that UTF-8 can encode and a message can hold.

    Raises:
        SandboxError: No message can hold it. gRPC refuses a message that is a little too long, but
            in place of one that it cannot encode (2 GiB) it sends an empty message.
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
