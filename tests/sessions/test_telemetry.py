"""What OpenTelemetry's SDK gets of a manager: spans of a session's steps, and metrics."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from typing import Any

import pytest
from opentelemetry.sdk.metrics import Meter
from opentelemetry.trace import StatusCode

from prodisco_sandbox import SandboxError, _telemetry, errors
from prodisco_sandbox._sessions.table import SessionState
from prodisco_sandbox.results import ExecutionState
from prodisco_sandbox.testing import FakeCustomObjectsApi, api_error
from tests.support.managers import Clients, LoopTimeApi, left_behind, managed, settle
from tests.support.patience import PATIENCE
from tests.support.spans import Observed, ident, observed, parent

__all__ = ["observed"]

pytestmark = pytest.mark.looptime

STEPS = ("sandbox.create", "sandbox.wait_ready", "sandbox.wait_healthy")


def annotation(api: FakeCustomObjectsApi) -> dict[str, str]:
    """The headers in the annotation of the only object."""
    [found] = api.objects
    headers: dict[str, str] = json.loads(found["metadata"]["annotations"][_telemetry.ANNOTATION])
    return headers


def link(span: Any) -> int:
    [found] = span.links
    return int(found.context.span_id)


async def test_the_steps_of_a_start_are_children_of_the_call_that_waits(observed: Observed) -> None:
    async with LoopTimeApi(auto_ready=2.0) as api, managed(api) as manager:
        with observed.tracer.start_as_current_span("request") as request:
            await manager.get_client("s")
        call = observed.span("sandbox.get_client")
        assert parent(call) == ident(request)
        for name in STEPS:
            step = observed.span(name)
            assert parent(step) == ident(call)
            assert step.context.trace_id == request.get_span_context().trace_id
            assert dict(step.attributes or {}) == {"sandbox.name": manager.sandbox_name("s")}
            assert step.status.status_code is StatusCode.UNSET
        waited = observed.span("sandbox.wait_ready")
        assert waited.start_time is not None
        create = observed.span("sandbox.create").context
        traceparent = f"00-{create.trace_id:032x}-{create.span_id:016x}-{create.trace_flags:02x}"
        assert annotation(api) == {"traceparent": traceparent}


async def test_a_ready_session_has_no_span(observed: Observed) -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        await manager.get_client("s")
        before = observed.spans()
        await manager.get_client("s")
        await manager.on_session_initialized("s")
        async with manager.session("s"):
            pass
        assert observed.spans() == before


async def test_who_joins_a_start_has_a_trace_of_its_own_that_links_to_the_first(observed: Observed) -> None:
    async with LoopTimeApi(auto_ready=2.0) as api, managed(api) as manager:

        async def call(name: str) -> None:
            with observed.tracer.start_as_current_span(name):
                await manager.get_client("s")

        first = asyncio.create_task(call("first"))
        await asyncio.sleep(1)
        await asyncio.gather(first, call("second"))
        requests = {s.name: s for s in observed.spans("first", "second")}
        calls = {parent(s): s for s in observed.spans("sandbox.get_client")}
        one, other = calls[ident(requests["first"])], calls[ident(requests["second"])]
        assert [*one.links] == []
        assert link(other) == ident(one)
        assert {parent(s) for s in observed.spans(*STEPS)} == {ident(one)}


async def test_the_steps_end_although_their_first_caller_leaves(observed: Observed) -> None:
    async with LoopTimeApi(auto_ready=2.0) as api, managed(api) as manager:
        caller = asyncio.create_task(manager.get_client("s"))
        await asyncio.sleep(1)
        caller.cancel()
        await asyncio.wait([caller])
        await manager.get_client("s")
        left, joined = observed.spans("sandbox.get_client")
        assert (left.attributes or {})["error.type"] == "CancelledError"
        assert left.status.status_code is StatusCode.UNSET
        assert link(joined) == ident(left)
        assert [s.name for s in observed.spans(*STEPS) if parent(s) == ident(left)] == [*STEPS]


async def test_a_failed_start_tells_the_class_of_its_error_and_not_its_text(observed: Observed) -> None:
    async with LoopTimeApi() as api, managed(api) as manager:
        api.faults.add("create", error=api_error(403, "secret-of-the-cluster"))
        with pytest.raises(SandboxError, match="secret-of-the-cluster"):
            await manager.get_client("s")
        for name in ("sandbox.get_client", "sandbox.create"):
            span = observed.span(name)
            assert span.status.status_code is StatusCode.ERROR
            assert (span.attributes or {})["error.type"] == "SandboxFailedError"
        assert observed.values("failures") == {"SandboxFailedError": 1}
        assert observed.points("start.duration") == {}
        assert "secret-of-the-cluster" not in observed.texts()


async def test_refusals_and_timeouts_are_failures(observed: Observed) -> None:
    async with LoopTimeApi() as api, managed(api, max_sessions=1, ready_timeout=5.0) as manager:
        first = asyncio.create_task(manager.get_client("s"))
        await settle()
        with pytest.raises(SandboxError):
            await manager.get_client("other")
        await asyncio.wait([first])
        assert isinstance(first.exception(), TimeoutError)
        assert observed.values("failures") == {"SandboxCapacityError": 1, "SandboxTimeoutError": 1}
        waited = observed.span("sandbox.wait_ready")
        assert waited.status.status_code is StatusCode.UNSET
        assert (waited.attributes or {})["error.type"] == "CancelledError"


async def test_a_delete_belongs_to_who_closes_the_session_and_links_to_its_start(observed: Observed) -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        await manager.get_client("s")
        with observed.tracer.start_as_current_span("goodbye") as goodbye:
            await manager.on_session_closed("s")
        deleted = observed.span("sandbox.delete")
        assert parent(deleted) == ident(goodbye)
        assert link(deleted) == ident(observed.span("sandbox.get_client"))


async def test_the_reapers_delete_is_a_trace_of_its_own(observed: Observed) -> None:
    settings: dict[str, Any] = {"session_idle_timeout": 60.0, "idle_check_interval": 10.0}
    async with LoopTimeApi(auto_ready=True) as api, managed(api, **settings) as manager:
        await manager.get_client("s")
        await asyncio.sleep(80)
        deleted, call = observed.span("sandbox.delete"), observed.span("sandbox.get_client")
        assert parent(deleted) is None
        assert deleted.context.trace_id != call.context.trace_id
        assert link(deleted) == ident(call)


async def test_a_delete_that_fails_is_a_span_for_each_try(observed: Observed) -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        await manager.get_client("s")
        api.faults.add("delete", error=500, times=1)
        await manager.on_session_closed("s")
        await asyncio.sleep(5)
        codes = [s.status.status_code for s in observed.spans("sandbox.delete")]
        assert codes == [StatusCode.ERROR, StatusCode.UNSET]
        assert observed.values("events")["sandbox_delete_failed"] == 1


async def test_the_check_of_a_suspect_belongs_to_who_asks_for_it(observed: Observed) -> None:
    clients = Clients()
    async with LoopTimeApi(auto_ready=True) as api, managed(api, clients) as manager:
        await manager.get_client("s")
        clients.made[0].fail()
        await manager.get_client("s")
        first, second = observed.spans("sandbox.get_client")
        assert link(second) == ident(first)
        assert parent(observed.spans("sandbox.wait_healthy")[-1]) == ident(second)


# Metrics


async def test_starts_are_told_apart(observed: Observed) -> None:
    async with LoopTimeApi(auto_ready=2.0) as api:
        async with managed(api) as manager:
            await manager.get_client("cold")
            await left_behind(api, "attached")
            await manager.get_client("attached")
        api.add_warm_pool("python", 1)
        await asyncio.sleep(5)
        async with managed(api, warm_pool="python") as manager:
            await manager.get_client("warm")
        settings: dict[str, Any] = {"on_idle": "suspend", "session_idle_timeout": 60.0}
        settings |= {"idle_check_interval": 10.0, "workspace_storage": "1Gi"}
        async with managed(api, **settings) as manager:
            await manager.get_client("resumed")
            await asyncio.sleep(100)
            await manager.get_client("resumed")
    points = observed.points("start.duration")
    assert {kind: point.count for kind, point in points.items()} == {
        "cold": 2,
        "attached": 1,
        "warm": 1,
        "resumed": 1,
    }
    assert points["cold"].sum == pytest.approx(4.0, abs=0.5)
    assert points["cold"].explicit_bounds == _telemetry.BUCKETS


async def test_what_another_replica_has_started_is_attached(observed: Observed) -> None:
    async with (
        LoopTimeApi(auto_ready=1.0) as api,
        managed(api, shared=True) as one,
        managed(api, shared=True) as other,
    ):
        await one.get_client("s")
        await other.get_client("s")
        assert len(observed.spans("sandbox.create")) == 1
        assert {kind: p.count for kind, p in observed.points("start.duration").items()} == {
            "cold": 1,
            "attached": 1,
        }
        assert (
            annotation(api)["traceparent"].split("-")[2] == f"{ident(observed.span('sandbox.create')):016x}"
        )
        before = observed.spans()
        await other.get_client("s")
        assert observed.spans() == before
        await other.on_session_closed("s")
        assert link(observed.span("sandbox.delete")) == ident(observed.spans("sandbox.get_client")[1])


async def test_an_api_that_takes_no_buckets_has_its_own(
    observed: Observed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The MCP SDK may bring one that is older than what the extra asks for."""

    def older(self: Any, name: str, unit: str = "", description: str = "") -> Any:
        return create(self, name, unit, description)

    create = Meter.create_histogram
    monkeypatch.setattr(Meter, "create_histogram", older)
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        await manager.get_client("s")
    assert observed.points("start.duration")["cold"].explicit_bounds != _telemetry.BUCKETS


