"""Identifies a request's caller and session, and so its sandbox."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
from collections.abc import Callable
from typing import Any

from mcp.server.auth.middleware.auth_context import get_access_token
from mcp.server.auth.provider import principal_components
from mcp.server.connection import Connection
from mcp.server.mcpserver import Context
from mcp.server.streamable_http import MCP_SESSION_ID_HEADER
from mcp_types.version import HANDSHAKE_PROTOCOL_VERSIONS

Policy = Callable[[Context[Any, Any]], str | None]
"""Reads a request's session or caller from its context."""

_KEY = "prodisco_sandbox.session_key"
_HANDLE_PREFIX = "sbx_"
_ID_BYTES = _TAG_BYTES = 16


def principal(ctx: Context[Any, Any]) -> str | None:
    """The authenticated caller: client id, issuer and subject of the access token.

    Returns:
        Text that differs for different callers; None without authentication.
    """
    token = get_access_token()
    return None if token is None else json.dumps(principal_components(token))


def session_key(ctx: Context[Any, Any], principal: Policy = principal) -> str | None:
    """The session that a request belongs to; the default policy of `add_sandbox_tools`.

    Up to protocol 2025-11-25 a connection is a session. On streamable HTTP that is one
    with a session id of its own, which the request's header must show; the key is bound
    to the principal. A header alone proves nothing: on stateless requests, and on all of
    2026-07-28, the SDK passes it on unchecked. On stdio the connection is the process's.

    From protocol 2026-07-28 on, requests stand alone and belong to no session.

    Args:
        ctx: The request.
        principal: Identifies the caller; the one that `add_sandbox_tools` was given.

    Returns:
        None where there is no session: then a handle names the sandbox.
    """
    if ctx.request_context.protocol_version not in HANDSHAKE_PROTOCOL_VERSIONS:
        return None
    connection = connection_of(ctx)
    if connection is None:
        return None
    if ctx.request_context.request is None:
        if not connection.has_standalone_channel:
            return None
        # Not a constant: a custom transport may serve several connections.
        key: str = connection.state.setdefault(_KEY, f"connection-{secrets.token_hex(16)}")
        return key
    own, shown = connection.session_id, (ctx.headers or {}).get(MCP_SESSION_ID_HEADER)
    if own is None or shown is None or not hmac.compare_digest(own.encode(), shown.encode()):
        return None
    key = "http-" + hashlib.sha256(json.dumps([own, principal(ctx)]).encode()).hexdigest()
    connection.state[_KEY] = key
    return key


def one_client() -> Policy:
    """A policy for a process with one client, as on stdio: all that belongs to no session is one session."""
    own = f"process-{secrets.token_hex(16)}"
    return lambda ctx: session_key(ctx) or own


def connection_of(ctx: Context[Any, Any]) -> Connection | None:
    """The connection of a request; None where the SDK does not show it.

    The SDK has no public way to it from a tool. Without it every caller is given handles,
    which is always safe.
    """
    connection = getattr(ctx.request_context.session, "_connection", None)
    return connection if isinstance(connection, Connection) else None


def connection_with_key(ctx: Context[Any, Any], key: str) -> Connection | None:
    """The connection whose end is the end of this session, if `session_key` made the key."""
    connection = connection_of(ctx)
    return connection if connection is not None and connection.state.get(_KEY) == key else None


class Handles:
    """Makes and reads sandbox handles: a random id, and a tag that binds it to a principal.

    A handle needs no table: nobody else can make a valid tag, and a handle of another
    principal is as invalid as an invented one.

    Args:
        secret: Makes handles outlive the process, and valid on all that share it; None:
            random.

    Raises:
        ValueError: The secret is too short.
    """

    def __init__(self, secret: str | bytes | None) -> None:
        if secret is None:
            secret = secrets.token_bytes(32)
        self._secret = secret.encode() if isinstance(secret, str) else secret
        if len(self._secret) < 16:
            # The message must not hold the secret.
            raise ValueError("handle_secret is too short: give at least 16 random characters")

    def make(self, who: str | None) -> tuple[str, str]:
        """A new handle for a principal, and the session key that it stands for."""
        identity = secrets.token_bytes(_ID_BYTES)
        handle = base64.urlsafe_b64encode(identity + self._tag(identity, who)).rstrip(b"=").decode()
        return _HANDLE_PREFIX + handle, _handle_key(identity)

    def read(self, handle: str, who: str | None) -> str | None:
        """The session key of a handle; None where it is not one of this principal's."""
        if not handle.isascii() or not handle.startswith(_HANDLE_PREFIX):
            return None
        text = handle.removeprefix(_HANDLE_PREFIX)
        try:
            data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        except ValueError:
            return None
        identity, tag = data[:_ID_BYTES], data[_ID_BYTES:]
        return _handle_key(identity) if hmac.compare_digest(tag, self._tag(identity, who)) else None

    def owner(self, who: str) -> str:
        """A name for a principal that tells nobody who it is: the same wherever the secret is."""
        return hmac.digest(self._secret, b"sandbox owner\0" + who.encode(), "sha256").hex()

    def _tag(self, identity: bytes, who: str | None) -> bytes:
        message = b"sandbox handle\0" + identity + json.dumps(who).encode()
        return hmac.digest(self._secret, message, "sha256")[:_TAG_BYTES]


def _handle_key(identity: bytes) -> str:
    return "handle-" + identity.hex()
