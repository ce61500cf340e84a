"""Scenario 7: what it takes to import the library."""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import tempfile
from typing import Any

from .measure import Figure, interleaved
from .scale import Setting

BEYOND = 30.0

# Processor time, which other work on the machine does not lengthen.
_TIMED = """
import time
import grpc, grpc.aio
begun = time.process_time()
{}
print(time.process_time() - begun)
"""
_LIBRARY = "from prodisco_sandbox import SandboxClient, SandboxManager, SandboxManagerConfig"
_PROTOCOL = (
    "from prodisco_sandbox.proto import sandbox_pb2, sandbox_pb2_grpc; import grpc_health.v1.health_pb2"
)
_SINGLE = f"""
import asyncio, sys
{_LIBRARY}
async def main():
    config = SandboxManagerConfig.from_env({{}})
    async with SandboxManager(config) as manager:
        await manager.get_client("session")
asyncio.run(main())
print(float("kubernetes_asyncio" in sys.modules))
"""


async def _run(code: str, cache: str) -> float:
    # Installed packages have their byte code; here it may not have been, or may not be, written.
    environ = {**os.environ, "PYTHONPYCACHEPREFIX": cache, "PYTHONDONTWRITEBYTECODE": ""}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code), env=environ, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    return float(out)


async def run(setting: Setting) -> list[Figure]:
    with tempfile.TemporaryDirectory(prefix="bench-") as cache:
        return await _measured(setting, cache)


async def _measured(setting: Setting, cache: str) -> list[Figure]:
    def timed(statement: str) -> Any:
        return lambda: _run(_TIMED.format(statement), cache)

    await _run(_TIMED.format(_LIBRARY), cache)  # Byte code is written, files are read.
    programs = {"library": timed(_LIBRARY), "protocol": timed(_PROTOCOL)}
    found = await interleaved(setting.scale.starts, programs)
    in_ms = {name: statistics.median(values) * 1000 for name, values in found.items()}
    return [
        Figure(
            scenario=7,
            what="import, beyond grpc and grpc.aio",
            value=in_ms["library"],
            unit="ms",
            target=BEYOND,
            note=f"of which protobuf and the generated stubs take {in_ms['protocol']:.0f} ms",
        ),
        Figure(
            scenario=7,
            what="kubernetes_asyncio loaded in single mode",
            value=await _run(_SINGLE, cache),
            unit="",
            target=0.0,
        ),
    ]
