"""Finding the cluster: in-cluster, by kubeconfig, with credentials that change."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from kubernetes_asyncio.client import CoreV1Api
from kubernetes_asyncio.config import incluster_config

from prodisco_sandbox import (
    SandboxManager,
    SandboxManagerConfig,
    SandboxPermissionError,
    SandboxUnavailableError,
)
from tests.support.apiserver import User
from tests.support.envtest import Namespace
from tests.support.patience import PATIENCE, until

pytestmark = pytest.mark.envtest


def manager_in(namespace: str) -> SandboxManager:
    """One that looks for its cluster itself."""
    return SandboxManager(SandboxManagerConfig(mode="multi", namespace=namespace, ready_timeout=PATIENCE))


def write(path: Path, **parts: Any) -> Path:
    path.write_text(json.dumps({"apiVersion": "v1", "kind": "Config", **parts}))
    return path


@pytest.fixture
def parts(namespace: Namespace) -> dict[str, Any]:
    """The administrator's kubeconfig."""
    found: dict[str, Any] = json.loads(namespace.server.kubeconfig())
    (cluster,) = found["clusters"]
    # Of data kubernetes_asyncio makes a file that it keeps open until the process ends.
    del cluster["cluster"]["certificate-authority-data"]
    cluster["cluster"]["certificate-authority"] = str(namespace.server.directory / "ca.crt")
    return found


async def test_a_kubeconfig_of_several_files_and_a_context(
    namespace: Namespace, parts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, (admin,) = parts["clusters"], parts["users"]
    nobody = {"name": "nobody", "user": {"token": namespace.server.token("nobody")}}
    contexts = [
        {"name": name, "context": {"cluster": "envtest", "user": name}} for name in ("admin", "nobody")
    ]
    files = [
        write(tmp_path / "contexts", **{"current-context": "nobody", "contexts": contexts}),
        write(tmp_path / "clusters", clusters=cluster),
        write(tmp_path / "users", users=[admin, nobody]),
    ]
    monkeypatch.setenv("KUBECONFIG", os.pathsep.join(map(str, files)))
    async with manager_in(namespace.name) as manager:
        with pytest.raises(SandboxPermissionError, match='User "nobody" cannot list'):
            await manager.cleanup_orphaned_sandboxes()
    monkeypatch.setenv("K8S_CONTEXT", "admin")
    async with manager_in(namespace.name) as manager:
        assert await manager.cleanup_orphaned_sandboxes() == 0
    monkeypatch.setenv("K8S_CONTEXT", "elsewhere")
    async with manager_in(namespace.name) as manager:
        with pytest.raises(SandboxUnavailableError, match="with context 'elsewhere'") as raised:
            await manager.cleanup_orphaned_sandboxes()
        assert all(str(file) in str(raised.value) for file in files)


PLUGIN = """\
import pathlib, sys
here = pathlib.Path(sys.argv[1])
with (here / "runs").open("a") as runs:
    runs.write(".")
number = len((here / "runs").read_text())
print((here / f"answer-{min(number, 2)}").read_text())
"""
EXEC_VERSION = "client.authentication.k8s.io/v1beta1"


async def test_an_exec_plugin_is_asked_again_when_its_token_expires(
    namespace: Namespace, parts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # kubernetes_asyncio renews five minutes early.
    now = dt.datetime.now(dt.UTC) + dt.timedelta(minutes=5)
    users: tuple[User, User] = ("nobody", "admin")
    for number, user, seconds in zip((1, 2), users, (8, 600), strict=True):
        status = {"token": namespace.server.token(user), "expirationTimestamp": stamp(now, seconds=seconds)}
        answer = {"apiVersion": EXEC_VERSION, "kind": "ExecCredential", "status": status}
        (tmp_path / f"answer-{number}").write_text(json.dumps(answer))
    runs, plugin = tmp_path / "runs", tmp_path / "plugin.py"
    plugin.write_text(PLUGIN)
    run = {"apiVersion": EXEC_VERSION, "command": sys.executable, "args": [str(plugin), str(tmp_path)]}
    parts["users"][0]["user"] = {"exec": run}
    monkeypatch.setenv("KUBECONFIG", str(write(tmp_path / "kubeconfig", **parts)))
    async with manager_in(namespace.name) as manager:
        with pytest.raises(SandboxPermissionError, match='User "nobody"'):
            await manager.cleanup_orphaned_sandboxes()
        assert runs.read_text() == "."
        await until(lambda: stamp(now, seconds=8) <= stamp(dt.datetime.now(dt.UTC), minutes=5), "its expiry")
        counts = await asyncio.gather(*(manager.cleanup_orphaned_sandboxes() for _ in range(20)))
        assert counts == [0] * 20
        assert runs.read_text() == ".."  # Once for all who waited.


def stamp(time: dt.datetime, **later: float) -> str:
    return (time + dt.timedelta(**later)).strftime("%Y-%m-%dT%H:%M:%SZ")


async def test_in_a_cluster_the_token_is_read_again_when_it_rotates(
    namespace: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token, certificate = tmp_path / "token", tmp_path / "ca.crt"
    certificate.write_bytes((namespace.server.directory / "ca.crt").read_bytes())
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(token))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(certificate))
    monkeypatch.setattr(incluster_config, "TOKEN_REFRESH_PERIOD", dt.timedelta(seconds=0.2))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(namespace.server.port))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "not looked at"))
    token.write_text(await account_token(namespace, "somebody"))
    async with manager_in(namespace.name) as manager:
        with pytest.raises(SandboxPermissionError, match=f"{namespace.name}:somebody"):
            await manager.cleanup_orphaned_sandboxes()
        token.write_text(await account_token(namespace, "mcp-server"))

        async def may() -> bool:
            try:
                return await manager.cleanup_orphaned_sandboxes() == 0
            except SandboxPermissionError:
                return False

        await until(may, "the new token to be used")


async def account_token(namespace: Namespace, name: str) -> str:
    """A token such as the kubelet projects into a pod."""
    core = CoreV1Api(namespace.api.api_client)
    await core.create_namespaced_service_account(namespace.name, {"metadata": {"name": name}})
    request = {"spec": {"audiences": ["https://kubernetes.default.svc"], "expirationSeconds": 600}}
    made = await core.create_namespaced_service_account_token(name, namespace.name, request)
    return str(made.status.token)


async def test_a_missing_configuration_says_where_it_looked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    async with manager_in("anywhere") as manager:
        with pytest.raises(SandboxUnavailableError, match="no usable Kubernetes configuration") as raised:
            await manager.get_client("session")
    assert "in-cluster (KUBERNETES_SERVICE_HOST is not set)" in str(raised.value)
    assert str(tmp_path / "none") in str(raised.value)
