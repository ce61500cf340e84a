"""What the library measures, in Prometheus' format."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily

from .. import _telemetry
from .._telemetry import Metric


class Metrics:
    """Counts what is measured while `recording` is entered; gauges are read when they are asked for."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._made: dict[Metric, Any] = {}
        for metric in _telemetry.MEASURED:
            kind = Counter if metric.kind == "counter" else partial(Histogram, buckets=_telemetry.BUCKETS)
            self._made[metric] = kind(*_about(metric), [metric.label], registry=self._registry)
            for value in metric.values:
                self._made[metric].labels(value)

    @contextmanager
    def recording(self) -> Iterator[None]:
        _telemetry.recorders.append(self._record)
        try:
            yield
        finally:
            _telemetry.recorders.remove(self._record)

    def _record(self, metric: Metric, value: float, label: str) -> None:
        made = self._made[metric].labels(label)
        (made.inc if metric.kind == "counter" else made.observe)(value)

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """The gauges, for the registry."""
        families: dict[Metric, GaugeMetricFamily] = {}
        for metric, value, label in _telemetry.levels():
            names, values = ([metric.label], [label]) if metric.label else ([], [])
            family = families.setdefault(metric, GaugeMetricFamily(*_about(metric), labels=names))
            family.add_metric(values, value)
        return families.values()

    def text(self) -> bytes:
        """For the media type ``CONTENT_TYPE_LATEST`` of prometheus_client."""
        return generate_latest(self._registry)


def _about(metric: Metric) -> tuple[str, str]:
    """Name and documentation."""
    unit = "_seconds" if metric.unit == "s" else ""
    return (_telemetry.PREFIX + metric.name).replace(".", "_") + unit, metric.text
