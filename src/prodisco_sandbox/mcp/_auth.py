"""Authenticates callers over HTTP: by tokens of a file, by JWTs of an OIDC issuer, or by both."""

from __future__ import annotations

import argparse
import ipaddress
from collections.abc import Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from mcp.server.auth.provider import AccessToken
from mcp.server.auth.settings import AuthSettings
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .._log import get_logger
from ._tokens import TokenFile

if TYPE_CHECKING:
    from ._oidc import Issuer

log = get_logger("audit")

AUTH_OPTIONS = {
    "--auth-token-file": ("PATH", "accept the tokens in this file: a name and a token on each line"),
    "--oidc-issuer": ("URL", "accept JWTs of this issuer"),
    "--oidc-audience": ("TEXT", "the audience (aud) that these JWTs must have"),
    "--public-url": (
        "URL",
        "with --oidc-issuer: the server's URL, as clients know it; default: from --host, --port and --path",
    ),
}

_reason = ContextVar("prodisco_sandbox_auth_refused", default="")
"""Why the token of this request was refused, which the SDK does not pass on."""


def add_auth_options(parser: argparse._ArgumentGroup) -> None:
    for option, (metavar, text) in AUTH_OPTIONS.items():
        parser.add_argument(option, metavar=metavar, help=f"http: {text}; variable: {_variable(option)}")
    parser.add_argument(
        "--unauthenticated",
        action="store_true",
        help="http: listen without authentication on any address, where all who reach it may run code",
    )


def read_auth_options(args: argparse.Namespace, environ: Mapping[str, str]) -> None:
    """Checks the options in ``args``, and sets those that the environment gives; an option beats it.

    Raises:
        ValueError: One is wrong, or does not go with another; the message names it.
    """
    for option in (*AUTH_OPTIONS, "--unauthenticated"):
        name = option[2:].replace("-", "_")
        value = getattr(args, name)
        if value == "":
            raise ValueError(f"{option} is empty: give a value, or leave it out")
        if value and args.transport == "stdio":
            raise ValueError(
                f"{option} is for --transport http: on stdio the only caller is the parent process"
            )
        if option in AUTH_OPTIONS and args.transport == "http":
            setattr(args, name, value or environ.get(_variable(option)) or None)
    if (args.oidc_issuer is None) != (args.oidc_audience is None):
        raise ValueError("--oidc-issuer and --oidc-audience belong together: give both or none")
    if args.unauthenticated and (args.auth_token_file or args.oidc_issuer):
        raise ValueError("--unauthenticated does not go with --auth-token-file or --oidc-issuer")
    if args.oidc_issuer is not None:
        from ._oidc import check_url  # Its libraries take long to import, and few need them.

        check_url("--oidc-issuer", args.oidc_issuer)
    if args.public_url is not None:
        if args.oidc_issuer is None:
            raise ValueError("--public-url is for --oidc-issuer: without it, no metadata names the URL")
        check_url("--public-url", args.public_url, http_anywhere=True)


def server_auth(args: argparse.Namespace, host: str, port: int) -> dict[str, Any]:
    """The arguments of ``MCPServer`` that make it authenticate; none where it is not to.

    Raises:
        ValueError: The address needs other options, or the file of tokens is wrong.
        OSError: The file of tokens cannot be read.
    """
    address = ipaddress.ip_address(host)
    if not args.auth_token_file and not args.oidc_issuer:
        if not address.is_loopback:
            text = f"--host: {host} is no loopback address, and callers are not authenticated"
            if not args.unauthenticated:
                raise ValueError(f"{text}: give --auth-token-file or --oidc-issuer, or --unauthenticated")
            log.warning("unauthenticated", problem=text)
        return {}
    if args.oidc_issuer and not args.public_url and address.is_unspecified:
        raise ValueError(f"--public-url is needed with --host {host}: clients cannot connect to that")
    url = args.public_url or f"http://{f'[{host}]' if ':' in host else host}:{port}{args.path}"
    settings = {
        "issuer_url": args.oidc_issuer or url,
        # For resource metadata, which leads to an authorization server; for tokens of a file there is none.
        "resource_server_url": url if args.oidc_issuer else None,
        "validate_token_resource": False,  # `Issuer` checks the audience.
    }
    return {"auth": AuthSettings.model_validate(settings), "token_verifier": Verifier(args)}


class Verifier:
    """The SDK's TokenVerifier. Only `LogRefusals` learns why it refuses a token."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._file = TokenFile(args.auth_token_file) if args.auth_token_file else None
        self._issuer: Issuer | None = None
        if args.oidc_issuer:
            from ._oidc import Issuer

            self._issuer = Issuer(args.oidc_issuer, args.oidc_audience)

    async def verify_token(self, token: str) -> AccessToken | None:
        # Results do not hold the token: nothing reads it, and nothing can log it.
        if self._file is not None and (name := self._file.find(token)) is not None:
            return AccessToken(token="", client_id=name, scopes=[])
        if self._issuer is None:
            _reason.set("unknown token")
            return None
        from ._oidc import TokenRefusedError

        try:
            subject = await self._issuer.verify(token)
        except TokenRefusedError as refusal:
            _reason.set(str(refusal))
            return None
        # A principal is the same in all its clients, whose own ids therefore do not count.
        claims = {"iss": self._issuer.url}
        return AccessToken(token="", client_id=subject, scopes=[], subject=subject, claims=claims)

    async def aclose(self) -> None:
        """Ends what is under way. Idempotent."""
        if self._issuer is not None:
            await self._issuer.aclose()


class LogRefusals:
    """ASGI middleware that logs why a request was answered with 401."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def logged(message: Message) -> None:
            if message.get("status") == 401:
                address = scope["client"][0] if scope.get("client") else None
                log.warning("auth_refused", reason=_reason.get(), address=address)
            await send(message)

        _reason.set("no bearer token")
        await self._app(scope, receive, logged)


def _variable(option: str) -> str:
    return "SANDBOX_" + option[2:].replace("-", "_").upper()
