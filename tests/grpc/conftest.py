from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from prodisco_sandbox.client import SandboxClient
from prodisco_sandbox.testing import FakeSandboxServer
from tests.support.patience import PATIENCE


@pytest.fixture
async def server() -> AsyncIterator[FakeSandboxServer]:
    async with FakeSandboxServer() as server:
        yield server


@pytest.fixture
async def client(server: FakeSandboxServer) -> AsyncIterator[SandboxClient]:
    async with SandboxClient(server.target, call_timeout=PATIENCE, deadline_margin=0.05) as client:
        yield client
