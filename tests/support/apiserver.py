"""A real kube-apiserver with its etcd on loopback, for tests."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import ssl
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import pytest
import trustme
from kubernetes_asyncio.client import ApiClient, Configuration

from tests.support.patience import wait
from tests.support.ports import free_ports

User = Literal["admin", "nobody"]
Server = TypeVar("Server", bound="ApiServer")

# Runs the servers and ends them when its standard input closes, so that nothing survives a
# killed test run, and a restart leaves this process with the same child and pipes. (A
# parent-death signal would not do: it follows the thread that started the child.)
_KEEPER = """
import json, subprocess, sys
running = {}
try:
    for line in sys.stdin:
        command, name, log, *argv = json.loads(line)
        if command == "start":
            with open(log, "ab") as out:
                try:
                    running[name] = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
                except OSError as error:
                    out.write(str(error).encode())
        elif command == "terminate" and name in running:
            running[name].terminate()
            running.pop(name).wait()
        elif command == "kill" and name in running:
            running[name].kill()
            running.pop(name).wait()
        print(json.dumps(name in running and running[name].poll() is None), flush=True)
finally:
    for child in running.values():
        child.kill()
        child.wait()
"""


@contextlib.contextmanager
def booted(server: Server) -> Iterator[Server]:
    """The server while it runs; where it does not boot, the tests that need it skip and say why."""
    try:
        server.__enter__()
    except (OSError, RuntimeError, AssertionError, subprocess.TimeoutExpired) as e:
        pytest.skip(f"{type(server).__name__} does not boot here: {e}")
    try:
        yield server
    finally:
        server.stop()


def assets() -> Path | None:
    """The directory with etcd, kube-apiserver and kubectl, if KUBEBUILDER_ASSETS names one."""
    value = os.environ.get("KUBEBUILDER_ASSETS")
    return Path(value) if value else None


class ApiServer:
    """etcd and kube-apiserver, RBAC on, with two users: ``admin`` and ``nobody`` (no rights).

    All calls block for up to seconds: call them from a fixture, or through
    `asyncio.to_thread`. There is no controller and no kubelet.

    Args:
        binaries: Directory with etcd, kube-apiserver and kubectl.
        watch_cache: False makes watches and lists read etcd itself, so that
            `compact` also ages the resourceVersions that watches start from.
        flags: More flags of kube-apiserver.
    """

    def __init__(self, binaries: Path, *, watch_cache: bool = True, flags: tuple[str, ...] = ()) -> None:
        self.binaries = binaries
        self.directory = Path(tempfile.mkdtemp(prefix="apiserver-"))
        self._flags = (f"--watch-cache={str(watch_cache).lower()}", *flags)
        self._tokens: dict[User, str] = {"admin": "admin-token", "nobody": "nobody-token"}
        self._keeper: subprocess.Popen[str] | None = None
        self._etcd_url = ""
        self.port = 0
        ca = trustme.CA()
        ca.cert_pem.write_to_path(self._path("ca.crt"))
        serving = ca.issue_cert("127.0.0.1", "localhost")
        serving.private_key_pem.write_to_path(self._path("server.key"))
        for blob in serving.cert_chain_pems:
            blob.write_to_path(self._path("server.crt"), append=True)
        self._path("tokens.csv").write_text(
            f"{self._tokens['admin']},admin,1,system:masters\n{self._tokens['nobody']},nobody,2\n"
        )

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Boots both (about three seconds) and returns when the server says that it is ready."""
        self._keeper = subprocess.Popen(
            [sys.executable, "-c", _KEEPER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the test run, which then stops us in order
        )
        client, peer, self.port = free_ports(3)
        self._etcd_url = f"http://127.0.0.1:{client}"
        self._run(
            "etcd",
            f"--data-dir={self._path('etcd')}",
            f"--listen-client-urls={self._etcd_url}",
            f"--advertise-client-urls={self._etcd_url}",
            f"--listen-peer-urls=http://127.0.0.1:{peer}",
            f"--initial-advertise-peer-urls=http://127.0.0.1:{peer}",
            f"--initial-cluster=default=http://127.0.0.1:{peer}",
        )
        self._start_server()

    def restart(self) -> None:
        """Kills the API server, which cuts every watch, and boots it again on the same data."""
        self.kill_server()
        self._start_server()

    def kill_server(self) -> None:
        """Kills the API server alone: from now on connections are refused."""
        self._ask("kill", "kube-apiserver")

    def stop(self) -> None:
        """Ends both and removes their files. Idempotent."""
        if self._keeper is not None:
            self._keeper.communicate(timeout=60)
            self._keeper = None
        shutil.rmtree(self.directory, ignore_errors=True)

    def token(self, user: User = "admin") -> str:
        return self._tokens[user]

    def api_client(self, user: User = "admin", *, account: str | None = None, pool: int = 100) -> ApiClient:
        """A client of kubernetes_asyncio, to be closed, which may act as an account; needs a running loop."""
        configuration = Configuration(host=self.url)
        configuration.ssl_ca_cert = str(self._path("ca.crt"))
        configuration.api_key = {"BearerToken": f"Bearer {self.token(user)}"}
        configuration.connection_pool_maxsize = pool
        client = ApiClient(configuration)
        if account is not None:
            client.set_default_header("Impersonate-User", account)
        return client

    def kubeconfig(self, user: User = "admin", namespace: str = "default") -> str:
        """The text of a kubeconfig (JSON, which is YAML) with one context."""
        ca = base64.b64encode(self._path("ca.crt").read_bytes()).decode()
        cluster = {"server": self.url, "certificate-authority-data": ca}
        context = {"cluster": "envtest", "user": user, "namespace": namespace}
        return json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "envtest",
                "clusters": [{"name": "envtest", "cluster": cluster}],
                "users": [{"name": user, "user": {"token": self.token(user)}}],
                "contexts": [{"name": "envtest", "context": context}],
            },
            indent=2,
        )

    def kubectl(self, *args: str, text: str | None = None) -> str:
        """Runs kubectl as admin with `text` on its standard input; returns what it prints."""
        config = self._path("admin.kubeconfig")
        config.write_text(self.kubeconfig())
        done = subprocess.run(
            [str(self.binaries / "kubectl"), f"--kubeconfig={config}", *args],
            input=text,
            text=True,
            capture_output=True,
            timeout=60,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"kubectl {' '.join(args)}: {done.stderr.strip()}")
        return done.stdout

    def install_extensions(self) -> bool:
        """Installs the definitions of claims and pools, and returns whether AGENT_SANDBOX_DIR has any."""
        directory = Path(os.environ.get("AGENT_SANDBOX_DIR", "/nowhere"), "crds-served")
        files = sorted(directory.glob("extensions.*.yaml"))
        for path in files:
            self.kubectl("create", "--validate=false", "-f", str(path))
        if files:
            self.kubectl("wait", "--for=condition=Established", "--timeout=60s", "crd", "--all")
        return bool(files)

    def install_crd(self, definition: Path | dict[str, Any]) -> None:
        """Installs a definition of Sandboxes, or changes it to this one, and waits until
        exactly its versions are served.

        Args:
            definition: A YAML file, or the definition itself.
        """
        crd = "sandboxes.agents.x-k8s.io"
        installed = self.kubectl("get", "crd", crd, "--ignore-not-found", "-o", "name")
        text = definition.read_text() if isinstance(definition, Path) else json.dumps(definition)
        # Not apply: it keeps a copy in an annotation, which these are too large for.
        self.kubectl("replace" if installed.strip() else "create", "--validate=false", "-f", "-", text=text)
        spec = json.loads(self.kubectl("get", "crd", crd, "-o", "json"))["spec"]
        wanted = {version["name"] for version in spec["versions"] if version["served"]}
        group = spec["group"]

        def served() -> bool:
            groups = json.loads(self.get("/apis"))["groups"]
            versions = {v["version"] for g in groups if g["name"] == group for v in g["versions"]}
            return versions == wanted and all(listed(f"/apis/{group}/{version}") for version in wanted)

        def listed(version: str) -> bool:
            plural = spec["names"]["plural"]
            if self.status(f"{version}/namespaces/default/{plural}") != 200:
                return False
            # The discovery of a version follows on its own.
            if self.status(version) != 200:
                return False
            return plural in {resource["name"] for resource in json.loads(self.get(version))["resources"]}

        wait(served, f"{crd} in {', '.join(sorted(wanted))}")

    def compact(self) -> int:
        """Compacts etcd's history up to now: older resourceVersions and continue tokens get 410."""
        revision = int(self._etcd_call("/v3/kv/range", {"key": "AA=="})["header"]["revision"])
        with contextlib.suppress(urllib.error.HTTPError):  # compacted up to here by the server itself
            self._etcd_call("/v3/kv/compaction", {"revision": str(revision), "physical": True})
        return revision

    def get(self, path: str, user: User = "admin") -> str:
        """The text of a GET of the API server.

        Raises:
            urllib.error.HTTPError: The answer is not a success.
        """
        request = urllib.request.Request(
            self.url + path, headers={"Authorization": f"Bearer {self.token(user)}"}
        )
        with self._opener().open(request, timeout=60) as response:
            return str(response.read().decode())

    def minor(self) -> int:
        """The minor version of Kubernetes that it is."""
        return int(json.loads(self.get("/version"))["minor"].rstrip("+"))

    def status(self, path: str, user: User = "admin") -> int:
        """The HTTP status of a GET; 0 where the server cannot be reached."""
        try:
            self.get(path, user)
        except urllib.error.HTTPError as error:
            error.close()
            return error.code
        except OSError:
            return 0
        return 200

    def _start_server(self) -> None:
        key = self._path("server.key")
        self._run(
            "kube-apiserver",
            f"--etcd-servers={self._etcd_url}",
            f"--secure-port={self.port}",
            "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1",
            "--endpoint-reconciler-type=none",  # newer ones refuse a loopback address without it
            f"--cert-dir={self._path('certs')}",
            f"--tls-cert-file={self._path('server.crt')}",
            f"--tls-private-key-file={key}",
            f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--token-auth-file={self._path('tokens.csv')}",
            "--authorization-mode=RBAC",
            "--service-cluster-ip-range=10.0.0.0/24",
            "--disable-admission-plugins=ServiceAccount",
            *self._flags,
        )

        def ready() -> bool:
            self._check_running("etcd", "kube-apiserver")
            return self.status("/readyz") == 200

        wait(ready, "kube-apiserver", 90)

    def _run(self, name: str, *flags: str) -> None:
        self._start(name, str(self.binaries / name), *flags)

    def _start(self, name: str, *argv: str) -> None:
        """Starts a program that ends when the server does; its output goes to NAME.log."""
        self._ask("start", name, *argv)

    def _check_running(self, *names: str) -> None:
        for name in names:
            if not self._ask("poll", name):
                log = self._path(f"{name}.log").read_text(errors="replace")
                raise RuntimeError(f"{name} ended; its log ends with:\n{log[-2000:]}")

    def _ask(self, command: str, name: str, *argv: str) -> bool:
        """Tells the keeper to do something; returns whether that server is running then."""
        if self._keeper is None or self._keeper.stdin is None or self._keeper.stdout is None:
            raise RuntimeError("the API server has not been started, or has been stopped")
        print(json.dumps([command, name, str(self._path(f"{name}.log")), *argv]), file=self._keeper.stdin)
        self._keeper.stdin.flush()
        return bool(json.loads(self._keeper.stdout.readline()))

    def _opener(self) -> urllib.request.OpenerDirector:
        tls = ssl.create_default_context(cafile=str(self._path("ca.crt")))
        return urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=tls)
        )

    def _etcd_call(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(self._etcd_url + path, json.dumps(body).encode())
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
            return json.load(answer)

    def _path(self, name: str) -> Path:
        return self.directory / name
