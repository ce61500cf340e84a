"""What the controller of agent-sandbox does on a cluster, with local server processes."""

from __future__ import annotations

import asyncio
import datetime as dt
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import manifest
from .._answers import NotFoundError, PreconditionError
from .._log import get_logger
from .._tasks import OwnedTasks
from .._watch import SandboxWatch
from ..config import SandboxManagerConfig
from ..errors import SandboxError
from ..kubernetes import MERGE_PATCH, SandboxResources
from ..manifest import Object
from ._processes import Keeper, ServerProcess

log = get_logger("local")

Command = Callable[[Path], tuple[Sequence[str], Mapping[str, str]]]
"""Arguments and environment of a server, given its directory."""


class Pod:
    """One Sandbox, and what runs for it."""

    def __init__(self, sandbox: Object) -> None:
        self.sandbox = sandbox
        self.uid = str(manifest.uid(sandbox))
        self.name = manifest.name(sandbox)
        self.seen_at = 0.0
        self.server: ServerProcess | None = None
        self.expiry: asyncio.Timeout | None = None
        self.task: asyncio.Task[None] | None = None
        self._turned: dict[str, tuple[str, str]] = {}

    def turned(self, condition: Object) -> str:
        """When the condition took on its status: now, if it was another before."""
        kind, status = condition["type"], condition["status"]
        if self._turned.get(kind, ("",))[0] != status:
            self._turned[kind] = (status, manifest.lease_time(time.time(), 0))
        return self._turned[kind][1]


