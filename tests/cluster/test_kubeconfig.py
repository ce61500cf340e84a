"""Where the connection to the cluster comes from: in-cluster, kubeconfig files, credential plugins."""

from __future__ import annotations

import asyncio
import datetime as dt
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme
import yaml
from kubernetes_asyncio.config import incluster_config

from prodisco_sandbox import SandboxManagerConfig, SandboxUnavailableError
from prodisco_sandbox._cluster.credentials import open_custom_objects_api
from prodisco_sandbox._cluster.requests import SandboxResources


def cluster(name: str) -> dict[str, Any]:
    return {"name": name, "cluster": {"server": f"http://{name}.test:8080"}}


def context(name: str, user: str = "me") -> dict[str, Any]:
    return {"name": name, "context": {"cluster": name, "user": user}}


def write(path: Path, **content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "Config", **content}))
    return path


def whole(path: Path, user: dict[str, Any] | None = None) -> Path:
    return write(
        path,
        clusters=[cluster("one"), cluster("two")],
        contexts=[context("one"), context("two")],
        users=[{"name": "me", "user": user or {"token": "secret"}}],
        **{"current-context": "one"},
    )


@asynccontextmanager
async def opened() -> AsyncIterator[Any]:
    api = await open_custom_objects_api()
    try:
        yield api.api_client.configuration
    finally:
        await api.api_client.close()


async def token(configuration: Any) -> str | None:
    """As kubernetes_asyncio asks for it before each request."""
    value: str | None = await configuration.get_api_key_with_prefix("BearerToken")
    return value


async def test_kubeconfig_and_its_current_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(whole(tmp_path / "config")))
    async with opened() as configuration:
        assert configuration.host == "http://one.test:8080"
        assert await token(configuration) == "Bearer secret"


async def test_kubeconfig_is_read_from_the_home_directory_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    whole(tmp_path / ".kube" / "config")
    async with opened() as configuration:
        assert configuration.host == "http://one.test:8080"


async def test_k8s_context_beats_the_current_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(whole(tmp_path / "config")))
    monkeypatch.setenv("K8S_CONTEXT", "two")
    async with opened() as configuration:
        assert configuration.host == "http://two.test:8080"


async def test_kubeconfig_may_name_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = write(tmp_path / "a", clusters=[cluster("one")], contexts=[context("one")], users=[])
    users = [{"name": "me", "user": {"token": "from b"}}]
    second = write(tmp_path / "b", users=users, **{"current-context": "one"})
    monkeypatch.setenv("KUBECONFIG", os.pathsep.join([str(first), str(tmp_path / "none"), str(second)]))
    async with opened() as configuration:
        assert configuration.host == "http://one.test:8080"
        assert await token(configuration) == "Bearer from b"


def unknown_context(tmp_path: Path) -> dict[str, str]:
    return {"KUBECONFIG": str(whole(tmp_path / "config")), "K8S_CONTEXT": "three"}


def broken_yaml(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "config").write_text("clusters: [")
    return {"KUBECONFIG": str(tmp_path / "config")}


def no_yaml_mapping(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "config").write_text("just text")
    return {"KUBECONFIG": str(tmp_path / "config")}


def missing_file(tmp_path: Path) -> dict[str, str]:
    return {"KUBECONFIG": str(tmp_path / "config")}


def no_service_account(tmp_path: Path) -> dict[str, str]:
    return {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "KUBERNETES_SERVICE_PORT": "443"}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (unknown_context, r"kubeconfig .*/config with context 'three'"),
        (broken_yaml, r"kubeconfig .*/config"),
        (no_yaml_mapping, r"kubeconfig .*/config"),
        (missing_file, r"in-cluster \(KUBERNETES_SERVICE_HOST is not set\), kubeconfig .*/config"),
        (no_service_account, r"in-cluster \(KUBERNETES_SERVICE_HOST, /var/run/secrets/.*/token\)"),
        (lambda _: {}, r"kubeconfig .*/\.kube/config"),
    ],
)
async def test_a_configuration_that_is_no_use_says_where_it_looked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], dict[str, str]], said: str
) -> None:
    for variable, value in make(tmp_path).items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(SandboxUnavailableError, match=rf"(?s)looked .*{said}.*or pass") as caught:
        await open_custom_objects_api()
    assert caught.value.__cause__ is not None


