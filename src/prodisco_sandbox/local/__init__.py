"""LocalCluster: sandboxes as local processes, no cluster needed. For development, on Linux."""

from __future__ import annotations

import asyncio
import contextvars
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from .._aio.tasks import outlast
from .._checks import integer, seconds
from .._cluster.metadata import Object
from .._log import get_logger
from ..config import SandboxManagerConfig
from ..errors import SandboxError
from ..testing import FakeCustomObjectsApi
from ._claims import POOL

if TYPE_CHECKING:  # These can be imported on Linux only.
    from ._controller import Controller, Pod

__all__ = ["LocalCluster"]

log = get_logger("local")

PASSED = ("PATH", "LANG", "LC_ALL", "TZ", "PYTHONPATH", "LD_LIBRARY_PATH")
"""Variables of the environment that servers inherit by default."""

OWN_OPTIONS = (
    "--socket", "--host", "--port", "--transport-mode", "--tls-cert", "--tls-key", "--tls-ca", "--pod-name",
    "--workspace", "--cache-dir", "--hide", "--exit-with-parent", "--require-token", "--check", "--help",
    "-h",
)  # fmt: skip
"""Options of the server that are the cluster's to set, or that keep it from serving."""

# The kernel takes 107 bytes: /prodisco-xxxxxxxx, a number, /socket.
_LONGEST_BASE = 107 - len("/prodisco-xxxxxxxx/123456/socket")
_NOT_STARTED = "the cluster has not been started: use `async with LocalCluster()`"


