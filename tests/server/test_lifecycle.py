"""Starting, serving over every transport, draining, ending, leaving nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from prodisco_sandbox.proto import sandbox_pb2 as pb
from prodisco_sandbox.server import _confine
from prodisco_sandbox.server._app import Directories, serve
from prodisco_sandbox.server._options import OptionsError, parse
from prodisco_sandbox.server._removal import _flatten
from tests.support.nested import nest, removed_by_force
from tests.support.patience import PATIENCE, until
from tests.support.ports import free_ports
from tests.support.servers import Server, Stub, alive, code, running, tls_options

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
    async with asyncio.timeout(PATIENCE):
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


def check(env: dict[str, str]) -> int:
    command = [sys.executable, "-m", "prodisco_sandbox.server", "--check"]
    return subprocess.run(
        command, env={**os.environ, **env}, stderr=subprocess.DEVNULL, timeout=PATIENCE
    ).returncode


async def test_a_socket_whose_name_looks_percent_encoded(tmp_path: Path) -> None:
    path = tmp_path / "a%20b"
    with running(tmp_path, address=["--socket", str(path)]) as server:
        assert server.target == f"unix:{path}"
        assert path.is_socket()
        assert check({"SANDBOX_SOCKET_PATH": str(path)}) == 0


async def test_the_environment_of_the_default_pod_template(tmp_path: Path) -> None:
    (port,) = free_ports(1)
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
        assert check(env) == 0
    assert check(env) == 1


def client_credentials(paths: dict[str, Path], name: str | None) -> grpc.ChannelCredentials:
    if name is None:
        return grpc.ssl_channel_credentials(paths["ca"].read_bytes())
    return grpc.ssl_channel_credentials(
        paths["ca"].read_bytes(), paths[f"{name}.key"].read_bytes(), paths[f"{name}.crt"].read_bytes()
    )


async def test_mtls_wants_a_certificate_of_its_authority(
    tmp_path: Path, certificates: dict[str, Path]
) -> None:
    with running(tmp_path, *tls_options(certificates, "mtls"), address=TCP) as server:
        async with server.connect(client_credentials(certificates, "client")) as stub:
            source = f"import json, os; os.listdir('/'); print(1)\nopen({str(certificates['server.key'])!r})"
            answer = await stub.Execute(code(source))
            assert answer.output.startswith("1\n")
            if _confine.landlock_version():  # The key is the one file that it cannot read.
                assert answer.error.startswith("PermissionError")
        for credentials in (
            client_credentials(certificates, "foreign"),
            client_credentials(certificates, None),
            None,
        ):
            async with server.connect(credentials) as stub:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stub.HealthCheck(pb.HealthCheckRequest())
                assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


@pytest.mark.slow
async def test_tls(tmp_path: Path, certificates: dict[str, Path]) -> None:
    with running(tmp_path, *tls_options(certificates, "tls"), address=TCP) as server:
        async with server.connect(client_credentials(certificates, None)) as stub:
            assert (await stub.HealthCheck(pb.HealthCheckRequest())).healthy
        host, port = server.target.split(":")
        env = {"SANDBOX_TCP_HOST": host, "SANDBOX_TCP_PORT": port, "SANDBOX_TRANSPORT_MODE": "tls"}
        env |= {f"SANDBOX_TLS_{what}_PATH": str(certificates["server.crt"]) for what in ("CERT", "KEY")}
        assert check(env) == 0
    assert check(env) == 1


def test_a_wrong_setting_ends_it_with_status_2_and_a_sentence(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "prodisco_sandbox.server", "--cache-dir", str(tmp_path / "cache")],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, "SANDBOX_TRANSPORT_MODE": "TLS"},
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert "SANDBOX_TRANSPORT_MODE is 'TLS': use one of insecure, tls, mtls" in result.stderr
    assert "Traceback" not in result.stderr
    assert os.listdir(tmp_path) == []


async def test_signals_that_its_parent_blocks_do_reach_it(tmp_path: Path) -> None:
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, signal.SIGTERM})
    try:
        with running(tmp_path) as server:
            async with server.connect() as stub:
                assert (await stub.Execute(code("print(1)"), timeout=PATIENCE)).output == "1\n"
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@pytest.fixture
def directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Directories:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return Directories(parse(["--socket", str(tmp_path / "run" / "s"), "--cache-dir", str(tmp_path)], {}))


def test_what_is_nested_deeper_than_recursion_goes_is_removed(
    directories: Directories, tmp_path: Path
) -> None:
    with removed_by_force(directories.temporary.parent):
        nest(directories.workspace)
        directories.remove()
        assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [OSError("busy"), RecursionError("too deep")], ids=repr)
def test_what_cannot_be_removed_does_not_keep_the_rest(
    directories: Directories,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    rmtree = shutil.rmtree

    def refuse(path: Path) -> None:
        if path == directories.temporary:
            raise error
        rmtree(path)

    monkeypatch.setattr(shutil, "rmtree", refuse)
    directories.remove()
    assert f"could not remove all of {directories.temporary}: {error}" in caplog.text
    assert os.listdir(tmp_path) == []


async def test_drains_on_sigterm(tmp_path: Path) -> None:
    go_on = tmp_path / "go_on"
    source = f"""
