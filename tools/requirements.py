"""Prints what pyproject.toml requires, one requirement a line, for pip's -r.

With --lowest the package's own requirements, not those of the development tools, are
pinned to their lower bounds, so that the test suite shows that the bounds are true.
"""

from __future__ import annotations

import argparse
import re
import tomllib
from pathlib import Path

_LOWER_BOUND = re.compile(r"(?P<name>[\w.-]+(?:\[[\w,-]+\])?)\s*>=\s*(?P<version>[\w.]+)(?:\s*,.*)?")


def lowest(requirement: str) -> str:
    """``grpcio>=1.74.0,<2`` becomes ``grpcio==1.74.0``.

    Raises:
        SystemExit: The requirement has no lower bound, or is more than a name and bounds.
    """
    match = _LOWER_BOUND.fullmatch(requirement)
    if match is None:
        raise SystemExit(f"pyproject.toml requires {requirement!r}: give it a lower bound, name>=version")
    return f"{match['name']}=={match['version']}"


def requirements(pyproject: Path, extras: list[str], *, pin: bool) -> list[str]:
    project = tomllib.loads(pyproject.read_text())["project"]
    optional = project["optional-dependencies"]
    if unknown := [extra for extra in extras if extra not in optional]:
        raise SystemExit(f"unknown extra {unknown[0]!r}: pyproject.toml has {', '.join(optional)}")
    own = [*project["dependencies"], *(r for extra in extras if extra != "dev" for r in optional[extra])]
    tools = optional["dev"] if "dev" in extras else []
    return [*(map(lowest, own) if pin else own), *tools]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lowest", action="store_true", help="pin to the lower bounds")
    parser.add_argument("extras", nargs="*", metavar="EXTRA")
    args = parser.parse_args()
    pyproject = Path(__file__).parents[1] / "pyproject.toml"
    print("\n".join(requirements(pyproject, args.extras, pin=args.lowest)))


if __name__ == "__main__":
    main()
