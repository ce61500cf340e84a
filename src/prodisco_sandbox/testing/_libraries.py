"""Classes of kubernetes_asyncio and aiohttp, which take half a second to import.

A `LocalCluster` needs neither. Code that names their classes has imported them, and gets these; nothing
else can tell a stand-in from them.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any


class _ApiError(Exception):
    """As much of an ApiException as clients use."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(status, reason)
        self.status, self.reason = status, reason
        self.body: Any = None
        self.headers: Any = None


_STAND_INS: dict[str, Any] = {
    "ApiException": _ApiError,
    "V1APIResource": SimpleNamespace,
    "V1APIResourceList": SimpleNamespace,
    "ClientConnectionError": ConnectionError,
    "ServerTimeoutError": TimeoutError,
}


def kubernetes(name: str) -> Any:
    """A class of ``kubernetes_asyncio.client``, or its stand-in."""
    return getattr(sys.modules.get("kubernetes_asyncio.client"), name, _STAND_INS[name])


def aiohttp(name: str) -> Any:
    """A class of aiohttp's, or its stand-in."""
    return getattr(sys.modules.get("aiohttp"), name, _STAND_INS[name])


def api_exceptions() -> tuple[Any, ...]:
    """What refusals may be: one that was made before kubernetes_asyncio was imported is a stand-in."""
    return (kubernetes("ApiException"), _ApiError)