import os, time
print("begun")
while not os.path.exists({str(go_on)!r}): time.sleep(0.01)
print("done")
"""
    unhurried = """
import sys
from prodisco_sandbox.server import __main__ as program, _app
_app._LINGER = 3600.0
sys.exit(program.main())
"""
    options = ["--grace-period", "3600", "--max-concurrent", "1"]
    with running(tmp_path, *options, command=(sys.executable, "-c", unhurried)) as server:
        async with server.connect() as stub:
            last = aiter(stub.ExecuteStream(code(source, timeout_ms=120_000)))
            assert (await anext(last)).output == "begun\n"
            queued = stub.Execute(code("print('never')"))
            await stub.HealthCheck(pb.HealthCheckRequest())
            server.process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(PATIENCE):
                while await health(server) == SERVING:
                    await asyncio.sleep(0.01)
            assert not (await stub.HealthCheck(pb.HealthCheckRequest())).healthy
            with pytest.raises(grpc.aio.AioRpcError, match="shutting down") as caught:
                await stub.Execute(code("print(1)"))
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
            assert (await queued).error == "the server is shutting down"
            go_on.touch()
            rest = [chunk async for chunk in last]
            assert "".join(chunk.output for chunk in rest) == "done\n"
            assert rest[-1].result.state == pb.EXECUTION_STATE_COMPLETED
            # There is time to read the last answer, but who asks twice does not wait for it.
            assert not (await stub.HealthCheck(pb.HealthCheckRequest())).healthy
            assert server.stop() == 0
        assert not (tmp_path / "run").exists()


async def test_kills_what_outlives_the_grace_period(tmp_path: Path) -> None:
    with running(tmp_path, "--grace-period", "0.6") as server:
        async with server.connect() as stub:
            execution, pids = await started_pids(stub, FAMILY + "time.sleep(1000)")
            ended = stub.GetExecution(pb.GetExecutionRequest(execution_id=execution, wait=True))
            began = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            assert (await ended).state == pb.EXECUTION_STATE_CANCELLED
            assert time.monotonic() - began > 0.5
        assert server.wait() == 0
        assert not any(map(alive, pids))
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("how", ["second signal", "end of input"])
async def test_ends_at_once(tmp_path: Path, how: str) -> None:
    with running(tmp_path, "--grace-period", "3600", "--exit-with-parent") as server:
        async with server.connect() as stub:
            _, pids = await started_pids(stub, FAMILY + "time.sleep(1000)")
            if how == "end of input":
                assert server.process.stdin is not None
                server.process.stdin.close()
            else:
                server.process.send_signal(signal.SIGINT)
                async with asyncio.timeout(PATIENCE):
                    while await health(server) == SERVING:
                        await asyncio.sleep(0.01)
                server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0  # Long before the grace period is over.
        assert not any(map(alive, pids))
        # Nothing that it made, the cache included: it was but a part of its parent.
        assert os.listdir(tmp_path) == ["log"]


async def test_ignored_signals_that_it_inherits(tmp_path: Path) -> None:
    background = ("/bin/sh", "-c", 'trap "" INT HUP; exec "$@"', "sh")
    command = (*background, sys.executable, "-m", "prodisco_sandbox.server")
    with running(tmp_path, command=command) as server:
        server.process.send_signal(signal.SIGHUP)
        async with server.connect() as stub:
            assert (await stub.Execute(code("print(1)"))).output == "1\n"
        assert server.stop(signal.SIGINT) == 0


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
        await call.done_writing()
        assert await call.code() == grpc.StatusCode.OK
    assert {"prodisco.sandbox.v1.SandboxService", "grpc.health.v1.Health"} <= names


async def test_messages_larger_than_the_default_limit(server: Server) -> None:
    async with server.connect() as stub:
        answer = await stub.Execute(code("#" + "y" * (5 << 20) + "\nprint(1)"))
        assert answer.output == "1\n"


# Directories that are in the way


def test_a_directory_that_cannot_be_made_is_named_and_leaves_none_behind(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "t").mkdir()
    done = start_in(tmp_path / "t", "--cache-dir", str(tmp_path / "file" / "x"))
    assert (done.returncode, done.stdout) == (2, "")
    assert "a directory cannot be made" in done.stderr
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path / "t") == []


def start_in(
    directory: Path, *options: str, wrapper: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """A server whose standard input is empty, until it ends."""
    command = [sys.executable, "-m", "prodisco_sandbox.server", "--socket", str(directory / "run" / "s")]
    return subprocess.run(
        [*wrapper, *command, *options],
        stdin=subprocess.DEVNULL,
        env={**os.environ, "TMPDIR": str(directory)},
        capture_output=True,
        text=True,
        timeout=30,
    )


@pytest.mark.parametrize("wrapper", [(), ("/bin/sh", "-c", 'exec "$@" <&-', "sh")], ids=["null", "closed"])
def test_an_input_that_has_ended_before_it_began_is_a_parent_that_is_gone(
    tmp_path: Path, wrapper: tuple[str, ...]
) -> None:
    cache = ("--cache-dir", str(tmp_path / "cache"))
    done = start_in(tmp_path, "--exit-with-parent", *cache, wrapper=wrapper)
    assert done.returncode == 0, done.stderr
    assert os.listdir(tmp_path) == []


def test_a_directory_that_another_server_makes_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir = Path.mkdir

    def quicker(self: Path, mode: int = 0o777) -> None:
        if self.name == "cache":
            mkdir(self)
        mkdir(self, mode)

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(Path, "mkdir", quicker)
    directories = Directories(
        parse(
            ["--socket", str(tmp_path / "s"), "--cache-dir", str(tmp_path / "cache"), "--exit-with-parent"],
            {},
        )
    )
    directories.remove()
    assert os.listdir(tmp_path) == ["cache"]


def test_one_that_stays_put_does_not_keep_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "stuck", "z"):
        (tmp_path / "top" / name / "inner").mkdir(parents=True)
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name in ("a", "stuck", "z") and self.name == first:
            raise OSError("busy")
        return rename(self, target)

    first = os.listdir(tmp_path / "top")[0]
    monkeypatch.setattr(Path, "rename", refuse)
    _flatten(tmp_path / "top")
    # The two others, their inner ones, and the one that stays put.
    assert len(os.listdir(tmp_path / "top")) == 5


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
async def test_a_locked_workspace_can_be_used_again(stub: Stub) -> None:
    assert (await stub.Execute(code("import os; os.chmod('.', 0)"))).success
    assert (await stub.Execute(code("open('x', 'w'); print('ok')"))).output == "ok\n"


async def test_nothing_stays_open_after_the_end(tmp_path: Path) -> None:
    def opened() -> list[str]:
        links = Path("/proc/self/fd").iterdir()
        return [found for link in links if (found := _target(link)).startswith(str(tmp_path))]

    (tmp_path / "socket").touch()
    options = parse(
        ["--workspace", f"{tmp_path}/w", "--cache-dir", f"{tmp_path}/c", "--socket", f"{tmp_path}/socket"]
    )
    with pytest.raises(OptionsError, match="not a socket"):
        await serve(options)
    assert opened() == []


def _target(link: Path) -> str:
    with contextlib.suppress(FileNotFoundError):  # The descriptor that lists them.
        return str(link.readlink())
    return ""
