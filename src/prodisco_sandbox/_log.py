"""Loggers: structlog events through the standard library's logging."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import structlog

_LEVELS = {name.lower(): level for name, level in logging.getLevelNamesMapping().items()}
_LEVELS["exception"] = logging.ERROR


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

    class Logger(structlog.stdlib.BoundLogger):
        # Not processors: most events are too low to be logged, and there are several for
        # each session, of which structlog would make 10 µs each before it dropped them.
        def _proxy_to_logger(
            self, method_name: str, event: str | None = None, *event_args: str, **event_kw: Any
        ) -> Any:
            if counts is not None:
                counts[str(event)] += 1
            if self._logger.isEnabledFor(_LEVELS[method_name]):
                return super()._proxy_to_logger(method_name, event, *event_args, **event_kw)
            return None

    logger: structlog.stdlib.BoundLogger = structlog.wrap_logger(
        logging.getLogger(f"prodisco_sandbox.{area}"),
        wrapper_class=Logger,
        processors=[structlog.processors.format_exc_info, _render],
    ).bind()
    return logger


def _render(
    logger: object, method: str, event: structlog.typing.EventDict
) -> tuple[tuple[str], dict[str, object]]:
    pairs = {key: value for key, value in event.items() if key not in ("event", "exception")}
    text = " ".join([str(event["event"]), *(f"{key}={value!r}" for key, value in pairs.items())])
    if "exception" in event:
        text += f"\n{event['exception']}"
    return (text,), {
        # The line that logged it, not structlog's: past its frames and `_proxy_to_logger` above.
        "stacklevel": 5,
        # The traceback is in the text; `exception` would have it printed once more.
        "exc_info": False,
        "extra": {"sandbox": {"event": event["event"], **pairs}},
    }
