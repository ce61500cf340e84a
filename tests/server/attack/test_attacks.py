"""Code that means harm, on a real server; each attack bounded in time and in size.

After every one the server must be healthy and nothing of the attack left.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from prodisco_sandbox.proto import sandbox_pb2 as pb
from prodisco_sandbox.server import _confine, _tree
from tests.support.patience import PATIENCE, until
from tests.support.servers import Server, Stub, alive, code, needs_landlock, own_cgroups, resident, running

pytestmark = pytest.mark.slow

MIB = 1 << 20
LIMITS = [
    *("--max-processes", "40", "--memory-limit-mb", "256", "--file-size-limit-mb", "64"),
    *("--workspace-limit-mb", "100", "--max-output", "100000", "--max-queued", "1000"),
]


@pytest.fixture(scope="module", params=[True, False], ids=["zygote", "no-zygote"])
def zygote(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, zygote: bool) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("attacked"), *LIMITS, zygote=zygote) as server:
        yield server


@pytest_asyncio.fixture
async def stub(server: Server) -> AsyncIterator[Stub]:
    async with server.connect() as stub:
        yield stub
        assert (await stub.HealthCheck(pb.HealthCheckRequest(), timeout=PATIENCE)).healthy
        # Spares aside, there is nothing below the server: supervisors without a child.
        await until(lambda: not any(server.supervisors().values()))
        await stub.Execute(code("import os, shutil\nfor n in os.listdir(): os.path.isdir(n) or os.unlink(n)"))


@pytest.mark.skipif(
    os.geteuid() == 0 and own_cgroups() is not None,
    reason="nothing bounds the processes of root without a pids cgroup",
)
@pytest.mark.parametrize("escape", ["pass", "os.setsid()"])
async def test_fork_bomb(server: Server, stub: Stub, escape: str) -> None:
    source = f"""
import os
while True:
    try:
        if os.fork() == 0:
            {escape}
    except OSError:
        pass
"""
    most = 0
    for timeout_ms in (2000, 10_000, 50_000):
        call = stub.Execute(code(source, timeout_ms), timeout=timeout_ms / 1000 + PATIENCE)
        while not call.done():
            most = max(most, len(_tree.descendants([server.pid])))
            await stub.HealthCheck(pb.HealthCheckRequest(), timeout=PATIENCE)
            await asyncio.sleep(0.1)
        assert (await call).error == f"timed out after {timeout_ms} ms"
        if most > 30:  # Else it had no time to grow.
            break
    # The server, spares, the supervisor, and 40 of the bomb; by user, room for error.
    assert 30 < most < (60 if own_cgroups() is None else 400)


async def test_memory(server: Server, stub: Stub) -> None:
    for source in (
        "x = bytearray(10**12)",
        "x = []\nwhile True: x.append(bytearray(10**7))",
        "x = 'a'\nwhile True: x += x",
    ):
        answer = await stub.Execute(code(source, timeout_ms=120_000))
        assert answer.error == "MemoryError"
    # A handler that goes on hoarding ends with its processes.
    answer = await stub.Execute(
        code("x = []\nwhile True:\n    try: x.append(bytearray(10**7))\n    except MemoryError: pass", 1000)
    )
    assert answer.error == "timed out after 1000 ms"


async def test_disk_fill_by_one_file(stub: Stub) -> None:
    source = "f = open('big', 'wb')\nwhile True: f.write(bytes(1 << 20))"
    answer = await stub.Execute(code(source, timeout_ms=120_000))
    assert answer.error.startswith("OSError: [Errno 27] File too large")
    size = await stub.Execute(code("import os; print(os.path.getsize('big'))"))
    assert int(size.output) == 64 * MIB


async def fill(stub: Stub, source: str) -> pb.ExecuteResponse:
    """Runs code that fills the disk; it must be stopped."""
    answer = await stub.Execute(code(source, timeout_ms=120_000))
    assert "--workspace-limit-mb is 100" in answer.error, answer
    return answer


# Slowly enough to see how soon it is noticed, rather than how fast the disk is, and how slow
# the server.
PACE = "time.sleep(0.1)"


async def test_disk_fill_by_many_files(server: Server, stub: Stub) -> None:
    await fill(
        stub,
        f"import time\nfor n in range(10**6):\n    open(f'f{{n}}', 'wb').write(bytes(5 << 20)); {PACE}",
    )
    used = await stub.Execute(code("import os; print(sum(os.path.getsize(n) for n in os.listdir()))"))
    assert 100 * MIB <= int(used.output) < 400 * MIB
    # It is full, but code that makes room can still run; what fills it further cannot.
    await fill(
        stub,
        f"import time\nfor n in range(10**6):\n    open(f'g{{n}}', 'wb').write(bytes(5 << 20)); {PACE}",
    )
    clean = "import os, time\nfor name in os.listdir(): os.unlink(name)\ntime.sleep(1)\nprint('ok')"
    assert (await stub.Execute(code(clean))).output == "ok\n"


async def test_disk_fill_by_files_without_a_name(stub: Stub) -> None:
    await fill(
        stub,
        f"""
