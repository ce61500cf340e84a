"""A manager that is killed: its successor, and the end of its leases."""

from __future__ import annotations

import datetime as dt
import os
import secrets
import time
from pathlib import Path
from typing import Any

import pytest

from prodisco_sandbox._cluster.manifest import SANDBOX
from tests.support.killed import killed
from tests.support.patience import until
from tests.support.pods import NAMESPACE, READY, Pods, managed, output

pytestmark = pytest.mark.cluster

LEASE = 8.0


async def test_a_killed_manager_is_succeeded_or_its_lease_ends(
    pods: Pods, session: str, tmp_path: Path
) -> None:
    instance, again, never = secrets.token_hex(8), f"{session}-again", f"{session}-never"
    await run_and_kill(tmp_path, instance, again, never)
    left = await pods.sandbox(SANDBOX.name(never))
    assert left is not None
    ends = dt.datetime.fromisoformat(left["spec"]["shutdownTime"]).timestamp()
    kept = await pods.one(SANDBOX.name(again))

    async with managed(instance_id=instance, lease_duration=LEASE) as manager:
        client = await manager.get_client(again)
        assert (await pods.one(SANDBOX.name(again)))["metadata"]["uid"] == kept["metadata"]["uid"]
        assert await output(client, "print(open('kept').read())") == "42"
        assert manager.stats().created == 0

        async def removed() -> bool:
            return await pods.sandbox(SANDBOX.name(never)) is None

        await until(removed, "the end of the other one's lease", LEASE + 30)
        assert time.time() >= ends
        await pods.going(SANDBOX.name(never))
        await until(lambda: time.time() > ends + 2, "the first manager's last lease to be over")
        assert await output(client, "print(open('kept').read())") == "42"
        assert manager.stats().lost == 0


async def run_and_kill(directory: Path, instance: str, *sessions: str, warm_pool: str | None = None) -> None:
    kubeconfig = directory / "kubeconfig"
    kubeconfig.write_bytes(Path(os.environ["KUBECONFIG"]).read_bytes())
    settings: dict[str, Any] = {"instance_id": instance, "lease_duration": LEASE, "warm_pool": warm_pool}
    code = "open('kept', 'w').write('42')"
    async with killed(kubeconfig, *sessions, code=code, namespace=NAMESPACE, ready_timeout=READY, **settings):
        pass
