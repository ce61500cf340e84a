"""Where a client connects to, and how it makes sure of whom it talks to."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import trustme

from prodisco_sandbox._targets import grpc_address
from prodisco_sandbox.client import SandboxClient
from prodisco_sandbox.config import TlsConfig
from prodisco_sandbox.errors import SandboxError, SandboxUnavailableError
from prodisco_sandbox.results import ExecutionResult
from prodisco_sandbox.testing import FakeSandboxServer
from tests.support.patience import PATIENCE, until

# Targets


@pytest.mark.parametrize(
    ("target", "address"),
    [
        ("localhost:50051", "dns:///localhost:50051"),
        ("sandbox-0a.prodisco.svc.cluster.local:1", "dns:///sandbox-0a.prodisco.svc.cluster.local:1"),
        ("host_name.:65535", "dns:///host_name.:65535"),
        ("dns:80", "dns:///dns:80"),
        ("10.0.0.7:50051", "dns:///10.0.0.7:50051"),
        ("[::1]:50051", "dns:///[::1]:50051"),
        ("unix:/run/sandbox.sock", "unix:/run/sandbox.sock"),
        ("unix:///run/sandbox.sock", "unix:/run/sandbox.sock"),
        ("unix:run/sandbox.sock", "unix:run/sandbox.sock"),
        ("unix:/run/a b%20#?.sock", "unix:/run/a%20b%2520%23%3F.sock"),
        ("unix:/" + 106 * "x", "unix:/" + 106 * "x"),
    ],
)
def test_a_target(target: str, address: str) -> None:
    assert grpc_address(target) == address
    assert SandboxClient(target).target == target


@pytest.mark.parametrize(
    "target",
    [
        "",
        "localhost",
        "localhost:",
        ":50051",
        "localhost:0",
        "localhost:65536",
        "localhost:http",
        "localhost:٣",
        "local host:1",
        "local/host:1",
        "-host:1",
        "host\n:1",
        "host:1\n",
        "http://localhost:1",
        "dns:///localhost:1",
        "::1:50051",
        "[::1]",
        "[fe80::1%eth0]:1",
        "[localhost]:1",
        "user@host:1",
        b"localhost:1",
        None,
        50051,
    ],
)
def test_what_is_no_target(target: Any) -> None:
    with pytest.raises(
        ValueError, match=r"^target is .*'host:port', '\[IPv6 address\]:port' or 'unix:PATH'"
    ) as caught:
        SandboxClient(target)
    assert repr(target) in str(caught.value)


@pytest.mark.parametrize("path", ["", "//host/a", "a\0b", "/" + 107 * "x", "/" + 54 * "é"])
def test_what_is_no_socket(path: str) -> None:
    with pytest.raises(
        ValueError, match=r"^target is .*: after 'unix:' comes the path of a socket, of at most 107"
    ):
        SandboxClient(f"unix:{path}")


@pytest.mark.parametrize("name", ["s.sock", "a b%20#?é.sock"])
async def test_a_unix_socket(tmp_path: Path, name: str) -> None:
    async with (
        FakeSandboxServer(socket_path=tmp_path / name) as server,
        SandboxClient(f"unix:{tmp_path / name}") as client,
    ):
        assert server.target == client.target
        assert (tmp_path / name).is_socket()
        assert await client.wait_for_healthy(PATIENCE)
        assert (await client.execute(code="x")).success
    assert not (tmp_path / name).exists()


# From the environment

CA = {"SANDBOX_TRANSPORT_MODE": "tls", "SANDBOX_TLS_CA_PATH": "/ca.pem"}
PAIR = {"SANDBOX_TLS_CLIENT_CERT_PATH": "/crt.pem", "SANDBOX_TLS_CLIENT_KEY_PATH": "/key.pem"}
UNIX = {"SANDBOX_SOCKET_PATH": "/s.sock"}


@pytest.mark.parametrize(
    ("environ", "options", "target"),
    [
        ({}, {}, "unix:/tmp/prodisco-sandbox.sock"),
        (UNIX, {}, "unix:/s.sock"),
        ({"SANDBOX_SOCKET_PATH": ""}, {}, "unix:/tmp/prodisco-sandbox.sock"),
        ({"SANDBOX_USE_TCP": "false", **UNIX}, {}, "unix:/s.sock"),
        (
            {"SANDBOX_USE_TCP": "0", "SANDBOX_TCP_HOST": "", "SANDBOX_TCP_PORT": "", **UNIX},
            {},
            "unix:/s.sock",
        ),
        ({"SANDBOX_USE_TCP": "true"}, {}, "localhost:50051"),
        ({"SANDBOX_USE_TCP": "1", **UNIX}, {}, "localhost:50051"),
        ({"SANDBOX_TCP_HOST": "10.0.0.1"}, {}, "10.0.0.1:50051"),
        ({"SANDBOX_TCP_HOST": "::1"}, {}, "[::1]:50051"),
        ({"SANDBOX_TCP_HOST": "[::1]"}, {}, "[::1]:50051"),
        ({"SANDBOX_TCP_PORT": "7", **UNIX}, {}, "localhost:7"),
        ({"SANDBOX_USE_TCP": "false", "SANDBOX_TCP_PORT": "7"}, {}, "localhost:7"),
        ({"SANDBOX_TCP_HOST": "h", "SANDBOX_TCP_PORT": "7"}, {}, "h:7"),
        # What is given beats the environment.
        (UNIX, {"tcp_host": "h"}, "h:50051"),
        (UNIX, {"tcp_port": 8}, "localhost:8"),
        ({"SANDBOX_TCP_HOST": "h", "SANDBOX_TCP_PORT": "7"}, {"tcp_port": 8}, "h:8"),
        ({"SANDBOX_TCP_HOST": "h", "SANDBOX_TCP_PORT": "7"}, {"tcp_host": "i"}, "i:7"),
        ({"SANDBOX_TCP_HOST": "?", "SANDBOX_TCP_PORT": "x"}, {"tcp_host": "i", "tcp_port": 9}, "i:9"),
        (
            {"SANDBOX_TCP_HOST": "h", "SANDBOX_TCP_PORT": "7", **UNIX},
            {"socket_path": "/o.sock"},
            "unix:/o.sock",
        ),
        ({"SANDBOX_USE_TCP": "1"}, {"socket_path": Path("/o.sock")}, "unix:/o.sock"),
    ],
)
def test_the_environment_names_the_target(
    environ: dict[str, str], options: dict[str, Any], target: str
) -> None:
    client = SandboxClient.from_env(environ, **options)
    assert client.target == target
    assert client._connection.channel.tls is None  # A client does not tell its certificates.


@pytest.mark.parametrize(
    ("environ", "options", "message"),
    [
        ({"SANDBOX_USE_TCP": "yes"}, {}, r"SANDBOX_USE_TCP is 'yes': it must be true, 1, false or 0"),
        ({"SANDBOX_TCP_PORT": "http"}, {}, r"SANDBOX_TCP_PORT is 'http'"),
        ({"SANDBOX_TCP_PORT": "65536"}, {}, r"SANDBOX_TCP_PORT is 65536"),
        (
            {"SANDBOX_TCP_HOST": "a b"},
            {},
            r"SANDBOX_TCP_HOST is 'a b': it must be a host name or an IP address",
        ),
        ({}, {"tcp_host": ""}, r"tcp_host is ''"),
        ({}, {"tcp_host": 7}, r"tcp_host is 7"),
        ({}, {"tcp_port": 0}, r"tcp_port is 0"),
        ({}, {"tcp_port": "7"}, r"tcp_port is '7'"),
        ({}, {"socket_path": ""}, r"target is 'unix:'"),
        ({}, {"socket_path": 5}, r"socket_path is 5: it must be the path of a Unix socket"),
        ({}, {"socket_path": "/s", "tcp_port": 7}, r"socket_path is given beside tcp_host or tcp_port"),
        ({"SANDBOX_TRANSPORT_MODE": "TLS"}, {}, r"SANDBOX_TRANSPORT_MODE is 'TLS'"),
        ({"SANDBOX_TRANSPORT_MODE": "mtls"}, {}, r"SANDBOX_TLS_CLIENT_CERT_PATH is not set"),
        ({}, {"call_timeout": -1}, r"call_timeout is -1"),
    ],
)
def test_a_wrong_environment_is_named(environ: dict[str, str], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        SandboxClient.from_env(environ, **options)


@pytest.mark.parametrize(
    ("environ", "options", "tls"),
    [
        (CA, {}, TlsConfig(ca="/ca.pem")),
        ({**CA, **PAIR}, {}, TlsConfig(ca="/ca.pem")),
        (
            {**CA, **PAIR, "SANDBOX_TRANSPORT_MODE": "mtls", "SANDBOX_TLS_SERVER_NAME": "sandbox"},
            {},
            TlsConfig(ca="/ca.pem", cert="/crt.pem", key="/key.pem", server_name="sandbox"),
        ),
        (CA, {"tls": None}, None),
        ({"SANDBOX_TRANSPORT_MODE": "TLS"}, {"tls": TlsConfig(ca="/other")}, TlsConfig(ca="/other")),
    ],
)
def test_the_environment_says_how_to_speak_tls(
    environ: dict[str, str], options: dict[str, Any], tls: TlsConfig | None
) -> None:
    # A client does not tell its certificates, and these files are not there.
    assert SandboxClient.from_env(environ, **options)._connection.channel.tls == tls


def test_the_environment_of_the_process_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SANDBOX_TCP_PORT", "7")
    assert SandboxClient.from_env().target == "localhost:7"


# TLS


class Certificates:
    """An authority and its certificates, as PEM files and bytes."""

    def __init__(self, directory: Path) -> None:
        self.authority = trustme.CA()
        self.stranger = trustme.CA()
        self.server = self.authority.issue_cert("localhost", "127.0.0.1", "sandbox.test")
        self.ca = directory / "ca.pem"
        self.authority.cert_pem.write_to_path(self.ca)
        self.strange_ca = directory / "strange-ca.pem"
        self.stranger.cert_pem.write_to_path(self.strange_ca)
        self.client = self._files(directory / "client", self.authority)
        self.strange_client = self._files(directory / "stranger", self.stranger)

    def _files(self, path: Path, authority: trustme.CA) -> dict[str, Any]:
        pair = authority.issue_cert("client.test")
        cert, key = path.with_suffix(".crt"), path.with_suffix(".key")
        cert.write_bytes(pair.cert_chain_pems[0].bytes())
        key.write_bytes(pair.private_key_pem.bytes())
        return {"cert": cert, "key": key}

    def serve(self, *, mutual: bool = False, **options: Any) -> FakeSandboxServer:
        return self.serve_as(self.server, mutual=mutual, **options)

    def serve_as(
        self, certificate: trustme.LeafCert, *, mutual: bool = False, **options: Any
    ) -> FakeSandboxServer:
        return FakeSandboxServer(
            certificate=certificate.cert_chain_pems[0].bytes(),
            private_key=certificate.private_key_pem.bytes(),
            client_ca=self.authority.cert_pem.bytes() if mutual else None,
            **options,
        )


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@contextlib.asynccontextmanager
async def talking(server: FakeSandboxServer, tls: TlsConfig | None) -> AsyncIterator[SandboxClient]:
    async with server, SandboxClient(server.target, tls=tls) as client:
        yield client


async def assert_refused(server: FakeSandboxServer, tls: TlsConfig | None) -> None:
    """Neither a call nor the health check gets through, not in the clear either."""
    async with talking(server, tls) as client:
        with pytest.raises(SandboxUnavailableError) as caught:
            await client.execute(code="x")
        assert caught.value.status == "UNAVAILABLE"
        with pytest.raises(SandboxUnavailableError):
            await anext(client.execute_stream(code="x"))
        assert await client.wait_for_healthy(0.05) is False
        assert server.calls == []


async def test_tls(certs: Certificates) -> None:
    async with talking(certs.serve(), TlsConfig(ca=certs.ca)) as client:
        assert await client.wait_for_healthy(PATIENCE)
        assert (await client.execute(code="x")).success
        assert [chunk.kind async for chunk in client.execute_stream(code="x")] == ["result"]


async def test_first_calls_at_once_share_a_channel(
    certs: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    make = grpc.aio.secure_channel

    def counted(*args: Any, **options: Any) -> Any:
        made.append(make(*args, **options))
        return made[-1]

    monkeypatch.setattr(grpc.aio, "secure_channel", counted)
    async with talking(certs.serve(), TlsConfig(ca=certs.ca)) as client:
        await asyncio.gather(*(client.execute(code="x") for _ in range(3)))
    assert len(made) == 1


async def test_tls_over_a_unix_socket(certs: Certificates, tmp_path: Path) -> None:
    # There is no host to verify: localhost stands in for it.
    server = certs.serve(socket_path=tmp_path / "s.sock")
    async with talking(server, TlsConfig(ca=str(certs.ca))) as client:
        assert (await client.execute(code="x")).success
    other = certs.authority.issue_cert("sandbox.test")
    await assert_refused(certs.serve_as(other, socket_path=tmp_path / "s.sock"), TlsConfig(ca=certs.ca))
    server = certs.serve_as(other, socket_path=tmp_path / "s.sock")
    async with talking(server, TlsConfig(ca=certs.ca, server_name="sandbox.test")) as client:
        assert (await client.execute(code="x")).success


async def test_mtls(certs: Certificates) -> None:
    async with talking(certs.serve(mutual=True), TlsConfig(ca=certs.ca, **certs.client)) as client:
        assert await client.wait_for_healthy(PATIENCE)
        assert (await client.execute(code="x")).success


async def test_a_server_name_is_verified_instead_of_the_host(certs: Certificates) -> None:
    other = certs.authority.issue_cert("sandbox.test")
    tls = TlsConfig(ca=certs.ca, server_name="sandbox.test")
    async with talking(certs.serve_as(other), tls) as client:
        assert (await client.execute(code="x")).success


async def test_a_certificate_for_another_name_is_refused(certs: Certificates) -> None:
    other = certs.authority.issue_cert("sandbox.test")
    await assert_refused(certs.serve_as(other), TlsConfig(ca=certs.ca))
    await assert_refused(certs.serve(), TlsConfig(ca=certs.ca, server_name="elsewhere.test"))


async def test_a_certificate_of_an_unknown_authority_is_refused(certs: Certificates) -> None:
    await assert_refused(certs.serve(), TlsConfig(ca=certs.strange_ca))
    await assert_refused(certs.serve(), TlsConfig())


async def test_an_expired_certificate_is_refused(certs: Certificates) -> None:
    past = dt.datetime(2001, 1, 1, tzinfo=dt.UTC)
    expired = certs.authority.issue_cert("127.0.0.1", not_after=past)
    await assert_refused(certs.serve_as(expired), TlsConfig(ca=certs.ca))


async def test_a_server_that_demands_a_certificate_refuses_who_has_none_or_a_strange_one(
    certs: Certificates,
) -> None:
    await assert_refused(certs.serve(mutual=True), TlsConfig(ca=certs.ca))
    await assert_refused(certs.serve(mutual=True), TlsConfig(ca=certs.ca, **certs.strange_client))


async def test_plaintext_and_tls_do_not_meet(certs: Certificates) -> None:
    await assert_refused(certs.serve(), None)
    await assert_refused(FakeSandboxServer(), TlsConfig(ca=certs.ca))


@pytest.mark.parametrize("name", ["ca", "cert", "key"])
@pytest.mark.parametrize("content", [None, b"no certificate"])
async def test_a_tls_file_that_cannot_be_read_is_named(
    certs: Certificates, tmp_path: Path, name: str, content: bytes | None
) -> None:
    path = tmp_path / "wrong.pem"
    if content is not None:
        path.write_bytes(content)
    tls = TlsConfig(**({"ca": certs.ca, **certs.client} | {name: path}))
    async with SandboxClient("localhost:1", tls=tls) as client:
        with pytest.raises(SandboxError, match=rf"^TlsConfig\.{name}: .*{path}") as caught:
            await client.execute(code="x")
        assert (type(caught.value), caught.value.status) == (SandboxError, None)
        # Waiting does not help.
        assert await client.wait_for_healthy(30) is False
        assert str(client.health_error) == str(caught.value)


async def test_a_key_of_another_certificate_is_refused(certs: Certificates) -> None:
    pair = {"cert": certs.client["cert"], "key": certs.strange_client["key"]}
    await assert_refused(certs.serve(mutual=True), TlsConfig(ca=certs.ca, **pair))


async def test_the_tls_files_are_read_once(certs: Certificates, tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    ca.write_bytes(certs.ca.read_bytes())
    server = certs.serve()
    server.script("Execute", ExecutionResult(True))
    async with talking(server, TlsConfig(ca=ca)) as client:
        assert (await client.execute(code="x")).success
        ca.unlink()
        await server.kill()
        waiting = asyncio.create_task(client.wait_for_healthy(PATIENCE))
        channel = client._connection.channel  # That a connection is made anew, no server tells.
        old = channel.grpc_channel
        await until(lambda: channel.grpc_channel not in (None, old))  # It is made anew.
        await server.start()
        assert await waiting
