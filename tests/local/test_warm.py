"""LocalCluster(warm=N): servers started ahead, and the claims that take them over."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from prodisco_sandbox import SandboxManager
from prodisco_sandbox._cluster.claim import CLAIM
from prodisco_sandbox._cluster.grace import STARTING_SERVER
from prodisco_sandbox._cluster.manifest import SANDBOX
from prodisco_sandbox._cluster.metadata import session_hash
from prodisco_sandbox.errors import SandboxError, SandboxUnavailableError
from prodisco_sandbox.local import LocalCluster
from prodisco_sandbox.testing import FakeCustomObjectsApi
from tests.support.local import (
    STUB,
    condition,
    create,
    in_seconds,
    processes,
    reason,
    stub,
    traces,
    until_gone,
)
from tests.support.patience import PATIENCE, put_forward, until

Object = dict[str, Any]
AT = (CLAIM.group, "v1beta1", "prodisco", CLAIM.plural)
MEMBER = "agents.x-k8s.io/warm-pool-sandbox"


@contextlib.asynccontextmanager
async def managed(cluster: LocalCluster, **settings: Any) -> AsyncIterator[SandboxManager]:
    config = cluster.config(**{"ready_timeout": PATIENCE, **settings})
    async with cluster, SandboxManager(config, custom_objects_api=cluster.custom_objects_api) as manager:
        yield manager


def members(cluster: LocalCluster) -> list[str]:
    """The servers that are ready and nobody's."""
    return [
        sandbox["metadata"]["name"]
        for sandbox in cluster.custom_objects_api.objects
        if MEMBER in sandbox["metadata"]["labels"] and condition(sandbox).get("status") == "True"
    ]


async def warmed(cluster: LocalCluster, count: int) -> list[str]:
    await cluster.custom_objects_api.until(lambda: len(members(cluster)) == count, timeout=PATIENCE)
    return members(cluster)


async def claim(cluster: LocalCluster, name: str, **spec: Any) -> Object:
    body = CLAIM.body(cluster.config(warm_pool="any"), "v1beta1", name, session_hash(name))
    body["spec"] |= spec
    made: Object = await cluster.custom_objects_api.create_namespaced_custom_object(*AT, body)
    return made


async def bound(cluster: LocalCluster, name: str) -> str:
    """The name of the Sandbox of a claim, once that is ready."""
    api = cluster.custom_objects_api
    await api.until(lambda: condition(api.get(name)).get("status") == "True", timeout=PATIENCE)
    return str(api.get(name)["status"]["sandbox"]["name"])


def home(target: str | None) -> Path:
    """The directory of a server."""
    assert target is not None
    return Path(target.removeprefix("unix:")).parent


async def test_sessions_take_servers_that_were_started_ahead(tmp_path: Path) -> None:
    cluster = LocalCluster(directory=tmp_path, warm=1)
    async with managed(cluster) as manager:
        (name,) = await warmed(cluster, 1)
        server = home(cluster.endpoint(cluster.custom_objects_api.get(name)))
        one = await manager.get_client("one")
        assert home(one.target) == server
        assert (await one.execute("open('mine', 'w').write('x'); print(6 * 7)")).output == "42\n"
        assert await warmed(cluster, 1) != [name]
        two = await manager.get_client("two")
        assert (await two.execute("import os; print(os.listdir())")).output == "[]\n"
        assert (manager.stats().warm, manager.stats().cold) == (2, 0)
        # A server that was taken is gone with its session.
        await manager.on_session_closed("one")
        await until_gone(server)
        await warmed(cluster, 1)
        assert processes(cluster.directory)
    assert not cluster.custom_objects_api.claims
    assert traces(tmp_path) == []


async def test_more_sessions_than_servers(tmp_path: Path) -> None:
    cluster = LocalCluster(directory=tmp_path, warm=1)
    async with managed(cluster) as manager:
        await warmed(cluster, 1)
        clients = await asyncio.gather(*(manager.get_client(f"s{number}") for number in range(3)))
        assert len({client.target for client in clients}) == 3
        assert manager.stats().warm + manager.stats().cold == 3
        assert manager.stats().warm >= 1
    assert traces(tmp_path) == []


@pytest.mark.parametrize("by", ["session", pytest.param("sandbox", marks=pytest.mark.slow)])
async def test_a_server_that_is_killed_under_a_session(tmp_path: Path, by: str) -> None:
    cluster = LocalCluster(directory=tmp_path, warm=1)
    async with managed(cluster) as manager:
        await warmed(cluster, 1)
        old = await manager.get_client("session")
        name = manager.sandbox_name("session")
        cluster.kill(name if by == "session" else await bound(cluster, name))
        await until(lambda: manager.stats().lost == 1)
        new = await manager.get_client("session")
        assert new.target != old.target
        assert (await new.execute("print(6 * 7)")).output == "42\n"
    assert traces(tmp_path) == []


