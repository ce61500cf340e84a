"""What is observed in a test: the spans and metrics of OpenTelemetry's real SDK."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
from opentelemetry import trace
from opentelemetry.metrics import _internal as metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from prodisco_sandbox import _telemetry
from prodisco_sandbox._telemetry import otel
from tests.support import PROGRAMS


class Observed:
    """The spans that have ended, and the metrics at this moment."""

    def __init__(self) -> None:
        self._exporter, self._reader = InMemorySpanExporter(), InMemoryMetricReader()
        self.traces = TracerProvider(shutdown_on_exit=False)
        self.traces.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = self.traces.get_tracer("application")
        self.metrics = MeterProvider([self._reader], shutdown_on_exit=False)

    def forget(self) -> None:
        """Forgets the spans so far."""
        self._exporter.clear()

    def spans(self, *names: str) -> list[ReadableSpan]:
        """In the order of their end; all, or those of these names."""
        return [s for s in self._exporter.get_finished_spans() if not names or s.name in names]

    def span(self, name: str) -> ReadableSpan:
        [found] = self.spans(name)
        return found

    def points(self, metric: str) -> dict[str, Any]:
        """The data points of ``prodisco.sandbox.<metric>`` by their only attribute's value."""
        data = self._reader.get_metrics_data()
        found = {}
        for resource in data.resource_metrics if data else ():
            for made in (each for scope in resource.scope_metrics for each in scope.metrics):
                if made.name == f"prodisco.sandbox.{metric}":
                    for point in made.data.data_points:
                        [value] = (point.attributes or {}).values() or [""]
                        found[str(value)] = point
        return found

    def values(self, metric: str) -> dict[str, float]:
        return {label: point.value for label, point in self.points(metric).items()}

    def texts(self) -> str:
        """All that is in spans and metrics, as text."""
        data = self._reader.get_metrics_data()
        return "\n".join([*(span.to_json() for span in self.spans()), data.to_json() if data else ""])


def parent(span: ReadableSpan) -> int | None:
    return span.parent.span_id if span.parent else None


def ident(span: Any) -> int:
    return int(span.get_span_context().span_id)


def _forget_providers() -> None:
    """A process has one provider for good, but each test its own."""
    otel._tracer.cache_clear()
    otel._instruments.cache_clear()


@pytest.fixture
def observed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Observed]:
    """The SDK is set up, for one test, and sees its managers alone."""
    found = Observed()
    monkeypatch.setattr(_telemetry, "tables", WeakSet())
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", found.traces)
    monkeypatch.setattr(metrics, "_METER_PROVIDER", found.metrics)
    _forget_providers()
    yield found
    _forget_providers()
    found.traces.shutdown()
    found.metrics.shutdown()


class TracedServers:
    """An interpreter for servers whose program has set up OpenTelemetry, and their spans."""

    def __init__(self, directory: Path) -> None:
        self._spans = directory / "spans"
        self._spans.touch()
        self.python = directory / "python"
        program = PROGRAMS / "traced_server.py"
        command = [sys.executable, str(program)]
        self.python.write_text(
            f"#!/bin/sh\nexport TRACED_SERVER_SPANS={shlex.quote(str(self._spans))}\n"
            f'exec {shlex.join(command)} "$@"\n'
        )
        self.python.chmod(0o700)

    def spans(self) -> list[dict[str, Any]]:
        """As the SDK writes them in JSON, in the order of their end."""
        return [json.loads(line) for line in self._spans.read_text().splitlines()]