class Controller:
    """Runs a server for each managed Sandbox of a namespace, and writes its status.

    It watches, or lists every `poll_interval` seconds where it may not, and keeps to
    requests that every CustomObjectsApi knows.
    """

    def __init__(
        self,
        config: SandboxManagerConfig,
        api: Any,
        keeper: Keeper,
        command: Command,
        *,
        max_starting: int,
        poll_interval: float,
    ) -> None:
        self.pods: dict[str, Pod] = {}
        self._config = config
        self._resources = SandboxResources(config, api)
        self._selector = manifest.managed_selector()
        self._watch = SandboxWatch(self._resources, self._selector, self)
        self._keeper = keeper
        self._command = command
        self._starting = asyncio.Semaphore(max_starting)
        self._poll_interval = poll_interval
        self._blind = asyncio.Event()
        self._tasks = OwnedTasks()

    def start(self) -> None:
        self._now = asyncio.get_running_loop().time
        self._tasks.supervise(self._watch.run, "local-watch")
        self._tasks.supervise(self._poll, "local-poll")

    async def aclose(self) -> None:
        """Stops; Sandboxes and servers stay as they are."""
        if stuck := await self._tasks.end():
            log.error("tasks_stuck", tasks=stuck)
        await self._resources.aclose()

    # The watch tells

    def synced(self, sandboxes: list[Object], since: float) -> None:
        for sandbox in sandboxes:
            self.changed(sandbox)
        listed = {manifest.uid(sandbox) for sandbox in sandboxes}
        for pod in list(self.pods.values()):
            if pod.uid not in listed and pod.seen_at < since:
                self.deleted(pod.sandbox)

    def changed(self, sandbox: Object) -> None:
        if manifest.is_deleting(sandbox):
            self.deleted(sandbox)
            return
        pod = self.pods.get(str(manifest.uid(sandbox)))
        if pod is None:
            pod = Pod(sandbox)
            self.pods[pod.uid] = pod
            pod.task = self._tasks.spawn(self._live(pod), f"local:{pod.name}")
        pod.sandbox = sandbox
        pod.seen_at = self._now()
        if pod.expiry is not None and not pod.expiry.expired():
            # Its owner keeps the lease ahead while it lives.
            pod.expiry.reschedule(self._expires(sandbox))

    def deleted(self, sandbox: Object) -> None:
        pod = self.pods.pop(str(manifest.uid(sandbox)), None)
        if pod is not None and pod.task is not None:
            pod.task.cancel()

    def down(self) -> None:
        self._blind.set()

    async def _poll(self) -> None:
        """Lists, while there is no watch."""
        while True:
            await self._blind.wait()
            since = self._now()
            try:
                self.synced((await self._resources.list(self._selector))[0], since)
            except SandboxError as e:
                log.info("list_failed", reason=str(e))
            if self._watch.active:
                self._blind.clear()
            else:
                await asyncio.sleep(self._poll_interval)

    # A Sandbox's life

    async def _live(self, pod: Pod) -> None:
        """Keeps one Sandbox; ended by cancellation, when it is deleted."""
        if manifest.readiness(pod.sandbox, self._config).state == "terminal":
            return  # Over before this cluster was there.
        try:
            await self._run_until_expiry(pod)
        except SandboxError as e:
            log.error("sandbox_abandoned", sandbox=pod.name, reason=str(e))  # noqa: TRY400
        finally:
            pod.expiry = None
            if pod.server is not None:
                pod.server.stop()

    async def _run_until_expiry(self, pod: Pod) -> None:
        try:
            async with asyncio.timeout_at(self._expires(pod.sandbox)) as pod.expiry:
                await self._run(pod)
                await asyncio.get_running_loop().create_future()
        except TimeoutError:
            log.info("sandbox_expired", sandbox=pod.name)
        if pod.server is not None:
            pod.server.stop()
            await pod.server.ended()
        if pod.sandbox["spec"].get("shutdownPolicy") == "Delete":
            await self._resources.delete(pod.name, pod.uid, math.inf)
        else:
            await self._write(pod, ready("False", "SandboxExpired", "The shutdownTime has passed"))

    async def _run(self, pod: Pod) -> None:
        await self._write(pod, ready("False", "DependenciesNotReady", "The server is starting"))
        async with self._starting:
            server = pod.server = self._keeper.new()
            server.start(*self._command(server.directory))
            await server.settled()
        if server.target is not None:
            log.debug("server_started", sandbox=pod.name, target=server.target)
            await self._write(pod, ready("True", "DependenciesReady", "The server is ready"))
        end = await server.ended()
        log.warning("server_ended", sandbox=pod.name, status=end.status, log=end.log)
        reason = "PodFailed" if end.status else "PodSucceeded"
        finished = {"type": "Finished", "status": "True", "reason": reason, "message": str(end)}
        await self._write(pod, ready("False", reason, str(end)), finished)

    def _expires(self, sandbox: Object) -> float | None:
        """spec.shutdownTime, on the loop's clock."""
        text = sandbox["spec"].get("shutdownTime")
        if not isinstance(text, str):
            return None
        return self._now() + dt.datetime.fromisoformat(text).timestamp() - time.time()

    async def _write(self, pod: Pod, *conditions: Object) -> None:
        """Writes a Sandbox's status, however long that takes."""
        generation = pod.sandbox["metadata"].get("generation", 1)
        status: Object = {
            "conditions": [
                {**condition, "observedGeneration": generation, "lastTransitionTime": pod.turned(condition)}
                for condition in conditions
            ],
            # No address: none leads here, and a made-up one might lead to somebody else.
            "service": pod.name,
            "serviceFQDN": f"{pod.name}.{self._config.namespace}.svc.cluster.local",
        }
        sandbox: Object | None = pod.sandbox
        while sandbox is not None and manifest.uid(sandbox) == pod.uid:
            # Of the status, a wrong uid is no conflict: it would go to a successor of this name.
            body = {"metadata": {"resourceVersion": sandbox["metadata"]["resourceVersion"]}, "status": status}
            try:
                await self._resources._call(
                    "patch",
                    "patch_namespaced_custom_object_status",
                    pod.name,
                    body,
                    deadline=math.inf,
                    _content_type=MERGE_PATCH,
                )
            except NotFoundError:  # Deleted; the watch will tell.
                return
            except PreconditionError:
                sandbox = await self._resources.get(pod.name, math.inf)
            else:
                return


def ready(status: str, reason: str, message: str) -> Object:
    return {"type": "Ready", "status": status, "reason": reason, "message": message}
