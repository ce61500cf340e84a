"""Replicas of the MCP program behind a proxy that gives each request to the next, on the real controller."""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
from mcp import Client

from prodisco_sandbox.mcp import _texts as texts
from tests.support.controller import ControlledNamespace
from tests.support.mcp_server import ERAS, connect, run
from tests.support.patience import PATIENCE, until


class Replica:
    """`prodisco-sandbox-mcp` over HTTP.

    Attributes:
        clients: Who waits for its answers: the proxy's clients, by their numbers.
        arriving: How many requests the proxy is about to give to it.
        killed: Whether it was.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self.port = 0
        self.clients: list[int] = []
        self.arriving = 0
        self.killed = False

    async def start(self, environment: dict[str, str]) -> None:
        """Returns once /readyz says yes, as a Service waits for it."""
        with self._log.open("w") as log:
            self.process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "prodisco_sandbox.mcp", "--kubernetes", "--language", "Python"),
                *("--transport", "http", "--port", "0", "--drain-timeout", str(PATIENCE)),
                env=environment,
                stderr=log,
            )
        await until(self._has_begun, seconds=3 * PATIENCE)
        found = re.search(r"listening on http://127\.0\.0\.1:(\d+)/", self._log.read_text())
        assert found is not None, self._log.read_text()
        self.port = int(found[1])
        await until(self.is_ready)

    def _has_begun(self) -> bool:
        return self.process.returncode is not None or "listening on " in self._log.read_text()

    async def is_ready(self) -> bool:
        async with httpx2.AsyncClient(timeout=PATIENCE, verify=False) as http:
            return (await http.get(f"http://127.0.0.1:{self.port}/readyz")).status_code == 200

    async def stop(self) -> None:
        """SIGTERM, and its own end."""
        self.process.terminate()
        async with asyncio.timeout(PATIENCE):
            assert await self.process.wait() == 0, self._log.read_text()

    async def kill(self) -> None:
        self.killed = True
        self.process.kill()
        await self.process.wait()

    def warnings(self) -> list[str]:
        return re.findall(r"^.* (?:WARNING|ERROR) .*$", self._log.read_text(), re.MULTILINE)


class Proxy:
    """An HTTP proxy that gives each request to the next replica in turn.

    A replica that refuses the connection has seen nothing of the request: the next one gets it.
    A client says its number in the header ``X-Client``.

    Args:
        on_cut: Called with a client's number where a replica was killed that had a request of it.
    """

    def __init__(self, on_cut: Callable[[int], None]) -> None:
        self._on_cut = on_cut
        self.replicas: list[Replica] = []
        self.url = ""

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as exchanges:

            def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                exchanges.create_task(self._exchange(reader, writer), name="exchange")

            async with await asyncio.start_server(accept, "127.0.0.1", 0) as server:
                self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/mcp"
                yield

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request for each connection, so that the client's next one goes elsewhere."""
        async with AsyncExitStack() as stack:
            stack.push_async_callback(_closed, writer)
            stack.enter_context(contextlib.suppress(asyncio.IncompleteReadError, ConnectionError))
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"(?im)^content-length: *(\d+)", head)
            body = await reader.readexactly(int(length[1]) if length else 0)
            line, _, headers = head.partition(b"\r\n")
            headers = re.sub(rb"(?im)^connection:.*\r\n", b"", headers)
            number = re.search(rb"(?im)^x-client: *(\d+)", head)
            assert number is not None
            replica, answers, requests = await self._connect()
            replica.clients.append(int(number[1]))
            try:
                requests.write(line + b"\r\nConnection: close\r\n" + headers + body)
                copying = asyncio.create_task(self._copy(answers, writer), name="copying")
                leaving = asyncio.create_task(reader.read(1), name="leaving")
                await asyncio.wait({copying, leaving}, return_when=asyncio.FIRST_COMPLETED)
                for task in (copying, leaving):
                    task.cancel()
                await asyncio.gather(copying, leaving, return_exceptions=True)
            finally:
                replica.clients.remove(int(number[1]))
                await _closed(requests)
                if replica.killed:
                    self._on_cut(int(number[1]))

    async def _connect(self) -> tuple[Replica, asyncio.StreamReader, asyncio.StreamWriter]:
        self.replicas.append(self.replicas.pop(0))
        for replica in list(self.replicas):
            replica.arriving += 1
            try:
                return replica, *(await asyncio.open_connection("127.0.0.1", replica.port))
            except ConnectionRefusedError:
                pass
            finally:
                replica.arriving -= 1
        raise AssertionError("no replica is left")

    @staticmethod
    async def _copy(answers: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await answers.read(65_536):
            writer.write(data)
            await writer.drain()


async def _closed(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


CALLS = 200
"""How many calls there are in all, at least: all that is done to the replicas falls into them."""
ANOTHER = (texts.REPLACED, texts.RESTARTED, texts.MAYBE_REPLACED)
"""What a result says where the sandbox is not that of the last call, or may be another."""
CLIENTS = 2
"""How many clients of each generation of the protocol."""


@dataclass
class Rig:
    """Replicas that share their sessions, and what their clients have seen."""

    directory: Path
    environment: dict[str, str]
    started: list[Replica] = field(default_factory=list)
    talks: list[Talk] = field(default_factory=list)
    starting: int = 0
    answered: int = 0
    over: bool = False
    """Whether all that is done to the replicas is done."""

    def __post_init__(self) -> None:
        self.proxy = Proxy(self.on_cut)

    @property
    def alive(self) -> list[Replica]:
        return [replica for replica in self.proxy.replicas if replica.process.returncode is None]

    async def add(self) -> Replica:
        replica = Replica(self.directory / f"replica-{len(self.started)}.log")
        self.started.append(replica)
        self.starting += 1
        await replica.start(self.environment)
        self.starting -= 1
        self.proxy.replicas.append(replica)
        return replica

    async def stop(self, replica: Replica) -> None:
        """As Kubernetes does: it gets no more requests, and then SIGTERM."""
        self.proxy.replicas.remove(replica)
        await until(lambda: not replica.arriving)
        for _ in range(
            10
        ):  # What it was sent before, it has begun then: that is what preStop hooks wait for.
            await replica.is_ready()
        await replica.stop()

    async def kill(self, replica: Replica) -> None:
        """While it answers somebody. Nobody tells the proxy."""
        await until(lambda: replica.clients)
        await replica.kill()

    def on_cut(self, number: int) -> None:
        self.talks[number].cut = True

    async def until_answered(self, share: float) -> None:
        await until(lambda: self.answered >= share * CALLS)


@asynccontextmanager
async def replicated(environment: dict[str, str], directory: Path) -> AsyncIterator[Rig]:
    """Three replicas with the settings of deploy/overlays/mcp-server and those given."""
    shared = {
        "SANDBOX_SHARED": "true",
        "SANDBOX_INSTANCE_ID": "mcp-server",
        "SANDBOX_HANDLE_SECRET": secrets.token_hex(32),
    }
    rig = Rig(directory, shared | environment)
    async with rig.proxy.serving():
        try:
            await asyncio.gather(*(rig.add() for _ in range(3)))
            yield rig
        finally:
            for replica in rig.started:
                if replica.process.returncode is None:
                    await replica.kill()


async def disturb(rig: Rig) -> None:
    """Replicas are killed, added and stopped, and then all are replaced."""
    await rig.until_answered(0.1)
    await rig.kill(rig.alive[0])
    await rig.add()
    await rig.until_answered(0.3)
    await rig.stop(rig.alive[0])
    await rig.until_answered(0.4)
    await rig.kill(rig.alive[0])
    last = rig.alive
    await asyncio.gather(*(rig.add() for _ in range(3)))
    for replica in last:
        await rig.stop(replica)
    rig.over = True


class Talk:
    """A client that goes on with one sandbox, whichever replica answers.

    Attributes:
        cut: Whether a replica was killed that had a request of the client's last call.
        lost: The calls that failed for that.
        notes: What the results say of another sandbox.
    """

    def __init__(self, rig: Rig, number: int, era: str) -> None:
        self._rig, self._number, self._era = rig, number, era
        self._handle: dict[str, str] = {}
        self._count = 0
        self._kept: list[str] = []
        self._under_way: str | None = None
        self.cut = False
        self.lost: list[str] = []
        self.notes: list[str] = []

    async def go_on(self) -> None:
        while not self._is_over():
            self.cut = False
            try:
                async with connect(self._rig.proxy.url, self._era, X_Client=str(self._number)) as client:
                    while not self._is_over():
                        await self._call(client)
                        if self._rig.starting:  # Which takes much of the processor.
                            await asyncio.sleep(1.0)
            except* AssertionError:
                raise
            except* Exception:  # A request that was cut off ends the connection.
                if not self.cut:
                    raise
                if self._under_way is not None:
                    self.lost.append(self._under_way)
                    self._under_way = None

    def _is_over(self) -> bool:
        return self._rig.over and self._rig.answered >= CALLS

    async def _call(self, client: Client) -> None:
        self._count += 1
        self.cut, self._under_way = False, f"call {self._number}-{self._count}"
        result = await self._result(client, self._under_way)
        self._rig.answered += 1
        self._check(self._under_way, result)
        self._under_way = None

    async def _result(self, client: Client, call: str) -> dict[str, Any]:
        code = f"""
import time
with open("kept", "a") as file: file.write("{call}\\n")
time.sleep(0.5)
print(open("kept").read(), end="")
"""
        if self._count % 5:
            return await run(client, code, **self._handle)
        # The execution is started by one replica, and asked for at others.
        begun = await run(client, code, mode="async", **self._handle)
        self._handle = {"sandbox": begun["sandbox"]} if "sandbox" in begun else self._handle
        known = {"execution_id": begun["execution_id"], **self._handle}
        return await run(client, mode="status", wait=True, timeout_ms=60_000, **known)

    def _check(self, call: str, result: dict[str, Any]) -> None:
        if "sandbox" in result:
            self._handle = {"sandbox": result["sandbox"]}
        self.notes += [text for text in ANOTHER if text.partition(":")[0] in result.get("note", "")]
        written = result["output"].splitlines()
        assert written[-1] == call
        assert [each for each in written if each not in self.lost] == [*self._kept, call]
        self._kept.append(call)


async def come_and_go(rig: Rig) -> list[str]:
    """Two clients of each generation call while replicas are killed, stopped and added.

    Returns:
        The calls that were lost, each with its replica.
    """
    rig.talks = [Talk(rig, number, ERAS[number % 2]) for number in range(CLIENTS * len(ERAS))]
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(disturb(rig), name="disturb")
        for number, talk in enumerate(rig.talks):
            tasks.create_task(talk.go_on(), name=f"client {number}")
    lost = [call for talk in rig.talks for call in talk.lost]
    print(f"{rig.answered} calls answered, {len(lost)} lost; {len(rig.started)} replicas in all")
    assert rig.answered >= CALLS
    assert [talk.notes for talk in rig.talks] == [[] for _ in rig.talks], "no sandbox was replaced"
    for replica in rig.started:
        assert replica.warnings() == []
    return lost


pytestmark = [pytest.mark.controller, pytest.mark.slow, pytest.mark.unmeasured]


@pytest.mark.parametrize("warm", [False, True], ids=["sandboxes", "claims"])
async def test_replicas_come_and_go_under_their_clients(
    cluster: ControlledNamespace, tmp_path: Path, warm: bool
) -> None:
    environment = {
        "KUBECONFIG": str(cluster.server.directory / "admin.kubeconfig"),
        "TMPDIR": str(cluster.server.directory),  # Some are killed, and leave files.
        "SANDBOX_NAMESPACE": cluster.name,
        "SANDBOX_TCP_PORT": str(cluster.server.sandbox_port),
    }
    if warm:
        environment["SANDBOX_WARM_POOL"] = "python"
        await cluster.make_pool(CLIENTS * len(ERAS))
    try:
        async with replicated(environment, tmp_path) as rig:
            lost = await come_and_go(rig)
            # A client whose first call was lost has lost the handle, too.
            unreachable = sum(call.endswith("-1") for call in lost)
            objects = await (cluster.claims() if warm else cluster.list())
            assert len(rig.talks) <= len(objects) <= len(rig.talks) + unreachable
    finally:
        await cluster.kubectl("delete", "sandboxwarmpools,sandboxclaims,sandboxes", "--all", "--wait=false")
