"""Replicas of the MCP program that come and go while their sandboxes are real pods."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.controller.test_replicas import come_and_go, replicated
from tests.support.pods import NAMESPACE, Pods

pytestmark = pytest.mark.cluster


async def test_replicas_come_and_go_over_real_pods(pods: Pods, tmp_path: Path) -> None:
    environment = {"KUBECONFIG": os.environ["E2E_KUBECONFIG"], "SANDBOX_NAMESPACE": NAMESPACE}
    running: set[str] = set()
    try:
        async with replicated(environment, tmp_path) as rig:
            lost = await come_and_go(rig)
            running |= {pod["metadata"]["labels"]["prodisco.dev/sandbox"] for pod in await pods.list()}
            assert len(rig.talks) <= len(running) <= len(rig.talks) + len(lost)
    finally:
        for sandbox in running:
            await pods.delete_sandbox(sandbox, propagation="Background")
