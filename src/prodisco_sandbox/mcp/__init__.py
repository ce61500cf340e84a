"""Sandboxes for an MCP server: the extra ``prodisco-sandbox[mcp]``.

::

    manager = SandboxManager(SandboxManagerConfig.from_env(mode="multi"))
    server = MCPServer("my-server", lifespan=sandbox_lifespan(manager))
    add_sandbox_tools(server, manager)
    server.run("streamable-http")

``python -m prodisco_sandbox.mcp`` is a complete server.
"""

import gc as _gc


def _import_the_sdk() -> None:
    """Imports the SDK. Most of its models are never used: each is built on its first use."""
    from pydantic import BaseModel

    BaseModel.model_config["defer_build"] = True
    try:
        from mcp.server import MCPServer  # noqa: F401
    finally:
        del BaseModel.model_config["defer_build"]


# The SDK makes a thousand classes and little garbage: collections would take a tenth of the time.
_collecting = _gc.isenabled()
_gc.disable()
try:
    _import_the_sdk()
except ImportError as error:
    if error.name is not None and error.name.partition(".")[0] not in ("mcp", "pydantic"):
        raise  # The SDK is installed, but one of its own imports is missing.
    raise ImportError(
        "prodisco_sandbox.mcp needs the official MCP SDK, version 2.3 or newer:"
        " pip install 'prodisco-sandbox[mcp]'",
        name="mcp",
    ) from error
else:
    from ._identity import principal, session_key
    from ._lifespan import sandbox_lifespan
    from ._tool import SandboxTools, add_sandbox_tools
finally:
    if _collecting:
        if not _gc.get_freeze_count():  # Makes all of it old: else the next two collections would visit it.
            _gc.freeze()
            _gc.unfreeze()
        _gc.enable()

__all__ = ["SandboxTools", "add_sandbox_tools", "principal", "sandbox_lifespan", "session_key"]

del _collecting, _gc
