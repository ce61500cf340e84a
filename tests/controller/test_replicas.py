"""Replicas of the MCP program behind a proxy that gives each request to the next, on the real controller."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.controller import ControlledNamespace
from tests.support.mcp_server import ERAS
from tests.support.replicas import CLIENTS, come_and_go, replicated

pytestmark = [pytest.mark.controller, pytest.mark.slow, pytest.mark.unmeasured]


@pytest.mark.parametrize("warm", [False, True], ids=["sandboxes", "claims"])
async def test_replicas_come_and_go_under_their_clients(
    cluster: ControlledNamespace, tmp_path: Path, warm: bool
) -> None:
    environment = {
        "KUBECONFIG": str(cluster.server.directory / "admin.kubeconfig"),
        "TMPDIR": str(cluster.server.directory),  # Some are killed, and leave files.
        "SANDBOX_NAMESPACE": cluster.name,
        "SANDBOX_TCP_PORT": str(cluster.server.sandbox_port),
    }
    if warm:
        environment["SANDBOX_WARM_POOL"] = "python"
        await cluster.make_pool(CLIENTS * len(ERAS))
    try:
        async with replicated(environment, tmp_path) as rig:
            lost = await come_and_go(rig)
            # A client whose first call was lost has lost the handle, too.
            unreachable = sum(call.endswith("-1") for call in lost)
            objects = await (cluster.claims() if warm else cluster.list())
            assert len(rig.talks) <= len(objects) <= len(rig.talks) + unreachable
    finally:
        await cluster.kubectl("delete", "sandboxwarmpools,sandboxclaims,sandboxes", "--all", "--wait=false")