WHOLE = {
    "clusters": [cluster("one")],
    "contexts": [context("one")],
    "users": [{"name": "me", "user": {"token": "secret-token"}}],
    "current-context": "one",
}


@pytest.mark.parametrize(
    ("content", "missing"),
    [
        ("", "is empty"),
        ("# nothing yet\n", "is empty"),
        ("apiVersion: v1\nkind: Config\nclusters: null\n", "is empty"),
        ("clusters: [", r"is no YAML \(line 1\)"),
        ("a: b: secret-token", r"is no YAML \(line 1\)"),
        (b"\xff\x80", "is no YAML"),
        ("just secret-token", "holds str, not a mapping"),
        ("- clusters", "holds list, not a mapping"),
        ({**WHOLE, "current-context": ""}, "has no current-context"),
        ({**WHOLE, "current-context": "two"}, r"has no context 'two' \(it has 'one'\)"),
        ({**WHOLE, "contexts": []}, r"has no context 'one' \(it has none\)"),
        ({**WHOLE, "contexts": {"one": {}}}, "has contexts that is no list"),
        ({**WHOLE, "contexts": [{"name": "one"}]}, "has a context 'one' without a cluster"),
        ({**WHOLE, "clusters": None}, "has no cluster 'one'"),
        ({**WHOLE, "clusters": [{"name": "one"}]}, "has a cluster 'one' without a server"),
        ({**WHOLE, "users": []}, r"has no user 'me' \(it has none\)"),
        ({**WHOLE, "users": ["secret-token"]}, "has an entry of users without a name"),
        (
            {**WHOLE, "users": [{"name": "me", "user": "secret-token"}]},
            "has an entry of users .* whose user is no mapping",
        ),
        ({**WHOLE, "users": [{"user": {"token": "secret-token"}}]}, "has an entry of users without a name"),
    ],
)
async def test_a_kubeconfig_that_is_not_whole_says_what_is_missing_in_which_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any, missing: str
) -> None:
    file = tmp_path / "config"
    text = yaml.safe_dump(content) if isinstance(content, dict) else content
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    monkeypatch.setenv("KUBECONFIG", str(file))
    with pytest.raises(
        SandboxUnavailableError, match=f"no usable Kubernetes configuration: {file} {missing}"
    ) as e:
        await open_custom_objects_api()
    assert "secret-token" not in str(e.value)


async def test_a_directory_is_no_kubeconfig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path))
    with pytest.raises(SandboxUnavailableError, match=f"{tmp_path} cannot be read: Is a directory"):
        await open_custom_objects_api()


async def test_an_empty_file_beside_others_is_as_good_as_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").touch()
    config = whole(tmp_path / "config")
    monkeypatch.setenv("KUBECONFIG", os.pathsep.join([str(tmp_path / "empty"), str(config)]))
    async with opened() as configuration:
        assert configuration.host == "http://one.test:8080"


async def test_of_several_files_the_first_that_says_something_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As kubectl merges them."""
    first = write(tmp_path / "a", **{**WHOLE, "current-context": ""})
    second = whole(tmp_path / "b", {"token": "from b"})
    third = write(tmp_path / "c", **{**WHOLE, "current-context": "two"})
    monkeypatch.setenv("KUBECONFIG", os.pathsep.join(map(str, (first, second, third))))
    async with opened() as configuration:
        assert configuration.host == "http://one.test:8080"
        assert await token(configuration) == "Bearer secret-token"


async def test_a_context_may_have_no_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = {"name": "one", "cluster": {"server": "https://one.test:6443"}}
    nobody = {"name": "one", "context": {"cluster": "one"}}
    file = write(tmp_path / "config", **{**WHOLE, "clusters": [server], "contexts": [nobody]})
    monkeypatch.setenv("KUBECONFIG", str(file))
    async with opened() as configuration:
        assert configuration.host == "https://one.test:6443"
        assert await token(configuration) is None


async def test_in_a_cluster_the_token_that_rotates_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ca = tmp_path / "ca.crt"
    trustme.CA().cert_pem.write_to_path(ca)
    (tmp_path / "token").write_text("first")
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(ca))
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr(incluster_config, "TOKEN_REFRESH_PERIOD", dt.timedelta(0))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    # In a cluster, a kubeconfig does not count.
    monkeypatch.setenv("KUBECONFIG", str(whole(tmp_path / "config")))
    async with opened() as configuration:
        assert configuration.host == "https://10.0.0.1:443"
        assert await token(configuration) == "Bearer first"
        (tmp_path / "token").write_text("second")
        assert await token(configuration) == "Bearer second"


PLUGIN = """
import json, sys, time
runs, lifetime = sys.argv[1], float(sys.argv[2])
with open(runs, "a") as file:
    file.write(".")
