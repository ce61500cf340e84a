"""A sandbox of its own for every MCP session.

An MCP server awaits `SandboxManager` from its request handlers and gets, for a session
id, a live `SandboxClient` of that session's own sandbox on Kubernetes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .client import ExecutionStream, FileStream, SandboxClient, SandboxFiles
    from .config import SandboxManagerConfig, TlsConfig
    from .errors import *
    from .manager import SandboxManager, SandboxManagerStats
    from .results import *

__all__ = [
    "SandboxClient",
    "SandboxManager",
    "SandboxManagerConfig",
    "SandboxManagerStats",
    "TlsConfig",
    # What calls return
    "CacheEntry",
    "CancelResult",
    "ExecutionChunk",
    "ExecutionInfo",
    "ExecutionOutcome",
    "ExecutionResult",
    "ExecutionState",
    "ExecutionStatus",
    "ExecutionStream",
    "FileInfo",
    "FileList",
    "FileStream",
    "HealthStatus",
    "LspDocumentSymbol",
    "LspHover",
    "LspLocation",
    "LspRange",
    "LspSymbolInfo",
    "LspSymbolKind",
    "LspWorkspaceSymbols",
    "SandboxFiles",
    "SandboxRef",
    "StartedExecution",
    "TestReport",
    "TestResult",
    "TestSummary",
    # Errors
    "SandboxCapacityError",
    "SandboxConflictError",
    "SandboxError",
    "SandboxFailedError",
    "SandboxManagerClosedError",
    "SandboxPermissionError",
    "SandboxReplacedError",
    "SandboxTimeoutError",
    "SandboxUnavailableError",
]

_HOMES = {
    "ExecutionStream": "client",
    "FileStream": "client",
    "SandboxFiles": "client",
    "SandboxClient": "client",
    "SandboxManager": "manager",
    "SandboxManagerConfig": "config",
    "SandboxManagerStats": "manager",
    "TlsConfig": "config",
}

if not TYPE_CHECKING:
    # Loaded when asked for (PEP 562): `python -m prodisco_sandbox.server` runs this file
    # too, and a sandbox starts faster without the manager.

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import importlib

        home = _HOMES.get(name) or ("errors" if name.endswith("Error") else "results")
        value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
