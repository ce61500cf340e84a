"""Doubles for tests of programs that use prodisco_sandbox: a cluster in memory.

`FakeCustomObjectsApi` goes into ``SandboxManager(..., custom_objects_api=...)``.
"""

from ._api import FakeCustomObjectsApi
from ._faults import Fault, Faults, Request
from ._status import api_error, plain_error
from ._watch import Response, Watch

__all__ = [
    "FakeCustomObjectsApi",
    "Fault",
    "Faults",
    "Request",
    "Response",
    "Watch",
    "api_error",
    "plain_error",
]
