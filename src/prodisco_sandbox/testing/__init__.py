"""Doubles for tests of programs that use prodisco_sandbox.

`FakeCustomObjectsApi` is a cluster in memory, for ``SandboxManager(...,
custom_objects_api=...)``; `FakeSandboxServer` is a real gRPC server with scripted answers.
"""

from typing import TYPE_CHECKING, Any

from . import _status
from ._api import FakeCustomObjectsApi
from ._faults import Fault, Faults, Request
from ._server import NEVER, FakeCall, FakeSandboxServer, FakeStatus
from ._watch import Response, Watch

if TYPE_CHECKING:
    from ._status import api_error, plain_error

__all__ = [
    "NEVER",
    "FakeCall",
    "FakeCustomObjectsApi",
    "FakeSandboxServer",
    "FakeStatus",
    "Fault",
    "Faults",
    "Request",
    "Response",
    "Watch",
    "api_error",
    "plain_error",
]


def __getattr__(name: str) -> Any:
    if name not in ("api_error", "plain_error"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import kubernetes_asyncio.client  # noqa: F401 - what they make is its ApiException

    return getattr(_status, name)
