"""Telemetry: the one seam between the library and what observes it.

Spans and metrics go to OpenTelemetry where the program has loaded its API: only then can it
have set up an SDK. Otherwise each function here does next to nothing, and imports nothing.
Measurements also go to `recorders`. No attribute holds a session id, code or output.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol
from weakref import WeakSet

if TYPE_CHECKING:
    from .otel import Call, Execution

ANNOTATION = "opentelemetry.io/trace-context"
"""From which agent-sandbox's controller continues a trace: a JSON object of W3C headers."""


class Metric(NamedTuple):
    """What is measured; `label` is its only attribute.

    `values` are those that the label has, where they are known: series should be there before
    something happens.
    """

    kind: Literal["gauge", "counter", "histogram"]
    name: str
    label: str
    text: str
    unit: str = ""
    values: tuple[str, ...] = ()


PREFIX = "prodisco.sandbox."
SESSIONS = Metric(
    "gauge",
    "sessions",
    "state",
    "Sessions by state; all but queued ones hold a slot.",
    values=("queued", "creating", "ready", "suspect", "closing"),
)
SLOTS = Metric("gauge", "slots", "", "Slots for sessions: max_sessions.")
STARTS = Metric(
    "histogram",
    "start.duration",
    "kind",
    "Successful starts, from the slot to the client.",
    unit="s",
    values=("cold", "warm", "resumed", "attached"),
)
_REASONS = "Capacity Timeout Failed Conflict Unavailable Permission"
FAILURES = Metric(
    "counter",
    "failures",
    "reason",
    "Sessions that got no sandbox, by the class of the error.",
    values=("SandboxError", *(f"Sandbox{reason}Error" for reason in _REASONS.split())),
)
EXECUTIONS = Metric(
    "counter",
    "executions",
    "outcome",
    "Executions whose end was seen.",
    values=("completed", "failed", "timeout", "cancelled", "error"),
)
EVENTS = Metric("counter", "events", "event", "Events of managers, as they are logged.")
MEASURED = (STARTS, FAILURES, EXECUTIONS, EVENTS)
BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
"""Upper bounds of the histogram's buckets, in seconds: from a warm start to ready_timeout."""

recorders: list[Callable[[Metric, float, str], object]] = []
"""Called with each measurement of a metric in `MEASURED`: the metric, a value, the label's value."""


class _Table(Protocol):
    max_sessions: int

    def counts(self) -> Counter[Any]: ...


tables: WeakSet[_Table] = WeakSet()
"""The session tables of this process's managers."""


class Trace(NamedTuple):
    """Where spans belong that are begun in a task of their own; both are span contexts."""

    parent: Any = None
    """None: the span that is current there, if any."""
    link: Any = None


_OFF: AbstractContextManager[None] = nullcontext()
_NO_STAGES = nullcontext(lambda _: None)


def _otel() -> Any:
    """The module `otel`; None where the program has not loaded OpenTelemetry's API."""
    if "opentelemetry.context" not in sys.modules:
        return None
    from . import otel

    return otel


# Traces


def here(after: Trace | None = None) -> Trace | None:
    """The current span, as the parent of spans in other tasks; `after`: where they link to."""
    otel = _otel()
    return None if otel is None else Trace(otel.current(), after and after.parent)


def joining(other: Trace | None) -> Trace | None:
    """For a span that waits for what another trace does: a link, and the current span as its parent."""
    return other and Trace(link=other.parent)


def span(
    name: str, trace: Trace | None = None, attributes: Mapping[str, str] | None = None
) -> AbstractContextManager[object]:
    """A span around the block, and current in it. An exception marks it as failed."""
    otel = _otel()
    return _OFF if otel is None else otel.span(name, trace, attributes)


def stages(
    trace: Trace | None, attributes: Mapping[str, str]
) -> AbstractContextManager[Callable[[str], object]]:
    """Gives a function that begins a span, and ends the one before; one of the same name goes on."""
    otel = _otel()
    return _NO_STAGES if otel is None else otel.stages(trace, attributes)


def headers() -> tuple[tuple[str, str], ...]:
    """The current span as W3C headers. Without baggage, which is not for sandboxes to read."""
    otel = _otel()
    return () if otel is None else tuple(otel.headers().items())


def annotation() -> dict[str, str]:
    """The annotation of a new object from which the controller continues the current trace."""
    otel = _otel()
    return {} if otel is None else otel.annotation()


def execution(rpc: str) -> AbstractContextManager[Execution | None]:
    """A span from here to `Execution.end`, current in the block, whose exception ends it."""
    otel = _otel() if rpc.startswith("Execute") else None
    return _OFF if otel is None else otel.Execution(rpc)


def files(rpc: str) -> AbstractContextManager[object]:
    """A span of a call on files, around the block and current in it."""
    otel = _otel()
    return _OFF if otel is None else otel.files(rpc)


def transfer(rpc: str) -> AbstractContextManager[Call | None]:
    """The same for a file that is read after the block: to `Call.end`, or an exception of the block."""
    otel = _otel() if rpc == "Read" else None
    return _OFF if otel is None else otel.Call("sandbox.files", rpc)


# Metrics


def measure(metric: Metric, value: float, label: str) -> None:
    """One measurement; `label` is one of the few values that the metric's label has."""
    otel = _otel()
    if otel is not None:
        otel.record(metric, value, label)
    for record in recorders:
        record(metric, value, label)


def happened(event: str, pairs: Mapping[str, Any]) -> None:
    """Derives the metrics of sessions from an event of a manager."""
    measure(EVENTS, 1, event)
    if event == "sandbox_ready" and "kind" in pairs:
        measure(STARTS, pairs["duration"], pairs["kind"])
    elif event in ("sandbox_failed", "session_refused") and "error" in pairs:
        measure(FAILURES, 1, pairs["error"])


def levels() -> list[tuple[Metric, float, str]]:
    """The gauges at this moment."""
    states: Counter[str] = Counter()
    for table in tables:
        states.update({state.value: count for state, count in table.counts().items()})
    slots = sum(table.max_sessions for table in tables)
    return [(SLOTS, slots, ""), *((SESSIONS, states[name], name) for name in SESSIONS.values)]
