"""What a 401 leads to: new credentials once, and the request again."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import ssl
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest
import trustme
import yaml
from aiohttp import web
from kubernetes_asyncio.client import ApiClient, Configuration, CustomObjectsApi
from kubernetes_asyncio.config import incluster_config, kube_config

from prodisco_sandbox import SandboxError, SandboxPermissionError, SandboxUnavailableError
from prodisco_sandbox._cluster.requests import SandboxResources
from tests.support.leftovers import children
from tests.support.patience import until
from tests.support.resources import body, settings

UNAUTHORIZED = {
    "kind": "Status",
    "apiVersion": "v1",
    "status": "Failure",
    "message": "Unauthorized",
    "reason": "Unauthorized",
    "code": 401,
}


class HttpApi:
    """Answers every verb as if it had worked, where `accepts` lets the request in.

    Attributes:
        requests: Method and path of each request, and whether it was let in.
        hosts: The Host header of each.
        answer: A response to give instead.
        held: A request waits for this before it is looked at.
    """

    def __init__(self, accepts: Callable[[web.Request], bool], tls: ssl.SSLContext | None = None) -> None:
        self.accepts = accepts
        self.requests: list[tuple[str, str, bool]] = []
        self.hosts: list[str] = []
        self.answer: Callable[[], web.Response] | None = None
        self.held: asyncio.Event | None = None
        self._tls = tls

    @property
    def let_in(self) -> list[bool]:
        return [accepted for _, _, accepted in self.requests]

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=self._tls)
        await site.start()
        self.port = self._runner.addresses[0][1]
        self.url = f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        accepted = self.accepts(request)
        self.hosts.append(request.host)
        self.requests.append((request.method, str(request.rel_url), accepted))
        if self.held is not None:
            await self.held.wait()
        if self.answer is not None:
            return self.answer()
        if not accepted:
            return web.json_response(UNAUTHORIZED, status=401)
        parts = request.path.strip("/").split("/")
        if "watch" in request.query:
            return web.Response(text="")
        if len(parts) == 3:
            resources = [
                {"name": "sandboxes", "singularName": "sandbox", "namespaced": True, "kind": "Sandbox"}
            ]
            kinds: dict[str, Any] = {"kind": "APIResourceList", "groupVersion": "/".join(parts[1:])}
            return web.json_response({**kinds, "resources": [{**r, "verbs": ["create"]} for r in resources]})
        found: dict[str, Any] = {"metadata": {"name": parts[-1], "uid": "1", "resourceVersion": "1"}}
        if request.method == "GET" and parts[-1] == "sandboxes":
            found["items"] = []
        return web.json_response(found, status=201 if request.method == "POST" else 200)


PLUGIN = """#!/bin/sh
echo x >> {runs}
[ -e {failing} ] && echo 'log in first' >&2 && exit 1
exec cat {status}
"""


class Cluster:
    """A kubeconfig whose user is a plugin, and the API server that it leads to."""

    def __init__(self, api: HttpApi, path: Path, accepted: set[str]) -> None:
        self.api, self.path, self.accepted = api, path, accepted
        self.runs, self.failing, self.status = path / "runs", path / "failing", path / "status"

    def gives(self, **status: str) -> None:
        credential = {"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential"}
        self.status.write_text(json.dumps({**credential, "status": status}))

    def turns_to(self, token: str, **status: str) -> None:
        """From now on the API server takes this token alone, and the plugin gives it."""
        self.accepted.clear()
        self.accepted.add(f"Bearer {token}")
        self.gives(token=token, **status)

    def plugin(self) -> dict[str, Any]:
        file = self.path / "plugin"
        file.write_text(PLUGIN.format(runs=self.runs, failing=self.failing, status=self.status))
        file.chmod(0o700)
        return {"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": str(file)}}

    @property
    def ran(self) -> int:
        return len(self.runs.read_text().splitlines())

    def configure(self, user: dict[str, Any], **cluster: Any) -> Path:
        file = self.path / "config"
        content = {
            "clusters": [{"name": "k", "cluster": {"server": self.api.url, **cluster}}],
            "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
            "users": [{"name": "u", "user": user}],
            "current-context": "c",
        }
        file.write_text(yaml.safe_dump(content))
        os.environ["KUBECONFIG"] = str(file)  # conftest takes it out again
        return file


def bearer(request: web.Request) -> str:
    return request.headers.get("Authorization", "")


@pytest.fixture
def accepted() -> set[str]:
    """What the API server takes as Authorization."""
    return {"Bearer one"}


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KUBECONFIG", "")
        yield


@pytest.fixture
async def cluster(tmp_path: Path, accepted: set[str]) -> AsyncIterator[Cluster]:
    async with HttpApi(lambda request: bearer(request) in accepted) as api:
        cluster = Cluster(api, tmp_path, accepted)
        cluster.gives(token="one")
        cluster.configure(cluster.plugin())
        yield cluster


@asynccontextmanager
async def resources(given: Any = None, version: str = "v1beta1") -> AsyncIterator[SandboxResources]:
    made = SandboxResources(settings(version), given)
    try:
        yield made
    finally:
        await made.aclose()


async def watched(r: SandboxResources) -> list[str]:
    async with contextlib.aclosing(r.watch("a=b", "1")) as events:
        return [kind async for kind, _ in events]


VERBS: dict[str, Callable[[SandboxResources], Awaitable[Any]]] = {
    "create": lambda r: r.create(body()),
    "get": lambda r: r.get("x"),
    "list": lambda r: r.list("a=b"),
    "patch": lambda r: r.patch("x", {"spec": {}}),
    "delete": lambda r: r.delete("x", "1"),
    "watch": watched,
}


@pytest.mark.parametrize(
    "lies", [{}, {"expirationTimestamp": "2040-01-01T00:00:00Z"}], ids=["no expiry", "a lie"]
)
@pytest.mark.parametrize("verb", VERBS)
async def test_a_plugin_is_run_once_more_and_the_request_is_repeated(
    cluster: Cluster, verb: str, lies: dict[str, str]
) -> None:
    cluster.gives(token="one", **lies)
    async with resources() as r:
        await VERBS[verb](r)
        cluster.turns_to("two", **lies)
        assert await VERBS[verb](r) is not None
        await VERBS[verb](r)
    assert cluster.api.let_in == [True, False, True, True]
    assert cluster.ran == 2


async def test_discovery_is_repeated_too(cluster: Cluster) -> None:
    async with resources(version="auto") as r:
        await r.connection.api()
        cluster.turns_to("two")
        assert await r.api_version() == "v1beta1"
    assert cluster.ran == 2


async def test_refused_discovery_assumes_nothing(cluster: Cluster, accepted: set[str]) -> None:
    accepted.clear()
    async with resources(version="auto") as r:
        with pytest.raises(SandboxPermissionError):
            await r.create(body())
    assert [path for _, path, _ in cluster.api.requests] == ["/apis/agents.x-k8s.io/v1beta1"] * 2


async def test_a_second_refusal_is_final_and_the_next_request_asks_again(
    cluster: Cluster, accepted: set[str]
) -> None:
    async with resources() as r:
        await r.get("x")
        accepted.clear()
        with pytest.raises(
            SandboxPermissionError, match="revoked, and so are those that were loaded"
        ) as caught:
            await r.get("x", deadline=asyncio.get_running_loop().time() + 30)
        assert caught.value.status == 401
        assert cluster.api.let_in == [True, False, False]
        accepted.add("Bearer two")
        cluster.gives(token="two")
        await r.get("x")
    assert cluster.ran == 3


async def test_many_that_are_refused_at_once_run_the_plugin_once(cluster: Cluster) -> None:
    async with resources() as r:
        await r.get("x")
        cluster.turns_to("two")
        cluster.api.held = asyncio.Event()
        asking = [asyncio.create_task(r.get("x")) for _ in range(20)]
        await until(lambda: len(cluster.api.requests) == 21)
        cluster.api.held.set()
        await asyncio.gather(*asking)
    assert cluster.ran == 2
    assert cluster.api.let_in == [True, *[False] * 20, *[True] * 20]


async def test_a_refusal_that_comes_late_does_not_run_the_plugin_again(cluster: Cluster) -> None:
    async with resources() as r:
        await r.get("x")
        cluster.turns_to("two")
        held = cluster.api.held = asyncio.Event()
        late = asyncio.create_task(r.get("late"))
        await until(lambda: len(cluster.api.requests) == 2)
        cluster.api.held = None
        await r.get("x")
        held.set()
        await late
    assert cluster.ran == 2


async def test_a_caller_that_is_cancelled_ends_nobody_elses_renewal(
    cluster: Cluster, accepted: set[str]
) -> None:
    async with resources() as r:
        await r.get("x")
        accepted.clear()
        accepted.add("Bearer two")
        cluster.status.unlink()
        os.mkfifo(cluster.status)
        first, second = (asyncio.create_task(r.get("x")) for _ in range(2))
        await until(lambda: cluster.ran == 2)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await asyncio.to_thread(cluster.gives, token="two")
        await second
    assert cluster.ran == 2


async def test_closing_ends_a_renewal_and_the_plugin_that_it_runs(
    cluster: Cluster, accepted: set[str]
) -> None:
    before = children()
    async with resources() as r:
        await r.get("x")
        accepted.clear()
        cluster.status.unlink()
        os.mkfifo(cluster.status)
        asking = asyncio.create_task(r.get("x"))
        await until(lambda: cluster.ran == 2)
        await r.aclose()
        with pytest.raises(SandboxUnavailableError, match="cut off"):
            await asking
        assert children() <= before


async def test_a_plugin_that_fails_says_why_and_is_run_again_by_the_next_request(cluster: Cluster) -> None:
    async with resources() as r:
        await r.get("x")
        cluster.turns_to("two")
        cluster.failing.touch()
        with pytest.raises(
            SandboxUnavailableError, match=r"new ones could not be loaded.*log in first"
        ) as caught:
            await r.delete("x", "1")
        assert caught.value.status == 401
        assert "log in first" in str(caught.value.__cause__)
        cluster.failing.unlink()
        await r.delete("x", "1")
    assert cluster.ran == 3


async def test_a_plugin_that_fails_when_its_token_has_expired_says_why(cluster: Cluster) -> None:
    cluster.gives(token="one", expirationTimestamp="2020-01-01T00:00:00Z")
    async with resources() as r:
        await r.get("x")
        cluster.failing.touch()
        with pytest.raises(SandboxUnavailableError, match=r"cannot be renewed.*log in first"):
            await r.get("x")
    assert len(cluster.api.requests) == 1


def token_file(cluster: Cluster, token: str) -> None:
    (cluster.path / "token").write_text(f"{token}\n")
    cluster.configure({"tokenFile": "token"})  # relative to the kubeconfig


def kubeconfig(cluster: Cluster, token: str) -> None:
    file = cluster.configure({"token": token})
    content = yaml.safe_load(file.read_text())
    if token == "two":  # Somebody has turned to another cluster meanwhile.
        content["clusters"].append({"name": "other", "cluster": {"server": "http://other.test"}})
        content["contexts"].append({"name": "other", "context": {"cluster": "other", "user": "u"}})
        content["current-context"] = "other"
    file.write_text(yaml.safe_dump(content))


@pytest.mark.parametrize("write", [token_file, kubeconfig])
async def test_files_that_have_been_written_anew_are_read_again(
    cluster: Cluster, write: Callable[[Cluster, str], None]
) -> None:
    write(cluster, "one")
    async with resources() as r:
        await r.get("x")
        cluster.turns_to("two")
        write(cluster, "two")
        await r.get("x")
    assert cluster.api.let_in == [True, False, True]


async def test_credentials_of_another_cluster_are_not_sent_to_this_one(
    cluster: Cluster, accepted: set[str]
) -> None:
    cluster.configure({"token": "one"})
    async with resources() as r:
        await r.get("x")
        accepted.clear()
        url = cluster.api.url
        cluster.configure({"token": "others"}, server="http://other.test:6443")
        with pytest.raises(SandboxUnavailableError, match=rf"from {url} to http://other\.test:6443"):
            await r.get("x")
    assert cluster.api.let_in == [True, False]


async def test_a_kubeconfig_that_was_a_pipe_is_not_read_again(cluster: Cluster) -> None:
    read, write = os.pipe()
    try:
        os.write(write, cluster.configure(cluster.plugin()).read_bytes())
        os.close(write)
        os.environ["KUBECONFIG"] = f"/dev/fd/{read}"
        async with resources() as r:
            await r.get("x")
            cluster.turns_to("two", expirationTimestamp="2040-01-01T00:00:00Z")
            await r.get("x")
            cluster.turns_to("three")
            await r.get("x")
    finally:
        os.close(read)
    assert cluster.ran == 3


@asynccontextmanager
async def tls_api(accepts: Callable[[web.Request], bool], ca: trustme.CA) -> AsyncIterator[HttpApi]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("127.0.0.1").configure_cert(context)
    ca.configure_trust(context)
    context.verify_mode = ssl.CERT_OPTIONAL
    async with HttpApi(accepts, context) as api:
        yield api


async def test_in_a_cluster_a_token_that_has_rotated_within_the_minute_is_read_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accepted: set[str]
) -> None:
    ca = trustme.CA()
    ca.cert_pem.write_to_path(tmp_path / "ca.crt")
    (tmp_path / "token").write_text("one")
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(tmp_path / "ca.crt"))
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    async with tls_api(lambda request: bearer(request) in accepted, ca) as api:
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(api.port))
        async with resources() as r:
            for token in ("one", "two", "three"):
                (tmp_path / "token").write_text(token)
                accepted.clear()
                accepted.add(f"Bearer {token}")
                await r.delete("x", "1")
        assert api.let_in == [True, False, True, False, True]


async def test_a_client_certificate_of_a_plugin_is_replaced_and_a_watch_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mkstemp(**options: Any) -> tuple[int, str]:
        descriptor, name = tempfile.mkstemp(**options)
        os.close(descriptor)  # kubernetes_asyncio leaves it open
        return -1, name

    monkeypatch.setattr(kube_config, "tempfile", SimpleNamespace(mkstemp=mkstemp))
    ca, names = trustme.CA(), {"one"}

    def accepts(request: web.Request) -> bool:
        certificate = (request.transport.get_extra_info("peercert") if request.transport else None) or {}
        return any(value in names for _, value in certificate.get("subjectAltName", ()))

    def certificate(name: str) -> dict[str, str]:
        issued = ca.issue_cert(name)
        return {
            "clientCertificateData": issued.cert_chain_pems[0].bytes().decode(),
            "clientKeyData": issued.private_key_pem.bytes().decode(),
        }

    async with tls_api(accepts, ca) as api:
        cluster = Cluster(api, tmp_path, set())
        cluster.gives(**certificate("one"))
        authority = base64.b64encode(ca.cert_pem.bytes()).decode()
        cluster.configure(cluster.plugin(), **{"certificate-authority-data": authority})
        async with resources() as r:
            await r.get("x")
            api.held = asyncio.Event()
            watching = asyncio.create_task(watched(r))
            await until(lambda: len(api.requests) == 2)
            held, api.held = api.held, None
            names.clear()
            names.add("two")
            cluster.gives(**certificate("two"))
            await r.get("x")
            await r.get("x")
            held.set()
            assert await watching == ["OPEN"], (
                "its connection is closed only once nothing can use it any more"
            )
        assert api.let_in == [True, True, False, True, True]
        assert cluster.ran == 2


def jwt(name: str, lifetime: float) -> str:
    claims = (
        base64.urlsafe_b64encode(json.dumps({"exp": time.time() + lifetime}).encode()).decode().rstrip("=")
    )
    return f"{name}.{claims}.signature"


@pytest.mark.filterwarnings("ignore::DeprecationWarning:kubernetes_asyncio")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:aiohttp")
async def test_an_oidc_token_is_refreshed_with_the_refresh_token_that_came_last(
    cluster: Cluster, accepted: set[str]
) -> None:
    tokens = [jwt("one", 3600), jwt("two", 3600), jwt("three", 3600)]
    asked = []

    async def handle(request: web.Request) -> web.Response:
        if request.path.endswith("openid-configuration"):
            return web.json_response({"token_endpoint": f"http://{request.host}/token"})
        asked.append((await request.post())["refresh_token"])
        fresh = tokens[len(asked)]
        return web.json_response({"id_token": fresh, "refresh_token": f"refresh {len(asked)}"})

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    settings = {
        "client-id": "id",
        "client-secret": "secret",
        "id-token": tokens[0],
        "refresh-token": "refresh 0",
        "idp-issuer-url": f"http://127.0.0.1:{runner.addresses[0][1]}",
    }
    cluster.configure({"auth-provider": {"name": "oidc", "config": settings}})
    try:
        async with resources() as r:
            for token in tokens:
                accepted.clear()
                accepted.add(f"Bearer {token}")
                await r.get("x")
    finally:
        await runner.cleanup()
    assert asked == ["refresh 0", "refresh 1"]


@asynccontextmanager
async def passed_in(cluster: Cluster, hook: Callable[[Any], None] | None) -> AsyncIterator[SandboxResources]:
    configuration = Configuration(host=cluster.api.url)
    configuration.api_key["BearerToken"] = "Bearer one"
    configuration.refresh_api_key_hook = hook
    async with ApiClient(configuration) as client, resources(CustomObjectsApi(client)) as r:
        yield r


async def test_a_client_that_was_passed_in_has_only_its_own_hook(
    cluster: Cluster, accepted: set[str]
) -> None:
    async with passed_in(cluster, None) as r:
        accepted.clear()
        with pytest.raises(SandboxPermissionError):
            await r.get("x")
        assert cluster.api.let_in == [False]

    def hook(configuration: Any) -> None:
        if len(cluster.api.requests) == 2:
            configuration.api_key["BearerToken"] = "Bearer two"

    accepted.add("Bearer two")
    async with passed_in(cluster, hook) as r:
        await r.get("x")
        assert cluster.api.let_in == [False, False, True]
    assert not cluster.runs.exists()


async def test_what_netrc_holds_is_not_sent(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("default login me password secret\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    async with resources() as r:
        await r.get("x")
    assert cluster.api.let_in == [True]


async def test_proxies_of_the_environment_are_used(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = cluster.api.url
    cluster.api.url = "http://cluster.test"
    cluster.configure(cluster.plugin())
    monkeypatch.setenv("http_proxy", proxy)
    async with resources() as r:
        await r.get("x")
    assert cluster.api.hosts == ["cluster.test"]
    monkeypatch.setenv("no_proxy", "cluster.test")
    async with resources() as r:
        with pytest.raises(SandboxError, match=r"cluster\.test"):
            await r.get("x")


async def test_a_proxys_page_that_is_no_utf8_is_a_refusal_like_any_other(cluster: Cluster) -> None:
    page = "<html>Zugriff gesch\u00fctzt</html>".encode("latin-1")
    cluster.api.answer = lambda: web.Response(body=page, status=403, content_type="text/html")
    async with resources() as r:
        for verb in VERBS.values():
            with pytest.raises(SandboxPermissionError, match="something in front of it") as caught:
                await verb(r)
            assert "needs the rule" not in str(caught.value)
