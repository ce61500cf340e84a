"""Reads the arguments of a call tolerantly.

Models and clients fill unused parameters with zeros and empty values, and write numbers, lists and
booleans as text. A value that can mean only one thing is accepted; any other is refused with a sentence
that names the parameter and what would be right.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mcp.server.context import CallNext, HandlerResult, ServerMiddleware, ServerRequestContext
from mcp.server.mcpserver import Context

from . import _parameters as p
from ._language import Language

PARAMETERS = (
    "mode", "code", "cached", "timeout_ms", "execution_id", "wait", "output_offset", "error_output_offset",
    "states", "limit", "include_completed_within_ms", "tests", "sandbox",
)  # fmt: skip

_RUN = frozenset({"code", "cached", "timeout_ms"})
_USED: dict[str, frozenset[str]] = {
    "execute": _RUN,
    "stream": _RUN,
    "async": _RUN,
    "status": frozenset({"execution_id", "wait", "timeout_ms", "output_offset", "error_output_offset"}),
    "cancel": frozenset({"execution_id"}),
    "list": frozenset({"states", "limit", "include_completed_within_ms"}),
    "test": frozenset({"tests", "code", "timeout_ms"}),
    "close": frozenset(),
}
_TELLING = ("code", "cached", "tests", "execution_id")
"""Parameters that say what a call is for: if the mode does not use one, the model must know."""

_NOTHING = frozenset({"", "null", "none", "undefined"})
_TRUE, _FALSE = frozenset({"true", "yes", "on", "1"}), frozenset({"false", "no", "off", "0"})
_STATE_SPELLINGS = {"CANCELED": "CANCELLED", "TIMED_OUT": "TIMEOUT", "TIMEDOUT": "TIMEOUT"}

_NUMBER = re.compile(r"[+-]?[0-9]{1,30}(\.[0-9]{0,30})?([eE][+-]?[0-9]{1,3})?")
_FENCE = re.compile(r"(`{3,})[ \t]*([^\s`]*)[^\n`]*\n")
_MOST_OFFSET = 2**53 - 1
_MOST_SHOWN = 40
_MOST_UNKNOWN = 5
_EXAMPLE = '{"mode": "execute", "code": "..."}'


class WrongCallError(Exception):
    """The arguments cannot be read; the message is for the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A call as it was read. Parameters that its mode does not use have their defaults."""

    mode: p.Mode = "execute"
    code: str | None = None
    cached: str | None = None
    timeout_ms: int | None = None
    execution_id: str = ""
    wait: bool = False
    output_offset: int = 0
    error_output_offset: int = 0
    states: tuple[p.StateName, ...] = ()
    limit: int = p.DEFAULT_LIMIT
    include_completed_within_ms: int = 0
    tests: str = ""
    sandbox: str | None = None
    notes: tuple[str, ...] = ()
    """A note for the model about how its call was read."""

    @property
    def timeout(self) -> float | None:
        """For the client, in seconds."""
        return None if self.timeout_ms is None else self.timeout_ms / 1000

    @property
    def limit_ms(self) -> int:
        """How long the code may run."""
        return max(self.timeout_ms or p.DEFAULT_TIMEOUT_MS, p.MIN_TIMEOUT_MS)

    @property
    def patience(self) -> float:
        """How long to wait for the end of an execution, in seconds."""
        return (self.timeout_ms or p.DEFAULT_TIMEOUT_MS) / 1000


def object_arguments(tool: str) -> ServerMiddleware[Any]:
    """Middleware that passes calls whose arguments are no object on to `read_call`.

    The SDK would answer them with "Invalid request parameters", which does not help a model.
    """

    async def middleware(ctx: ServerRequestContext[Any, Any], call_next: CallNext) -> HandlerResult:
        params = ctx.params
        if ctx.method == "tools/call" and isinstance(params, Mapping) and params.get("name") == tool:
            arguments = params.get("arguments")
            if arguments is not None and not isinstance(arguments, Mapping):
                ctx = dataclasses.replace(ctx, params={**params, "arguments": {"arguments": arguments}})
        return await call_next(ctx)

    return middleware


def foreign_arguments(ctx: Context[Any, Any], tool: str) -> dict[str, Any]:
    """Arguments of a call with unknown names, which the SDK does not pass on."""
    params = ctx.request_context.params or {}
    if params.get("name") != tool:  # Another tool calls this one.
        return {}
    return {name: value for name, value in (params.get("arguments") or {}).items() if name not in PARAMETERS}


def read_call(sent: Mapping[str, Any], language: Language) -> Call:
    """Reads the arguments of a call.

    Args:
        sent: The arguments as they came, by name, unknown names included.
        language: The language of code.

    Raises:
        WrongCallError: An argument has no meaning, or more than one.
    """
    given, unknown = _by_name(_unwrapped(sent))
    mode = _mode(given.pop("mode", None))
    used = {name: value for name, value in given.items() if name in _USED[mode]}
    notes = [
        f"`{name}` was ignored: mode {mode!r} does not use it."
        for name in _TELLING
        if name not in _USED[mode] and not is_blank(given.get(name))
    ]
    if unknown:
        notes.append(_about_unknown(unknown))
    try:
        code = _program("code", used.get("code"), language, notes)
        tests = _program("tests", used.get("tests"), language, notes) or ""
        cached = read_name("cached", used.get("cached"))
        if cached and not (code or "").strip():
            code = None  # Models fill unused parameters with empty text; only code may be empty.
        call = Call(
            mode=mode,
            code=code,
            cached=cached or None,
            timeout_ms=_whole("timeout_ms", used, 1, p.MAX_TIMEOUT_MS, " in milliseconds", notes),
            execution_id=read_name("execution_id", used.get("execution_id")),
            wait=_boolean("wait", used.get("wait")),
            output_offset=_whole("output_offset", used, 0, _MOST_OFFSET) or 0,
            error_output_offset=_whole("error_output_offset", used, 0, _MOST_OFFSET) or 0,
            states=_states(used.get("states")),
            limit=_whole("limit", used, 1, p.MAX_LIMIT) or p.DEFAULT_LIMIT,
            include_completed_within_ms=_whole(
                "include_completed_within_ms", used, 0, p.MAX_WITHIN_MS, " in milliseconds"
            )
            or 0,
            tests=tests if tests.strip() else "",
            sandbox=read_name("sandbox", given.get("sandbox"), secret=True) or None,
            notes=tuple(notes),
        )
        _check(call)
    except WrongCallError as error:
        # An ignored argument may be the one that is missing.
        raise WrongCallError(" ".join([str(error), *notes])) from None
    return call


def _check(call: Call) -> None:
    """Refuses a call that lacks what its mode needs."""
    match call.mode:
        case "execute" | "stream" | "async":
            if call.code is None and call.cached is None:
                raise WrongCallError(
                    f"Mode {call.mode!r} needs `code`, or `cached` with the name of a cached script."
                )
            if call.code is not None and call.cached is not None:
                raise WrongCallError("Both `code` and `cached` were given: pass one of them.")
        case "status" | "cancel":
            if not call.execution_id:
                raise WrongCallError(
                    f"Mode {call.mode!r} needs `execution_id`; mode 'list' shows which ones there are."
                )
        case "test":
            if not call.tests:
                raise WrongCallError("Mode 'test' needs `tests`.")


# Names


def _unwrapped(sent: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments themselves, where they came as JSON text or within an object of their own."""
    if {name for name, value in sent.items() if value is not None} != {"arguments"}:
        return sent
    inner = sent["arguments"]
    if isinstance(inner, str):
        with contextlib.suppress(ValueError, RecursionError):  # Text that is no JSON is refused below.
            inner = json.loads(inner)
    if isinstance(inner, Mapping):
        return inner
    if is_blank(inner):
        return {}
    raise WrongCallError(
        f"The arguments are {_kind(inner)}: they must be an object with the tool's parameters, such as"
        f" {_EXAMPLE}."
    )


