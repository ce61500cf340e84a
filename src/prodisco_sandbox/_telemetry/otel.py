"""Spans and metrics through OpenTelemetry's API; the only module of the library that imports it."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Self, cast

from opentelemetry import context, metrics, trace
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    Tracer,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from . import (
    ANNOTATION,
    BUCKETS,
    EXECUTIONS,
    MEASURED,
    PREFIX,
    SESSIONS,
    SLOTS,
    Metric,
    Trace,
    levels,
    measure,
)

SCOPE = "prodisco_sandbox"

_w3c = TraceContextTextMapPropagator()


# What is made before an SDK is set up passes on to it later.


@functools.cache
def _tracer() -> Tracer:
    return trace.get_tracer(SCOPE)


def current() -> SpanContext | None:
    found = trace.get_current_span().get_span_context()
    return found if found.is_valid else None


def headers() -> dict[str, str]:
    carrier: dict[str, str] = {}
    _w3c.inject(carrier)
    return carrier


def annotation() -> dict[str, str]:
    carrier = headers()
    return {ANNOTATION: json.dumps(carrier)} if carrier else {}


def begin(
    name: str, at: Trace | None, attributes: Mapping[str, str] | None, kind: SpanKind = SpanKind.INTERNAL
) -> Span:
    parent, link = at or Trace()
    around = None if parent is None else trace.set_span_in_context(NonRecordingSpan(parent))
    links = [] if link is None else [Link(link)]
    return _tracer().start_span(name, around, kind, attributes, links)


def fail(begun: Span, error: BaseException) -> None:
    """Marks a span as failed: by the error's class, since its text may hold what spans must not."""
    begun.set_attribute("error.type", type(error).__qualname__)
    if isinstance(error, Exception):  # A caller that leaves is none.
        begun.set_status(Status(StatusCode.ERROR))


@contextmanager
def span(name: str, at: Trace | None, attributes: Mapping[str, str] | None) -> Iterator[Span]:
    begun = begin(name, at, attributes)
    try:
        with trace.use_span(begun, record_exception=False, set_status_on_exception=False):
            yield begun
    except BaseException as error:
        fail(begun, error)
        raise
    finally:
        begun.end()


@contextmanager
def stages(at: Trace | None, attributes: Mapping[str, str]) -> Iterator[Callable[[str], None]]:
    name, begun = "", cast(Span, trace.INVALID_SPAN)

    def enter(stage: str) -> None:
        nonlocal name, begun
        if stage != name:
            begun.end()
            name, begun = stage, begin(stage, at, attributes)

    try:
        yield enter
    except BaseException as error:
        fail(begun, error)
        raise
    finally:
        begun.end()


class Call:
    """A span from here to `end`, current in the block."""

    def __init__(self, name: str, rpc: str) -> None:
        self._span = begin(name, None, {"rpc.method": rpc}, SpanKind.CLIENT)
        self._over = False

    def __enter__(self) -> Self:
        self._token = context.attach(trace.set_span_in_context(self._span))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        context.detach(self._token)
        if error is not None:
            self.end(error=error)

    def end(self, *, error: BaseException | None = None) -> None:
        """Ends it, once."""
        if not self._over:
            self._over = True
            if error is not None:
                fail(self._span, error)
            self._span.end()


@contextmanager
def files(rpc: str) -> Iterator[None]:
    with Call("sandbox.files", rpc) as call:
        yield
        call.end()


class Execution(Call):
    """One execution: its span, and its outcome in the metrics."""

    def __init__(self, rpc: str) -> None:
        super().__init__("sandbox.execute", rpc)
        self._outcome: str | None = None

    def saw(self, outcome: str | None) -> None:
        """Notes the outcome that a message tells; most messages of a stream tell none."""
        self._outcome = outcome or self._outcome

    def end(self, otherwise: str = "cancelled", *, error: BaseException | None = None) -> None:
        """Ends it, once; `otherwise`: the outcome where no message has told it."""
        if self._over:
            return
        if error is not None:
            otherwise = "error" if isinstance(error, Exception) else "cancelled"
        outcome = self._outcome or otherwise
        self._span.set_attribute("sandbox.outcome", outcome)
        super().end(error=error)
        measure(EXECUTIONS, 1, outcome)


# Metrics


def record(metric: Metric, value: float, label: str) -> None:
    _instruments()[metric](value, {metric.label: label})


@functools.cache
def _instruments() -> dict[Metric, Callable[[float, dict[str, str]], None]]:
    meter = metrics.get_meter(SCOPE)

    def level(wanted: Metric) -> None:
        def observe(_: CallbackOptions) -> Iterable[Observation]:
            found = [(value, name) for metric, value, name in levels() if metric is wanted]
            return [Observation(value, {wanted.label: name} if name else {}) for value, name in found]

        meter.create_observable_gauge(PREFIX + wanted.name, [observe], wanted.unit, wanted.text)

    level(SESSIONS)
    level(SLOTS)
    instruments: dict[Metric, Callable[[float, dict[str, str]], None]] = {}
    for metric in MEASURED:
        about = (PREFIX + metric.name, metric.unit, metric.text)
        if metric.kind == "counter":
            instruments[metric] = meter.create_counter(*about).add
        else:
            try:
                made = meter.create_histogram(*about, explicit_bucket_boundaries_advisory=BUCKETS)
            except TypeError:  # OpenTelemetry before 1.30 has its own buckets.
                made = meter.create_histogram(*about)
            instruments[metric] = made.record
    return instruments
