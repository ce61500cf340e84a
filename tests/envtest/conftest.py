"""One API server for all tests here, and a namespace of its own for each."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.support.apiserver import assets, booted
from tests.support.envtest import (
    VERSIONS,
    AuditedServer,
    Controller,
    Definitions,
    Namespace,
    controlled,
    made_namespace,
)

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AuditedServer]:
    with booted(AuditedServer(binaries(), tmp_path_factory.mktemp("audit"))) as server:
        yield server


@pytest.fixture(scope="module")
def uncached_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AuditedServer]:
    """One whose watches read etcd itself, so that a compaction ages their resourceVersion."""
    directory = tmp_path_factory.mktemp("audit")
    with booted(AuditedServer(binaries(), directory, watch_cache=False)) as server:
        yield server


def binaries() -> Path:
    found = assets()
    assert found is not None
    return found


@pytest.fixture(scope="session")
def definitions(server: AuditedServer) -> Definitions:
    return Definitions(server)


@pytest.fixture
def definition() -> Path | tuple[str, ...]:
    """The Sandbox definition that a test runs on: the compact one, unless a test overrides it."""
    return VERSIONS


@pytest.fixture
def version() -> str:
    """The API version that the test itself speaks."""
    return VERSIONS[0]


@pytest.fixture
async def namespace(
    server: AuditedServer, definitions: Definitions, definition: Path | tuple[str, ...], version: str
) -> AsyncIterator[Namespace]:
    definitions.use(definition)
    async with made_namespace(server, f"test-{next(_numbers)}", version) as namespace:
        yield namespace


@pytest.fixture
async def controller(namespace: Namespace) -> AsyncIterator[Controller]:
    async with controlled(namespace) as controller:
        yield controller