class LocalCluster:
    """Runs each Sandbox as a server process of its own on this machine.

    ::

        async with LocalCluster() as cluster:
            config = cluster.config(max_sessions=50)
            async with SandboxManager(config, custom_objects_api=cluster.custom_objects_api) as manager:
                client = await manager.get_client(session_id)

    A small controller does for the managed Sandboxes of a namespace what agent-sandbox
    does on a cluster: it runs a server (`python -m prodisco_sandbox.server`, on a Unix
    socket in a directory of its own) as the pod of each, and writes the same conditions in
    the same steps. It honours ``spec.shutdownTime``, and ``spec.operatingMode``: a suspended
    Sandbox has no server. The pod template is not looked at. A server that ends by itself is a
    failed pod under restartPolicy Never: Ready is False and Finished True, with the reason PodFailed.

    The workspace goes with its server, except where the Sandbox has ``spec.volumeClaimTemplates``
    (``cluster.config(on_idle="suspend")``, or a `workspace_storage`): then it stays, whatever the
    templates say, until the Sandbox is deleted or the cluster ends, and each server of that Sandbox
    gets it. TMPDIR, cached scripts and processes are always the server's own.

    With `warm`, so many servers are started ahead, and a session takes one of them over: a
    SandboxClaim, whatever pool it names, binds a server that is ready, another one is started in its
    place, and where none is ready the claim starts a server of its own, under its name. A server
    is gone with its claim, and never another session's. Claims without `warm` start their own.

    No process, socket or file outlives the cluster, also if its process is killed: then
    they are gone within some two seconds. The cluster belongs to the event loop that it
    is started in. Several may run at once.

    These are processes of the same user on the same machine: a sandbox in name only. Run
    no code there that you would not run yourself. With Landlock (Linux 5.13; signals since
    6.12) sandboxes are kept from each other: of `directory`, code sees what is its own
    server's only, and each server answers only this process, which alone has its token.
    Without, ``sandboxes_not_separated`` is logged.

    Args:
        custom_objects_api: A kubernetes_asyncio ``CustomObjectsApi`` whose Sandboxes to
            run; no other controller may run them. It is never closed here. None: a
            `FakeCustomObjectsApi`, in memory.
        namespace: The namespace whose Sandboxes are run.
        api_version: "auto", "v1alpha1" or "v1beta1", as in `SandboxManagerConfig`.
        server_args: Further arguments of the servers, such as
            ``["--memory-limit-mb", "512"]``. By default they have no zygote; ``["--zygote"]``
            gives each one of its own.
        python: The interpreter that runs the servers; None: the one that runs this.
        pass_env: Names of variables that the servers inherit; they get no others.
        max_starting: How many servers may be starting at the same time.
        directory: Where the cluster makes its own directory, with access for this user
            only; None: the system's directory for temporary files. Code in the sandboxes
            sees nothing else in it, but for its own files and a Python that is installed there.
        poll_interval: How often the Sandboxes are listed where they cannot be watched, in
            seconds.
        warm: How many servers are started ahead.

    Raises:
        ValueError: An argument is wrong; the message names it.
        SandboxError: This is not Linux.
    """

    def __init__(
        self,
        *,
        custom_objects_api: Any | None = None,
        namespace: str = "prodisco",
        api_version: Literal["auto", "v1alpha1", "v1beta1"] = "auto",
        server_args: Sequence[str] = (),
        python: str | os.PathLike[str] | None = None,
        pass_env: Iterable[str] = PASSED,
        max_starting: int = 4,
        directory: str | os.PathLike[str] | None = None,
        poll_interval: float = 1.0,
        warm: int = 0,
    ) -> None:
        if sys.platform != "linux":
            raise SandboxError(
                f"a local cluster needs Linux (/proc, child subreapers), not {sys.platform}:"
                " run it in a container, or use a cluster"
            )
        from ._processes import Keeper

        integer("max_starting", max_starting, least=1, most=None)
        integer("warm", warm, least=0, most=None)
        self._warm = warm
        self._python = _interpreter(python)
        self._server_args = _strings("server_args", server_args)
        for arg in self._server_args:
            if arg.partition("=")[0] in OWN_OPTIONS:
                own = ", ".join(OWN_OPTIONS)
                raise ValueError(f"server_args has {arg!r}: the cluster itself sets {own}")
        passed = _strings("pass_env", pass_env)
        self._env = {name: os.environ[name] for name in passed if name in os.environ}
        seconds("poll_interval", poll_interval)
        self._poll_interval = poll_interval
        self._config = SandboxManagerConfig(mode="multi", namespace=namespace, api_version=api_version)
        self._fake = FakeCustomObjectsApi() if custom_objects_api is None else None
        self._api = self._fake if custom_objects_api is None else custom_objects_api
        self._base = _base(directory)
        self._keeper = Keeper(self._base)
        self._controller: Controller | None = None
        self._max_starting = max_starting
        self._closing: asyncio.Task[None] | None = None
        self._settled = asyncio.Event()

    @property
    def custom_objects_api(self) -> Any:
        """The ``custom_objects_api`` for a `SandboxManager`."""
        return self._api

    @property
    def directory(self) -> Path:
        """The cluster's directory: one of each server's inside, with its ``server.log``, and those
        workspaces that outlive their servers.

        Raises:
            SandboxError: The cluster has not been started.
        """
        if self._keeper.root is None:
            raise SandboxError(_NOT_STARTED)
        return self._keeper.root

    def endpoint(self, sandbox: Object) -> str | None:
        """The gRPC target of the server of a Sandbox, or of a claim's Sandbox; None while there is none.

        For ``endpoint`` of `SandboxManagerConfig`; the status holds no address that leads
        to a server.
        """
        if self._controller is None:
            raise SandboxError(_NOT_STARTED)
        return self._controller.target(sandbox)

    def config(self, **settings: Any) -> SandboxManagerConfig:
        """Settings of a manager on this cluster: multi mode, the namespace, the endpoint, the warm pool,
        and with ``on_idle="suspend"`` a volume for the workspace, whose size and class mean nothing here.

        Args:
            settings: Further fields of `SandboxManagerConfig`; they beat the cluster's.

        Raises:
            ValueError, TypeError: As `SandboxManagerConfig`.
        """
        own: dict[str, Any] = {
            "mode": "multi",
            "namespace": self._config.namespace,
            "api_version": self._config.api_version,
            "endpoint": self.endpoint,
            **({"warm_pool": POOL} if self._warm else {}),
            **({"workspace_storage": "1Gi"} if settings.get("on_idle") == "suspend" else {}),
        }
        return SandboxManagerConfig(**(own | settings))

    def kill(self, name: str) -> None:
        """Kills the server of a Sandbox, or of a claim, with SIGKILL, as the kernel does when memory
        runs out.

        Raises:
            KeyError: No server runs for a Sandbox of this name.
        """
        pod = self._pod(name)
        if pod.server is None or pod.has_ended or pod.state.deleting:
            raise KeyError(f"no server runs for a Sandbox {name!r}")
        pod.server.kill()

    def delete_pod(self, name: str) -> None:
        """Ends the server of a Sandbox, or of a claim, in good order, as a drained node or
        ``kubectl delete pod`` does: another one starts in the same Sandbox. The workspace is empty
        then, unless the Sandbox has volumes.

        Raises:
            KeyError: There is no server for a Sandbox of this name, not even one that has ended.
        """
        pod = self._pod(name)
        assert self._controller is not None  # noqa: S101
        self._controller.end(pod)

    def _pod(self, name: str) -> Pod:
        pod = None
        if self._controller is not None:
            pod = self._controller.pods.get(self._controller.claims.bound(name))
        if pod is None:
            raise KeyError(f"no server runs for a Sandbox {name!r}")
        return pod

    async def start(self) -> None:
        """Starts the controller. If this fails or is cancelled, the cluster is closed.

        Raises:
            SandboxError: It was started or closed before, or is closed meanwhile.
            SandboxUnavailableError: The system refuses a process.
        """
        if self._controller is not None or self._closing is not None:
            raise SandboxError("a cluster is started once: make a new one")
        from ..server import _confine
        from ._controller import Controller

        self._controller = Controller(
            self._config,
            self._api,
            self._keeper,
            self._command,
            max_starting=self._max_starting,
            poll_interval=self._poll_interval,
            warm=self._warm,
        )
        try:
            await self._keeper.start()
        except BaseException:
            self._settled.set()
            await outlast(self._close())
            raise
        self._settled.set()
        version = _confine.landlock_version()
        in_namespaces = any(arg.rpartition("=")[2] == "bwrap" for arg in self._server_args)
        if version < _confine.LANDLOCK_SCOPES and not in_namespaces:
            what = "signal the servers" if version else "read the files, and signal the servers,"
            text = f"the code of a sandbox can {what} of others"
            log.warning("sandboxes_not_separated", landlock=version, reason=text)
        if self._closing is not None:  # By another task meanwhile.
            await outlast(self._close())  # type: ignore[unreachable]
            raise SandboxError("the cluster was closed while it started")
        self._controller.start()

    async def aclose(self) -> None:
        """Ends every server and removes every file, kept workspaces too. Sandboxes stay as they are.

        Idempotent. Safe to cancel: it goes on in a task of the cluster's. Leaving ``async
        with`` waits for it even if cancelled.
        """
        await asyncio.wait({self._close()})
        self._close().result()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await outlast(self._close())

    def _close(self) -> asyncio.Task[None]:
        if self._closing is None:
            self._closing = asyncio.create_task(
                self._run_close(), name="local-close", context=contextvars.Context()
            )
        return self._closing

    async def _run_close(self) -> None:
        if self._controller is not None:
            await self._settled.wait()
            await self._controller.aclose()
        await self._keeper.aclose()
        if self._fake is not None:
            await self._fake.aclose()

    def _command(self, directory: Path, workspace: Path) -> tuple[Sequence[str], Mapping[str, str]]:
        """How a server is started."""
        # -P: a file in its working directory must not pass for a module.
        argv = [self._python, "-P", "-m", "prodisco_sandbox.server", "--exit-with-parent"]
        argv += ["--socket", str(directory / "socket"), "--workspace", str(workspace)]
        # Other clusters of this user lie there, too.
        hidden = directory.parent if self._base == Path("/") else self._base
        argv += ["--require-token", "--hide", str(hidden)]
        # Many servers share this machine, and a zygote takes memory of its own in each.
        argv += ["--cache-dir", str(directory / "cache-dir"), "--no-zygote"]
        return argv + self._server_args, {**self._env, "TMPDIR": str(directory / "tmp")}


def _interpreter(python: str | os.PathLike[str] | None) -> str:
    found = shutil.which(sys.executable if python is None else python)
    if found is None:
        raise ValueError(f"python is {python!r}: there is no such program")
    return str(Path(found).absolute())


def _strings(name: str, value: object) -> list[str]:
    found: list[Any] = [value] if isinstance(value, str) or not isinstance(value, Iterable) else list(value)
    if isinstance(value, str) or not all(isinstance(text, str) for text in found):
        raise ValueError(f"{name} is {value!r}: it must be a sequence of strings")
    return found


def _base(directory: str | os.PathLike[str] | None) -> Path:
    base = Path(tempfile.gettempdir() if directory is None else directory).absolute()
    if len(os.fsencode(base)) > _LONGEST_BASE:
        if directory is not None:
            raise ValueError(
                f"directory is {str(directory)!r}: sockets in it would have names that the kernel"
                f" refuses; its absolute path must have at most {_LONGEST_BASE} bytes"
            )
        base = Path("/tmp")
    if not base.is_dir():
        raise ValueError(f"directory is {str(directory)!r}: there is no such directory")
    return base
