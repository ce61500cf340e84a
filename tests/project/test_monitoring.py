"""The dashboard and the alerts in deploy/monitoring say what the code measures."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser as promql
import yaml
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard
from prometheus_client.parser import text_string_to_metric_families

import prodisco_sandbox
from prodisco_sandbox._telemetry import EVENTS, FAILURES, MEASURED, PREFIX, SESSIONS, SLOTS
from prodisco_sandbox.mcp._prometheus import Metrics
from tests.support import ROOT

DEPLOY = ROOT / "deploy"
MONITORING = DEPLOY / "monitoring"
OF_TARGETS = {"namespace", "pod"}
"""Labels that Prometheus adds to what it scrapes in a cluster."""


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((MONITORING / "dashboard.json").read_text())
    return found


def alerts() -> list[dict[str, Any]]:
    [group] = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["spec"]["groups"]
    rules: list[dict[str, Any]] = group["rules"]
    return rules


def expressions() -> Iterator[str]:
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            yield target["expr"].replace("$__rate_interval", "5m").replace("$namespace", ".*")
    for alert in alerts():
        yield alert["expr"]


def selectors(expression: promql.Expr) -> list[promql.VectorSelector]:
    found: list[promql.VectorSelector] = []

    def note(node: promql.Expr) -> None:
        if isinstance(node, promql.VectorSelector):
            found.append(node)

    promql.walk(expression, note)
    return found


def measured() -> dict[str, set[str]]:
    """The series of /metrics, and the labels of each."""
    metrics = Metrics()
    metrics._record(EVENTS, 1, "sandbox_created")
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(metrics.text().decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def values() -> dict[str, set[str]]:
    """What each label may say."""
    found = {metric.label: {*metric.values} for metric in (*MEASURED, SESSIONS, SLOTS)}
    source = Path(prodisco_sandbox.__file__).parent
    logged = (
        re.findall(r"log\.\w+\((?:level, )?\s*\"(\w+)\"", path.read_text()) for path in source.glob("_*/*.py")
    )
    return found | {"event": {*itertools.chain.from_iterable(logged)}}


def test_the_expressions_ask_for_what_there_is() -> None:
    series, known = measured(), values()
    for text in expressions():
        asked = selectors(promql.parse(text))
        assert asked, text
        for selector in asked:
            assert selector.name in series, text
            for matcher in selector.matchers.matchers:
                if matcher.name in OF_TARGETS:
                    continue
                assert matcher.name in series[selector.name], text
                for each in re.split(r"\|(?![^(]*\))", matcher.value):
                    assert any(re.fullmatch(each, value) for value in known[matcher.name]), each


def test_the_dashboard_is_one_of_grafanas_schema() -> None:
    """Grafana's own model of a dashboard reads it, and writes it again without losing anything."""
    plugins.register_default_plugins()
    model = Dashboard.from_json(dashboard())
    assert [*lost(dashboard(), json.loads(JSONEncoder().encode(model)))] == []


def lost(before: Any, after: Any, at: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        for key, value in before.items():
            yield from lost(value, after.get(key), f"{at}.{key}")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for number, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from lost(one, other, f"{at}[{number}]")
    elif before != after:
        yield at


def test_no_panel_covers_another() -> None:
    covered: set[tuple[int, int]] = set()
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        columns, rows = range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        own = {*itertools.product(columns, rows)}
        assert not own & covered
        assert max(columns) < 24
        covered |= own


def test_the_alerts_that_matter_are_there() -> None:
    assert {alert["alert"] for alert in alerts()} == {
        "SandboxStartsFail",
        "SandboxStartsSlow",
        "SandboxSlotsFull",
        "SandboxLeasesFail",
        "SandboxDeletesRetried",
        "SandboxWatchBroken",
    }
    for alert in alerts():
        assert alert["labels"]["severity"] in ("critical", "warning")
        assert {*alert["annotations"]} == {"summary", "description"}
        assert re.fullmatch(r"\d+m", alert["for"])


def test_the_program_s_pods_are_scraped() -> None:
    monitor = yaml.safe_load((MONITORING / "podmonitor.yaml").read_text())
    deployment = yaml.safe_load((DEPLOY / "overlays" / "mcp-server" / "deployment.yaml").read_text())
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert monitor["metadata"]["namespace"] == deployment["metadata"]["namespace"]
    [endpoint] = monitor["spec"]["podMetricsEndpoints"]
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    assert endpoint["port"] in {port["name"] for port in container["ports"]}


def test_the_documentation_names_all_of_it() -> None:
    text = (DEPLOY.parent / "docs" / "telemetry.md").read_text()
    for metric in (*MEASURED, SESSIONS, SLOTS):
        assert f"`{PREFIX}{metric.name}`" in text
        assert all(f"`{value}`" in text for value in metric.values if metric is not FAILURES)
    assert all(f"`{alert['alert']}`" in text for alert in alerts())
    described = {name for name in measured() if not name.endswith(("_created", "_bucket", "_sum", "_count"))}
    assert all(f"`{name}`" in text for name in described)
