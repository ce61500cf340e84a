"""A real API server takes the manifests of deploy/."""

from __future__ import annotations

import pytest

from .support import DEPLOY, AuditedServer

pytestmark = pytest.mark.envtest


@pytest.fixture(scope="module")
def prodisco(server: AuditedServer) -> AuditedServer:
    """A dry run does not make the namespace that the other objects are in."""
    server.kubectl("apply", "-f", str(DEPLOY / "base" / "namespace.yaml"))
    return server


@pytest.mark.parametrize("directory", ["base", "overlays/api-access"])
def test_the_api_server_accepts(prodisco: AuditedServer, directory: str) -> None:
    said = prodisco.kubectl("apply", "--server-side", "--dry-run=server", "-k", str(DEPLOY / directory))
    lines = said.splitlines()
    assert all(line.endswith("serverside-applied (server dry run)") for line in lines)
    kinds = {line.split("/")[0].split(".")[0] for line in lines}
    assert kinds == {"namespace", "serviceaccount", "role", "rolebinding", "networkpolicy"}
