"""One server for all tests that do not need one of their own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from .support import Server, Stub, running


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("server"), "--max-output", "20000") as server:
        yield server


@pytest_asyncio.fixture
async def stub(server: Server) -> AsyncIterator[Stub]:
    async with server.connect() as stub:
        yield stub
