"""The token that calls must carry, where a server has been given one."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import grpc

from prodisco_sandbox.proto import metadata as names

from ._options import OptionsError
from ._undecodable import Continuation, refusal

_LEAST, _MOST = 16, 256


def read_token(source: int = 0) -> bytes:
    """Reads the token, the first line of standard input: arguments and the environment are seen in /proc.

    Raises:
        OptionsError: There is no such line.
    """
    line = bytearray()
    while not line.endswith(b"\n"):
        try:
            more = os.read(source, 1)  # What follows the line is not ours.
        except OSError as error:
            raise OptionsError(f"--require-token: standard input cannot be read: {error}") from error
        if not more or len(line) > _MOST:
            break
        line += more
    token = bytes(line.removesuffix(b"\n"))
    if not line.endswith(b"\n") or len(token) < _LEAST or not token.isascii():
        raise OptionsError(
            f"--require-token: standard input must begin with the token: a line of {_LEAST} to {_MOST}"
            " ASCII characters"
        )
    return token


class RequireToken(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Refuses every call without the token, whatever its method, before anything runs."""

    def __init__(self, token: bytes) -> None:
        self._token = token

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        if self._is_in(handler_call_details.invocation_metadata or ()):
            return await continuation(handler_call_details)
        text = f"the call lacks this server's token ({names.TOKEN})"
        return refusal(lambda context: context.abort(grpc.StatusCode.UNAUTHENTICATED, text))

    def _is_in(self, metadata: Iterable[tuple[str, str | bytes]]) -> bool:
        # Only now, since it takes a part of the start.
        from hmac import compare_digest

        found = [value for key, value in metadata if key == names.TOKEN]
        given = found[0] if len(found) == 1 else b""
        return compare_digest(given.encode() if isinstance(given, str) else given, self._token)
