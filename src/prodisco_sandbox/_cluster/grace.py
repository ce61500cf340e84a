"""An API server that is starting refuses everybody: which refusals may pass."""

from __future__ import annotations

import asyncio
import math

STARTING_SERVER = 10.0
"""Seconds for which an API server that starts may answer 401 or 403 to everybody."""


class StartupGrace:
    """Tells a refusal that may pass from one that counts.

    A refusal may pass for 10 s after the server could not be reached, and a 403 to a verb that
    has worked for 10 s after its first refusal. From then on it counts until the verb works.
    """

    def __init__(self) -> None:
        self._unreachable_at = -math.inf
        self._refused_at: dict[str, float] = {}
        """First refusal of each verb that has worked, since it worked last; infinity: none."""

    def unreachable(self) -> None:
        """A connection failed or broke, or a request got no answer: that comes before a start."""
        self._unreachable_at = asyncio.get_running_loop().time()

    def worked(self, verb: str) -> None:
        self._refused_at[verb] = math.inf

    def has_worked(self, verb: str) -> bool:
        return verb in self._refused_at

    def may_pass(self, verb: str, code: int) -> bool:
        """Notes a refusal by RBAC or authentication, and tells whether it may pass."""
        now = asyncio.get_running_loop().time()
        since = self._unreachable_at
        if code == 403 and verb in self._refused_at:
            since = self._refused_at[verb] = min(self._refused_at[verb], now)
        return now - since < STARTING_SERVER
