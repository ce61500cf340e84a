"""Binding: what is refused, with which words. See test_lifecycle.py for what is served."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import grpc
import pytest

from prodisco_sandbox.server._app import CHANNEL_OPTIONS
from prodisco_sandbox.server._options import OptionsError, parse
from prodisco_sandbox.server._transport import bind, credentials
from tests.support.servers import Server, tls_options


async def refusal(*argv: str) -> str:
    server = grpc.aio.server(options=CHANNEL_OPTIONS)
    try:
        with pytest.raises(OptionsError) as caught:
            bind(server, parse(argv, {}))
    finally:
        await server.stop(None)
    return str(caught.value)


async def test_a_live_socket_is_refused(server: Server) -> None:
    assert "is in use by a live server" in await refusal("--socket", server.target.removeprefix("unix:"))
    async with server.channel() as channel:
        await channel.channel_ready()


async def test_a_busy_port_is_refused() -> None:
    # By a server like it: SO_REUSEPORT, gRPC's default, would have them share the port.
    server = grpc.aio.server(options=CHANNEL_OPTIONS)
    try:
        target = bind(server, parse(["--host", "127.0.0.1", "--port", "0"], {}))
        await server.start()
        refused = await refusal("--host", "127.0.0.1", "--port", target.rpartition(":")[2])
        assert f"cannot listen on {target}" in refused
    finally:
        await server.stop(None)


async def test_a_stale_socket_is_replaced_and_any_other_file_is_not(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    server = grpc.aio.server()
    umask = os.umask(0o022)
    try:
        assert bind(server, parse(["--socket", str(path)], {})) == f"unix:{path}"
        await server.start()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
        assert path.stat().st_mode & 0o777 == 0o600
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(umask)
        await server.stop(None)
    assert not path.exists()
    path.write_text("precious")
    assert "exists and is not a socket" in await refusal("--socket", str(path))
    assert path.read_text() == "precious"


async def test_bad_places_for_a_socket_are_refused(tmp_path: Path) -> None:
    assert "too long a path" in await refusal("--socket", str(tmp_path / ("x" * 120)))
    tmp_path.chmod(0o777)
    assert "lets anyone replace the socket" in await refusal("--socket", str(tmp_path / "s"))
    assert os.listdir(tmp_path) == []


def test_bad_certificates_are_refused_and_never_downgraded(
    tmp_path: Path, certificates: dict[str, Path]
) -> None:
    junk = tmp_path / "junk.pem"
    junk.write_text("junk")
    crt, key = str(certificates["server.crt"]), str(certificates["server.key"])
    mtls = [*tls_options(certificates, "mtls")[:-1], str(junk)]
    for options, text in (
        (["--transport-mode", "tls", "--tls-cert", str(junk), "--tls-key", key], "certificate"),
        (["--transport-mode", "tls", "--tls-cert", crt, "--tls-key", str(certificates["client.key"])], "key"),
        (mtls, "authorities"),
    ):
        with pytest.raises(OptionsError, match=rf"{text} .*cannot be used"):
            credentials(parse(options, {}))
    assert credentials(parse([], {})) is None
    assert credentials(parse(tls_options(certificates, "mtls"), {})) is not None
