"""The cluster that this process is configured for, and its credentials.

kubernetes_asyncio takes half a second to import: only what opens a connection loads this module.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
from kubernetes_asyncio.client import ApiClient, Configuration, CustomObjectsApi
from kubernetes_asyncio.client.rest import RESTClientObject
from kubernetes_asyncio.config import incluster_config
from kubernetes_asyncio.config.kube_config import ConfigNode, KubeConfigLoader

from ..errors import SandboxUnavailableError
from .kubeconfig import existing, read_kubeconfig

SERVICE_ACCOUNT_TOKEN = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
RETIRED_FOR = 150.0
"""Seconds after which no request or watch uses a connection with a former client certificate."""

T = TypeVar("T")


async def open_custom_objects_api() -> Any:
    """A ``CustomObjectsApi`` as the environment says: in-cluster if there is one, else by kubeconfig.

    KUBECONFIG may name several files, separated by colons; K8S_CONTEXT names the context, else
    current-context counts. An exec credential plugin is run again when its token has expired, and a
    projected service account token, which rotates, is read again every minute. The caller closes the
    `OwnClient` in ``api_client``. `SandboxUnavailableError` says where a configuration was looked for.
    """
    credentials, configuration = Credentials(), Configuration()
    await credentials.load(configuration)
    return CustomObjectsApi(await _in_thread(lambda: OwnClient(configuration, credentials)))


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

        `SandboxUnavailableError`: they cannot be loaded; the old ones stay in use.
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
        """Fills an empty configuration in; `again`: what was loaded before is no longer good.

        `SandboxUnavailableError`: there is no usable one.
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
            loader = _Loader(
                ConfigNode("kubeconfig", merged), active_context=self._context, config_base_path=None
            )
        await loader.load_and_set(configuration)
        self._loader = loader

    async def _before_request(
        self, configuration: Configuration, reads_again: Callable[[Configuration], None] | None
    ) -> None:
        """Called by kubernetes_asyncio: reads a token again, or runs the plugin, when that is due."""
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


class _Loader(KubeConfigLoader):  # type: ignore[misc]
    """Ends the credential plugin when its caller is cancelled; kubernetes_asyncio would let it run on."""

    async def load_from_exec_plugin(self) -> bool:
        try:
            return bool(await super().load_from_exec_plugin())
        except BaseException as e:
            # The process is in a local variable of kubernetes_asyncio's, and nowhere else.
            for frame, _ in traceback.walk_tb(e.__traceback__):
                for value in frame.f_locals.values():
                    if isinstance(value, asyncio.subprocess.Process) and value.returncode is None:
                        with contextlib.suppress(ProcessLookupError):
                            value.kill()
                        await value.wait()
            raise


def _forget(loader: KubeConfigLoader, files: str) -> bool:
    """Makes the loader ask for new credentials.

    Returns:
        False where the files themselves are to be read again. What an auth provider gave, such as
        a refresh token that is good for once, is in none of them, and a pipe can be read only once.
    """
    user = loader._user or {}
    provider = user["auth-provider"].value.get("config") or {} if loader.provider else {}
    renewable = loader.provider == "gcp" or "refresh-token" in provider
    if not renewable and all(path.is_file() for path in existing(files)):
        return False
    if renewable:
        provider.pop("id-token", None)
        provider.pop("access-token", None)
    loader.__dict__.pop("exec_plugin_expiry", None)
    return True


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
