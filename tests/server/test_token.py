"""A server that demands a token, and directories that it hides from executions."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2

from prodisco_sandbox import SandboxClient, SandboxPermissionError
from prodisco_sandbox._targets import GuardedTarget
from prodisco_sandbox.proto import metadata as names
from prodisco_sandbox.proto import sandbox_pb2 as pb
from prodisco_sandbox.server import _check
from prodisco_sandbox.server._options import OptionsError, parse
from prodisco_sandbox.server._token import read_token
from tests.support.servers import END_TIMEOUT, Server, needs_landlock

TOKEN = "0123456789abcdef" * 4


@pytest.fixture(scope="module", params=["no-zygote", "zygote"])
def guarded(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Server]:
    base = tmp_path_factory.mktemp("guarded")
    options = [
        "--require-token",
        "--exit-with-parent",
        "--hide",
        str(base),
        "--workspace",
        str(base / "work"),
    ]
    server = Server(base / "s", *options, token=TOKEN, zygote=request.param == "zygote")
    try:
        yield server
    finally:
        server.process.stdin.close()  # type: ignore[union-attr]
        assert server.wait() == 0


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        ((names.TOKEN, ""),),
        ((names.TOKEN, TOKEN[:-1]),),
        ((names.TOKEN, TOKEN + "0"),),
        ((names.TOKEN, TOKEN), (names.TOKEN, "0")),
        (("prodisco-token-bin", TOKEN.encode()),),
    ],
)
async def test_every_method_is_refused_without_the_token(
    guarded: Server, metadata: tuple[tuple[str, str | bytes], ...]
) -> None:
    async with guarded.channel() as channel:
        methods = {
            "/prodisco.sandbox.v1.SandboxService/Execute": pb.ExecuteRequest(code="open('ran', 'w')"),
            "/prodisco.sandbox.v1.SandboxService/HealthCheck": pb.HealthCheckRequest(),
            "/prodisco.sandbox.v1.SandboxService/None": pb.HealthCheckRequest(),
            "/prodisco.files.v1.FileService/Read": pb.HealthCheckRequest(),
            "/grpc.health.v1.Health/Check": health_pb2.HealthCheckRequest(),
            "/grpc.health.v1.Health/Watch": health_pb2.HealthCheckRequest(),
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": pb.HealthCheckRequest(),
        }
        for path, request in methods.items():
            method = channel.unary_stream(path, lambda message: message.SerializeToString(), bytes)
            with pytest.raises(grpc.aio.AioRpcError) as refusal:
                [answer async for answer in method(request, metadata=metadata)]
            assert refusal.value.code() is grpc.StatusCode.UNAUTHENTICATED, path
            told = dict(iter(refusal.value.initial_metadata()))
            assert names.BOOT_ID not in told


async def test_a_client_of_a_guarded_target_is_served(guarded: Server) -> None:
    async with SandboxClient(GuardedTarget(guarded.target, TOKEN)) as client:
        assert (await client.health_check()).healthy
        assert (await client.execute(code="print(6 * 7)")).output == "42\n"
        stream = [chunk async for chunk in client.execute_stream(code="import os; print(os.listdir())")]
        assert stream[0].text == "[]\n"  # Nothing of what was refused has run.
        started = await client.execute_async(code="")
        await client.wait_for_execution(started.execution_id)
        assert not await client.files.list()
    async with SandboxClient(guarded.target) as client:
        with pytest.raises(SandboxPermissionError, match="lacks this server's token"):
            await client.execute(code="")


@needs_landlock
async def test_a_hidden_directory_shows_what_is_writable_only(guarded: Server) -> None:
    base = guarded.directory.parent
    (base / "secret").write_text("s3cret")
    source = f"""
import os
for path in ("{base}/secret", "{guarded.directory}/log", "{guarded.directory}/cache"):
    assert os.path.exists(path), path
    try: os.path.isdir(path) and os.listdir(path) or open(path)
    except PermissionError: print("refused")
for path in ("{base}", "{guarded.directory}"):
    try: os.listdir(path)
    except PermissionError: print("refused")
open("own", "w").write("x"); print(open("{base}/work/own").read()); os.unlink("own")
"""
    async with SandboxClient(GuardedTarget(guarded.target, TOKEN)) as client:
        result = await client.execute(code=source)
    assert result.output == "refused\n" * 5 + "x\n", result


@pytest.mark.parametrize("given", ["", "short\n", "0" * 64, "0" * 300 + "\n", "é" * 20 + "\n"])
def test_what_is_no_token_is_refused(given: str) -> None:
    reading, writing = os.pipe()
    try:
        os.write(writing, given.encode())
        os.close(writing)
        with pytest.raises(OptionsError, match="must begin with the token: a line of 16 to 256 ASCII"):
            read_token(reading)
    finally:
        os.close(reading)


def test_no_more_than_the_token_is_read() -> None:
    reading, writing = os.pipe()
    try:
        os.write(writing, f"{TOKEN}\nmore".encode())
        assert read_token(reading) == TOKEN.encode()
        assert os.read(reading, 9) == b"more"
    finally:
        os.close(reading)
        os.close(writing)


def test_a_server_without_its_token_does_not_start(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "prodisco_sandbox.server", "--require-token"]
    command += ["--socket", str(tmp_path / "s" / "s"), "--cache-dir", str(tmp_path / "c")]
    ended = subprocess.run(command, input=b"", capture_output=True, timeout=END_TIMEOUT, check=False)
    assert (ended.returncode, b"--require-token: standard input must begin" in ended.stderr) == (2, True)
    assert os.listdir(tmp_path) == []


def test_the_check_of_health_takes_the_token_too(guarded: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for options, given, problem in (
        ([], "", "UNAUTHENTICATED"),
        (["--require-token"], TOKEN, None),
        (["--require-token"], "0" * 64, "UNAUTHENTICATED"),
    ):
        monkeypatch.setattr(_check, "read_token", given.encode)
        told = _check.check(parse([*options, "--socket", guarded.target.removeprefix("unix:")], {}))
        assert told is None if problem is None else problem in str(told)
