"""Start-up time and idle memory of the reference server, and the latency of ``print(1)``.

Times are also given as multiples of what starting and ending a bare interpreter takes.

Run it where nothing else does::

    python benchmarks/server_latency.py [--runs N] [-- SERVER OPTIONS]

It starts servers of its own on Unix sockets and leaves nothing behind.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import grpc

from prodisco_sandbox.proto import sandbox_pb2 as pb
from prodisco_sandbox.proto import sandbox_pb2_grpc

STARTS = 5


def start(directory: str, options: list[str]) -> tuple[subprocess.Popen[bytes], str, float]:
    """A server, its target, and the seconds until it served."""
    command = [
        *(sys.executable, "-m", "prodisco_sandbox.server", "--exit-with-parent"),
        *("--socket", f"{directory}/run/s", "--cache-dir", f"{directory}/cache", *options),
    ]
    began = time.perf_counter()
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    line = process.stdout.readline().decode()
    return process, line.removeprefix("listening on ").strip(), time.perf_counter() - began


def stop(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    process.wait(30)
    process.stdout.close()


def resident_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / (1 << 20)


def children(pid: int) -> list[int]:
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        found += map(int, path.read_text().split())
    return found


async def latencies(target: str, at_once: int, runs: int, pause: float) -> list[float]:
    """Milliseconds of each call."""
    found: list[float] = []
    request = pb.ExecuteRequest(code="print(1)")
    async with grpc.aio.insecure_channel(target) as channel:
        execute = sandbox_pb2_grpc.SandboxServiceStub(channel).Execute

        async def caller() -> None:
            for _ in range(runs):
                began = time.perf_counter()
                answer: pb.ExecuteResponse = await execute(request)  # type: ignore[misc]
                found.append((time.perf_counter() - began) * 1000)
                if answer.output != "1\n":
                    raise RuntimeError(f"a wrong answer: {answer}")
                await asyncio.sleep(pause)

        await asyncio.gather(*(caller() for _ in range(at_once)))
    return found


def bare_interpreter() -> float:
    """Milliseconds that the least possible Python process takes."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-I", "-c", "pass"], check=True)
    return (time.perf_counter() - began) * 1000


def report(name: str, values: list[float], floor: float) -> None:
    median, p95 = statistics.median(values), statistics.quantiles(values, n=20)[-1]
    print(
        f"{name:<44} median {median:7.1f} ms {median / floor:6.1f}x   p95 {p95:7.1f} ms {p95 / floor:6.1f}x"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=50, help="calls of each caller")
    parser.add_argument("options", nargs="*", help="options of the server, after --")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        bare = [bare_interpreter() for _ in range(given.runs)]
        floor = statistics.median(bare)
        report("a bare interpreter", bare, floor)
        starts = []
        for _ in range(STARTS):
            process, target, seconds = start(directory, given.options)
            stop(process)
            starts.append(seconds * 1000)
        report("start-up, process to serving", starts, floor)
        process, target, _ = start(directory, given.options)
        try:
            asyncio.run(latencies(target, 1, 5, 0))
            time.sleep(1)
            spares = sum(map(resident_mib, children(process.pid)))
            server = resident_mib(process.pid)
            print(f"{'idle memory, resident':<44} server {server:.0f} MiB, spares {spares:.0f} MiB")
            for at_once, pause in ((1, 0.2), (1, 0.0), (8, 0.0)):
                values = asyncio.run(latencies(target, at_once, given.runs, pause))
                how = "one after another" if not pause else f"every {pause} s"
                report(f"print(1), {at_once} at once, {how}", values, floor)
            print(f"{os.cpu_count()} processors, Python {sys.version.split()[0]}")
        finally:
            stop(process)


if __name__ == "__main__":
    main()
