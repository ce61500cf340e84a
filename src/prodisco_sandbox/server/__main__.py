"""Entry point of ``python -m prodisco_sandbox.server``."""

from __future__ import annotations

import gc
import sys

if __name__ == "__main__":
    # Objects made by imports stay: collecting would find nothing.
    gc.disable()
    # asyncio works without ssl, and gRPC brings its own TLS: importing it takes a tenth of the start.
    sys.modules["ssl"] = None  # type: ignore[assignment]

import asyncio
import logging
import signal

from ._app import serve
from ._options import OptionsError, parse

if __name__ == "__main__":
    del sys.modules["ssl"]
    gc.freeze()
    gc.enable()

log = logging.getLogger("prodisco_sandbox.server")


def main() -> int:
    """Runs the server; returns its exit status: 0, or 2 for a wrong setting.

    With ``--check``: 0 where a server is well, 1 where it is not.
    """
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    # Blocked signals are inherited: with SIGCHLD blocked, the end of an execution would go unnoticed.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    try:
        options = parse()
        if options.check:
            from ._check import check

            problem = check(options)
            if problem is not None:
                log.error(problem)
            return 0 if problem is None else 1
        asyncio.run(serve(options))
    except OptionsError as error:
        print(f"prodisco_sandbox.server: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
