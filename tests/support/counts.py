"""What the tests have tried, for the table of `make reliability`."""

from __future__ import annotations

import os


def count(what: str, number: int = 1) -> None:
    """Adds to a figure, in the file that RELIABILITY_COUNTS names; many processes may write to it."""
    if path := os.environ.get("RELIABILITY_COUNTS"):
        with open(path, "a") as file:
            file.write(f"{what}\t{number}\n")


def tries(number: int, quick: int | None = None) -> int:
    """How often a test tries what it tries: as RELIABILITY_TRIES says, else as `full` does."""
    return int(os.environ.get("RELIABILITY_TRIES") or full(number, quick))


def full(number: int, quick: int | None = None) -> int:
    """The whole number in CI, as in `.ci/run`; a quick one at every other run of the tests."""
    return number if quick is None or os.environ.get("CI") else quick