def _by_name(sent: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Values by parameter, and unknown names; other spellings of a parameter's name are accepted."""
    given = {name: value for name, value in sent.items() if name in PARAMETERS and value is not None}
    unknown = []
    for name, value in sent.items():
        if name in PARAMETERS:
            continue
        meant = _SPELLINGS.get(_letters(name))
        if meant is not None and meant not in given:
            given[meant] = value
        elif not is_blank(value) and not name.startswith("_"):
            unknown.append(name)
    return given, unknown


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


_SPELLINGS = {_letters(name): name for name in PARAMETERS}


def _about_unknown(names: list[str]) -> str:
    shown = []
    for name in names[:_MOST_UNKNOWN]:
        close = difflib.get_close_matches(name[:_MOST_SHOWN].lower(), PARAMETERS, n=1)
        shown.append(f"`{repr(name[:_MOST_SHOWN])[1:-1]}`" + (f" (`{close[0]}`?)" if close else ""))
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return f"Ignored, because the tool has no such parameter: {', '.join(shown)}{more}."


# Values


def is_blank(value: object) -> bool:
    """Whether models and clients send this value for a parameter that they do not use."""
    return _bare(value).lower() in _NOTHING if isinstance(value, str) else not value


def _bare(text: str) -> str:
    """Without white space, and the quotes of JSON text, around it."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        text = text[1:-1].strip()
    return text


def _mode(value: object) -> p.Mode:
    if is_blank(value):
        return "execute"
    if isinstance(value, str):
        for mode in p.MODES:
            if _bare(value).lower() == mode:
                return mode
    raise WrongCallError(f"`mode` is {_shown(value)}: it must be one of {_choices(p.MODES)}.")


def _whole(
    name: str, used: Mapping[str, Any], least: int, most: int, unit: str = "", notes: list[str] | None = None
) -> int | None:
    """A whole number; None where nothing, or a zero that can only mean nothing, was sent.

    With ``notes`` one above the limit is taken as the limit, and a note says so.
    """
    value = used.get(name)
    if is_blank(value):
        return None
    number: object = value
    if isinstance(value, str) and _NUMBER.fullmatch(_bare(value)):
        number = float(_bare(value)) if re.search("[.eE]", value) else int(_bare(value))
    if isinstance(number, float) and math.isfinite(number) and number.is_integer():
        number = int(number)
    if isinstance(number, int) and not isinstance(number, bool):
        if number == 0:
            return None
        if least <= number <= most:
            return number
        if notes is not None and most < number <= _MOST_OFFSET:
            notes.append(f"`{name}` was taken as {most}, the most there is: do what takes longer in steps.")
            return most
    upper = "" if most == _MOST_OFFSET else f" and less than or equal to {most}"
    raise WrongCallError(
        f"`{name}` is {_shown(value)}: it must be a whole number{unit}, greater than or equal to"
        f" {least}{upper}. Leave it out for the default."
    )


def _boolean(name: str, value: object) -> bool:
    if is_blank(value):
        return False
    text = _bare(value).lower() if isinstance(value, str) else ""
    if text in _TRUE or (isinstance(value, int | float) and value == 1):
        return True
    if text in _FALSE:
        return False
    raise WrongCallError(f"`{name}` is {_shown(value)}: it must be true or false.")


def read_name(name: str, value: object, *, secret: bool = False) -> str:
    """A name or id; empty where there is none."""
    if is_blank(value):
        return ""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**30:
        value = str(value)
    if not isinstance(value, str):
        raise WrongCallError(f"`{name}` is {_kind(value)}: it must be a string.")
    text = _bare(value)
    if len(text) > p.MAX_NAME and not secret:
        raise WrongCallError(
            f"`{name}` is a string of {len(text):,} characters: it may have at most {p.MAX_NAME} characters."
        )
    return text


def _states(value: object) -> tuple[p.StateName, ...]:
    """States in a list, in text of one, or as words."""
    if isinstance(value, str):
        value = re.split(r"[\s,;|\[\]\"']+", value)
    if is_blank(value):
        return ()
    if not isinstance(value, list):
        raise _wrong_states(value)
    found: list[p.StateName] = []
    for item in value:
        if is_blank(item):
            continue
        word = _bare(item).upper().replace("-", "_") if isinstance(item, str) else ""
        word = word.removeprefix("EXECUTION_STATE_")
        word = _STATE_SPELLINGS.get(word, word)
        state = next((state for state in p.STATES if state == word), None)
        if state is None:
            raise _wrong_states(item)
        found.append(state)
    return tuple(dict.fromkeys(found))


def _wrong_states(value: object) -> WrongCallError:
    return WrongCallError(
        f"`states` has {_shown(value)}: it must be an array of states, which are {_choices(p.STATES)}."
    )


def _program(name: str, value: object, language: Language, notes: list[str]) -> str | None:
    """Code without a byte order mark or a Markdown fence around all of it."""
    if isinstance(value, int | float) and not isinstance(value, bool) and value and abs(value) < 10**30:
        value = str(value)  # The number 42 means the code `42`.
    if not isinstance(value, str):
        if is_blank(value):
            return None
        raise WrongCallError(
            f"`{name}` is {_kind(value)}: it must be one string of {language.name}, with line breaks in it."
        )
    text = value.lstrip("\ufeff")
    begin = text.lstrip()
    fence = _FENCE.match(begin)
    if not begin.startswith("```"):
        return text
    lines = begin.rstrip().splitlines()
    closing = len(lines) > 1 and fence is not None and lines[-1].strip() == fence[1]
    inside = any(line.strip().startswith(fence[1]) for line in lines[1:-1]) if fence else False
    if fence is None or not closing or inside:
        raise WrongCallError(
            f"`{name}` begins with a Markdown fence: pass the {language.name} code alone, without ``` lines."
        )
    if (tag := fence[2].strip("{}.").rstrip("0123456789.").lower()) and tag not in language.tags:
        raise WrongCallError(
            f"`{name}` is a Markdown block of {_shown(fence[2])}, but this sandbox runs {language.name}: pass"
            f" {language.name} code alone, without ``` lines."
        )
    notes.append(f"The Markdown fence around `{name}` was taken away: pass code without ``` lines.")
    return begin[fence.end() : begin.rstrip().rfind(fence[1])]


# Words for the model


def _choices(names: tuple[str, ...]) -> str:
    return ", ".join(map(repr, names))


def _kind(value: object) -> str:
    if value is None:
        return "null"
    for kind, words in (
        (bool, "a boolean"), (int | float, "a number"), (str, "a string"), (list, "an array"),
    ):  # fmt: skip
        if isinstance(value, kind):
            return words
    return "an object"


def _shown(value: object) -> str:
    """A value for a sentence: short, and one line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return repr(value if len(value) <= _MOST_SHOWN else value[:_MOST_SHOWN] + "...")
    if isinstance(value, int | float):
        # Python refuses to write integers of thousands of digits.
        return str(value) if isinstance(value, float) or abs(value) < 10**30 else "a very large number"
    return _kind(value)
