"""Runs the reliability campaign, and prints the table of docs/reliability.md.

    make reliability                      all of it
    make reliability SCALE=0.2            a fifth of it, for a look

Each part is a run of pytest with more tries than the suites make. The figures are what the
tests themselves counted; a part that fails is a leak, or worse, and ends the campaign with
its output. Parts run one after another.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 900


@dataclass(frozen=True)
class Part:
    """A run of pytest.

    Attributes:
        title: What it tries.
        arguments: Of pytest.
        variable: The environment variable that says how often.
        tries: Its value for the whole campaign.
        figures: What the tests count, in the order of the table.
    """

    title: str
    arguments: tuple[str, ...]
    variable: str
    tries: int
    figures: tuple[str, ...]


PARTS = (
    Part(
        "random interleavings of the session table's calls",
        ("tests/sessions/test_table.py", "-k", "TestTable"),
        "RELIABILITY_TRIES",
        5_000,
        ("steps of the table's machine",),
    ),
    Part(
        "random interleavings of calls, faults and deaths on the whole manager",
        ("tests/sessions/test_machine.py",),
        "MACHINE_EXAMPLES",
        8_000,
        (
            "runs of the manager's machine",
            "moves of the manager's machine",
            "faults injected",
            "cancellations of callers",
        ),
    ),
    Part(
        "every path interrupted at every step",
        ("tests/sessions/test_interruptions.py",),
        "INTERRUPTION_STRIDE",
        1,
        ("cancellations at a step", "other interruptions at a step"),
    ),
    Part(
        "streams cancelled at every point at which they wait",
        ("tests/reliability/test_streams.py",),
        "",
        0,
        ("cancellations of streams",),
    ),
    Part(
        "processes killed at random moments under load, and drained",
        ("tests/reliability/test_crashes.py", "tests/reliability/test_places.py"),
        "RELIABILITY_TRIES",
        50,
        ("kills", "drains"),
    ),
    Part(
        "hostile session ids, and every failing path searched for them",
        ("tests/sessions/test_security.py", "tests/sessions/test_failures.py"),
        "RELIABILITY_TRIES",
        100_000,
        ("session ids", "failing paths searched for the session id"),
    ),
    Part(
        "overload, a busy API server, hostile servers",
        ("tests/sessions/test_overload.py",),
        "",
        0,
        ("callers in overload", "refusals in overload", "faults injected", "hostile servers"),
    ),
)


def run(part: Part, scale: float) -> tuple[Counter[str], float]:
    """Runs a part; returns what it has counted, and the seconds that it took.

    Raises:
        SystemExit: It failed; its output has been printed.
    """
    begun = time.monotonic()
    counted: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="reliability-") as directory:
        path = Path(directory, "counts")
        environ = {**os.environ, "RELIABILITY_COUNTS": str(path), "HYPOTHESIS_PROFILE": "dev"}
        if part.variable == "INTERRUPTION_STRIDE":
            environ[part.variable] = str(max(1, round(1 / scale)))
        elif part.variable:
            environ[part.variable] = str(max(1, round(part.tries * scale)))
        # One test may be most of a part, and the machine slow: what hangs is still ended.
        options = ("-q", "-p", "no:cacheprovider", "-o", f"faulthandler_timeout={TIMEOUT}")
        command = [sys.executable, "-m", "pytest", *options, *part.arguments]
        done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
        if path.exists():
            for line in path.read_text().splitlines():
                what, number = line.split("\t")
                counted[what] += int(number)
    if done.returncode:
        raise SystemExit(f"{done.stdout}{done.stderr}\nFAILED: {part.title}")
    return counted, time.monotonic() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs the reliability campaign.")
    parser.add_argument("--scale", type=float, default=1.0, help="of all tries; 1 is the whole campaign")
    scale = parser.parse_args().scale
    if not 0 < scale <= 10:
        parser.error(f"--scale is {scale}: it must be more than 0 and at most 10")
    total = 0.0
    print("| what | how much | leaks and broken promises found | took |")
    print("| --- | --- | --- | --- |", flush=True)
    for part in PARTS:
        counted, seconds = run(part, scale)
        total += seconds
        if missing := [figure for figure in part.figures if not counted[figure]]:
            raise SystemExit(f"FAILED: {part.title}: nothing was counted as {', '.join(missing)}")
        figures = "; ".join(f"{counted[figure]:,} {figure}" for figure in part.figures)
        print(f"| {part.title} | {figures} | 0 | {seconds:.0f} s |", flush=True)
    python = platform.python_version()
    print(f"\nScale {scale:g}, {total:.0f} s in all, Python {python}, {os.cpu_count()} processors.")


if __name__ == "__main__":
    main()
