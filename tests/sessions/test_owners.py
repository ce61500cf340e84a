"""Whose session it is, as far as callers say."""

from __future__ import annotations

from typing import Any

import pytest

from prodisco_sandbox import SandboxClient, SandboxManager, SandboxManagerConfig
from tests.support.managers import LoopTimeApi, managed

pytestmark = pytest.mark.looptime


def owner(manager: SandboxManager, session_id: str) -> str | None:
    """Nothing tells whose a session is: it only decides who is evicted."""
    assert manager._engine is not None
    return manager._engine.table.current[session_id].owner


@pytest.mark.parametrize("ready", [False, True])
async def test_the_first_owner_that_is_given_stays(ready: bool) -> None:
    async with LoopTimeApi(auto_ready=1.0) as api, managed(api) as manager:
        if ready:
            await manager.get_client("a")
            assert owner(manager, "a") is None
        async with manager.session("a", owner="first"):
            assert owner(manager, "a") == "first"
        await manager.get_client("a", owner="second")
        async with manager.session("a", owner="second"):
            await manager.on_session_initialized("a", owner="third")
            assert owner(manager, "a") == "first"
        await manager.on_session_initialized("b", owner="first")
        assert owner(manager, "b") == "first"
        await manager.on_session_closed("a")
        await manager.get_client("a", owner="second")
        assert owner(manager, "a") == "second"
        assert "second" not in repr(manager._engine.table.current["a"])  # type: ignore[union-attr]


@pytest.mark.parametrize("wrong", ["", 7, b"owner"])
@pytest.mark.parametrize("ready", [False, True])
async def test_an_owner_is_a_text(wrong: Any, ready: bool) -> None:
    async with LoopTimeApi(auto_ready=1.0) as api, managed(api) as manager:
        if ready:
            await manager.get_client("a")
        with pytest.raises(ValueError, match=r"owner is .* non-empty str"):
            await manager.get_client("a", owner=wrong)
        with pytest.raises(ValueError, match="owner is"):
            async with manager.session("a", owner=wrong):
                raise AssertionError("it was entered")
        with pytest.raises(ValueError, match="owner is"):
            await manager.on_session_initialized("a", owner=wrong)
        assert manager.has_session("a") == ready


async def test_in_single_mode_owners_change_nothing() -> None:
    client = SandboxClient("localhost:1")
    async with SandboxManager(SandboxManagerConfig(mode="single", single_client=client)) as manager:
        assert await manager.get_client("a", owner="me") is client
        async with manager.session(owner="me") as same:
            assert same is client
        await manager.on_session_initialized(owner="me")
