"""What the tests on a real API server share: namespaces, connections, a controller, audit."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import json
import os
import re
import textwrap
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from kubernetes_asyncio import watch
from kubernetes_asyncio.client import (
    ApiException,
    AuthorizationV1Api,
    CustomObjectsApi,
)

from prodisco_sandbox import SandboxClient, SandboxManager, SandboxManagerConfig, SandboxPermissionError
from prodisco_sandbox._cluster.manifest import SANDBOX
from prodisco_sandbox._cluster.metadata import LABEL_MANAGED_BY, session_hash
from prodisco_sandbox._cluster.resource import Resource
from tests.support import ROOT
from tests.support.apiserver import ApiServer
from tests.support.managers import Clients, conditions
from tests.support.patience import PATIENCE, until, wait
from tests.support.sandbox_crd import sandbox_crd

Object = dict[str, Any]

GROUP, PLURAL = "agents.x-k8s.io", "sandboxes"
EXTENSIONS, CLAIMS = "extensions.agents.x-k8s.io", "sandboxclaims"
CRD = f"{PLURAL}.{GROUP}"
VERSIONS = ("v1beta1", "v1alpha1")
"""What the compact definition serves; the first is the stored one."""
MERGE_PATCH = "application/merge-patch+json"
AWAY = (ApiException, aiohttp.ClientError, OSError)
"""What a request raises while the API server restarts."""
VERBS = {"create", "delete", "get", "list", "patch", "watch"}
"""What a manager does, and its Roles allow."""
DEPLOY = ROOT / "deploy"
DOCUMENT = ROOT / "docs/kubernetes.md"


class AuditedServer(ApiServer):
    """An API server that writes down every request on Sandboxes and claims."""

    def __init__(self, binaries: Path, directory: Path, *, watch_cache: bool = True) -> None:
        self._log, policy = directory / "audit.log", directory / "audit-policy.json"
        audited = [{"group": group} for group in (GROUP, EXTENSIONS)]
        rules = [{"level": "Metadata", "resources": audited}, {"level": "None"}]
        about = {"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "omitStages": ["RequestReceived"]}
        policy.write_text(json.dumps({**about, "rules": rules}))
        flags = (f"--audit-policy-file={policy}", f"--audit-log-path={self._log}")
        super().__init__(binaries, watch_cache=watch_cache, flags=flags)

    def requests(self, user: str, plural: str = PLURAL) -> Counter[str]:
        """How many requests on Sandboxes, or on claims, a user has made so far, by verb."""
        verbs: dict[str, str] = {}
        for line in self._log.read_text().splitlines():
            event = json.loads(line)
            who = event.get("impersonatedUser") or event["user"]
            if who["username"] == user and event["objectRef"]["resource"] == plural:
                verbs[event["auditID"]] = event["verb"]
        return Counter(verbs.values())


class Definitions:
    """Which Sandbox definition an API server has; changed only where a test needs another."""

    def __init__(self, server: ApiServer) -> None:
        self._server = server
        self._installed: str | None = None

    def use(self, definition: Path | tuple[str, ...]) -> None:
        """Installs the definition of a file, or the compact one that serves these versions."""
        if self._installed == str(definition):
            return
        # Not replaced: a version that Sandboxes were stored in may not be taken away.
        self.remove()
        if isinstance(definition, Path):
            self._server.install_crd(definition)
        else:
            self.change(sandbox_crd(*definition))
        self._installed = str(definition)

    def change(self, crd: Object) -> None:
        """Replaces the definition in place."""
        self._installed = ""
        path = self._server.directory / "crd.json"
        path.write_text(json.dumps(crd))
        self._server.install_crd(path)

    def remove(self) -> None:
        if self._installed is not None:
            self._server.kubectl("delete", "crd", CRD)
            wait(lambda: self._server.status(f"/apis/{GROUP}") == 404, "the definition's end")
        self._installed = None


def lacks(verb: str, plural: str = PLURAL, group: str = GROUP) -> Any:
    """The error names the rule to add."""
    rule = rf'apiGroups \["{group}"\], resources \["{plural}"\], verbs \["{verb}"\]'
    return pytest.raises(SandboxPermissionError, match=rule)


@dataclass
class Namespace:
    """A namespace with the rights of deploy/base/rbac.yaml for its manager's service account."""

    name: str
    server: AuditedServer
    api: CustomObjectsApi
    """The administrator's."""
    manager_api: CustomObjectsApi
    """The manager's."""
    account: str
    version: str

    def _at(self, of: Resource) -> tuple[str, str, str, str]:
        return of.group, self.version, self.name, of.plural

    async def list(self, of: Resource = SANDBOX) -> list[Object]:
        return list((await self.api.list_namespaced_custom_object(*self._at(of)))["items"])

    async def names(self) -> set[str]:
        return {sandbox["metadata"]["name"] for sandbox in await self.list()}

    async def get(self, name: str, of: Resource = SANDBOX) -> Object:
        found: Object = await self.api.get_namespaced_custom_object(*self._at(of), name)
        return found

    async def find(self, name: str, of: Resource = SANDBOX) -> Object | None:
        """The object of that name, None where there is none."""
        try:
            return await self.get(name, of)
        except ApiException as e:
            if e.status == 404:
                return None
            raise

    async def delete(self, name: str) -> None:
        await self.api.delete_namespaced_custom_object(*self._at(SANDBOX), name)

    async def patch_status(self, name: str, status: Object) -> None:
        body = {"status": status}
        await self.api.patch_namespaced_custom_object_status(
            *self._at(SANDBOX), name, body, _content_type=MERGE_PATCH
        )

    async def orphan(self, instance: str, lease: str | None, *, managed: bool = True) -> str:
        """Makes a Sandbox as a manager that is no more left it; the controller keeps it past its lease."""
        session = f"of {instance}, {managed}"
        name = SANDBOX.name(session)
        config = SandboxManagerConfig(mode="multi", namespace=self.name, instance_id=instance)
        body = SANDBOX.body(config, self.version, name, session_hash(session), lease)
        body["spec"]["shutdownPolicy"] = "Retain"
        if not managed:
            del body["metadata"]["labels"][LABEL_MANAGED_BY]
        await self.api.create_namespaced_custom_object(*self._at(SANDBOX), body)
        return name

    async def may(self, verb: str, plural: str = PLURAL, group: str = GROUP, subresource: str = "") -> bool:
        """Whether the manager may do this to Sandboxes: new rights take a moment to count."""
        resource = {"verb": verb, "group": group, "resource": plural, "namespace": self.name}
        resource["subresource"] = subresource
        review = {"spec": {"user": self.account, "resourceAttributes": resource}}
        answer = await AuthorizationV1Api(self.api.api_client).create_subject_access_review(review)
        return bool(answer.status.allowed)

    async def allow(self, role: str, verbs: set[str], plural: str = PLURAL, group: str = GROUP) -> None:
        """Gives the Role's first rule these verbs; returns once they count, and no others."""
        patch = [{"op": "replace", "path": "/rules/0/verbs", "value": sorted(verbs)}]
        await self.kubectl("patch", "role", role, "--type=json", "-p", json.dumps(patch))

        async def known() -> bool:
            return all([await self.may(verb, plural, group) == (verb in verbs) for verb in VERBS])

        await until(known, "the changed rights to count")

    async def kubectl(self, *args: str, text: str | None = None) -> str:
        return await asyncio.to_thread(self.server.kubectl, f"--namespace={self.name}", *args, text=text)

    @asynccontextmanager
    async def managed(
        self,
        clients: Callable[[str], SandboxClient] | None = None,
        *,
        api: Any = None,
        **settings: Any,
    ) -> AsyncIterator[SandboxManager]:
        """A manager with the rights of deploy/base/rbac.yaml, unless `api` says otherwise."""
        config = SandboxManagerConfig(**{"mode": "multi", "namespace": self.name, **settings})
        manager = SandboxManager(
            config, custom_objects_api=api or self.manager_api, client_factory=clients or Clients()
        )
        async with manager:
            yield manager

    def requests(self, plural: str = PLURAL) -> Counter[str]:
        """The manager's requests on Sandboxes, or on claims, so far, by verb."""
        return self.server.requests(self.account, plural)


