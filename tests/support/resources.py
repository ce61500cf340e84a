"""SandboxResources on the fake API, as several test files use it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from prodisco_sandbox import (
    SandboxManagerConfig,
)
from prodisco_sandbox._cluster.manifest import SANDBOX
from prodisco_sandbox._cluster.requests import SandboxResources
from prodisco_sandbox.testing import FakeCustomObjectsApi


@contextlib.asynccontextmanager
async def cluster(
    version: str = "auto", **options: Any
) -> AsyncIterator[tuple[FakeCustomObjectsApi, SandboxResources]]:
    async with FakeCustomObjectsApi(**options) as api:
        resources = SandboxResources(settings(version), api)
        yield api, resources
        await resources.aclose()


def settings(version: str = "auto", *, warm_pool: str | None = None) -> SandboxManagerConfig:
    choice: Any = version
    return SandboxManagerConfig(mode="multi", instance_id="me", api_version=choice, warm_pool=warm_pool)


def body(taken: str = "sandbox-x", version: str = "v1beta1") -> dict[str, Any]:
    return SANDBOX.body(settings(), version, taken, "0" * 40)
