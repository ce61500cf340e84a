"""Where all sandboxes are taken: who gets one, who loses one, what they are told; and closing one's own."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from mcp import Client
from mcp.server import MCPServer

from prodisco_sandbox import SandboxManager, SandboxManagerConfig
from prodisco_sandbox.mcp import add_sandbox_tools, sandbox_lifespan
from prodisco_sandbox.testing import NEVER, FakeSandboxServer
from tests.support.mcp_server import ERAS, call, connect, over_http, refused, rig, run
from tests.support.patience import PATIENCE

MODERN = "2026-07-28"
EVICTS: dict[str, Any] = {
    "max_sessions": 2,
    "when_full": "evict",
    "evict_after": 0.001,
    "capacity_timeout": PATIENCE,
}
SUSPENDS = {"on_idle": "suspend", "workspace_storage": "1Gi"}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {},
            ["This is a new sandbox", "closed (while you did not use it, others needed its place). Its"],
        ),
        (SUSPENDS, ["was suspended (while you did not use it, others needed", "were kept; other files"]),
    ],
)
async def test_conversations_that_are_over_make_room_and_whoever_comes_back_is_told_once(
    settings: dict[str, Any], told: list[str]
) -> None:
    async with rig(settings=EVICTS | settings) as r, Client(r.server, mode=MODERN) as client:
        handles = [(await run(client, ""))["sandbox"] for _ in range(3)]
        assert (r.manager.stats().evicted, r.manager.stats().ready) == (1, 2)
        back = await run(client, "", sandbox=handles[0])
        for text in told:
            assert text in back["note"]
        assert "note" not in await run(client, "", sandbox=handles[0])
        assert r.manager.stats().evicted == 2


async def test_a_flood_of_calls_without_a_handle_takes_nobodys_sandbox_who_has_come_back() -> None:
    async with rig(settings=EVICTS) as r, Client(r.server, mode=MODERN) as client:
        handle = (await run(client, ""))["sandbox"]
        await run(client, "", sandbox=handle)
        for _ in range(5):
            assert "note" not in await run(client, "")
        assert "note" not in await run(client, "", sandbox=handle)
        assert (r.manager.stats().evicted, r.manager.stats().created) == (4, 6)


async def test_a_principal_gives_up_its_own_sandbox_first() -> None:
    settings = {**EVICTS, "max_sessions": 3}
    async with (
        rig(settings=settings, auth=True, max_per_principal=3) as r,
        over_http(r.server) as url,
        connect(url, MODERN, token="bob") as bob,
        connect(url, MODERN, token="ann") as ann,
    ):
        his = (await run(bob, ""))["sandbox"]
        hers = [(await run(ann, ""))["sandbox"] for _ in range(2)]
        for handle in hers:
            await run(ann, "", sandbox=handle)
        await run(ann, "")
        assert "note" not in await run(ann, "", sandbox=hers[1])
        assert "others needed its place" in (await run(ann, "", sandbox=hers[0]))["note"]
        assert "note" not in await run(bob, "", sandbox=his)


async def test_a_principal_at_its_cap_gives_up_a_sandbox_that_it_does_not_use() -> None:
    settings = {**EVICTS, "max_sessions": 4}
    async with rig(settings=settings, principal=lambda ctx: "ann", max_per_principal=1) as r:
        async with Client(r.server, mode=MODERN) as client:
            handle = (await run(client, ""))["sandbox"]
            await run(client, "", sandbox=handle)
            await run(client, "")
            assert (r.manager.stats().evicted, r.manager.stats().ready) == (1, 1)
            r.sandbox.script("ExecuteTest", NEVER)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(lambda: call(client, "", mode="test", tests="x", sandbox=handle))
                await r.sandbox.wait_for_call("ExecuteTest")
                assert "You have 1 sandboxes" in await refused(client, "")
                tasks.cancel_scope.cancel()
        assert r.manager.stats().evicted == 2


@pytest.mark.parametrize("era", ERAS)
async def test_a_caller_may_close_its_sandbox(era: str) -> None:
    async with rig() as r, Client(r.server, mode=era) as client:
        known = {"sandbox": handle} if (handle := (await run(client, "")).get("sandbox")) else {}
        assert await run(client, mode="close", **known) == {
            "success": True,
            "note": "The sandbox is closed, and its files are gone.",
        }
        assert r.api.objects == []
        assert (await run(client, mode="close", **known))["success"], "again"
        assert "This is a new sandbox" in (await run(client, "", **known))["note"]
        assert r.manager.stats().created == 2


async def test_what_is_not_ones_own_is_not_closed() -> None:
    async with rig(auth=True) as r, over_http(r.server) as url:
        async with connect(url, MODERN, token="ann") as ann, connect(url, MODERN, token="bob") as bob:
            handle = (await run(ann, ""))["sandbox"]
            assert "There is no sandbox with this handle" in await refused(bob, mode="close", sandbox=handle)
            assert "needs `sandbox`" in await refused(bob, mode="close")
        assert len(r.api.objects) == 1


async def test_a_shared_sandbox_is_not_closed() -> None:
    async with FakeSandboxServer() as sandbox:
        manager = SandboxManager(SandboxManagerConfig(mode="single", single_target=sandbox.target))
        server = MCPServer("test", lifespan=sandbox_lifespan(manager))
        add_sandbox_tools(server, manager)
        async with Client(server, mode=MODERN) as client:
            assert "cannot be closed" in await refused(client, mode="close")
            await run(client, "")