import os, time
held = []
while True:
    held.append(open("x", "wb", buffering=0)); os.unlink("x"); held[-1].write(bytes(5 << 20)); {PACE}
""",
    )


async def test_disk_fill_by_empty_files(stub: Stub) -> None:
    await fill(stub, "n = 0\nwhile True:\n    n += 1; open(f'e{n}', 'w').close()")


@needs_landlock
async def test_disk_fill_elsewhere(stub: Stub) -> None:
    for directory in ("/tmp", "/var/tmp", "/dev/shm", "/root", "/run"):
        answer = await stub.Execute(code(f"open({directory + '/attack'!r}, 'w')"))
        # Semaphores need the one of them: it is the execution's own, or is emptied.
        assert "Error" in answer.error or directory == "/dev/shm"
        assert not Path(directory, "attack").exists()


async def test_a_gigabyte_of_output(server: Server, stub: Stub) -> None:
    before = resident(server.pid)
    answer = await stub.Execute(
        code("import os\nfor _ in range(1024): os.write(1, b'x' * (1 << 20))", timeout_ms=120_000)
    )
    assert answer.success
    assert len(answer.output) == 100_000 + len("\n[output cut: more than 100,000 characters]\n")
    assert resident(server.pid) - before < 100 * MIB


@pytest.mark.parametrize("descriptor", [1, 2])
async def test_endless_output_without_a_newline(server: Server, stub: Stub, descriptor: int) -> None:
    source = f"import os\nwhile True: os.write({descriptor}, b'\\xff' * 100_000)"

    async def read(call: Any) -> list[pb.ExecuteChunk]:
        return [chunk async for chunk in call]

    text, answers = "", 0
    for timeout_ms in (1500, 6000, 24_000):
        reading = asyncio.create_task(read(stub.ExecuteStream(code(source, timeout_ms))))
        while not reading.done():
            await stub.HealthCheck(pb.HealthCheckRequest(), timeout=PATIENCE)
            answers += not reading.done()
            await asyncio.sleep(0.05)
        chunks = await reading
        assert chunks[-1].result.state == pb.EXECUTION_STATE_TIMEOUT
        text = "".join(chunk.output + chunk.error_output for chunk in chunks)
        if "[output cut" in text and answers >= 5:
            break  # Else the machine is too slow to show it in that time.
    assert text.startswith("\ufffd" * 100_000)
    assert "[output cut" in text
    assert answers >= 5, "what is printed does not keep the server from answering"


@needs_landlock
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM])
async def test_signals_to_the_parents(server: Server, stub: Stub, number: signal.Signals) -> None:
    parent, group = "os.getppid()", "-os.getpgid(os.getppid())"
    targets = [parent, group, f"{server.pid}", f"-os.getpgid({server.pid})"]
    targets += [] if server.zygote is None else [f"{server.zygote}", f"-os.getpgid({server.zygote})"]
    for target in targets:
        answer = await stub.Execute(code(f"import os\nos.kill({target}, {number:d})"))
        assert answer.error.startswith("PermissionError"), (target, answer)
    assert server.process.poll() is None


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
async def test_a_workspace_that_resists_its_removal(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        async with server.connect() as stub:
            source = "import os; os.makedirs('a/b'); open('a/b/c', 'w'); os.chmod('a/b', 0); os.chmod('a', 0)"
            assert (await stub.Execute(code(source))).success
        assert server.stop() == 0
        assert sorted(os.listdir(tmp_path)) == ["cache", "log"]


async def test_the_servers_environment_and_files(tmp_path: Path, zygote: bool) -> None:
    with running(tmp_path, env={"SECRET": "s3cret-of-the-server"}, zygote=zygote) as server:
        async with server.connect() as stub:
            source = f"""
