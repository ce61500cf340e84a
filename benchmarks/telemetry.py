"""Scenario 9: what telemetry costs, off and on."""

from __future__ import annotations

import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

from opentelemetry.sdk.trace import SpanProcessor, TracerProvider

from prodisco_sandbox import SandboxClient, _telemetry
from prodisco_sandbox._telemetry import otel

from .lookups import ready_manager
from .measure import Figure, compared, interleaved
from .sandboxes import OUTPUT
from .scale import Setting

NOTHING = 1.05
"""No more than what differs between two rounds of the same."""


@contextmanager
def absent() -> Iterator[None]:
    """The library as it would be without telemetry."""
    # Plain functions: calls of mocks would be measured.
    stand_ins: dict[str, Any] = {
        "execution": lambda rpc: _telemetry._OFF,
        "headers": lambda: (),
        "happened": lambda event, pairs: None,
    }
    with mock.patch.multiple(_telemetry, **stand_ins), off():
        yield


@contextmanager
def off() -> Iterator[None]:
    """As in a program that has not loaded OpenTelemetry."""
    with mock.patch.dict(sys.modules):
        del sys.modules["opentelemetry.context"]
        yield


def loaded() -> nullcontext[None]:
    """OpenTelemetry's API is loaded, as by the MCP SDK, and no SDK is set up."""
    return nullcontext()


@contextmanager
def recording() -> Iterator[None]:
    """The SDK records all spans; what exporters do is their own affair."""
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SpanProcessor())
    tracer = provider.get_tracer(otel.SCOPE)
    with mock.patch.object(otel, "_tracer", lambda: tracer):  # noqa: PT008
        yield


async def run(setting: Setting) -> list[Figure]:
    scale = setting.scale

    def timed(kind: Any, call: Callable[[], Awaitable[object]], count: int) -> Callable[[], Awaitable[float]]:
        async def measured() -> float:
            with kind():
                begun = time.thread_time()
                for _ in range(count):
                    await call()
                return (time.thread_time() - begun) / count * 1e6

        return measured

    kinds: dict[str, Any] = {"absent": absent, "off": off, "loaded": loaded, "recording": recording}
    async with (
        ready_manager(["session"]) as manager,
        SandboxClient(f"127.0.0.1:{setting.sandbox_port}") as client,
    ):

        async def look_up() -> None:
            await manager.get_client("session")

        async def execute() -> None:
            assert (await client.execute("print(42)")).output == OUTPUT

        await execute()
        lookups = {name: timed(kind, look_up, scale.lookups) for name, kind in kinds.items()}
        calls = {name: timed(kind, execute, scale.calls) for name, kind in kinds.items()}
        found = {
            "get_client": await interleaved(scale.rounds, lookups),
            "execute": await interleaved(scale.rounds, calls),
        }
    return [
        compared(
            9,
            f"{what}, telemetry {name}",
            values[name],
            values["absent"],
            "µs",
            against="the library without telemetry",
            target=NOTHING if name == "off" or what == "get_client" else None,
        )
        for what, values in found.items()
        for name in ("off", "loaded", "recording")
    ]
