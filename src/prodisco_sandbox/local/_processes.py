"""The cluster's side of the keeper: server processes, as an event loop sees them."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._log import get_logger
from .._targets import GuardedTarget
from ..errors import SandboxUnavailableError
from ._keeper import remove

log = get_logger("local")

START_TIMEOUT = 30.0
END_TIMEOUT = 15.0
KILLED = -int(signal.SIGKILL)

_FILE = Path(__file__).with_name("_keeper.py")
# Without running the packages' own code, whose imports would take half a second.
_BOOTSTRAP = """\
import importlib, os, sys
here = os.path.dirname(sys.argv[1])
for name, path in (("prodisco_sandbox", os.path.dirname(here)), ("prodisco_sandbox.local", here)):
    sys.modules[name] = type(sys)(name)
    sys.modules[name].__path__ = [path]
keeper = importlib.import_module("prodisco_sandbox.local._keeper")
sys.exit(keeper.main(*sys.argv[2:]))
"""


@dataclass(frozen=True, slots=True)
class Exit:
    """How a server ended.

    Attributes:
        status: Exit status; negative: the number of the signal that killed it.
        log: The end of its log.
    """

    status: int
    log: str

    def __str__(self) -> str:
        if self.status == KILLED:
            return "The server was killed with SIGKILL"  # Its log cannot say so.
        how = f"status {self.status}" if self.status >= 0 else f"signal {-self.status}"
        last = self.log.rpartition("\n")[2][:300]
        return f"The server ended with {how}" + (f": {last}" if last else "")


class ServerProcess:
    """One server.

    Attributes:
        directory: Its own; gone once it has ended.
        target: Where it serves, as a gRPC target, and the token that it demands; None before and after.
        exit: How it ended; None until nothing of it is left, neither process nor file.
    """

    def __init__(self, keeper: Keeper, key: str, directory: Path) -> None:
        self.directory = directory
        self.target: GuardedTarget | None = None
        self.exit: Exit | None = None
        self._keeper = keeper
        self._key = key
        self._token = os.urandom(32).hex()
        self._settled = asyncio.Event()
        self._ended = asyncio.Event()

    async def settled(self) -> None:
        """Returns when it serves or has ended. Safe to cancel."""
        await self._settled.wait()

    async def ended(self) -> Exit:
        """Returns when nothing of it is left. Safe to cancel."""
        await self._ended.wait()
        assert self.exit is not None  # noqa: S101
        return self.exit

    def start(self, argv: Sequence[str], env: Mapping[str, str], workspace: Path | None = None) -> None:
        """Starts it, in its directory, with standard error in ``server.log`` there. Once.

        Its token is the first line of its standard input.

        Args:
            argv: Program and arguments.
            env: Its environment.
            workspace: A `Keeper.new_workspace` to be there when it starts.
        """
        name = workspace and workspace.name
        self._keeper.send(
            do="start",
            server=self._key,
            argv=list(argv),
            env=dict(env),
            workspace=name,
            token=self._token,
        )

    def stop(self) -> None:
        """Asks it to end, and kills it if it does not. Idempotent."""
        self.target = None
        if self.exit is None:
            self._keeper.send(do="stop", server=self._key)

    def kill(self) -> None:
        """Kills it with SIGKILL."""
        if self.exit is None:
            self._keeper.send(do="kill", server=self._key)

    def on_first_line(self, line: str) -> None:
        prefix, _, target = line.partition("listening on ")
        if target and not prefix:
            self.target = GuardedTarget(target.strip(), self._token)
            self._settled.set()

    def on_end(self, status: int, text: str) -> None:
        self.target = None
        self.exit = Exit(status, text)
        self._settled.set()
        self._ended.set()


class Keeper:
    """The keeper process, and the servers that it keeps.

    Args:
        base: Where to make the cluster's directory.

    Attributes:
        root: The cluster's directory; None until it is made.
    """

    def __init__(self, base: Path) -> None:
        self.root: Path | None = None
        self._base = base
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()
        self._lost: str | None = None
        self._servers: dict[str, ServerProcess] = {}
        self._keys = map(str, itertools.count(1))
        self._workspaces = map("workspace-{}".format, itertools.count(1))
        self._ending = False

    async def start(self) -> None:
        """Starts it. `aclose` must follow, also if this fails or is cancelled.

        Raises:
            SandboxUnavailableError: It did not start.
        """
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self._spawn(theirs)
            reader, self._writer = await asyncio.open_unix_connection(sock=ours)
        except BaseException:
            ours.close()
            raise
        self._reading = asyncio.create_task(
            self._read(reader), name="local-keeper", context=contextvars.Context()
        )
        try:
            async with asyncio.timeout(START_TIMEOUT):
                await self._ready.wait()
        except TimeoutError as e:
            raise SandboxUnavailableError(f"the servers' keeper did not start in {START_TIMEOUT:g} s") from e
        if self.root is None:
            raise SandboxUnavailableError(f"the servers' keeper did not start: {self._lost}")

    def _spawn(self, control: socket.socket) -> None:
        # Not asyncio's: a cancellation while it starts a process may lose the process.
        try:
            self._process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-I", "-c", _BOOTSTRAP, str(_FILE), str(self._base), str(os.getpid())],
                stdin=control.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as e:
            raise SandboxUnavailableError(f"the servers' keeper cannot be started: {e}") from e

    def new(self) -> ServerProcess:
        """A server that is yet to be started."""
        assert self.root is not None  # noqa: S101
        key = next(self._keys)
        server = ServerProcess(self, key, self.root / key)
        if self._lost is None:
            self._servers[key] = server
        else:
            server.on_end(KILLED, self._lost)
        return server

    def new_workspace(self) -> Path:
        """A place for a workspace that outlives its servers; made when the first one starts."""
        assert self.root is not None  # noqa: S101
        return self.root / next(self._workspaces)

    def remove_workspace(self, workspace: Path) -> None:
        """Removes one that no server uses any more."""
        self.send(do="remove", workspace=workspace.name)

    def send(self, **order: object) -> None:
        if self._lost is None and self._writer is not None and not self._ending:
            self._writer.write(json.dumps(order).encode() + b"\n")

    async def _read(self, reader: asyncio.StreamReader) -> None:
        reason = "it ended without giving a reason"
        try:
            while line := await reader.readline():
                report = json.loads(line)
                if report["event"] == "broken":
                    reason = report["text"]
                else:
                    self._on_report(report)
        except OSError as e:
            reason = str(e)
        finally:
            self._lost = f"the process that keeps the servers is gone: {reason}"
            self._ready.set()
            for server in self._servers.values():
                server.on_end(KILLED, self._lost)
            self._servers.clear()
            if not self._ending:
                log.error("keeper_lost", reason=reason)

    def _on_report(self, report: dict[str, Any]) -> None:
        match report["event"]:
            case "ready":
                self.root = Path(report["root"])
                self._ready.set()
            case "first_line":
                self._servers[report["server"]].on_first_line(report["line"])
            case "ended":
                self._servers.pop(report["server"]).on_end(report["exit"], report["log"])
            case "left":
                log.error("left_behind", what=report["what"])

    async def aclose(self) -> None:
        """Ends all servers and the keeper, and removes all files. Idempotent; not to be cancelled."""
        self._ending = True
        if self._process is None:
            return
        if self._writer is not None:
            self._writer.write_eof()
        if self._reading is not None:
            await asyncio.wait({self._reading}, timeout=END_TIMEOUT)
        await asyncio.to_thread(self._reap, self._process)
        if self._reading is not None:
            await self._reading
        if self._writer is not None:
            self._writer.close()
            with contextlib.suppress(OSError):  # The keeper is gone; unsent orders do not matter.
                await self._writer.wait_closed()

    def _reap(self, process: subprocess.Popen[bytes]) -> None:
        try:
            process.wait(END_TIMEOUT)
        except subprocess.TimeoutExpired:
            log.error("keeper_stuck", pid=process.pid)  # noqa: TRY400 - the traceback says nothing more
            process.kill()
            process.wait()
        # It leaves files only if it was killed; its servers died with it.
        if self.root is not None and self.root.exists() and not remove(self.root):
            log.error("left_behind", what=f"files that cannot be removed, in {self.root}")
