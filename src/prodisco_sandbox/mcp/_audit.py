"""The audit log: an event ``sandbox_call`` for each call of the tool, refused ones included."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from .._log import get_logger
from ._sandboxes import Use

log = get_logger("audit")


@dataclass
class CallRecord:
    """What is logged of a call: never code, session ids or handles."""

    mode: str | None = None
    use: Use | None = None
    sandbox: str | None = None
    """The name of the sandbox of a call that does not use one."""
    outcome: Literal["ok", "failed", "error", "invalid", "refused", "no_sandbox", "cancelled"] = "cancelled"


@contextmanager
def audited(principal: str | None) -> Iterator[CallRecord]:
    """Logs a call at its end; the block sets what becomes known of it."""
    record = CallRecord()
    begun = time.monotonic()
    try:
        yield record
    except Exception:
        record.outcome = "error"
        raise
    finally:
        sandbox = record.use and record.use.client.sandbox
        log.info(
            "sandbox_call",
            principal=principal,
            sandbox=sandbox.name if sandbox else record.sandbox,
            mode=record.mode,
            outcome=record.outcome,
            duration=round(time.monotonic() - begun, 3),
        )
