"""Runs the scenarios of docs/benchmarks.md: `make bench`, or `python -m benchmarks --quick`."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import resource
import sys
from contextlib import AsyncExitStack
from dataclasses import asdict
from pathlib import Path

from . import (
    at_once,
    calls,
    executions,
    files,
    imports,
    lookups,
    memory,
    readiness,
    reaping,
    shared,
    telemetry,
    warm,
)
from .clusters import Cluster, FakeCluster, real_cluster
from .measure import Figure, new_loop
from .sandboxes import sandboxes
from .scale import FULL, QUICK, SMOKE, Scale, Setting

SCENARIOS = dict(
    enumerate(
        (
            lookups,
            readiness,
            at_once,
            memory,
            calls,
            reaping,
            imports,
            warm,
            telemetry,
            shared,
            files,
            executions,
        ),
        start=1,
    )
)
VERDICTS = {True: "yes", False: "NO", None: ""}


async def measure(scale: Scale, only: list[int], *, real: bool) -> list[Figure]:
    figures: list[Figure] = []
    async with AsyncExitStack() as stack:
        port = await stack.enter_async_context(sandboxes())
        clusters: list[Cluster] = [FakeCluster(port)]
        if real:
            clusters.append(await stack.enter_async_context(real_cluster(port)))
        setting = Setting(scale=scale, clusters=clusters, sandbox_port=port)
        for number in only:
            print(str(SCENARIOS[number].__doc__).strip().splitlines()[0], file=sys.stderr, flush=True)
            figures += await SCENARIOS[number].run(setting)
    return figures


def row(figure: Figure) -> str:
    what = figure.what + (f" ({figure.cluster})" if figure.cluster else "")
    ratio = "" if figure.ratio is None else f"{figure.ratio:.2f}x"
    target = "" if figure.target is None else f"{'>=' if figure.at_least else '<='} {figure.target:g}"
    value = f"{figure.value:.3f} {figure.unit}".rstrip()
    cells = (str(figure.scenario), what, value, ratio, target, VERDICTS[figure.met], figure.note)
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    scale = parser.add_mutually_exclusive_group()
    scale.add_argument("--quick", action="store_true", help="a look, in a minute")
    scale.add_argument("--smoke", action="store_true", help="just to see that all of it runs")
    parser.add_argument("--only", type=int, nargs="+", choices=list(SCENARIOS), default=list(SCENARIOS))
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    given = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    real = bool(os.environ.get("KUBEBUILDER_ASSETS"))
    with asyncio.Runner(loop_factory=new_loop) as runner:
        size = SMOKE if given.smoke else QUICK if given.quick else FULL
        figures = runner.run(measure(size, given.only, real=real))
    print(f"Python {platform.python_version()}, {os.cpu_count()} processors, {platform.machine()}\n")
    print("| | what | value | ratio | target | met | |\n| --- | --- | --- | --- | --- | --- | --- |")
    for figure in figures:
        print(row(figure))
    if given.json is not None and not given.smoke:  # The last figures worth drawing stay.
        given.json.write_text(json.dumps([asdict(figure) for figure in figures], indent=1))


if __name__ == "__main__":
    main()
