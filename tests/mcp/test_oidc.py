"""JWTs of an OIDC issuer: which are accepted, and what becomes of its keys."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Literal, Self

import jwt
import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from prodisco_sandbox.mcp import _oidc
from prodisco_sandbox.mcp._oidc import Issuer, TokenRefusedError, check_url
from tests.support.patience import PATIENCE, put_forward, until

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


@pytest_asyncio.fixture
async def fake() -> AsyncIterator[FakeIssuer]:
    async with FakeIssuer() as fake:
        yield fake


@pytest_asyncio.fixture
async def issuer(fake: FakeIssuer) -> AsyncIterator[Issuer]:
    issuer = Issuer(fake.url, AUDIENCE)
    yield issuer
    await issuer.aclose()


async def reason(issuer: Issuer, token: str) -> str:
    with pytest.raises(TokenRefusedError) as refusal:
        await issuer.verify(token)
    assert refusal.value.__cause__ is None
    return str(refusal.value)


def in_parts(header: object, payload: object = None, secret: bytes = b"") -> str:
    parts = [base64url(json.dumps(part).encode()) for part in (header, payload or {})]
    signature = hmac.digest(secret, ".".join(parts).encode(), "sha256") if secret else b""
    return ".".join([*parts, base64url(signature)])


def base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def signed_with_the_public_key(fake: FakeIssuer) -> str:
    """What a verifier accepts that lets the token choose HS256."""
    public = RSA_KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    claims = jwt.decode(fake.token(), options={"verify_signature": False})
    return in_parts({"alg": "HS256", "kid": "rsa"}, claims, public)


def forged(fake: FakeIssuer) -> str:
    """Header and signature of a good token around other claims."""
    header, _, signature = fake.token().split(".")
    return f"{header}.{fake.token(sub='root').split('.')[1]}.{signature}"


NOW = time.time()

REFUSED: dict[str, tuple[str, Callable[[FakeIssuer], str]]] = {
    "no JWT": ("malformed", lambda _: "a token that is no JWT"),
    "empty": ("malformed", lambda _: ""),
    "not ASCII": ("malformed", lambda _: "\N{OWL}.\N{OWL}.\N{OWL}"),
    "long": ("too long", lambda f: f.token(name="x" * _oidc.MAX_TOKEN)),
    "deep": ("malformed", lambda _: base64.urlsafe_b64encode(b"[" * 12_000).decode() + ".e30.e30"),
    "alg none": ("algorithm not allowed", lambda f: f.token(None, algorithm="none")),
    "alg None": ("algorithm not allowed", lambda _: in_parts({"alg": "None", "kid": "rsa"})),
    "alg missing": ("algorithm not allowed", lambda _: in_parts({"kid": "rsa"})),
    "alg a list": ("algorithm not allowed", lambda _: in_parts({"alg": ["RS256"], "kid": "rsa"})),
    "HS256": ("algorithm not allowed", signed_with_the_public_key),
    "kid a list": ("malformed", lambda _: in_parts({"alg": "RS256", "kid": ["rsa"]})),
    "crit": ("malformed", lambda _: in_parts({"alg": "RS256", "kid": "rsa", "crit": ["x"]})),
    "unknown key": ("unknown key", lambda f: f.token(kid="other")),
    "no kid": ("unknown key", lambda f: f.token(kid=None)),
    "other key": ("wrong signature", lambda f: f.token(OTHER_KEY)),
    "other claims": ("wrong signature", forged),
    "no signature": ("wrong signature", lambda f: f.token().rpartition(".")[0] + "."),
    "key of another kind": ("wrong kind of key", lambda f: f.token(kid="ec")),
    "key of another algorithm": ("wrong kind of key", lambda f: f.token(kid="rs512")),
    "short key": ("wrong kind of key", lambda f: f.token(SHORT_KEY, kid="short")),
    "symmetric key": ("unknown key", lambda f: f.token(kid="oct")),
    "key for encryption": ("unknown key", lambda f: f.token(kid="enc")),
    "expired": ("expired", lambda f: f.token(exp=NOW - 60)),
    "no exp": ("claim missing", lambda f: f.token(exp=None)),
    "exp infinite": ("malformed", lambda f: f.token(exp=float("inf"))),
    "exp a list": ("malformed", lambda f: f.token(exp=[])),
    "nbf": ("not valid yet", lambda f: f.token(nbf=NOW + 3600)),
    "iat": ("not valid yet", lambda f: f.token(iat=NOW + 3600)),
    "other audience": ("other audience", lambda f: f.token(aud="mail")),
    "other audiences": ("other audience", lambda f: f.token(aud=["mail", "chat"])),
    "no audience": ("claim missing", lambda f: f.token(aud=None)),
    "other issuer": ("other issuer", lambda f: f.token(iss="https://evil.example")),
    "issuer with a slash": ("other issuer", lambda f: f.token(iss=f.url + "/")),
    "no issuer": ("claim missing", lambda f: f.token(iss=None)),
    "no subject": ("claim missing", lambda f: f.token(sub=None)),
    "empty subject": ("claim missing", lambda f: f.token(sub="")),
}


@pytest.mark.filterwarnings("ignore::jwt.warnings.InsecureKeyLengthWarning")  # This test signs with one.
async def test_what_is_refused(fake: FakeIssuer, issuer: Issuer) -> None:
    fake.keys += [
        jwk(RSA_KEY, "rs512", alg="RS512"),
        jwk(SHORT_KEY, "short"),
        jwk(RSA_KEY, "enc", use="enc"),
        {"kty": "oct", "kid": "oct", "k": "c2VjcmV0"},
    ]
    for name, (text, make) in REFUSED.items():
        assert (name, await reason(issuer, make(fake))) == (name, text)
        await issuer.verify(fake.token())


async def test_keys_of_any_asymmetric_kind_are_good(fake: FakeIssuer, issuer: Issuer) -> None:
    for key, kid, algorithm in (
        (RSA_KEY, "rsa", "RS256"),
        (RSA_KEY, "rsa", "PS512"),
        (EC_KEY, "ec", "ES256"),
        (ED_KEY, "ed", "EdDSA"),
    ):
        assert await issuer.verify(fake.token(key, kid, algorithm)) == "alice"
    assert fake.asked == ["/.well-known/openid-configuration", "/keys"], "once for all"


async def test_clocks_may_differ_a_little(fake: FakeIssuer, issuer: Issuer) -> None:
    now = time.time()
    await issuer.verify(fake.token(exp=now - 5, nbf=now + 20, iat=now + 20, aud=["mail", AUDIENCE]))


async def test_a_key_set_without_ids_is_good(fake: FakeIssuer, issuer: Issuer) -> None:
    fake.keys = [jwk(RSA_KEY, None)]
    assert await issuer.verify(fake.token(kid=None)) == "alice"


@pytest.mark.parametrize(
    "well_known",
    ["/realm/.well-known/openid-configuration", "/.well-known/oauth-authorization-server/realm"],
)
async def test_metadata_are_found_in_both_places(well_known: str) -> None:
    async with FakeIssuer("/realm") as fake:
        fake.well_known = well_known
        issuer = Issuer(fake.url, AUDIENCE)
        assert await issuer.verify(fake.token()) == "alice"
        await issuer.aclose()


# Rotation


async def test_a_new_key_is_fetched_when_it_is_needed_but_not_too_often(
    fake: FakeIssuer, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    await issuer.verify(fake.token())
    fake.keys = [jwk(OTHER_KEY, "new")]
    asked = len(fake.asked)
    # Invented ids do not make it ask again and again.
    tokens = [fake.token(kid=f"invented-{number}") for number in range(20)]
    assert {await reason(issuer, token) for token in tokens} == {"unknown key"}
    assert len(fake.asked) == asked
    put_forward(monkeypatch, _oidc.FETCH_PAUSE + 1)
    # At once: one of them asks, and all get its answer.
    good = (issuer.verify(fake.token(OTHER_KEY, "new")) for _ in range(5))
    assert await asyncio.gather(*good) == ["alice"] * 5
    assert len(fake.asked) == asked + 2
    assert await reason(issuer, fake.token()) == "unknown key", "it was withdrawn"


async def test_a_withdrawn_key_is_dropped_in_time(
    fake: FakeIssuer, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    await issuer.verify(fake.token())
    fake.keys = [jwk(OTHER_KEY, "new")]
    put_forward(monkeypatch, _oidc.FRESH + 1)
    await issuer.verify(fake.token())  # It is fetched meanwhile.
    await until(lambda: "new" in issuer._keys)
    assert await reason(issuer, fake.token()) == "unknown key"


async def test_a_caller_that_leaves_does_not_take_the_keys_from_others(
    fake: FakeIssuer, issuer: Issuer
) -> None:
    fake.state = "slow"
    first = asyncio.create_task(issuer.verify(fake.token()))
    await until(lambda: fake.asked)
    second = asyncio.create_task(issuer.verify(fake.token()))
    fetch = issuer._fetch
    first.cancel()
    await asyncio.wait([first])
    assert issuer._fetch is fetch
    assert fetch is not None
    assert not fetch.done()
    second.cancel()
    await asyncio.wait([second])


# An issuer in trouble


@pytest.mark.parametrize("state", ["down", "slow", "huge", "moved", "broken"])
async def test_known_keys_outlast_an_issuer_in_trouble(
    fake: FakeIssuer,
    issuer: Issuer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    state: str,
) -> None:
    monkeypatch.setattr(_oidc, "FETCH_TIMEOUT", PATIENCE)
    await issuer.verify(fake.token())
    fake.state = state  # type: ignore[assignment]
    if state == "slow":
        monkeypatch.setattr(_oidc, "FETCH_TIMEOUT", 0.5)
    put_forward(monkeypatch, _oidc.FRESH + 1)
    assert await issuer.verify(fake.token()) == "alice"
    assert issuer._fetch is not None
    assert not issuer._fetch.done(), "nobody waits for it"
    await issuer._fetch
    assert "oidc_keys_failed" in caplog.text
    assert await issuer.verify(fake.token()) == "alice"
    assert await reason(issuer, fake.token(kid="new")) == "unknown key"
    assert "/elsewhere" not in fake.asked
    put_forward(monkeypatch, _oidc.STALE)
    assert await reason(issuer, fake.token()) == "no keys of the issuer"
    fake.state = "up"
    monkeypatch.setattr(_oidc, "FETCH_TIMEOUT", PATIENCE)
    put_forward(monkeypatch, _oidc.FETCH_PAUSE + 1)
    assert await issuer.verify(fake.token()) == "alice"


@pytest.mark.parametrize(
    ("metadata", "keys", "text"),
    [
        ({"issuer": "https://evil.example"}, None, "is that of another issuer"),
        ({"jwks_uri": None}, None, "jwks_uri is 'None'"),
        ({"jwks_uri": "http://evil.example/keys"}, None, "give an https URL"),
        ({"jwks_uri": "file:///etc/passwd"}, None, "give an https URL"),
        ({}, [], "has no usable key"),
        ({}, [1, {"kty": "oct"}, {"kty": "RSA", "kid": []}], "has no usable key"),
    ],
)
async def test_keys_of_wrong_metadata_are_not_used(
    fake: FakeIssuer,
    issuer: Issuer,
    caplog: pytest.LogCaptureFixture,
    metadata: dict[str, object],
    keys: list[dict[str, object]] | None,
    text: str,
) -> None:
    fake.metadata = metadata
    fake.keys = fake.keys if keys is None else keys
    assert await reason(issuer, fake.token()) == "no keys of the issuer"
    assert text in caplog.text


async def test_a_key_that_is_none_costs_only_itself(fake: FakeIssuer, issuer: Issuer) -> None:
    fake.keys.append({"kty": "RSA", "kid": "bad", "n": "!", "e": 1})
    assert await reason(issuer, fake.token(kid="bad")) in ("malformed", "wrong kind of key")
    assert await issuer.verify(fake.token()) == "alice"


@pytest.mark.parametrize(
    ("url", "right"),
    [
        ("https://login.example.com", True),
        ("https://login.example.com:8443/realm/", True),
        ("http://127.0.0.1:1", True),
        ("http://[::1]/realm", True),
        ("http://localhost", True),
        ("http://login.example.com", False),
        ("http://10.0.0.1", False),
        ("login.example.com", False),
        ("ftp://login.example.com", False),
        ("https://", False),
        ("https://ann:secret@login.example.com", False),
        ("https://login.example.com?realm=1", False),
        ("https://login.example.com#here", False),
        ("https://login.example.com:many", False),
        ("https://[::1", False),
    ],
)
def test_what_url_an_issuer_may_have(url: str, right: bool) -> None:
    if right:
        check_url("--oidc-issuer", url)
        return
    with pytest.raises(ValueError, match=r"^--oidc-issuer is '.*': give an https URL"):
        check_url("--oidc-issuer", url)


def test_the_algorithms_are_asymmetric() -> None:
    assert {type(jwt.get_algorithm_by_name(name)).__name__ for name in _oidc.ALGORITHMS} == {
        "RSAAlgorithm",
        "RSAPSSAlgorithm",
        "ECAlgorithm",
        "OKPAlgorithm",
    }
