"""Loggers: structlog events through the standard library's logging."""

from __future__ import annotations

import logging
from collections import Counter

import structlog


def get_logger(area: str, counts: Counter[str] | None = None) -> structlog.stdlib.BoundLogger:
    """A logger of events (``sandbox_ready``) with key=value pairs.

    structlog unconfigured prints to standard output, which would corrupt an MCP server
    on stdio. So events go to the standard library's logger ``prodisco_sandbox.<area>``:
    silent below warnings until the program configures logging, and rendered here, so
    that no structlog configuration is needed. The pairs are also on the log record's
    ``sandbox`` attribute, for handlers that write JSON.

    Args:
        area: Last part of the logger's name.
        counts: Counts the events by name, also those that are too low to be logged.
    """

    def count(logger: object, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        if counts is not None:
            counts[event["event"]] += 1
        return event

    logger: structlog.stdlib.BoundLogger = structlog.wrap_logger(
        logging.getLogger(f"prodisco_sandbox.{area}"),
        wrapper_class=structlog.stdlib.BoundLogger,
        processors=[
            count,
            structlog.stdlib.filter_by_level,
            structlog.processors.format_exc_info,
            _render,
        ],
    )
    return logger


def _render(
    logger: object, method: str, event: structlog.typing.EventDict
) -> tuple[tuple[str], dict[str, object]]:
    pairs = {key: value for key, value in event.items() if key not in ("event", "exception")}
    text = " ".join([str(event["event"]), *(f"{key}={value!r}" for key, value in pairs.items())])
    if "exception" in event:
        text += f"\n{event['exception']}"
    return (text,), {"extra": {"sandbox": {"event": event["event"], **pairs}}}
