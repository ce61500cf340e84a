"""What the tests have tried, for the table of `make reliability`."""

from __future__ import annotations

import os


def count(what: str, number: int = 1) -> None:
    """Adds to a figure, in the file that RELIABILITY_COUNTS names; many processes may write to it."""
    if path := os.environ.get("RELIABILITY_COUNTS"):
        with open(path, "a") as file:
            file.write(f"{what}\t{number}\n")


def tries(default: int) -> int:
    """How often a test tries what it tries: so often, or as RELIABILITY_TRIES says."""
    return int(os.environ.get("RELIABILITY_TRIES") or default)