import os
for pid in ("{server.pid}", "{server.zygote or server.pid}", str(os.getppid()), "self"):
    for name in ("environ", "cmdline", "mem", "maps", "auxv"):
        try:
            with open(f"/proc/{{pid}}/{{name}}", "rb") as file:
                print(pid, name, file.read(100_000))
        except OSError as error:
            print(pid, name, type(error).__name__)
    for fd in range(100):
        try:
            print(open(f"/proc/{{pid}}/fd/{{fd}}", "rb", buffering=0).read(10) if pid != "self" else "")
        except OSError:
            pass
"""
            answer = await stub.Execute(code(source))
            assert "s3cret-of-the-server" not in answer.output
            if _confine.landlock_version() or os.geteuid() != 0:
                assert f"{server.pid} environ PermissionError" in answer.output
                assert f"{server.pid} mem PermissionError" in answer.output
                if zygote:
                    assert f"{server.zygote} environ PermissionError" in answer.output
                    assert f"{server.zygote} mem PermissionError" in answer.output


STUCK = "does not answer; killing it"
"""What the server says where a supervisor has not done its work."""


async def test_holding_on_after_the_timeout(server: Server, stub: Stub) -> None:
    source = """
import os, signal, subprocess, sys, threading, time
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
def daemon():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            while True: time.sleep(1)
        os._exit(0)
for _ in range(3): daemon()
subprocess.Popen(["sleep", "1000"], start_new_session=True)
stopped = subprocess.Popen(["sleep", "1000"]); stopped.send_signal(signal.SIGSTOP)
class Hold:
    def __del__(self):
        while True: pass
hold = Hold()
while True:
    try:
        while True: time.sleep(1)
    except BaseException: pass
"""
    stuck = server.log().count(STUCK)
    answer = await stub.Execute(code(source, timeout_ms=1000))
    assert answer.error == "timed out after 1000 ms"
    assert server.log().count(STUCK) == stuck, "its supervisor has ended it"


async def test_keeping_the_outputs_open_elsewhere(stub: Stub) -> None:
    """A pipe's end handed to another execution, over a socket, does not keep this one."""
    keeper = stub.ExecuteStream(
        code(
            """
import array, os, socket, time
server = socket.socket(socket.AF_UNIX); server.bind("keep"); server.listen()
print("ready")
connection = server.accept()[0]
connection.recvmsg(1, socket.CMSG_SPACE(4))
time.sleep(1000)
""",
            timeout_ms=120_000,
        )
    )
    assert (await anext(aiter(keeper))).output == "ready\n"
    answer = await stub.Execute(
        code(
            """
import array, socket
client = socket.socket(socket.AF_UNIX); client.connect("keep")
client.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [1]))])
print("given")
"""
        )
    )
    assert not keeper.done()
    keeper.cancel()
    assert answer.success
    assert answer.output == "given\n"


async def test_a_stopped_supervisor_does_not_hold_the_server(server: Server, stub: Stub) -> None:
    """As code could do it where Landlock does not keep signals inside."""
    chunks = aiter(stub.ExecuteStream(code("import os, time; print(os.getpid()); time.sleep(1000)")))
    first = await anext(chunks)
    pid = int(first.output)
    supervisor = next(parent for parent, children in server.supervisors().items() if pid in children)
    os.kill(supervisor, signal.SIGSTOP)
    stuck = server.log().count(STUCK)
    request = pb.CancelExecutionRequest(execution_id=first.execution_id)
    assert (await stub.CancelExecution(request, timeout=PATIENCE)).success
    assert server.log().count(STUCK) == stuck + 1
    assert not alive(pid)
    await until(lambda: not alive(supervisor))
    last = [chunk async for chunk in chunks][-1]
    assert last.result.state == pb.EXECUTION_STATE_CANCELLED


