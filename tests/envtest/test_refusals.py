"""What the API server refuses is reported in its own words."""

from __future__ import annotations

import asyncio
import base64
import random
import ssl
from typing import Any, Self

import pytest
import trustme
from aiohttp import web
from kubernetes_asyncio.client import AdmissionregistrationV1Api, ApiException, CoreV1Api

from prodisco_sandbox import (
    SandboxCapacityError,
    SandboxError,
    SandboxFailedError,
    SandboxManagerConfig,
    SandboxUnavailableError,
)
from prodisco_sandbox._cluster.manifest import SANDBOX
from tests.support.envtest import CRD, GROUP, MERGE_PATCH, PLURAL, Controller, Namespace
from tests.support.patience import PATIENCE, until

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


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        ({"code": 403, "message": "image has no digest"}, SandboxFailedError),
        ({"code": 404, "message": "image has no digest"}, SandboxFailedError),
        ({"code": 401, "reason": "image has no digest"}, SandboxFailedError),
        ({"code": 500, "message": "image has no digest"}, SandboxUnavailableError),
    ],
)
async def test_what_a_webhook_refuses_is_not_taken_for_rbac(
    namespace: Namespace,
    controller: Controller,
    monkeypatch: pytest.MonkeyPatch,
    status: dict[str, Any],
    kind: type[SandboxError],
) -> None:
    final = kind is SandboxFailedError
    create, refusals = namespace.manager_api.create_namespaced_custom_object, 0

    async def create_twice(*args: Any, **options: Any) -> Any:
        nonlocal refusals
        try:
            return await create(*args, **options)
        except ApiException:
            refusals += 1
            if refusals == 2:  # The pause before the third try would be too long.
                monkeypatch.setattr(random, "random", lambda: 1e6)
            raise

    monkeypatch.setattr(namespace.manager_api, "create_namespaced_custom_object", create_twice)
    async with Webhook(namespace) as webhook, namespace.managed(ready_timeout=PATIENCE) as manager:
        await manager.get_client("before")
        webhook.refusal = status
        with pytest.raises(
            kind, match=r'admission webhook "w\.test\.example" denied the request: image'
        ) as raised:
            await manager.get_client("session")
        monkeypatch.undo()
        assert raised.value.status == status["code"]
        assert "needs the rule" not in str(raised.value)
        assert refusals == (1 if final else 2)
        assert namespace.requests()["create"] == 1 + refusals
        assert namespace.requests()["get"] == 0, "nothing was stored: there is nothing to look for"
        # A use that RBAC allows and the webhook does not.
        await manager.on_session_closed("before")
        await until(lambda: webhook.deletes > 0, "the webhook to be asked")
        assert await namespace.list()
        webhook.refusal = None


async def test_a_webhook_that_is_away_is_waited_for(namespace: Namespace, controller: Controller) -> None:
    async with Webhook(namespace) as webhook, namespace.managed() as manager:
        await manager.get_client("before")
        await webhook.stop()
        waiting = asyncio.create_task(manager.get_client("session"))
        await until(lambda: namespace.requests()["create"] >= 3, "another try")
        await webhook.start()
        await waiting


class Webhook:
    """An admission webhook for the Sandboxes of one namespace.

    Attributes:
        refusal: The Status that it refuses with; None: it allows everything.
        deletes: How many deletes it has been asked about.
    """

    def __init__(self, namespace: Namespace) -> None:
        self.refusal: dict[str, Any] | None = None
        self.deletes = 0
        self._namespace = namespace
        self._admission = AdmissionregistrationV1Api(namespace.api.api_client)
        self._port = 0

    async def __aenter__(self) -> Self:
        ca = trustme.CA()
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        ca.issue_cert("127.0.0.1").configure_cert(self._tls)
        await self.start()
        name = self._namespace.name
        labelled = {"metadata": {"labels": {"webhook": name}}}
        await CoreV1Api(self._namespace.api.api_client).patch_namespace(
            name, labelled, _content_type=MERGE_PATCH
        )
        rule = {
            "apiGroups": [GROUP],
            "apiVersions": ["*"],
            "resources": [PLURAL],
            "operations": ["CREATE", "DELETE"],
        }
        client = {
            "url": f"https://127.0.0.1:{self._port}/",
            "caBundle": base64.b64encode(ca.cert_pem.bytes()).decode(),
        }
        webhook = {
            "name": "w.test.example",
            "clientConfig": client,
            "rules": [rule],
            "namespaceSelector": {"matchLabels": {"webhook": name}},
            "sideEffects": "None",
            "admissionReviewVersions": ["v1"],
        }
        body = {"metadata": {"name": name}, "webhooks": [webhook]}
        await self._admission.create_validating_webhook_configuration(body)
        await until(self._is_asked, "the API server to know the webhook")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._admission.delete_validating_webhook_configuration(self._namespace.name)
        await self.stop()

    async def start(self) -> None:
        app = web.Application()
        app.router.add_post("/", self._review)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self._port, ssl_context=self._tls).start()
        self._port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def _review(self, request: web.Request) -> web.Response:
        asked = (await request.json())["request"]
        self.deletes += asked["operation"] == "DELETE"
        answer: dict[str, Any] = {"uid": asked["uid"], "allowed": self.refusal is None}
        if self.refusal is not None:
            answer["status"] = self.refusal
        return web.json_response(
            {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": answer}
        )

    async def _is_asked(self) -> bool:
        self.refusal = {"code": 403, "message": "probe"}
        refused = await would_be_refused(self._namespace)
        self.refusal = None
        return refused


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
            return await would_be_refused(self._namespace) == (used >= 2)

        await until(counts, "the API server to know the quota")


async def would_be_refused(namespace: Namespace) -> bool:
    """Whether a create gets a 403."""
    config = SandboxManagerConfig(mode="multi", namespace=namespace.name)
    body = SANDBOX.body(config, namespace.version, "tried", "0" * 40)
    where = (GROUP, namespace.version, namespace.name, PLURAL)
    try:
        await namespace.api.create_namespaced_custom_object(*where, body, dry_run="All")
    except ApiException as e:
        if e.status != 403:
            raise
        return True
    return False