with open(runs) as file:
    count = len(file.read())
expiry = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + lifetime))
status = {"token": f"token {count}", "expirationTimestamp": expiry}
credential = {"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential"}
print(json.dumps({**credential, "status": status}))
"""


def plugin(tmp_path: Path, lifetime: float, code: str = PLUGIN) -> str:
    command = {
        "apiVersion": "client.authentication.k8s.io/v1",
        "command": sys.executable,
        "args": ["-I", "-S", "-c", code, str(tmp_path / "runs"), str(lifetime)],
    }
    return str(whole(tmp_path / "config", {"exec": command}))


async def test_a_credential_plugin_is_run_once_while_its_token_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", plugin(tmp_path, lifetime=3600))
    async with opened() as configuration:
        assert {await token(configuration) for _ in range(3)} == {"Bearer token 1"}


async def test_a_credential_plugin_is_run_again_when_its_token_has_expired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", plugin(tmp_path, lifetime=-3600))
    async with opened() as configuration:
        assert [await token(configuration) for _ in range(2)] == ["Bearer token 2", "Bearer token 3"]


async def test_many_requests_at_once_run_an_expired_plugin_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first token has expired when it comes, the second lives.
    code = PLUGIN.replace("time.time() + lifetime", "time.time() + (3600 if count > 1 else -3600)")
    monkeypatch.setenv("KUBECONFIG", plugin(tmp_path, 0, code))
    async with opened() as configuration:
        tokens = await asyncio.gather(*(token(configuration) for _ in range(8)))
        assert set(tokens) == {"Bearer token 2"}
        assert (tmp_path / "runs").read_text() == ".."


async def test_a_credential_plugin_that_fails_says_what_it_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = "import sys; sys.exit('log in first')"
    monkeypatch.setenv("KUBECONFIG", plugin(tmp_path, 0, failing))
    with pytest.raises(SandboxUnavailableError, match="log in first"):
        await open_custom_objects_api()


async def test_the_connection_is_opened_on_first_use_shared_and_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resources = SandboxResources(SandboxManagerConfig(mode="multi", api_version="v1beta1"))
    with pytest.raises(
        SandboxUnavailableError, match=r"no usable Kubernetes configuration.*: there is no kubeconfig file"
    ):
        await resources.get("x")
    monkeypatch.setenv("KUBECONFIG", str(whole(tmp_path / "config")))  # A failure is not kept.
    apis = await asyncio.gather(*(resources.connection.api() for _ in range(5)))
    assert len({id(api) for api in apis}) == 1
    client: Any = apis[0].client
    closed, close = [], client.close

    async def note() -> None:
        closed.append(True)
        await close()

    monkeypatch.setattr(client, "close", note)
    await resources.aclose()
    assert closed == [True]


async def test_a_pipe_is_a_kubeconfig_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a shell's ``KUBECONFIG=<(...)``."""
    read, write = os.pipe()
    try:
        os.write(write, whole(tmp_path / "config").read_bytes())
        os.close(write)
        monkeypatch.setenv("KUBECONFIG", f"/dev/fd/{read}")
        async with opened() as configuration:
            assert configuration.host == "http://one.test:8080"
    finally:
        os.close(read)


@pytest.mark.parametrize(
    "files", ["/nowhere:{}", ":{}", "{}:", "~nobody-of-that-name/x:{}", "{}/below/it:{}"]
)
async def test_what_cannot_be_reached_of_several_files_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: str
) -> None:
    path = whole(tmp_path / "config")
    monkeypatch.setenv("KUBECONFIG", files.replace("{}", str(path)))
    async with opened() as configuration:
        assert configuration.host == "http://one.test:8080"
