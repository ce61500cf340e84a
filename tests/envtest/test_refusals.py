"""What the API server refuses is reported in its own words."""

from __future__ import annotations

import pytest
from kubernetes_asyncio.client import ApiException, CoreV1Api

from prodisco_sandbox import SandboxCapacityError, SandboxFailedError, SandboxManagerConfig
from prodisco_sandbox.manifest import sandbox_body

from .support import CRD, GROUP, PLURAL, Controller, Namespace, until

pytestmark = pytest.mark.envtest

QUOTA = f"count/{CRD}"
NAMELESS = {"spec": {"containers": [{"image": "sandbox"}]}}


async def test_a_bad_pod_template_fails_with_the_servers_message(namespace: Namespace) -> None:
    async with namespace.managed(pod_template_spec=NAMELESS) as manager:
        with pytest.raises(SandboxFailedError, match=r"spec\.podTemplate\.spec\.containers\S*name") as raised:
            await manager.get_client("session")
        assert raised.value.status == 422
        await until(lambda: manager.stats().closing == 0, "the slot")
    # Refused for good: it is neither tried again nor looked for.
    assert namespace.requests()["create"] == 1
    assert namespace.requests()["get"] == 0
    assert namespace.requests()["delete"] == 0


async def test_a_namespace_that_does_not_exist_is_named(namespace: Namespace) -> None:
    async with namespace.managed(api=namespace.api, namespace="nowhere", ready_timeout=5) as manager:
        with pytest.raises(SandboxFailedError, match='namespaces "nowhere" not found'):
            await manager.get_client("session")


async def test_an_exceeded_quota_is_a_matter_of_capacity(
    namespace: Namespace, controller: Controller
) -> None:
    quota = Quota(namespace)
    await quota.count(used=2)
    async with namespace.managed() as manager:
        for session in ("session", "other"):
            with pytest.raises(SandboxCapacityError, match=f"exceeded quota: sandboxes.*{QUOTA}") as raised:
                await manager.get_client(session)
            assert raised.value.status == 403
        await quota.count(used=1)
        await manager.get_client("session")
        with pytest.raises(SandboxCapacityError):
            await manager.get_client("other")
    assert not await namespace.list()


class Quota:
    """A quota of two Sandboxes, and what the quota controller would write."""

    def __init__(self, namespace: Namespace) -> None:
        self._namespace = namespace
        self._core = CoreV1Api(namespace.api.api_client)
        self._made = False

    async def count(self, used: int) -> None:
        if not self._made:
            quota = {"metadata": {"name": "sandboxes"}, "spec": {"hard": {QUOTA: "2"}}}
            await self._core.create_namespaced_resource_quota(self._namespace.name, quota)
            self._made = True
        status = {"status": {"hard": {QUOTA: "2"}, "used": {QUOTA: str(used)}}}
        await self._core.patch_namespaced_resource_quota_status("sandboxes", self._namespace.name, status)

        async def counts() -> bool:
            return await self._refuses() == (used >= 2)

        await until(counts, "the API server to know the quota")

    async def _refuses(self) -> bool:
        config = SandboxManagerConfig(mode="multi", namespace=self._namespace.name)
        body = sandbox_body(config, self._namespace.version, "tried", "0" * 40)
        where = (GROUP, self._namespace.version, self._namespace.name, PLURAL)
        try:
            await self._namespace.api.create_namespaced_custom_object(*where, body, dry_run="All")
        except ApiException as e:
            if e.status != 403:
                raise
            return True
        return False
