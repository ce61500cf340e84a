"""An OIDC issuer on loopback, with real keys and whatever may go wrong with one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from typing import Any, Literal, Self

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

AUDIENCE = "sandboxes"

RSA_KEY = rsa.generate_private_key(65537, 2048)
OTHER_KEY = rsa.generate_private_key(65537, 2048)
SHORT_KEY = rsa.generate_private_key(65537, 1024)
EC_KEY = ec.generate_private_key(ec.SECP256R1())
ED_KEY = ed25519.Ed25519PrivateKey.generate()


def jwk(key: Any, kid: str | None, **more: Any) -> dict[str, Any]:
    kinds = ((rsa.RSAPrivateKey, "RS256"), (ec.EllipticCurvePrivateKey, "ES256"))
    algorithm = next((name for kind, name in kinds if isinstance(key, kind)), "EdDSA")
    public = jwt.get_algorithm_by_name(algorithm).to_jwk(key.public_key(), as_dict=True)
    return {**public, **({} if kid is None else {"kid": kid}), **more}


class FakeIssuer:
    """Serves metadata and keys, and signs tokens.

    Args:
        path: The path of the issuer's URL.
    """

    def __init__(self, path: str = "") -> None:
        self.path = path
        self.keys = [jwk(RSA_KEY, "rsa"), jwk(EC_KEY, "ec"), jwk(ED_KEY, "ed")]
        self.state: Literal["up", "down", "slow", "huge", "moved", "broken"] = "up"
        self.metadata: dict[str, Any] = {}
        """Overrides what the metadata say."""
        self.well_known = f"{path}/.well-known/openid-configuration"
        self.asked: list[str] = []
        self._connections: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.base = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        self.url = self.base + self.path
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in list(self._connections):
            task.cancel()
            await asyncio.wait([task])

    def token(
        self, key: Any = RSA_KEY, kid: str | None = "rsa", algorithm: str = "RS256", **claims: Any
    ) -> str:
        """A good token, but for what is said here; None leaves a claim out."""
        now = int(time.time())
        whole = {"iss": self.url, "sub": "alice", "aud": AUDIENCE, "exp": now + 600, **claims}
        present = {name: value for name, value in whole.items() if value is not None}
        headers = {} if kid is None else {"kid": kid}
        return jwt.encode(present, key, algorithm, headers=headers)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                await self._serve(reader, writer)
        finally:
            writer.close()
            self._connections.discard(task)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        path = (await reader.readuntil(b"\r\n\r\n")).split()[1].decode()
        self.asked.append(path)
        status, body = "404 Not Found", b"{}"
        if path == self.well_known:
            about = {"issuer": self.url, "jwks_uri": f"{self.base}/keys", **self.metadata}
            status, body = "200 OK", json.dumps(about).encode()
        elif path in ("/keys", "/elsewhere"):
            status, body = "200 OK", json.dumps({"keys": self.keys}).encode()
        match self.state:
            case "down":
                return
            case "slow":
                await asyncio.Event().wait()
            case "moved":
                status = "302 Found"
            case "broken":
                body = b"[" * 100_000
            case "huge":
                writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
                while True:
                    writer.write(b" " * 65_536)
                    await writer.drain()
            case "up":
                pass
        head = f"HTTP/1.1 {status}\r\nLocation: {self.base}/elsewhere\r\nConnection: close\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
