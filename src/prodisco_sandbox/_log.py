"""Events: through the application's structlog where it has configured one, else `logging`."""

from __future__ import annotations

import logging
from collections import Counter

import structlog

from . import _telemetry


class Logger:
    """Logs events (``sandbox_ready``) with key=value pairs.

    Where the application has configured structlog, the events go through its processors,
    level filter and context variables, as those of ``structlog.get_logger(name)`` do, with
    the name as ``logger``. Otherwise they go to the standard library's logger of that name,
    which shows nothing below a warning until the application configures it: structlog's own
    default prints to standard output, which would corrupt an MCP server on stdio. Each event
    decides anew, so the application may configure structlog at any time.
    """

    def __init__(self, name: str, counts: Counter[str] | None) -> None:
        self._name = name
        self._standard = logging.getLogger(name)
        self._structlog = structlog.get_logger(name)  # reads its configuration when it is used
        self._counts = counts

    def debug(self, event: str, **pairs: object) -> None:
        self._log(logging.DEBUG, event, pairs)

    def info(self, event: str, **pairs: object) -> None:
        self._log(logging.INFO, event, pairs)

    def warning(self, event: str, **pairs: object) -> None:
        self._log(logging.WARNING, event, pairs)

    def error(self, event: str, **pairs: object) -> None:
        self._log(logging.ERROR, event, pairs)

    def exception(self, event: str, **pairs: object) -> None:
        """An error with the traceback of the exception that is being handled."""
        self._log(logging.ERROR, event, pairs, exc_info=True)

    def log(self, level: int, event: str, **pairs: object) -> None:
        self._log(level, event, pairs)

    def _log(self, level: int, event: str, pairs: dict[str, object], *, exc_info: bool = False) -> None:
        if self._counts is not None:
            self._counts[event] += 1
            _telemetry.happened(event, pairs)
        if structlog.is_configured():
            if exc_info:
                pairs["exc_info"] = True
            method = getattr(self._structlog, logging.getLevelName(level).lower())
            method(event, logger=self._name, **pairs)
        elif self._standard.isEnabledFor(level):
            self._standard.log(
                level,
                " ".join([event, *(f"{key}={value!r}" for key, value in pairs.items())]),
                exc_info=exc_info,
                extra={"sandbox": {"event": event, **pairs}},
                stacklevel=3,
            )


def get_logger(area: str, counts: Counter[str] | None = None) -> Logger:
    """The logger ``prodisco_sandbox.<area>``.

    Args:
        area: Last part of the logger's name.
        counts: Counts the events by name, also those that are too low to be logged.
    """
    return Logger(f"prodisco_sandbox.{area}", counts)
