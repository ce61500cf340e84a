"""What a manager asks of a real API server, and how soon it hears of readiness.

``KUBEBUILDER_ASSETS=DIR python -m benchmarks.api_requests [SESSIONS]`` in the repository's
root. Sessions arrive in waves, live for a while, are asked for again and are closed; the API
server's own audit log says what it was asked. The controller is a process of its own and
notes when each status write was acknowledged.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time

from .clusters import Access, kubernetes_version, real_cluster
from .contenders import Library, library
from .measure import percentile
from .sandboxes import sandboxes

WAVE = 20
DELAY = (0.05, 0.5)
"""Seconds from a Sandbox's creation to its readiness."""
LIFE = 8.0
"""Seconds that the sessions live: two renewals at half of the lease below."""
LEASE = 6.0


async def opened(contender: Library, session: str, moments: dict[str, float]) -> None:
    await contender.open(session)
    moments[contender.sandbox(session)] = time.perf_counter()


async def measure(access: Access, count: int) -> None:
    sessions = [f"session-{i}" for i in range(count)]
    moments: dict[str, float] = {}
    async with library(access, lease_duration=LEASE) as contender:
        begun = time.perf_counter()
        for start in range(0, count, WAVE):
            wave = sessions[start : start + WAVE]
            await asyncio.gather(*(opened(contender, session, moments) for session in wave))
        took = time.perf_counter() - begun
        written = await access.written()
        await asyncio.sleep(LIFE)
        await asyncio.gather(*(contender.open(session) for session in sessions))
        await asyncio.gather(*(contender.close(session) for session in sessions))
        stats = contender.manager.stats()
    for _ in range(100):  # The watch is in the log once the server has seen its end.
        if (requests := await access.requests())["watch"]:
            break
        await asyncio.sleep(0.1)

    print(f"{count} sessions, {WAVE} at a time, made in {took:.1f} s, alive for {LIFE:g} s more; {stats}")
    print(f"{'verb':8} {'requests':>9} {'per session':>12}")
    for verb, number in sorted(requests.items()):
        print(f"{verb:8} {number:9} {number / count:12.3f}")
    total = sum(requests.values())
    leases = requests["patch"]
    print(f"{'all':8} {total:9} {total / count:12.3f}   without leases {(total - leases) / count:.3f}")
    late = [(moments[name] - written[name]) * 1000 for name in moments]
    print(
        f"status write acknowledged to get_client returned: median {statistics.median(late):.1f} ms,"
        f" p95 {percentile(late, 95):.1f} ms, longest {max(late):.1f} ms"
    )


async def main(count: int) -> None:
    async with sandboxes() as port, real_cluster(port) as cluster, cluster.access() as access:
        await cluster.delay(*DELAY)
        await measure(access, count)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sessions", type=int, nargs="?", default=200)
    given = parser.parse_args()
    if "KUBEBUILDER_ASSETS" not in os.environ:
        parser.error("KUBEBUILDER_ASSETS is not set: it names a directory with etcd and kube-apiserver")
    print(kubernetes_version())
    asyncio.run(main(given.sessions))
