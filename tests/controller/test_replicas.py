"""Replicas of the MCP program behind a proxy that gives each request to the next, on the real controller."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from _patience import until
from mcp import Client
from mcp_tool.support import ERAS, connect, run

from prodisco_sandbox.mcp import _texts as texts

from .replicas import Proxy, Replica
from .support import ControlledNamespace

pytestmark = [pytest.mark.controller, pytest.mark.slow, pytest.mark.unmeasured]

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
async def replicated(cluster: ControlledNamespace, directory: Path, *, warm: bool) -> AsyncIterator[Rig]:
    """Three replicas with the settings of deploy/overlays/mcp-server, on a warm pool or not."""
    environment = {
        "KUBECONFIG": str(cluster.server.directory / "admin.kubeconfig"),
        "TMPDIR": str(cluster.server.directory),  # Some are killed, and leave files.
        "SANDBOX_NAMESPACE": cluster.name,
        "SANDBOX_TCP_PORT": str(cluster.server.sandbox_port),
        "SANDBOX_SHARED": "true",
        "SANDBOX_INSTANCE_ID": "mcp-server",
        "SANDBOX_HANDLE_SECRET": secrets.token_hex(32),
    }
    if warm:
        environment["SANDBOX_WARM_POOL"] = "python"
        await cluster.make_pool(CLIENTS * len(ERAS))
    rig = Rig(directory, environment)
    async with rig.proxy.serving():
        try:
            await asyncio.gather(*(rig.add() for _ in range(3)))
            yield rig
        finally:
            for replica in rig.started:
                if replica.process.returncode is None:
                    await replica.kill()
            kinds = "sandboxwarmpools,sandboxclaims,sandboxes"
            await cluster.kubectl("delete", kinds, "--all", "--wait=false")


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


@pytest.mark.parametrize("warm", [False, True], ids=["sandboxes", "claims"])
async def test_replicas_come_and_go_under_their_clients(
    cluster: ControlledNamespace, tmp_path: Path, warm: bool
) -> None:
    async with replicated(cluster, tmp_path, warm=warm) as rig:
        rig.talks = [Talk(rig, number, ERAS[number % 2]) for number in range(CLIENTS * len(ERAS))]
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(disturb(rig), name="disturb")
            for number, talk in enumerate(rig.talks):
                tasks.create_task(talk.go_on(), name=f"client {number}")
        lost = [call for talk in rig.talks for call in talk.lost]
        print(f"{rig.answered} calls answered, {len(lost)} lost; {len(rig.started)} replicas in all")
        assert rig.answered >= CALLS
        assert [talk.notes for talk in rig.talks] == [[] for _ in rig.talks], "no sandbox was replaced"
        # A client whose first call was lost has lost the handle, too.
        unreachable = sum(call.endswith("-1") for call in lost)
        objects = await (cluster.claims() if warm else cluster.list())
        assert len(rig.talks) <= len(objects) <= len(rig.talks) + unreachable
        for replica in rig.started:
            assert replica.warnings() == []
