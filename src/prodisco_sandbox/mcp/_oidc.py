"""Verifies JWTs against the keys of their issuer, which are fetched, cached and rotated."""

from __future__ import annotations

import asyncio
import ipaddress
import json
from typing import Any
from urllib.parse import urlsplit

import httpx2
import jwt

from .._log import get_logger

log = get_logger("audit")

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
"""Asymmetric ones only: with HS256, whoever knows the public key could sign."""
LEEWAY = 30.0
"""Seconds by which the issuer's clock may differ."""
MAX_TOKEN = 16_384
"""Characters of a token."""
MAX_ANSWER = 256 * 1024
"""Bytes of an answer of the issuer."""
FETCH_TIMEOUT = 5.0
"""Seconds for one fetch of the keys, metadata included."""
FETCH_PAUSE = 5.0
"""Seconds between fetches, also where a token names an unknown key."""
FRESH = 300.0
"""Seconds after which keys are fetched again, to drop those that the issuer has withdrawn."""
STALE = 86_400.0
"""Seconds for which keys are used while the issuer cannot be reached."""

_JWT = jwt.PyJWT({"enforce_minimum_key_length": True})
_REASONS: dict[type[Exception], str] = {
    jwt.ExpiredSignatureError: "expired",
    jwt.ImmatureSignatureError: "not valid yet",
    jwt.InvalidAudienceError: "other audience",
    jwt.InvalidIssuerError: "other issuer",
    jwt.InvalidSignatureError: "wrong signature",
    jwt.MissingRequiredClaimError: "claim missing",
    jwt.InvalidKeyError: "wrong kind of key",
}
"""PyJWT's own texts may quote the token."""


class TokenRefusedError(Exception):
    """The token is refused; the message says why, for the log, and holds nothing of it."""


class Issuer:
    """An OIDC issuer, or another authorization server with metadata as in RFC 8414.

    Args:
        url: The issuer's, exactly as in the claim ``iss``.
        audience: What the claim ``aud`` has to be, or to hold.
    """

    def __init__(self, url: str, audience: str) -> None:
        self.url, self._audience = url, audience
        self._keys: dict[str | None, dict[str, Any]] = {}
        self._fetched_at = self._next_fetch = float("-inf")
        self._fetch: asyncio.Task[None] | None = None

    async def verify(self, token: str) -> str:
        """The subject of a JWT. Safe to cancel.

        Raises:
            TokenRefusedError: It is not valid, or the issuer's keys are not known.
        """
        if len(token) > MAX_TOKEN:
            raise TokenRefusedError("too long")
        try:
            header = jwt.get_unverified_header(token)
            algorithm = header.get("alg")
            if algorithm not in ALGORITHMS:
                raise TokenRefusedError("algorithm not allowed")
            key = await self._key(header.get("kid"))
            if key.get("alg", algorithm) != algorithm:
                raise TokenRefusedError("wrong kind of key")
            claims = _JWT.decode(
                token,
                jwt.PyJWK(key, algorithm),
                algorithms=[algorithm],
                audience=self._audience,
                issuer=self.url,
                leeway=LEEWAY,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise TokenRefusedError(_REASONS.get(type(error), "malformed")) from None
        subject: str = claims["sub"]
        if not subject:
            raise TokenRefusedError("claim missing")
        return subject

    async def aclose(self) -> None:
        """Ends a fetch that is under way. Idempotent."""
        if self._fetch is not None:
            self._fetch.cancel()
            await asyncio.wait([self._fetch])

    async def _key(self, kid: str | None) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        age = loop.time() - self._fetched_at
        if age > STALE:
            self._keys = {}
        key = self._keys.get(kid)
        if key is None or age > FRESH:
            if (self._fetch is None or self._fetch.done()) and loop.time() >= self._next_fetch:
                self._fetch = loop.create_task(self._fetch_keys(), name="keys of the OIDC issuer")
            if key is None and self._fetch is not None:
                await asyncio.shield(self._fetch)  # Others wait for it, too.
                key = self._keys.get(kid)
        if key is None:
            raise TokenRefusedError("unknown key" if self._keys else "no keys of the issuer")
        return key

    async def _fetch_keys(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            async with (
                asyncio.timeout(FETCH_TIMEOUT),
                # Not compressed, so that the bound on an answer is one on memory.
                httpx2.AsyncClient(headers={"Accept-Encoding": "identity"}, follow_redirects=False) as http,
            ):
                self._keys = await self._read_keys(http)
            self._fetched_at = loop.time()
            log.info("oidc_keys_fetched", issuer=self.url, keys=len(self._keys))
        except (OSError, httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
            text = str(error) or type(error).__name__
            log.warning("oidc_keys_failed", issuer=self.url, error=text, known=len(self._keys))
        finally:
            self._next_fetch = loop.time() + FETCH_PAUSE

    async def _read_keys(self, http: httpx2.AsyncClient) -> dict[str | None, dict[str, Any]]:
        parts = urlsplit(self.url)
        server, path = f"{parts.scheme}://{parts.netloc}/", parts.path.rstrip("/")
        try:
            metadata = await _get(http, f"{self.url.rstrip('/')}/.well-known/openid-configuration")
        except ValueError:
            metadata = await _get(http, f"{server}.well-known/oauth-authorization-server{path}")
        if metadata.get("issuer") != self.url:
            raise ValueError(f"the metadata of {self.url} is that of another issuer")
        url = str(metadata.get("jwks_uri"))
        check_url("jwks_uri", url)
        keys = (await _get(http, url)).get("keys")
        usable = {
            key.get("kid"): key
            for key in (keys if isinstance(keys, list) else ())
            if isinstance(key, dict)
            and isinstance(key.get("kid"), str | None)
            and key.get("use", "sig") == "sig"
            and key.get("kty") in ("RSA", "EC", "OKP")
        }
        if not usable:
            raise ValueError(f"{url} has no usable key")
        return usable


async def _get(http: httpx2.AsyncClient, url: str) -> dict[str, Any]:
    body = bytearray()
    async with http.stream("GET", url) as answer:
        if answer.status_code != 200:
            raise ValueError(f"{url} answered {answer.status_code}; redirects are not followed")
        async for chunk in answer.aiter_raw():
            body += chunk
            if len(body) > MAX_ANSWER:
                raise ValueError(f"{url} answered more than {MAX_ANSWER} bytes")
    try:
        return dict(json.loads(body))
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"{url} answered no JSON object") from None


def check_url(name: str, url: str, *, http_anywhere: bool = False) -> None:
    """Raises ValueError where a URL is neither https nor, unless ``http_anywhere``, on loopback."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        secure = parts.scheme == "https" or (
            parts.scheme == "http"
            and (http_anywhere or host == "localhost" or ipaddress.ip_address(host).is_loopback)
        )
        right = secure and host and parts.port != 0 and not (parts.query or parts.fragment or parts.username)
    except ValueError:
        right = False
    if not right:
        raise ValueError(
            f"{name} is {url!r}: give an https URL without user, query and fragment"
            " (http only on a loopback address)"
        )