async def test_sessions_are_counted_by_state(observed: Observed) -> None:
    settings: dict[str, Any] = {"max_sessions": 2, "capacity_timeout": 30.0}
    async with LoopTimeApi(auto_ready=10.0) as api, managed(api, **settings) as manager:
        await manager.get_client("ready")
        calls = [asyncio.create_task(manager.get_client(name)) for name in ("creating", "queued")]
        await asyncio.sleep(1)
        wanted = {"queued": 1, "creating": 1, "ready": 1, "suspect": 0, "closing": 0}
        assert observed.values("sessions") == wanted
        assert observed.values("slots") == {"": 2}
        await manager.on_session_closed("ready")
        await asyncio.gather(*calls)
        assert observed.values("sessions") == dict.fromkeys(wanted, 0) | {"ready": 2}
        assert observed.values("events")["sandbox_created"] == 3


def test_the_values_of_labels_are_those_that_there_are() -> None:
    states = {state.value for state in SessionState if state is not SessionState.GONE}
    assert {*_telemetry.SESSIONS.values} == states
    public = {name for name in vars(errors) if name.startswith("Sandbox") and name.endswith("Error")}
    assert {*_telemetry.FAILURES.values} == public - {"SandboxManagerClosedError", "SandboxReplacedError"}
    ends = {state.name.lower() for state in ExecutionState if state.is_final}
    assert {*_telemetry.EXECUTIONS.values} == ends | {"error"}


