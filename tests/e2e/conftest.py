"""The cluster that E2E_KUBECONFIG names, and a session id that no other test has had."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.support.patience import until
from tests.support.pods import GONE, Pods, administered


@pytest.fixture(scope="session")
def _nothing_left() -> Iterator[None]:
    """Pods outlive their sessions by some seconds, which no single test waits for."""
    yield

    async def wait() -> None:
        async with administered() as pods:

            async def none_left() -> bool:
                return not await pods.list()

            await until(none_left, "the last pods to go", GONE)

    asyncio.run(wait())


@pytest.fixture
async def pods(_nothing_left: None, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Pods]:
    monkeypatch.setenv("KUBECONFIG", os.environ["E2E_KUBECONFIG"])
    async with administered() as pods:
        yield pods


@pytest.fixture
def session(request: pytest.FixtureRequest) -> str:
    return f"{request.node.name}-{secrets.token_hex(8)}"
