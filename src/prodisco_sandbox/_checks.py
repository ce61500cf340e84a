"""Checks of arguments and settings: a `ValueError` names the value and what would be right."""

from __future__ import annotations

import sys
from collections.abc import Mapping

INT32_MAX = 2**31 - 1


def wrong(name: str, value: object, right: str) -> ValueError:
    return ValueError(f"{name} is {value!r}: it must be {right}")


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def integer(name: str, value: object, *, least: int = 0, most: int | None = INT32_MAX) -> int:
    """Checks an integer; an int32 unless told otherwise."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or not least <= value or (most is not None and value > most):  # type: ignore[operator]
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise wrong(name, value, f"an integer {limits}")
    return value  # type: ignore[return-value]


def seconds(name: str, value: object, *, zero: bool = False, most: float = sys.float_info.max) -> float:
    """Checks a duration: finite, and above 0 or at least 0."""
    # Compared rather than passed to math.isfinite, which cannot take every int.
    if not is_number(value) or not (0 if zero else 1e-9) <= value <= most:  # type: ignore[operator]
        raise wrong(name, value, f"a finite number of seconds {'of at least' if zero else 'above'} 0")
    return float(value)  # type: ignore[arg-type]


def env_int(environ: Mapping[str, str], variable: str) -> int:
    """Reads a variable that must hold an integer.

    Raises:
        ValueError: It holds something else; the message names the variable.
    """
    text = environ[variable]
    try:
        return int(text)
    except ValueError:
        raise wrong(variable, text, "an integer") from None


def env_seconds(environ: Mapping[str, str], variable: str) -> float:
    """Reads a variable that must hold a number of seconds; its range is for `seconds` to check.

    Raises:
        ValueError: It holds something else; the message names the variable.
    """
    text = environ[variable]
    try:
        return float(text)
    except ValueError:
        raise wrong(variable, text, "a number of seconds") from None


def env_flag(environ: Mapping[str, str], variable: str) -> bool:
    """Reads a variable that is true or false, the latter also where it is unset; a `ValueError` names it."""
    text = environ.get(variable, "").strip().lower()
    if text not in ("", "0", "1", "false", "true"):
        raise wrong(variable, environ[variable], "true, 1, false or 0")
    return text in ("1", "true")
