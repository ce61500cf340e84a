"""A real server process, and ways to wait for what it does."""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest

from prodisco_sandbox.proto import sandbox_pb2 as pb
from prodisco_sandbox.proto import sandbox_pb2_grpc
from prodisco_sandbox.server import _confine, _tree
from prodisco_sandbox.server._cgroup import find_pids_cgroups
from prodisco_sandbox.server._options import MAX_TIMEOUT_MS
from tests.support.patience import PATIENCE

if TYPE_CHECKING:
    Stub = sandbox_pb2_grpc.SandboxServiceAsyncStub
else:
    Stub = sandbox_pb2_grpc.SandboxServiceStub

START_TIMEOUT = PATIENCE
END_TIMEOUT = PATIENCE


class Server:
    """``python -m prodisco_sandbox.server`` with everything of its own below one directory.

    With `zygote` it is there once it forks executions; else it starts an interpreter for each.
    """

    def __init__(
        self,
        directory: Path,
        *options: str,
        env: Mapping[str, str] | None = None,
        command: Sequence[str] = (sys.executable, "-m", "prodisco_sandbox.server"),
        address: Sequence[str] | None = None,
        zygote: bool = False,
        token: str = "",
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self._log = directory / "log"
        if address is None:
            address = ["--socket", str(directory / "run" / "s")]
        arguments = [*command, *address, "--cache-dir", str(directory / "cache"), *options]
        arguments += [] if zygote else ["--no-zygote"]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                arguments,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "TMPDIR": str(directory), **(env or {})},
            )
        try:
            if token:
                self.process.stdin.write(f"{token}\n".encode())  # type: ignore[union-attr]
                self.process.stdin.flush()  # type: ignore[union-attr]
            self.target = self._target()
            if zygote:
                self.wait_for_zygote()
        except BaseException:
            self.kill()
            raise

    def _target(self) -> str:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], START_TIMEOUT)
        line = self.process.stdout.readline().decode() if ready else ""
        if not line.startswith("listening on "):
            raise AssertionError(f"the server did not start: {line!r}, log: {self.log()}")
        return line.removeprefix("listening on ").strip()

    def wait_for_zygote(self, but: int | None = None) -> int:
        """The process that executions are forked from, which is not to be a certain one."""
        deadline = time.monotonic() + START_TIMEOUT
        while (pid := self.zygote) is None or pid == but:
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.02)
        return pid

    @property
    def zygote(self) -> int | None:
        """The process that executions are, or were last, forked from."""
        zygotes = self.zygotes
        return zygotes[-1] if zygotes else None

    @property
    def zygotes(self) -> list[int]:
        """All such processes, of earlier times too."""
        return [int(pid) for pid in re.findall(r"forked from process (\d+)", self.log())]

    def supervisors(self) -> dict[int, list[int]]:
        """The processes that supervise an execution, or wait for one, and the children of each."""
        table, zygotes = _tree.children_by_parent(), self.zygotes
        own = [pid for parent in (self.pid, *zygotes) for pid in table.get(parent, ())]
        return {
            pid: [c for c in table.get(pid, []) if not waits(c, pid)] for pid in own if pid not in zygotes
        }

    @property
    def pid(self) -> int:
        return self.process.pid

    def log(self) -> str:
        return self._log.read_text()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Sends a signal and returns the exit status."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        status = self.process.wait(END_TIMEOUT)
        self._close_pipes()
        return status

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(END_TIMEOUT)
        self._close_pipes()

    def _close_pipes(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    @contextlib.asynccontextmanager
    async def connect(
        self, credentials: grpc.ChannelCredentials | None = None, **options: str
    ) -> AsyncIterator[Stub]:
        async with self.channel(credentials, **options) as channel:
            yield Stub(channel)  # type: ignore[call-arg]

    def channel(self, credentials: grpc.ChannelCredentials | None = None, **options: str) -> grpc.aio.Channel:
        pairs = [
            ("grpc.max_receive_message_length", 64 << 20),
            ("grpc.max_send_message_length", 64 << 20),
            *((f"grpc.{name}", value) for name, value in options.items()),
        ]
        if credentials is None:
            return grpc.aio.insecure_channel(self.target, options=pairs)
        return grpc.aio.secure_channel(self.target, credentials, options=pairs)


@contextlib.contextmanager
def running(directory: Path, *options: str, **kind: object) -> Iterator[Server]:
    """A server, ended by SIGTERM; that it ends cleanly is part of every test."""
    server = Server(directory, *options, **kind)  # type: ignore[arg-type]
    try:
        yield server
    except BaseException:
        server.kill()
        raise
    if server.process.poll() is None:
        assert server.stop() == 0, server.log()
    else:
        server.wait()


def waits(child: int, supervisor: int) -> bool:
    """Whether a supervisor's child has no code yet: what runs code is in a session of its own."""
    try:
        return os.getsid(child) == supervisor
    except ProcessLookupError:
        return False


def alive(pid: int) -> bool:
    """Whether the process is there, a zombie counting as well."""
    return Path("/proc", str(pid)).exists()


def resident(pid: int) -> int:
    """Bytes of memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


def code(source: str, timeout_ms: int = MAX_TIMEOUT_MS) -> pb.ExecuteRequest:
    """Code, with more time than the server would give it: a busy machine needs it."""
    return pb.ExecuteRequest(code=source, timeout_ms=timeout_ms)


def with_tests(source: str, tests: str, timeout_ms: int = MAX_TIMEOUT_MS) -> pb.ExecuteTestRequest:
    return pb.ExecuteTestRequest(code=source, tests=tests, timeout_ms=timeout_ms)


def tls_options(paths: dict[str, Path], mode: str) -> list[str]:
    options = ["--tls-cert", str(paths["server.crt"]), "--tls-key", str(paths["server.key"])]
    if mode == "mtls":
        options += ["--tls-ca", str(paths["clients"])]
    return ["--transport-mode", mode, *options]


needs_bubblewrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")

needs_landlock = pytest.mark.skipif(
    _confine.landlock_version() < _confine.LANDLOCK_SCOPES,
    reason="this kernel's Landlock keeps no signals in",
)


def own_cgroups() -> str | None:
    """None where pids cgroups can be made, else why not."""
    try:
        find_pids_cgroups().remove()
    except OSError as error:
        return str(error)
    return None