async def test_a_drained_server_is_replaced_in_the_same_sandbox(tmp_path: Path) -> None:
    async with LocalCluster(python=stub(tmp_path), warm=1) as cluster:
        await warmed(cluster, 1)
        made = await claim(cluster, "a")
        name, api = await bound(cluster, "a"), cluster.custom_objects_api
        before = cluster.endpoint(api.get("a"))
        cluster.delete_pod("a")
        await api.until(lambda: condition(api.get("a")).get("status") != "True", timeout=PATIENCE)
        assert await bound(cluster, "a") == name
        assert cluster.endpoint(api.get("a")) not in (None, before)
        assert cluster.endpoint(made) is None  # It names no Sandbox.


async def test_a_deleted_sandbox_is_replaced_without_a_word(tmp_path: Path) -> None:
    async with LocalCluster(python=stub(tmp_path), warm=1) as cluster:
        api = cluster.custom_objects_api
        await warmed(cluster, 1)
        await claim(cluster, "a")
        name = await bound(cluster, "a")
        server = home(cluster.endpoint(api.get("a")))
        await warmed(cluster, 1)
        api.delete_now(name)
        await api.until(lambda: api.get("a")["status"]["sandbox"]["name"] != name, timeout=PATIENCE)
        assert cluster.endpoint(api.get("a")) is not None
        await until_gone(server)


async def test_a_claim_without_a_server_that_is_ready_starts_its_own(tmp_path: Path) -> None:
    never = stub(tmp_path, "#!/bin/sh\nread -r _ && read -r _\n")
    async with LocalCluster(python=never, warm=1) as cluster:
        api = cluster.custom_objects_api
        await claim(cluster, "a")
        await api.until(lambda: (api.get("a") or {}).get("status"), timeout=PATIENCE)
        assert api.get("a")["status"]["sandbox"] == {"name": "a"}
        assert api.get("a", kind="Sandbox") is not None


async def test_a_claim_starts_its_own_server_without_warm_ones(tmp_path: Path) -> None:
    async with LocalCluster(python=stub(tmp_path)) as cluster:
        api = cluster.custom_objects_api
        await claim(cluster, "a")
        assert await bound(cluster, "a") == "a"
        server = home(cluster.endpoint(api.get("a")))
        await api.delete_namespaced_custom_object(*AT, "a")
        await until_gone(server)
        assert api.objects == []


async def test_an_expired_claim_goes_with_its_server(tmp_path: Path) -> None:
    async with LocalCluster(python=stub(tmp_path), warm=1) as cluster:
        api = cluster.custom_objects_api
        await warmed(cluster, 1)
        seen: list[Object] = []
        api.subscribe(lambda _, obj: seen.append(obj))
        await claim(cluster, "a", lifecycle={"shutdownTime": in_seconds(0.3), "shutdownPolicy": "Delete"})
        name = await bound(cluster, "a")
        server = home(cluster.endpoint(api.get("a")))
        await api.until(lambda: not api.claims and api.get(name) is None, timeout=PATIENCE)
        assert "ClaimExpired" in {reason(obj) for obj in seen if obj["kind"] == "SandboxClaim"}
        await until_gone(server)


async def test_a_warm_server_that_dies_is_replaced(tmp_path: Path) -> None:
    async with LocalCluster(python=stub(tmp_path), warm=2) as cluster:
        first, second = await warmed(cluster, 2)
        cluster.kill(first)
        await until(lambda: len(members(cluster)) == 2 and first not in members(cluster))
        assert second in members(cluster)


async def test_servers_that_never_start_are_not_tried_all_the_time(tmp_path: Path) -> None:
    async with LocalCluster(python=stub(tmp_path, "#!/bin/sh\nexit 1\n"), warm=1) as cluster:
        api, made = cluster.custom_objects_api, set[str]()
        api.subscribe(lambda kind, obj: made.add(obj["metadata"]["name"]))
        await api.until(lambda: len(made) == 2, timeout=PATIENCE)
        await claim(cluster, "a")  # While it pauses, claims are served.
        await api.until(lambda: reason(api.get("a")) == "PodFailed", timeout=PATIENCE)
        assert len(made - {"a"}) == 2


async def test_members_of_an_earlier_cluster_are_taken_over_or_away(tmp_path: Path) -> None:
    async with FakeCustomObjectsApi() as api:
        async with LocalCluster(custom_objects_api=api, python=stub(tmp_path), warm=2) as cluster:
            names = await warmed(cluster, 2)
        async with LocalCluster(custom_objects_api=api, python=stub(tmp_path), warm=1) as cluster:
            await api.until(lambda: len(api.objects) == 1, timeout=PATIENCE)
            assert {sandbox["metadata"]["name"] for sandbox in api.objects} < set(names)
        async with LocalCluster(custom_objects_api=api, python=stub(tmp_path)):
            await api.until(lambda: not api.objects, timeout=PATIENCE)