async def test_a_thousand_queued_executions(server: Server, stub: Stub) -> None:
    sleep = code("import time; time.sleep(1000)", timeout_ms=120_000)
    busy = [(await stub.ExecuteAsync(sleep)).execution_id for _ in range(8)]
    before = resident(server.pid)
    queued = [stub.ExecuteAsync(code(f"print({n})")) for n in range(1000)]
    ids = [(await call).execution_id for call in queued]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ExecuteAsync(code("print('one too many')"))
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (await stub.HealthCheck(pb.HealthCheckRequest(), timeout=PATIENCE)).healthy
    assert resident(server.pid) - before < 50 * MIB
    for execution_id in ids[10:]:
        await stub.CancelExecution(pb.CancelExecutionRequest(execution_id=execution_id))
    for execution_id in busy:
        await stub.CancelExecution(pb.CancelExecutionRequest(execution_id=execution_id))
    for number, execution_id in enumerate(ids[:10]):
        request = pb.GetExecutionRequest(execution_id=execution_id, wait=True)
        assert (await stub.GetExecution(request, timeout=PATIENCE)).output == f"{number}\n"


@pytest.mark.parametrize(
    "name", ["../../../etc/passwd", "/etc/passwd", "..", "a/b", "nul\0byte", "x" * 100_000, "é-0123456789ab"]
)
async def test_path_tricks_in_cache_names(stub: Stub, name: str) -> None:
    answer = await stub.Execute(pb.ExecuteRequest(cached=name))
    assert not answer.success
    assert answer.error.startswith("no cached script is named")


async def test_a_client_that_vanishes_in_the_middle_of_a_stream(server: Server, stub: Stub) -> None:
    client = subprocess.Popen(
        [
            sys.executable,
            "-c",
            """
import sys, grpc
from prodisco_sandbox.proto import sandbox_pb2 as pb, sandbox_pb2_grpc
stub = sandbox_pb2_grpc.SandboxServiceStub(grpc.insecure_channel(sys.argv[1]))
code = "import os, time; print(os.getpid()); time.sleep(1000)"
for chunk in stub.ExecuteStream(pb.ExecuteRequest(code=code, timeout_ms=120_000)):
    print(chunk.output, flush=True)
""",
            server.target,
        ],
        stdout=subprocess.PIPE,
    )
    try:
        assert client.stdout is not None
        line = await asyncio.wait_for(asyncio.to_thread(client.stdout.readline), PATIENCE)
        pid = int(line)
        assert alive(pid)
    finally:
        client.kill()
        client.wait()
        assert client.stdout is not None
        client.stdout.close()
    await until(lambda: not alive(pid))


async def test_garbage_on_the_port(tmp_path: Path) -> None:
    with running(tmp_path, address=["--host", "127.0.0.1", "--port", "0"]) as server:
        host, port = server.target.rsplit(":", 1)
        junk = [
            os.urandom(65536),
            b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + os.urandom(4096),
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff\xff\xff\x00\x00\x00\x00\x00\x01" + bytes(4096),
            b"",
        ]
        with contextlib.ExitStack() as stack:
            for data in junk * 20:
                connection = stack.enter_context(socket.create_connection((host, int(port)), PATIENCE))
                with contextlib.suppress(ConnectionError):
                    connection.sendall(data)
            async with server.channel() as channel:
                stub = Stub(channel)  # type: ignore[call-arg]
                assert (await stub.Execute(code("print(1)"), timeout=PATIENCE)).output == "1\n"
                method = channel.unary_unary(
                    "/prodisco.sandbox.v1.SandboxService/Execute", lambda junk: junk, lambda answer: answer
                )
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await method(b"\xff\xff\xff", timeout=PATIENCE)
                assert caught.value.code() == grpc.StatusCode.INTERNAL
