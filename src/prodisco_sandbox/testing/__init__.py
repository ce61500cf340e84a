"""Doubles for tests of programs that use prodisco_sandbox.

`FakeCustomObjectsApi` is a cluster in memory, for ``SandboxManager(...,
custom_objects_api=...)``; `FakeSandboxServer` is a real gRPC server with scripted answers.
"""

from ._api import FakeCustomObjectsApi
from ._faults import Fault, Faults, Request
from ._server import NEVER, FakeCall, FakeSandboxServer, FakeStatus
from ._status import api_error, plain_error
from ._watch import Response, Watch

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
