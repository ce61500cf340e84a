"""gRPC statuses as errors of this library."""

from __future__ import annotations

import re
from typing import Any

from ..errors import (
    SandboxCapacityError,
    SandboxError,
    SandboxPermissionError,
    SandboxTimeoutError,
    SandboxUnavailableError,
)
from .codec import MAX_MESSAGE_BYTES

SUSPICIOUS = ("UNAVAILABLE", "DEADLINE_EXCEEDED")
"""Statuses of calls to a dead sandbox."""

_KINDS: dict[str, type[SandboxError]] = {
    "UNAVAILABLE": SandboxUnavailableError,
    "DEADLINE_EXCEEDED": SandboxTimeoutError,
    "UNAUTHENTICATED": SandboxPermissionError,
    "PERMISSION_DENIED": SandboxPermissionError,
    "RESOURCE_EXHAUSTED": SandboxCapacityError,
}

# The wording of C-core and Node, of Go, and of Java.
_SIZES = re.compile(r"larger than max \((?P<size>\d+) vs\.? (?P<limit>\d+)\)")
_JAVA_SIZES = re.compile(r"exceeds maximum size (?P<limit>\d+): (?P<size>\d+)")


def failure(call: str, error: Any) -> SandboxError:
    """The error for an AioRpcError of a call, given as ``RPC on TARGET``."""
    status, details = error.code().name, error.details() or "no details"
    kind = _KINDS.get(status, SandboxError)
    if status == "RESOURCE_EXHAUSTED" and (size := about_size(details)) is not None:
        kind, details = SandboxError, size
    return kind(f"{call}: {status}: {details}", status=status)


def about_size(details: str) -> str | None:
    """What a RESOURCE_EXHAUSTED says about the size of a message; None where it is about something else.

    Servers have limits of their own, of 4 MiB by default, and refuse a larger request
    before anything runs. An answer is only ever over this client's limit.
    """
    found = _SIZES.search(details) or _JAVA_SIZES.search(details)
    if found is None:
        return None
    size, limit = int(found["size"]), int(found["limit"])
    if limit == MAX_MESSAGE_BYTES and "SERVER: " not in details:
        return f"a message is over the size limit of {MAX_MESSAGE_BYTES >> 20} MiB: {details}"
    return (
        f"a request of {size:,} bytes is over the size limit of {limit / (1 << 20):.3g} MiB of this server's"
        " messages: nothing was run"
    )
