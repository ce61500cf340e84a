"""One server for all tests that do not need one of their own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
import trustme

from tests.support.servers import Server, Stub, running


@pytest.fixture(scope="session")
def warm_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One that forks executions from its zygote."""
    with running(tmp_path_factory.mktemp("server"), "--max-output", "20000", zygote=True) as server:
        yield server


@pytest.fixture(scope="session")
def cold_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One that starts an interpreter for each execution."""
    with running(tmp_path_factory.mktemp("server"), "--max-output", "20000") as server:
        yield server


@pytest.fixture
def server(warm_server: Server) -> Server:
    return warm_server


@pytest_asyncio.fixture
async def stub(server: Server) -> AsyncIterator[Stub]:
    async with server.connect() as stub:
        yield stub


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("certificates")
    authority, clients = trustme.CA(), trustme.CA()
    issued = {
        "server": authority.issue_cert("127.0.0.1", "localhost"),
        "client": clients.issue_cert("client@example.org"),
        "foreign": authority.issue_cert("foreign@example.org"),
    }
    paths = {"ca": directory / "ca.pem", "clients": directory / "clients.pem"}
    authority.cert_pem.write_to_path(str(paths["ca"]))
    clients.cert_pem.write_to_path(str(paths["clients"]))
    for name, cert in issued.items():
        paths[f"{name}.key"] = directory / f"{name}.key"
        paths[f"{name}.crt"] = directory / f"{name}.crt"
        cert.private_key_pem.write_to_path(str(paths[f"{name}.key"]))
        cert.cert_chain_pems[0].write_to_path(str(paths[f"{name}.crt"]))
    return paths
