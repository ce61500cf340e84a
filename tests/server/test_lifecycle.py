"""Starting, serving over every transport, draining, ending, leaving nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc

from prodisco_sandbox.proto import sandbox_pb2 as pb

from .support import Server, Stub, alive, code, running, until

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
TCP = ["--host", "127.0.0.1", "--port", "0"]


async def health(server: Server, name: str = "") -> int:
    async with server.channel() as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        answer = await check(health_pb2.HealthCheckRequest(service=name))
        return int(answer.status)


async def started_pids(stub: Stub, source: str) -> tuple[str, list[int]]:
    """Starts code that prints process ids, and waits for these."""
    execution = (await stub.ExecuteAsync(code(source))).execution_id
    async with asyncio.timeout(10):
        while True:
            answer = await stub.GetExecution(pb.GetExecutionRequest(execution_id=execution))
            if answer.output.endswith("\n"):
                return execution, [int(pid) for pid in answer.output.split()]
            await asyncio.sleep(0.01)


FAMILY = """
import os, subprocess, time
child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
print(os.getpid(), child.pid)
"""


async def test_serves_a_private_socket_and_removes_all_it_made(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        path = tmp_path / "run" / "s"
        assert server.target == f"unix:{path}"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert await health(server) == SERVING
        assert await health(server, "prodisco.sandbox.v1.SandboxService") == SERVING
        async with server.connect() as stub:
            where = (await stub.Execute(code("import os; print(os.getcwd())"))).output.strip()
            assert stat.S_IMODE(Path(where).stat().st_mode) == 0o700
        assert server.stop() == 0
        assert not Path(where).exists()
        # The cache stays, for the next server.
        assert sorted(os.listdir(tmp_path)) == ["cache", "log"]


async def test_serves_tcp_on_a_free_port(tmp_path: Path) -> None:
    with running(tmp_path, address=TCP) as server:
        host, port = server.target.rsplit(":", 1)
        assert host == "127.0.0.1"
        assert int(port) > 0
        assert await health(server) == SERVING


async def test_the_environment_of_the_default_pod_template(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {
        "SANDBOX_USE_TCP": "true",
        "SANDBOX_TCP_HOST": "127.0.0.1",
        "SANDBOX_TCP_PORT": str(port),
        "SCRIPTS_CACHE_DIR": "/nowhere",  # an option beats the environment
        "SANDBOX_TRANSPORT_MODE": "insecure",
    }
    with running(tmp_path, address=[], env=env) as server:
        assert server.target == f"127.0.0.1:{port}"
        assert await health(server) == SERVING


def refused(tmp_path: Path, *options: str, env: dict[str, str] | None = None) -> str:
    """Starts a server that must refuse to start; returns what it says."""
    result = subprocess.run(
        [sys.executable, "-m", "prodisco_sandbox.server", "--cache-dir", str(tmp_path / "c"), *options],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=20,
        env={**os.environ, "TMPDIR": str(tmp_path), **(env or {})},
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr


async def test_a_live_socket_and_a_busy_port_are_refused(tmp_path: Path) -> None:
    with running(tmp_path / "a") as first:
        text = refused(tmp_path, "--socket", first.target.removeprefix("unix:"))
        assert "is in use by a live server" in text
        assert await health(first) == SERVING
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        text = refused(tmp_path, "--host", "127.0.0.1", "--port", str(listener.getsockname()[1]))
        assert "cannot listen on 127.0.0.1" in text


async def test_a_stale_socket_is_replaced_and_any_other_file_is_not(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with running(tmp_path, address=["--socket", str(path)]) as server:
        assert await health(server) == SERVING
    path.write_text("precious")
    assert "is not a socket" in refused(tmp_path, "--socket", str(path))
    assert path.read_text() == "precious"


def test_bad_sockets_are_refused(tmp_path: Path) -> None:
    assert "too long a path" in refused(tmp_path, "--socket", str(tmp_path / ("x" * 120)))
    public = tmp_path / "public"
    public.mkdir()
    public.chmod(0o777)
    assert "lets anyone replace the socket" in refused(tmp_path, "--socket", str(public / "s"))
    assert os.listdir(public) == []


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("certificates")
    authority, clients = trustme.CA(), trustme.CA()
    issued = {
        "server": authority.issue_cert("127.0.0.1", "localhost"),
        "client": clients.issue_cert("client@example.org"),
        "foreign": authority.issue_cert("foreign@example.org"),
    }
    paths = {"ca": directory / "ca.pem", "clients": directory / "clients.pem"}
    authority.cert_pem.write_to_path(str(paths["ca"]))
    clients.cert_pem.write_to_path(str(paths["clients"]))
    for name, cert in issued.items():
        paths[f"{name}.key"] = directory / f"{name}.key"
        paths[f"{name}.crt"] = directory / f"{name}.crt"
        cert.private_key_pem.write_to_path(str(paths[f"{name}.key"]))
        cert.cert_chain_pems[0].write_to_path(str(paths[f"{name}.crt"]))
    return paths


def client_credentials(paths: dict[str, Path], name: str | None) -> grpc.ChannelCredentials:
    if name is None:
        return grpc.ssl_channel_credentials(paths["ca"].read_bytes())
    return grpc.ssl_channel_credentials(
        paths["ca"].read_bytes(), paths[f"{name}.key"].read_bytes(), paths[f"{name}.crt"].read_bytes()
    )


def tls(paths: dict[str, Path], mode: str) -> list[str]:
    options = ["--tls-cert", str(paths["server.crt"]), "--tls-key", str(paths["server.key"])]
    if mode == "mtls":
        options += ["--tls-ca", str(paths["clients"])]
    return ["--transport-mode", mode, *options]


async def test_tls_hides_its_key_and_refuses_plaintext(tmp_path: Path, certificates: dict[str, Path]) -> None:
    with running(tmp_path, *tls(certificates, "tls"), address=TCP) as server:
        async with server.connect(client_credentials(certificates, None)) as stub:
            source = f"open({str(certificates['server.key'])!r}).read()"
            answer = await stub.Execute(code(source))
            if "Landlock" in server.log() and "no Landlock" not in server.log():
                assert "PermissionError" in answer.error
            answer = await stub.Execute(code("import json, os; os.listdir('/'); print(json.dumps(1))"))
            assert answer.output == "1\n"
        async with server.connect() as stub:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.HealthCheck(pb.HealthCheckRequest())
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_mtls_wants_a_certificate_of_its_authority(
    tmp_path: Path, certificates: dict[str, Path]
) -> None:
    with running(tmp_path, *tls(certificates, "mtls"), address=TCP) as server:
        async with server.connect(client_credentials(certificates, "client")) as stub:
            assert (await stub.HealthCheck(pb.HealthCheckRequest())).healthy
        for name in (None, "foreign"):
            async with server.connect(client_credentials(certificates, name)) as stub:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stub.HealthCheck(pb.HealthCheckRequest())
                assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


def test_bad_tls_is_refused_and_never_downgraded(tmp_path: Path, certificates: dict[str, Path]) -> None:
    junk = tmp_path / "junk.pem"
    junk.write_text("junk")
    crt, key = str(certificates["server.crt"]), str(certificates["server.key"])
    for options, text in (
        (["--tls-cert", str(junk), "--tls-key", key], "cannot be used"),
        (["--tls-cert", crt, "--tls-key", str(certificates["client.key"])], "cannot be used"),
        (["--tls-cert", crt], "--tls-key (SANDBOX_TLS_KEY_PATH) is not set"),
    ):
        assert text in refused(tmp_path, "--transport-mode", "tls", *TCP, *options)
    assert "use one of insecure, tls, mtls" in refused(tmp_path, env={"SANDBOX_TRANSPORT_MODE": "TLS"})


async def test_drains_on_sigterm_and_kills_at_the_bound(tmp_path: Path) -> None:
    with running(tmp_path, "--grace-period", "0.6", "--max-concurrent", "2") as server:
        async with server.connect() as stub:
            short = stub.Execute(code("import time; time.sleep(0.4); print('done')"))
            execution, pids = await started_pids(stub, FAMILY + "time.sleep(1000)")
            queued = stub.Execute(code("print('never')"))
            await stub.HealthCheck(pb.HealthCheckRequest())
            server.process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(5):
                while await health(server) == SERVING:
                    await asyncio.sleep(0.01)
            assert not (await stub.HealthCheck(pb.HealthCheckRequest())).healthy
            with pytest.raises(grpc.aio.AioRpcError, match="shutting down") as caught:
                await stub.Execute(code("print(1)"))
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
            ended = stub.GetExecution(pb.GetExecutionRequest(execution_id=execution, wait=True))
            assert (await queued).error == "the server is shutting down"
            assert (await short).output == "done\n"
            assert (await ended).state == pb.EXECUTION_STATE_CANCELLED
        assert server.wait() == 0
        assert not any(map(alive, pids))
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("how", ["second signal", "end of input"])
async def test_ends_at_once(tmp_path: Path, how: str) -> None:
    with running(tmp_path, "--grace-period", "60", "--exit-with-parent") as server:
        async with server.connect() as stub:
            _, pids = await started_pids(stub, FAMILY + "time.sleep(1000)")
            began = time.monotonic()
            if how == "end of input":
                assert server.process.stdin is not None
                server.process.stdin.close()
            else:
                server.process.send_signal(signal.SIGINT)
                async with asyncio.timeout(5):
                    while await health(server) == SERVING:
                        await asyncio.sleep(0.01)
                server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
        assert time.monotonic() - began < 3
        assert not any(map(alive, pids))
        # Nothing that it made, the cache included: it was but a part of its parent.
        assert os.listdir(tmp_path) == ["log"]


async def test_executions_die_with_a_killed_server(tmp_path: Path) -> None:
    server = Server(tmp_path)
    with contextlib.ExitStack() as stack:
        stack.callback(server.kill)
        async with server.connect() as stub:
            _, pids = await started_pids(stub, FAMILY + "time.sleep(1000)")
    await until(lambda: not any(map(alive, pids)))


async def test_reflection_names_the_services(server: Server) -> None:
    reflection = pytest.importorskip("grpc_reflection.v1alpha.reflection_pb2")
    stubs = pytest.importorskip("grpc_reflection.v1alpha.reflection_pb2_grpc")
    async with server.channel() as channel:
        call = stubs.ServerReflectionStub(channel).ServerReflectionInfo()
        await call.write(reflection.ServerReflectionRequest(list_services=""))
        names = {service.name for service in (await call.read()).list_services_response.service}
        call.cancel()
    assert {"prodisco.sandbox.v1.SandboxService", "grpc.health.v1.Health"} <= names


async def test_messages_larger_than_the_default_limit(server: Server) -> None:
    async with server.connect() as stub:
        answer = await stub.Execute(code("x = '" + "y" * (5 << 20) + "'\nprint(len(x))"))
        assert answer.output == f"{5 << 20}\n"