async def test_a_sandbox_whose_claim_is_gone_goes_too(tmp_path: Path) -> None:
    """As Kubernetes' garbage collector has it, which not every API server has."""
    async with LocalCluster(python=stub(tmp_path)) as cluster:
        api = cluster.custom_objects_api
        await create(cluster, "mine")
        owner = {"apiVersion": f"{CLAIM.group}/v1beta1", "kind": CLAIM.kind, "name": "gone", "uid": "u"}
        body = SANDBOX.body(cluster.config(), "v1beta1", "a", "session")
        body["metadata"]["ownerReferences"] = [{**owner, "controller": True}]
        await api.create_namespaced_custom_object("agents.x-k8s.io", "v1beta1", "prodisco", "sandboxes", body)
        await api.until(lambda: api.get("a") is None, timeout=PATIENCE)
        assert api.get("mine") is not None


async def test_a_quota_that_keeps_the_pool_small(tmp_path: Path) -> None:
    async with FakeCustomObjectsApi() as api:
        api.quota = 1
        async with LocalCluster(custom_objects_api=api, python=stub(tmp_path), warm=2) as cluster:
            await warmed(cluster, 1)
            for name in "ab":
                await claim(cluster, name)
            assert await bound(cluster, "a") != "a"
            await api.until(lambda: reason(api.get("b")) == "ReconcilerError", timeout=PATIENCE)
            assert "exceeded quota" in condition(api.get("b"))["message"]
            await api.delete_namespaced_custom_object(*AT, "a")
            await bound(cluster, "b")


async def test_claims_are_listed_where_they_cannot_be_watched(tmp_path: Path) -> None:
    async with FakeCustomObjectsApi() as api:
        api.forbid("watch")
        cluster = LocalCluster(custom_objects_api=api, python=stub(tmp_path), warm=1, poll_interval=0.05)
        async with cluster:
            (name,) = await warmed(cluster, 1)
            await claim(cluster, "a")
            assert await bound(cluster, "a") == name
            await api.delete_namespaced_custom_object(*AT, "a")
            await warmed(cluster, 1)
            assert api.get(name) is None


async def test_a_claim_that_may_not_be_written_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    async with LocalCluster(python=stub(tmp_path), warm=1) as cluster:
        api = cluster.custom_objects_api
        await warmed(cluster, 1)
        api.faults.add("patch", error=403, when=lambda request: request.plural == CLAIM.plural)
        await claim(cluster, "a")
        put_forward(monkeypatch, STARTING_SERVER)
        await until(lambda: "claim_abandoned" in caplog.text)
        await api.delete_namespaced_custom_object(*AT, "a")
        api.faults.clear()
        await claim(cluster, "b")
        assert await bound(cluster, "b") != "b"


async def test_a_dead_member_that_may_not_be_deleted_yet(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with LocalCluster(python=stub(tmp_path), warm=1) as cluster:
        api = cluster.custom_objects_api
        (name,) = await warmed(cluster, 1)
        api.forbid("delete")
        cluster.kill(name)
        await api.until(lambda: api.count("delete"), timeout=PATIENCE)
        put_forward(monkeypatch, STARTING_SERVER)
        await until(lambda: "task_failed" in caplog.text)
        api.allow()
        assert await warmed(cluster, 1) != [name]
        assert len(api.watches) == 2


async def test_an_api_server_without_the_extensions(tmp_path: Path) -> None:
    async with FakeCustomObjectsApi(extensions=False) as api:
        cluster = LocalCluster(custom_objects_api=api, directory=tmp_path)
        async with managed(cluster) as manager:
            assert (await (await manager.get_client("a")).execute("print(6 * 7)")).output == "42\n"
        cluster = LocalCluster(custom_objects_api=api, python=stub(tmp_path, STUB), warm=1)
        async with managed(cluster) as manager:
            with pytest.raises(SandboxUnavailableError, match=r"sandboxclaims.*install agent-sandbox"):
                await manager.get_client("a")
            assert api.objects == []


@pytest.mark.parametrize("warm", [-1, True, 1.5, "2", None])
def test_how_many_must_be_a_number(warm: Any) -> None:
    with pytest.raises(ValueError, match=r"warm is .*must be"):
        LocalCluster(warm=warm)


async def test_the_settings_name_the_pool() -> None:
    assert LocalCluster().config().warm_pool is None
    assert LocalCluster(warm=1).config().warm_pool == "local"
    with pytest.raises(SandboxError, match="has not been started"):
        LocalCluster(warm=1).endpoint({})