def accepted(server: AuditedServer, *args: str, text: str | None = None) -> set[str]:
    """The kinds of what the API server would take."""
    said = server.kubectl("apply", "--server-side", "--dry-run=server", *args, text=text)
    lines = said.splitlines()
    assert lines
    assert all(line.endswith("serverside-applied (server dry run)") for line in lines)
    return {line.split("/")[0].split(".")[0] for line in lines}


def examples(language: str) -> list[str]:
    """The examples of docs/kubernetes.md."""
    found = re.findall(rf"^ *```{language}\n(.*?)^ *```", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(example) for example in found]


def rights(namespace: str) -> tuple[list[Object], str]:
    """The objects of deploy/base/rbac.yaml in another namespace, and the user that they are for."""
    objects = list(yaml.safe_load_all((DEPLOY / "base" / "rbac.yaml").read_text()))
    account = ""
    for found in objects:
        found["metadata"]["namespace"] = namespace
        for subject in found.get("subjects", ()):
            subject["namespace"] = namespace
            account = f"system:serviceaccount:{namespace}:{subject['name']}"
    return objects, account


@asynccontextmanager
async def made_namespace(server: AuditedServer, name: str, version: str) -> AsyncIterator[Namespace]:
    objects, account = rights(name)
    objects.insert(0, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    listed = {"apiVersion": "v1", "kind": "List", "items": objects}
    await asyncio.to_thread(server.kubectl, "create", "--validate=false", "-f", "-", text=json.dumps(listed))
    async with connected(server) as api, connected(server, account=account) as manager_api:
        namespace = Namespace(name, server, api, manager_api, account, version)
        await until(lambda: namespace.may("list"), f"the rights in {name}")
        yield namespace
    # aiohttp does not wait for the end of TLS, and the loop may be closed before.
    await until(lambda: connections(server.port) == 0, "the connections to be closed")


@asynccontextmanager
async def connected(
    server: ApiServer, *, account: str | None = None, pool: int = 100
) -> AsyncIterator[CustomObjectsApi]:
    """The administrator's CustomObjectsApi, or one that acts as an account."""
    async with server.api_client(account=account, pool=pool) as client:
        yield CustomObjectsApi(client)


def connections(port: int) -> int:
    """How many connections this process has to a port of this machine."""
    ours = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            ours.add(os.readlink(descriptor))
    found = 0
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        remote, inode = fields[2], fields[9]
        found += int(remote.rpartition(":")[2], 16) == port and f"socket:[{inode}]" in ours
    return found


class Wrapped:
    """A CustomObjectsApi whose lists and watches a subclass meddles with."""

    def __init__(self, api: CustomObjectsApi) -> None:
        self._api = api

    def __getattr__(self, name: str) -> Any:
        return getattr(self._api, name)


class Gate(Wrapped):
    """Cuts the watch, and lets no new one through, while it is closed.

    Attributes:
        waiting: Whether a watch stands before the closed gate.
    """

    def __init__(self, api: CustomObjectsApi) -> None:
        super().__init__(api)
        self.waiting = False
        self._opened = asyncio.Event()
        self._opened.set()
        self._response: Any = None

    def close(self) -> None:
        self._opened.clear()
        self._response.close()

    def open(self) -> None:
        self._opened.set()

    async def list_namespaced_custom_object(self, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("watch"):
            return await self._api.list_namespaced_custom_object(*args, **kwargs)
        self.waiting = not self._opened.is_set()
        await self._opened.wait()
        self._response = await self._api.list_namespaced_custom_object(*args, **kwargs)
        return self._response


# What agent-sandbox does


def ready(sandbox: Object) -> Object:
    """The status of a Sandbox whose pod is up."""
    name, namespace = sandbox["metadata"]["name"], sandbox["metadata"]["namespace"]
    address = ".".join(map(str, uuid.UUID(sandbox["metadata"]["uid"]).bytes[:3]))  # No two pods have one.
    status = conditions("DependenciesReady", status="True") | {"podIPs": [f"10.{address}"]}
    if sandbox["spec"].get("service") or sandbox["apiVersion"].endswith("v1alpha1"):
        status |= {"service": name, "serviceFQDN": f"{name}.{namespace}.svc.cluster.local"}
    return status


class Controller:
    """Plays the agent-sandbox controller for a namespace, without pods: writes status, honours shutdownTime.

    Attributes:
        seen: All Sandboxes that there are, by uid.
        created: The uids of all that there ever were.
    """

    def __init__(self, namespace: Namespace, api: CustomObjectsApi) -> None:
        self.seen: dict[str, Object] = {}
        self.created: set[str] = set()
        self._api = api
        self._at = (GROUP, namespace.version, namespace.name, PLURAL)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._expire(), name="shutdownTime")
            while True:
                self.seen.clear()
                with contextlib.suppress(*AWAY):
                    async with watch.Watch() as watching:
                        async for event in watching.stream(
                            self._api.list_namespaced_custom_object, *self._at
                        ):
                            sandbox, uid = event["object"], event["object"]["metadata"]["uid"]
                            if event["type"] == "DELETED":
                                self.seen.pop(uid, None)
                                continue
                            self.seen[uid] = sandbox
                            if uid not in self.created:
                                self.created.add(uid)
                                tasks.create_task(self._make_ready(sandbox), name="status")
                await asyncio.sleep(0.05)

    async def _make_ready(self, sandbox: Object) -> None:
        at = (*self._at, sandbox["metadata"]["name"], {"status": ready(sandbox)})
        while not sandbox.get("status"):
            try:
                sandbox = await self._api.patch_namespaced_custom_object_status(
                    *at, _content_type=MERGE_PATCH, _request_timeout=PATIENCE
                )
            except AWAY as e:
                if getattr(e, "status", None) == 404:
                    return
                await asyncio.sleep(0.05)

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(0.05)
            for sandbox in list(self.seen.values()):
                spec, name = sandbox["spec"], sandbox["metadata"]["name"]
                end = dt.datetime.fromisoformat(spec.get("shutdownTime", "9999-01-01T00:00:00Z"))
                if spec.get("shutdownPolicy") == "Delete" and end.timestamp() <= time.time():
                    with contextlib.suppress(*AWAY):
                        await self._api.delete_namespaced_custom_object(*self._at, name)


@asynccontextmanager
async def controlled(namespace: Namespace) -> AsyncIterator[Controller]:
    async with connected(namespace.server, pool=8) as api:
        controller = Controller(namespace, api)
        running = asyncio.create_task(controller.run(), name="controller")
        try:
            yield controller
        finally:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running