async def test_no_session_id_is_in_any_attribute(observed: Observed) -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api, max_sessions=1) as manager:
        await manager.get_client("alices-secret")
        with pytest.raises(SandboxError):
            await manager.get_client("alices-secret-too")
        await manager.on_session_closed("alices-secret")
    assert "sandbox.delete" in observed.texts()
    assert "alices-secret" not in observed.texts()


async def test_without_opentelemetry_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "opentelemetry.context")
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        await manager.get_client("s")
        [found] = api.objects
        assert _telemetry.ANNOTATION not in found["metadata"].get("annotations", {})
        assert manager.stats().created == 1


def test_an_sdk_that_is_set_up_late_gets_all_that_comes_after() -> None:
    """The library may have used OpenTelemetry's API before; nothing is counted twice."""
    code = """
import opentelemetry.context
from prodisco_sandbox import _telemetry
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

with _telemetry.span("sandbox.early"):
    _telemetry.happened("early", {})
exporter, reader, provider = InMemorySpanExporter(), InMemoryMetricReader(), TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)
metrics.set_meter_provider(MeterProvider([reader]))
with _telemetry.span("sandbox.late"):
    _telemetry.happened("late", {})
[scope] = reader.get_metrics_data().resource_metrics[0].scope_metrics
print([span.name for span in exporter.get_finished_spans()])
print(sorted((made.name, len(made.data.data_points)) for made in scope.metrics))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.stderr == ""
    spans, made = done.stdout.splitlines()
    assert spans == "['sandbox.late']"
    assert made == str(
        [(f"{_telemetry.PREFIX}{name}", n) for name, n in (("events", 1), ("sessions", 5), ("slots", 1))]
    )
