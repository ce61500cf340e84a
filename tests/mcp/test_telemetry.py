"""Traces that begin in an MCP request, and the program's metrics."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from prodisco_sandbox import SandboxManager, _telemetry
from prodisco_sandbox.local import LocalCluster
from prodisco_sandbox.mcp._telemetry import add_metrics
from tests.support.mcp_server import (
    ERAS,
    META,
    connect,
    headers,
    make_server,
    open_session,
    over_http,
    refused,
    rig,
    run,
    served_by_the_program,
)
from tests.support.patience import PATIENCE
from tests.support.spans import Observed, TracedServers, ident, observed, parent

__all__ = ["observed"]

TRACE, CALLER, OTHER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7", "00f067aa0ba902b8"


@pytest.fixture(autouse=True)
def _sdk_is_observed(observed: Observed, monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDK would keep the tracer of the first provider that it meets."""
    monkeypatch.setattr("mcp.shared._otel._tracer", observed.traces.get_tracer("mcp"))


def traceparent(caller: str = CALLER) -> dict[str, str]:
    return {"traceparent": f"00-{TRACE}-{caller}-01"}


async def post(url: str, era: str, code: str, *, meta: Mapping[str, str], **extra: str) -> None:
    """A call of the tool by hand, with this in ``_meta`` and in the headers."""
    params: dict[str, Any] = {"name": "run_sandbox", "arguments": {"code": code}, "_meta": dict(meta)}
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}
    async with open_session(url) as session_id, httpx2.AsyncClient(timeout=PATIENCE, verify=False) as http:
        given = headers(session_id if era == "legacy" else None, None) | extra
        if era != "legacy":
            params["_meta"] |= META
            given |= {"MCP-Protocol-Version": era, "Mcp-Method": "tools/call", "Mcp-Name": "run_sandbox"}
        answer = await http.post(url, json=body, headers=given)
    assert '"isError":false' in answer.text


@pytest.mark.parametrize("era", ERAS)
async def test_a_request_s_trace_goes_on(era: str, observed: Observed) -> None:
    bad = {"traceparent": "none"}
    cases: tuple[tuple[dict[str, str], dict[str, str], str | None], ...] = (
        (traceparent(), {}, CALLER),
        ({}, traceparent(), CALLER),
        (traceparent(), traceparent(OTHER), CALLER),
        (bad, traceparent(), CALLER),
        ({}, bad, None),
    )
    async with (
        rig(settings={"max_sessions": len(cases)}) as r,
        served_by_the_program(r.server, r.tools) as url,
    ):
        for meta, extra, caller in cases:
            observed.forget()
            await post(url, era, "1", meta=meta, **extra)
            request = observed.span("tools/call run_sandbox")
            assert parent(request) == (caller and int(caller, 16))
            assert (f"{request.context.trace_id:032x}" == TRACE) == (caller is not None)
            call = observed.span("sandbox.get_client")
            assert parent(call) == ident(request)
            assert parent(observed.span("sandbox.execute")) == ident(request)
            assert parent(observed.span("sandbox.create")) == ident(call)


async def test_a_trace_leads_from_a_request_to_the_server_s_span(observed: Observed, tmp_path: Path) -> None:
    """Through get_client, the object's annotation, and gRPC metadata to the sandbox's own process."""
    servers = TracedServers(tmp_path)
    annotated = []
    async with LocalCluster(python=servers.python) as cluster:
        cluster.custom_objects_api.subscribe(lambda _, found: annotated.append(found["metadata"]))
        manager = SandboxManager(cluster.config(), custom_objects_api=cluster.custom_objects_api)
        async with served_by_the_program(*make_server(manager)) as url:
            await post(url, "2026-07-28", "print('output-secret')", meta=traceparent())
    create, execute = observed.span("sandbox.create"), observed.span("sandbox.execute")
    carried = json.loads(annotated[0]["annotations"][_telemetry.ANNOTATION])["traceparent"]
    assert carried.split("-")[1:3] == [TRACE, f"{ident(create):016x}"]
    [ran] = [span for span in servers.spans() if span["name"].endswith("/ExecuteStream")]
    assert ran["context"]["trace_id"] == f"0x{TRACE}"
    assert ran["parent_id"] == f"0x{ident(execute):016x}"
    names = [span.name for span in observed.spans() if f"{span.context.trace_id:032x}" == TRACE]
    assert {*names} == {
        "tools/call run_sandbox",
        *("sandbox.get_client", "sandbox.create", "sandbox.wait_ready", "sandbox.wait_healthy"),
        *("sandbox.execute", "sandbox.files"),
    }
    assert "secret" not in observed.texts() + str(servers.spans())


# Metrics


async def metrics(url: str) -> dict[str, float]:
    """The samples of /metrics, as Prometheus' own parser reads them; its text without a token."""
    async with httpx2.AsyncClient(timeout=PATIENCE, verify=False) as http:
        answer = await http.get(url.removesuffix("/mcp") + "/metrics")
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert "secret" not in answer.text
    return {
        sample.name + "".join(f"[{value}]" for value in sample.labels.values()): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


async def test_the_metrics_need_no_token_and_hold_no_ids() -> None:
    async with rig(auth=True, settings={"max_sessions": 4}) as r:
        with add_metrics(r.server):
            async with over_http(r.server) as url:
                before = await metrics(url)
                assert before["prodisco_sandbox_slots"] == 4
                assert before["prodisco_sandbox_sessions[ready]"] == 0
                async with connect(url, "legacy", token="alices-secret") as client:
                    result = await run(client, "print('code-secret')")
                    after = await metrics(url)
                    assert after["prodisco_sandbox_sessions[ready]"] == 1
                    assert after["prodisco_sandbox_start_duration_seconds_count[cold]"] == 1
                    assert after["prodisco_sandbox_start_duration_seconds_bucket[cold][+Inf]"] == 1
                    assert after["prodisco_sandbox_executions_total[completed]"] == 1
                    assert after["prodisco_sandbox_events_total[sandbox_created]"] == 1
                    assert {v for name, v in after.items() if "failures_total" in name} == {0}
                    assert result["success"]
                    r.api.faults.add("create", error=422)
                    async with connect(url, "legacy", token="bobs-secret") as other:
                        await refused(other, "1")
                    last = await metrics(url)
                    assert last["prodisco_sandbox_failures_total[SandboxFailedError]"] == 1
                    names = [str(sandbox["metadata"]["name"]) for sandbox in r.api.objects]
                    assert not [name for name in last if any(each in name for each in names)]
    assert _telemetry.recorders == []


async def test_without_prometheus_client_there_are_no_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    async with rig() as r:
        with add_metrics(r.server):
            async with over_http(r.server) as url, httpx2.AsyncClient(verify=False) as http:
                answer = await http.get(url.removesuffix("/mcp") + "/metrics")
                assert answer.status_code == 404
                assert _telemetry.recorders == []
