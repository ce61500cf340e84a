"""Names that are taken, or still being given up."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from prodisco_sandbox import SandboxConflictError, SandboxManagerConfig
from prodisco_sandbox._cluster.manifest import SANDBOX
from tests.support.envtest import GROUP, MERGE_PATCH, PLURAL, Controller, Gate, Namespace, Object
from tests.support.patience import PATIENCE, until

pytestmark = pytest.mark.envtest


async def patch(namespace: Namespace, name: str, metadata: Object) -> Object:
    patched: Object = await namespace.api.patch_namespaced_custom_object(
        *(GROUP, namespace.version, namespace.name, PLURAL, name),
        {"metadata": metadata},
        _content_type=MERGE_PATCH,
    )
    return patched


async def foreign(namespace: Namespace, name: str) -> Object:
    """Makes a Sandbox that is no manager's."""
    config = SandboxManagerConfig(mode="multi", namespace=namespace.name)
    body = SANDBOX.body(config, namespace.version, name, "0" * 40)
    body["metadata"]["labels"] = {"app": "something-else"}
    made: Object = await namespace.api.create_namespaced_custom_object(
        GROUP, namespace.version, namespace.name, PLURAL, body
    )
    return made


async def test_a_name_that_is_still_being_deleted_is_left_alone(
    namespace: Namespace, controller: Controller
) -> None:
    async with namespace.managed(max_sessions=1) as manager:
        first = await manager.get_client("session")
        name = manager.sandbox_name("session")
        await patch(namespace, name, {"finalizers": ["example.org/slow"]})
        # Whoever closes it waits for no finalizer, and neither does its slot.
        await asyncio.wait_for(manager.on_session_closed("session"), PATIENCE)
        assert "deletionTimestamp" in (await namespace.get(name))["metadata"]
        second = await manager.get_client("session")
        assert manager.sandbox_name("session") == SANDBOX.name("session", 1) != name
        assert first.sandbox is not None
        assert second.sandbox is not None
        assert second.sandbox.incarnation == 1
        await patch(namespace, name, {"finalizers": []})
        await until(lambda: len(controller.seen) == 1, "the first one's end")
        assert await manager.get_client("session") is second
        assert manager.stats().lost == 0
    assert not await namespace.list()


async def test_a_name_that_is_somebody_elses_is_a_conflict(namespace: Namespace) -> None:
    other = await foreign(namespace, SANDBOX.name("session"))
    async with namespace.managed() as manager:
        with pytest.raises(SandboxConflictError, match=SANDBOX.name("session")):
            await manager.get_client("session")
    (left,) = await namespace.list()
    assert left["metadata"]["uid"] == other["metadata"]["uid"]


@pytest.mark.parametrize("ended_by", ["close", "shutdown", "lease"])
async def test_what_took_the_name_meanwhile_is_not_deleted(
    namespace: Namespace, controller: Controller, ended_by: str
) -> None:
    gate: Any = Gate(namespace.manager_api)
    async with namespace.managed(api=gate, lease_duration=2.0 if ended_by == "lease" else 600.0) as manager:
        await manager.get_client("session")
        name = manager.sandbox_name("session")
        gate.close()
        await namespace.delete(name)
        other = await foreign(namespace, name)
        if ended_by != "lease":  # A renewal hears of it whenever it comes.
            assert manager.stats().lost == 0, "it has not heard of that"
        if ended_by == "close":
            await manager.on_session_closed("session")
        elif ended_by == "lease":
            await until(lambda: manager.stats().lost == 1, "the renewal to meet another uid")
        await manager.shutdown()
    (left,) = await namespace.list()
    assert left["metadata"]["uid"] == other["metadata"]["uid"]
    assert "shutdownTime" not in left["spec"]
