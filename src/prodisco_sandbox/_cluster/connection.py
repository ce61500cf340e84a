"""The connection to the cluster that this process is configured for, and its credentials."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
import yaml
from kubernetes_asyncio.client import ApiClient, Configuration, CustomObjectsApi
from kubernetes_asyncio.client.rest import RESTClientObject
from kubernetes_asyncio.config import incluster_config
from kubernetes_asyncio.config.kube_config import ConfigNode, KubeConfigLoader

from ..errors import SandboxUnavailableError

SERVICE_ACCOUNT_TOKEN = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
RETIRED_FOR = 150.0
"""Seconds after which nothing runs any more on connections with a former client certificate."""
_NOBODY = "\0"
_LISTS = ("clusters", "contexts", "users")

T = TypeVar("T")


async def open_custom_objects_api() -> Any:
    """Connects as the environment says: in-cluster if there is one, else by kubeconfig.

    KUBECONFIG may name several files, separated by colons; K8S_CONTEXT names the
    context, else the files' current-context counts. An exec credential plugin is run again
    when its token has expired, and a projected service account token, which rotates, is read
    again every minute.

    Returns:
        A ``CustomObjectsApi`` whose ``api_client`` is an `OwnClient`, which the caller closes.

    Raises:
        SandboxUnavailableError: There is no usable configuration; the message says
            where it was looked for.
    """
    credentials, configuration = Credentials(), Configuration()
    await credentials.load(configuration)
    return CustomObjectsApi(await _in_thread(lambda: OwnClient(configuration, credentials)))


class KubeconfigError(Exception):
    """A kubeconfig that is no use."""


class OwnClient(ApiClient):  # type: ignore[misc]
    """An ApiClient whose credentials can be loaded again, and beat those of ~/.netrc."""

    configuration: Any
    rest_client: Any

    def __init__(self, configuration: Configuration, credentials: Credentials) -> None:
        super().__init__(configuration)
        self._credentials = credentials
        self._retired: list[tuple[float, RESTClientObject]] = []
        _without_netrc(self.rest_client, configuration)

    async def renew_credentials(self) -> None:
        """Loads the credentials anew, whatever lifetime they claimed to have.

        Raises:
            SandboxUnavailableError: They cannot be loaded; the old ones stay in use.
        """
        fresh = Configuration()
        await self._credentials.load(fresh, again=True)
        if fresh.host != self.configuration.host:
            raise SandboxUnavailableError(
                f"the Kubernetes configuration has changed from {self.configuration.host} to {fresh.host}:"
                " restart to use it"
            )
        now = asyncio.get_running_loop().time()
        if fresh.cert_file or self.configuration.cert_file:
            # The server looks at the certificate that a connection was opened with.
            rest = await _in_thread(lambda: RESTClientObject(fresh))
            _without_netrc(rest, fresh)
            self._retired.append((now, self.rest_client))
            self.rest_client = rest
        self.configuration = fresh
        while self._retired and now - self._retired[0][0] > RETIRED_FOR:
            await self._retired.pop(0)[1].close()

    async def close(self) -> None:
        await super().close()
        while self._retired:
            await self._retired.pop()[1].close()


class Credentials:
    """Loads a Configuration, and keeps its token fresh by the times that it claims."""

    def __init__(self) -> None:
        self._loader: Any = None
        self._context = os.environ.get("K8S_CONTEXT") or None
        self._turn = asyncio.Lock()

    async def load(self, configuration: Configuration, *, again: bool = False) -> None:
        """Fills the configuration in.

        Args:
            configuration: An empty one.
            again: What was loaded before is no longer good: ask for new credentials.

        Raises:
            SandboxUnavailableError: There is no usable configuration.
        """
        looked = "in-cluster (KUBERNETES_SERVICE_HOST is not set)"
        try:
            if os.environ.get("KUBERNETES_SERVICE_HOST"):
                looked = f"in-cluster (KUBERNETES_SERVICE_HOST, {SERVICE_ACCOUNT_TOKEN})"
                await asyncio.to_thread(incluster_config.load_incluster_config, configuration)
            else:
                # Read at each use: kubernetes_asyncio freezes KUBECONFIG when it is imported.
                files = os.environ.get("KUBECONFIG") or "~/.kube/config"
                looked += f", kubeconfig {files}"
                looked += f" with context {self._context!r}" if self._context else ""
                async with self._turn:
                    await self._load_kubeconfig(files, configuration, again=again)
        except Exception as e:  # kubernetes_asyncio lets through whatever a broken file makes it raise
            raise SandboxUnavailableError(
                f"no usable Kubernetes configuration: {e}; looked {looked}; set KUBECONFIG (and K8S_CONTEXT)"
                " or pass custom_objects_api"
            ) from e
        reads_again = configuration.refresh_api_key_hook
        configuration.refresh_api_key_hook = lambda current: self._before_request(current, reads_again)
        _strip(configuration)

    async def _load_kubeconfig(self, files: str, configuration: Configuration, *, again: bool) -> None:
        loader = self._loader
        if not again or loader is None or not _forget(loader, files):
            merged = await asyncio.to_thread(read_kubeconfig, files, self._context)
            # Another current-context may be another cluster.
            self._context = merged["current-context"]
            loader = KubeConfigLoader(
                ConfigNode("kubeconfig", merged), active_context=self._context, config_base_path=None
            )
        await loader.load_and_set(configuration)
        self._loader = loader

    async def _before_request(
        self, configuration: Configuration, reads_again: Callable[[Configuration], None] | None
    ) -> None:
        """As kubernetes_asyncio asks for it: reads a token again, or runs the plugin, when it is due."""
        try:
            if reads_again is not None:
                reads_again(configuration)
            elif hasattr(self._loader, "exec_plugin_expiry"):
                async with self._turn:  # Many requests at once find it expired: one runs the plugin.
                    await self._loader.load_from_exec_plugin()
                configuration.api_key["BearerToken"] = self._loader.token
        except Exception as e:
            raise SandboxUnavailableError(f"the Kubernetes credentials cannot be renewed: {e}") from e
        _strip(configuration)


def _forget(loader: KubeConfigLoader, files: str) -> bool:
    """Makes the loader ask for new credentials.

    Returns:
        False where the files themselves are to be read again. What an auth provider gave, such as
        a refresh token that is good for once, is in none of them, and a pipe can be read only once.
    """
    user = loader._user or {}
    provider = user["auth-provider"].value.get("config") or {} if loader.provider else {}
    renewable = loader.provider == "gcp" or "refresh-token" in provider
    if not renewable and all(path.is_file() for path in _paths(files)):
        return False
    if renewable:
        provider.pop("id-token", None)
        provider.pop("access-token", None)
    loader.__dict__.pop("exec_plugin_expiry", None)
    return True


def read_kubeconfig(files: str, context: str | None) -> dict[str, Any]:
    """Merges kubeconfig files as kubectl does, and checks that the context is whole.

    Args:
        files: Paths, separated by colons. Files that do not exist are passed over.
        context: The context to use; None: current-context.

    Returns:
        The merged file, with that context as current-context.

    Raises:
        KubeconfigError: The message names the file and what is wrong with it, and holds no secret.
    """
    merged: dict[str, Any] = {"current-context": context, **{kind: {} for kind in _LISTS}}
    paths = _paths(files)
    if not paths:
        raise KubeconfigError("there is no kubeconfig file")
    for path in paths:
        content = _parsed(path)
        merged["current-context"] = merged["current-context"] or content.get("current-context")
        for kind in _LISTS:
            for item in _items(path, kind, content):
                # Paths in it are relative to its file.
                merged[kind].setdefault(item["name"], ConfigNode(f"{path}/{kind}", item, str(path)))
    where, name = ", ".join(map(str, paths)), merged["current-context"]
    if not any(merged.values()):
        raise KubeconfigError(f"{where} is empty: it needs {', '.join(_LISTS)} and current-context")
    if not name:
        raise KubeconfigError(f"{where} has no current-context: kubectl config use-context NAME sets it")
    chosen = _named(merged, "contexts", name, where)
    cluster = chosen.get("cluster")
    if not cluster:
        raise KubeconfigError(f"{where} has a context {name!r} without a cluster")
    if not isinstance(_named(merged, "clusters", cluster, where).get("server"), str):
        raise KubeconfigError(f"{where} has a cluster {cluster!r} without a server")
    if user := chosen.get("user"):
        _named(merged, "users", user, where)
    else:  # kubernetes_asyncio has no words for nobody.
        chosen["user"] = _NOBODY
        merged["users"][_NOBODY] = {"name": _NOBODY, "user": {}}
    return {**merged, **{kind: list(merged[kind].values()) for kind in _LISTS}}


def _paths(files: str) -> list[Path]:
    # Asked as kubectl asks: a pipe will do (KUBECONFIG=<(...)).
    paths = (os.path.expanduser(file) for file in files.split(os.pathsep) if file)  # noqa: PTH111
    return [Path(path) for path in paths if os.path.exists(path)]  # noqa: PTH110


def _parsed(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_bytes())
    except OSError as e:
        raise KubeconfigError(f"{path} cannot be read: {e.strerror}") from e
    except (yaml.YAMLError, RecursionError) as e:
        mark = getattr(e, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark else ""
        raise KubeconfigError(
            f"{path} is no YAML{line}: {getattr(e, 'problem', None) or type(e).__name__}"
        ) from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise KubeconfigError(
            f"{path} holds {type(content).__name__}, not a mapping with {', '.join(_LISTS)}"
        )
    return content


def _items(path: Path, kind: str, content: dict[str, Any]) -> list[dict[str, Any]]:
    items = content.get(kind) or []
    key = kind.removesuffix("s")
    if not isinstance(items, list):
        raise KubeconfigError(f"{path} has {kind} that is no list")
    for item in items:
        named = isinstance(item, dict) and isinstance(item.get("name"), str)
        if not named or not isinstance(item.get(key) or {}, dict):
            raise KubeconfigError(
                f"{path} has an entry of {kind} without a name, or whose {key} is no mapping"
            )
    return items


def _named(merged: dict[str, Any], kind: str, name: object, where: str) -> dict[str, Any]:
    """The entry of that name: its mapping."""
    if not isinstance(name, str) or name not in merged[kind]:
        known = ", ".join(map(repr, merged[kind])) or "none"
        raise KubeconfigError(f"{where} has no {kind.removesuffix('s')} {name!r} (it has {known})")
    item: dict[str, dict[str, Any]] = merged[kind][name].value
    key = kind.removesuffix("s")
    item[key] = item.get(key) or {}
    return item[key]


def _strip(configuration: Configuration) -> None:
    """A token file may end in a newline, which no header may."""
    if token := configuration.api_key.get("BearerToken"):
        configuration.api_key["BearerToken"] = token.strip()


async def _in_thread(make: Callable[[], T]) -> T:
    """Makes a client: its SSL context blocks for some 20 ms, hence the thread."""
    loop = asyncio.get_running_loop()

    def run() -> T:
        asyncio._set_running_loop(loop)  # aiohttp wants the loop that it will run in.
        try:
            return make()
        finally:
            asyncio._set_running_loop(None)

    return await asyncio.to_thread(run)


def _without_netrc(rest: RESTClientObject, configuration: Configuration) -> None:
    """Takes proxies from the environment, but no credentials from ~/.netrc.

    aiohttp does both or neither, and refuses a request for which it has found two credentials.
    """
    session = rest.pool_manager
    rest.pool_manager = aiohttp.ClientSession(connector=session.connector, read_bufsize=2**21)
    session.detach()
    url = urlsplit(configuration.host)
    if not rest.proxy and not proxy_bypass(url.hostname or ""):
        rest.proxy = getproxies().get(url.scheme)  # type: ignore[assignment]
