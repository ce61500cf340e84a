"""One control plane with the real controller for all tests here, and a namespace for each."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.support.apiserver import booted
from tests.support.controller import ControlledNamespace, ControlPlane, controlled_namespace


@pytest.fixture(scope="session")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    variables = ("KUBEBUILDER_ASSETS", "AGENT_SANDBOX_DIR", "AGENT_SANDBOX_PODS")
    binaries, agent_sandbox, node = (Path(os.environ[name]) for name in variables)
    plane = ControlPlane(binaries, agent_sandbox, node, tmp_path_factory.mktemp("audit"))
    with booted(plane) as control_plane:
        yield control_plane


@pytest.fixture
async def cluster(control_plane: ControlPlane) -> AsyncIterator[ControlledNamespace]:
    async with controlled_namespace(control_plane) as cluster:
        yield cluster
