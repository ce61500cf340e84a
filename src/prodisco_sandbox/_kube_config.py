"""Opening a connection to the cluster that this process is configured for."""

from __future__ import annotations

import asyncio
import os
from functools import partial
from pathlib import Path
from typing import Any

from .errors import SandboxUnavailableError

SERVICE_ACCOUNT_TOKEN = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")


async def open_custom_objects_api() -> Any:
    """Connects as the environment says: in-cluster if there is one, else by kubeconfig.

    KUBECONFIG may name several files, separated by colons; K8S_CONTEXT names the
    context, else the files' current-context counts. An exec credential plugin is run again
    when its token has expired. In a cluster the projected service
    account token rotates: kubernetes_asyncio reads it again every minute.

    Returns:
        A ``CustomObjectsApi`` whose ``api_client`` the caller closes.

    Raises:
        SandboxUnavailableError: There is no usable configuration; the message says
            where it was looked for.
    """
    from kubernetes_asyncio import config
    from kubernetes_asyncio.client import ApiClient, Configuration, CustomObjectsApi

    configuration = Configuration()
    looked = "in-cluster (KUBERNETES_SERVICE_HOST is not set)"
    try:
        if os.environ.get("KUBERNETES_SERVICE_HOST"):
            looked = f"in-cluster (KUBERNETES_SERVICE_HOST, {SERVICE_ACCOUNT_TOKEN})"
            await asyncio.to_thread(config.load_incluster_config, client_configuration=configuration)
        else:
            files = _kubeconfig_files()
            context = os.environ.get("K8S_CONTEXT") or None
            looked += f", kubeconfig {files}" + (f" with context {context!r}" if context else "")
            _check_one_is_there(files)
            loader = await config.load_kube_config(
                config_file=files, context=context, client_configuration=configuration, persist_config=False
            )
            if hasattr(loader, "exec_plugin_expiry"):
                configuration.refresh_api_key_hook = partial(_refresh_exec_token, loader, asyncio.Lock())
    except Exception as e:  # kubernetes_asyncio lets through whatever a broken file makes it raise
        raise SandboxUnavailableError(
            f"no usable Kubernetes configuration: {e}; looked {looked}; set KUBECONFIG (and K8S_CONTEXT)"
            " or pass custom_objects_api"
        ) from e
    loop = asyncio.get_running_loop()

    def build() -> ApiClient:
        # Making an SSL context blocks for some 20 ms, hence the thread; aiohttp wants the
        # loop that it will run in, hence the loan.
        asyncio._set_running_loop(loop)
        try:
            return ApiClient(configuration)
        finally:
            asyncio._set_running_loop(None)

    return CustomObjectsApi(await asyncio.to_thread(build))


def _kubeconfig_files() -> str:
    # Read at each use: kubernetes_asyncio freezes KUBECONFIG when it is imported.
    return os.environ.get("KUBECONFIG") or str(Path("~/.kube/config").expanduser())


def _check_one_is_there(files: str) -> None:
    # kubernetes_asyncio says of a missing file that it has no key current-context.
    # Asked as it asks: a pipe will do (KUBECONFIG=<(...)), and what cannot be reached is passed over.
    if not any(os.path.exists(os.path.expanduser(file)) for file in files.split(os.pathsep)):  # noqa: PTH110, PTH111
        raise FileNotFoundError("there is no kubeconfig file")


async def _refresh_exec_token(loader: Any, turn: asyncio.Lock, configuration: Any) -> None:
    """Runs the exec credential plugin again once its token has expired; called before each request."""
    async with turn:  # Many requests at once find it expired: one of them runs the plugin.
        await loader.load_from_exec_plugin()
    configuration.api_key["BearerToken"] = loader.token
