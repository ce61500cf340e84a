"""Two servers whose managers share their sessions: either answers any call."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest
from mcp import Client

from prodisco_sandbox import SandboxManagerConfig
from prodisco_sandbox._cluster.metadata import LABEL_OWNER, labels
from prodisco_sandbox.mcp._serve import add_probes
from prodisco_sandbox.testing import FakeCustomObjectsApi, FakeSandboxServer
from tests.support.mcp_server import ERAS, Manager, connect, make_server, over_http, refused, run
from tests.support.patience import PATIENCE, until

SECRET = "the same in all replicas"


@dataclass
class Pair:
    """Two servers on one cluster.

    Attributes:
        machines: The sandbox servers; new sandboxes are on the last one.
    """

    api: FakeCustomObjectsApi
    machines: list[FakeSandboxServer]
    managers: list[Manager]
    urls: list[str]

    @asynccontextmanager
    async def clients(self, era: str = "2026-07-28", token: str = "alice") -> AsyncIterator[list[Client]]:
        """One of each server."""
        async with AsyncExitStack() as stack:
            yield [await stack.enter_async_context(connect(url, era, token=token)) for url in self.urls]

    async def told(self, count: int) -> None:
        """Waits until both know so many sandboxes."""
        await until(lambda: all(manager.stats().known == count for manager in self.managers))


@asynccontextmanager
async def pair(*, unlisted: bool = False, **settings: Any) -> AsyncIterator[Pair]:
    """With `unlisted`, the API server gives no lists yet."""
    async with AsyncExitStack() as stack:
        machines = [await stack.enter_async_context(FakeSandboxServer())]
        api = await stack.enter_async_context(FakeCustomObjectsApi(auto_ready=True))
        if unlisted:
            api.faults.add("list", error=503, times=None)
        managers, urls = [], []
        for _ in range(2):
            config = SandboxManagerConfig(
                mode="multi",
                shared=True,
                instance_id="group",
                endpoint=lambda _: machines[-1].target,
                **{"max_sessions": 4, **settings},
            )
            manager = Manager(config, custom_objects_api=api)
            server, tools = make_server(manager, auth=True, handle_secret=SECRET)
            add_probes(server, tools)
            managers.append(manager)
            urls.append(await stack.enter_async_context(over_http(server, stateless_http=True)))
        yield Pair(api, machines, managers, urls)


@pytest.mark.parametrize("era", ERAS)
async def test_a_handle_leads_to_its_sandbox_from_either(era: str) -> None:
    async with pair() as p, p.clients(era) as (one, other):
        begun = await run(one, "1")
        assert "note" not in begun
        await p.told(1)
        for client in (other, one, other):
            again = await run(client, "2", sandbox=begun["sandbox"])
            assert again["sandbox"] == begun["sandbox"]
            assert "note" not in again, "it is the same machine"
        assert len(p.api.objects) == 1
        assert [manager.stats().created for manager in p.managers] == [1, 0]


async def test_a_replaced_machine_is_told_once_by_whoever_comes_first() -> None:
    async with pair() as p, p.clients() as (one, other):
        known = {"sandbox": (await run(one, "1"))["sandbox"]}
        await p.told(1)
        await run(other, "2", **known)
        async with FakeSandboxServer() as replacement:
            p.machines.append(replacement)
            p.api.delete_now(p.api.objects[0]["metadata"]["name"])
            await p.told(0)
            assert "new" in (await run(other, "3", **known))["note"]
            await p.told(1)
            for client in (one, other, one):
                assert "note" not in await run(client, "4", **known)
            for manager in p.managers:
                await manager.shutdown()


async def test_one_that_never_saw_the_old_machine_tells_of_the_new_one() -> None:
    async with pair() as p, p.clients() as (one, other):
        known = {"sandbox": (await run(one, "1"))["sandbox"]}
        await p.told(1)
        async with FakeSandboxServer() as replacement:
            p.machines.append(replacement)
            p.api.delete_now(p.api.objects[0]["metadata"]["name"])
            await p.told(0)
            assert "may be a new, empty sandbox" in (await run(other, "2", **known))["note"]
            await p.told(1)
            assert "note" not in await run(one, "3", **known)
            for manager in p.managers:
                await manager.shutdown()


async def test_a_principal_s_sandboxes_are_counted_over_both() -> None:
    async with pair() as p, p.clients() as (one, other), p.clients(token="bob") as (bobs, _):
        handles = [(await run(client, "1"))["sandbox"] for client in (one, other)]
        await p.told(2)
        alices = p.api.objects[0]["metadata"]["name"]
        for client in (one, other):
            assert "You have 2 sandboxes" in await refused(client, "2")
            for handle in handles:
                assert (await run(client, "3", sandbox=handle))["sandbox"] == handle
        assert "sandbox" in await run(bobs, "4")
        await p.told(3)
        owners = {labels(found)[LABEL_OWNER] for found in p.api.objects}
        assert len(owners) == 2
        assert not [owner for owner in owners if "alice" in owner or "bob" in owner]
        p.api.delete_now(alices)  # What is gone does not count.
        await p.told(2)
        assert "sandbox" in await run(other, "5")


async def test_it_is_not_ready_before_the_group_s_sandboxes_are_known() -> None:
    async with pair(unlisted=True) as p, httpx2.AsyncClient(timeout=PATIENCE, verify=False) as http:
        probe = p.urls[0].replace("/mcp", "/readyz")
        answer = await http.get(probe)
        assert (answer.status_code, answer.text) == (503, "starting\n")
        assert (await http.get(probe.replace("/readyz", "/healthz"))).status_code == 200
        p.api.faults.clear()

        async def is_ready() -> bool:
            return (await http.get(probe)).status_code == 200

        await until(is_ready)
