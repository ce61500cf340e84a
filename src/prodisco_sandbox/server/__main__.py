"""Entry point of ``python -m prodisco_sandbox.server``."""

from __future__ import annotations

import asyncio
import logging
import sys

from ._app import serve
from ._options import OptionsError, parse


def main() -> int:
    """Runs the server; returns its exit status: 0, or 2 for a wrong setting."""
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    try:
        asyncio.run(serve(parse()))
    except OptionsError as error:
        print(f"prodisco_sandbox.server: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
