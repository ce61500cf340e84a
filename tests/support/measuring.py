"""What coverage costs: before Python 3.14 it doubles the time of all code, also that of libraries."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator

import coverage


@contextlib.contextmanager
def unmeasured() -> Iterator[None]:
    """Pauses the measurement of coverage in this process, if there is one."""
    measuring = coverage.Coverage.current()
    if measuring is not None:
        measuring.stop()
    try:
        yield
    finally:
        if measuring is not None:
            measuring.start()


def import_libraries() -> None:
    """Imports what takes long, before test modules do it while coverage is measured."""
    if coverage.Coverage.current() is not None:
        with unmeasured():
            for name in (
                "grpc.aio",
                "hypothesis",
                "kubernetes_asyncio.client",
                "mcp.client",
                "mcp.server",
                "uvicorn",
            ):
                importlib.import_module(name)
