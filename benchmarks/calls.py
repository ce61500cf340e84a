"""Scenario 5: what the client adds to a call."""

from __future__ import annotations

import time
from typing import Any

import grpc
import grpc.aio

from prodisco_sandbox import SandboxClient
from prodisco_sandbox.proto import sandbox_pb2 as pb
from prodisco_sandbox.proto import sandbox_pb2_grpc as pb_grpc

from .measure import Figure, busy, compared, interleaved
from .sandboxes import OUTPUT
from .scale import Setting

EXECUTE, STREAM, PASS = 1.15, 0.8, 5.0
TIMEOUT = 30.0


class Calls:
    def __init__(self, client: SandboxClient, stub: Any, setting: Setting) -> None:
        self._client = client
        self._stub = stub
        self._calls = setting.scale.calls
        self._chunks = setting.scale.chunks

    async def raw_execute(self) -> float:
        begun = time.perf_counter()
        for _ in range(self._calls):
            answer = await self._stub.Execute(pb.ExecuteRequest(code="print(42)"), timeout=TIMEOUT)
            assert answer.output == OUTPUT
        return (time.perf_counter() - begun) / self._calls

    async def execute(self) -> float:
        begun = time.perf_counter()
        for _ in range(self._calls):
            answer = await self._client.execute(code="print(42)")
            assert answer.output == OUTPUT
        return (time.perf_counter() - begun) / self._calls

    async def raw_stream(self) -> float:
        """Chunks a second."""
        begun = time.perf_counter()
        count = 0
        request = pb.ExecuteRequest(code=str(self._chunks))
        async for chunk in self._stub.ExecuteStream(request, timeout=120):
            count += chunk.output == OUTPUT
        assert count == self._chunks
        return self._chunks / (time.perf_counter() - begun)

    async def stream(self) -> float:
        """Chunks a second."""
        begun = time.perf_counter()
        count = 0
        async with self._client.execute_stream(code=str(self._chunks), timeout=120) as stream:
            async for chunk in stream:
                count += chunk.text == OUTPUT
        assert count == self._chunks
        return self._chunks / (time.perf_counter() - begun)


async def run(setting: Setting) -> list[Figure]:
    scale = setting.scale
    target = f"127.0.0.1:{setting.sandbox_port}"
    async with SandboxClient(target) as client, grpc.aio.insecure_channel(target) as channel:
        calls = Calls(client, pb_grpc.SandboxServiceStub(channel), setting)
        await calls.execute()
        await calls.raw_execute()
        one = await interleaved(scale.rounds, {"library": calls.execute, "raw": calls.raw_execute})
        many = await interleaved(scale.stream_rounds, {"library": calls.stream, "raw": calls.raw_stream})
        async with busy() as passes:
            await calls.execute()
            await calls.stream()
    in_us = {name: [value * 1e6 for value in values] for name, values in one.items()}
    against = "the raw stub"
    return [
        compared(5, "execute", in_us["library"], in_us["raw"], "µs", against=against, target=EXECUTE),
        compared(
            5,
            f"execute_stream, {scale.chunks:,} chunks",
            many["library"],
            many["raw"],
            "/s",
            against=against,
            target=STREAM,
            at_least=True,
        ),
        Figure(
            scenario=5,
            what="calls and streams, longest pass of the loop",
            value=passes.longest * 1000,
            unit="ms",
            target=PASS,
        ),
    ]
