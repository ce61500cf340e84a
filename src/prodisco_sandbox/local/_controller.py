"""agent-sandbox's controller, and a node whose pods are local server processes."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .._aio.tasks import OwnedTasks
from .._cluster import claim, metadata
from .._cluster.api_errors import NotFoundError, PreconditionError
from .._cluster.manifest import holds_volumes
from .._cluster.metadata import Object
from .._cluster.requests import SandboxResources
from .._log import get_logger
from ..config import SandboxManagerConfig
from ..errors import SandboxError
from ..testing import _agent_sandbox as model
from ..testing import _warm_pools as model_of_claims
from ._claims import Claims
from ._follow import Follower
from ._processes import Keeper, ServerProcess

log = get_logger("local")

Command = Callable[[Path, Path], tuple[Sequence[str], Mapping[str, str]]]
"""Arguments and environment of a server, given its directory and workspace."""

NODE = "local"


class Pod:
    """A server process as a pod: one that has ended stays, as under restartPolicy Never.

    Attributes:
        state: What the controller reads of it.
        server: Its process; None until it has its turn to start.
        task: What runs it.
    """

    def __init__(self, state: model.Pod) -> None:
        self.state = state
        self.server: ServerProcess | None = None
        self.task: asyncio.Task[None] | None = None

    @property
    def has_ended(self) -> bool:
        return self.server is None or self.server.exit is not None

    def delete(self) -> None:
        """Starts to end it; it is gone when the controller has seen its end."""
        self.state = replace(self.state, deleting=True)
        if self.server is not None:
            self.server.stop()
        elif self.task is not None:
            self.task.cancel()


class Worker:
    """The work on one Sandbox, until it is deleted.

    Attributes:
        sandbox: As it was last seen.
        seen_at: When that was, on the loop's clock.
        wakes_at: When the controller makes its next pass if nothing happens before.
    """

    def __init__(self, sandbox: Object) -> None:
        self.sandbox = sandbox
        self.uid = str(metadata.uid(sandbox))
        self.name = metadata.name(sandbox)
        self.seen_at = 0.0
        self.wakes_at: float | None = None
        self.changed = asyncio.Event()
        self.task: asyncio.Task[None] | None = None


class Controller(Follower):
    """Runs a server for each managed Sandbox of a namespace, and writes its status.

    It watches, or lists every `poll_interval` seconds where it may not, and keeps to
    requests that every CustomObjectsApi knows. `model.reconcile` decides what it does and
    writes.

    Attributes:
        workers: One for each Sandbox, by its uid.
        pods: By name, which is the Sandbox's; one may outlive its Sandbox for a moment.
        claims: The claims of the namespace.
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
        warm: int,
    ) -> None:
        super().__init__(SandboxResources(config, api), poll_interval)
        self.claims = Claims(config, api, self, warm=warm, poll_interval=poll_interval)
        self.workers: dict[str, Worker] = {}
        self.pods: dict[str, Pod] = {}
        self._addresses = itertools.count(1)
        self._workspaces: dict[str, Path] = {}
        """Those that outlive their servers, by the uid of their Sandboxes."""
        self._keeper = keeper
        self._command = command
        self._starting = asyncio.Semaphore(max_starting)
        self._tasks = OwnedTasks()

    def start(self) -> None:
        self._now = asyncio.get_running_loop().time
        self.follow(self._tasks, "local")
        self._tasks.supervise(lambda: self.claims.run(self._tasks), "local-claims")

    async def aclose(self) -> None:
        """Stops; Sandboxes and servers stay as they are."""
        if stuck := await self._tasks.end():
            log.error("tasks_stuck", tasks=stuck)
        await self.claims.resources.aclose()
        await self.resources.aclose()

    # Calls of the watch

    def seen_before(self, since: float) -> list[Object]:
        return [worker.sandbox for worker in self.workers.values() if worker.seen_at < since]

    def changed(self, obj: Object) -> None:
        if metadata.is_deleting(obj):
            self.deleted(obj)
            return
        worker = self.workers.get(str(metadata.uid(obj)))
        if worker is None:
            worker = Worker(obj)
            self.workers[worker.uid] = worker
            worker.task = self._tasks.spawn(self._work(worker), f"local:{worker.name}")
        worker.sandbox = obj
        worker.seen_at = self._now()
        worker.changed.set()
        self.claims.wake()

    def deleted(self, obj: Object) -> None:
        worker = self.workers.pop(str(metadata.uid(obj)), None)
        if worker is None:
            return
        self.claims.wake()
        if worker.task is not None:
            worker.task.cancel()
        if (pod := self.pod_of(worker.uid, worker.name)) is not None:
            self.end(pod)
        self._release_workspace(worker.uid)

    def sandboxes(self) -> list[Object]:
        return [worker.sandbox for worker in self.workers.values()]

    def sandbox(self, name: str) -> Object | None:
        return next((found for found in self.sandboxes() if metadata.name(found) == name), None)

    def target(self, sandbox: Object) -> str | None:
        """Where the server of a Sandbox, or of a claim's Sandbox, serves; None while it does not."""
        name, uid = metadata.name(sandbox), str(metadata.uid(sandbox))
        if "warmPoolRef" in (sandbox.get("spec") or {}):
            name = claim.machine(sandbox).pod
            found = self.sandbox(name) or {}
            uid = str(metadata.uid(found)) if model_of_claims.owns(sandbox, found) else ""
        pod = self.pod_of(uid, name)
        return pod.server.target if pod and pod.server else None

    # The node

    def pod_of(self, uid: str, name: str) -> Pod | None:
        """The pod that belongs to this very Sandbox."""
        pod = self.pods.get(name)
        return pod if pod is not None and pod.state.owner[1] == uid else None

    def end(self, pod: Pod) -> None:
        """Deletes a pod, as kubectl does."""
        pod.delete()
        if pod.has_ended:
            self._pod_changed(pod)

    async def _run(self, pod: Pod, workspace: Path | None) -> None:
        async with self._starting:
            server = pod.server = self._keeper.new()
            self._set(pod, node=NODE)
            command = self._command(server.directory, workspace or server.directory / "workspace")
            server.start(*command, workspace)
            await server.settled()
        if server.target is not None and not pod.state.deleting:
            log.debug("server_started", sandbox=pod.state.name, target=server.target)
            # Addresses that are reserved to lead nowhere (RFC 6666): a server has none.
            address = f"100::{next(self._addresses):x}"
            self._set(pod, phase="Running", ready=True, ips=(address,))
        end = await server.ended()
        if not pod.state.deleting:
            log.warning("server_ended", sandbox=pod.state.name, status=end.status, log=end.log)
        how = "" if pod.state.deleting else str(end)
        self._set(pod, phase="Failed" if end.status else "Succeeded", ready=False, message=how)

    def _set(self, pod: Pod, **fields: Any) -> None:
        pod.state = replace(pod.state, **fields)
        self._pod_changed(pod)

    def _pod_changed(self, pod: Pod) -> None:
        """Lets the controller look at a pod; one that has ended and has no Sandbox is gone."""
        if pod.state.deleting and pod.has_ended and pod.state.owner[1] not in self.workers:
            self._forget(pod)
        for worker in self.workers.values():
            if worker.name == pod.state.name:
                worker.changed.set()

    def _forget(self, pod: Pod) -> None:
        if self.pods.get(pod.state.name) is pod:
            del self.pods[pod.state.name]
            self._release_workspace(pod.state.owner[1])

    def _workspace(self, worker: Worker) -> Path | None:
        """The workspace that a Sandbox's servers share; None: each has its own."""
        if worker.uid not in self._workspaces and holds_volumes(worker.sandbox):
            self._workspaces[worker.uid] = self._keeper.new_workspace()
        return self._workspaces.get(worker.uid)

    def _release_workspace(self, uid: str) -> None:
        """Removes the workspace of a Sandbox that is gone, once its last server is."""
        in_use = any(pod.state.owner[1] == uid for pod in self.pods.values())
        if uid in self._workspaces and uid not in self.workers and not in_use:
            self._keeper.remove_workspace(self._workspaces.pop(uid))

    # A Sandbox's worker

    async def _work(self, worker: Worker) -> None:
        """Keeps one Sandbox; ended by cancellation, when it is deleted."""
        self._restore_pod(worker)
        try:
            while True:
                worker.changed.clear()
                pod = self.pods.get(worker.name)
                wait = await self._make_pass(worker, pod)
                if pod is not None and pod.state.deleting and pod.has_ended:
                    self._forget(pod)  # Now that its end has been seen.
                    continue
                worker.wakes_at = None if wait is None else self._now() + wait
                try:
                    async with asyncio.timeout_at(worker.wakes_at):
                        await worker.changed.wait()
                except TimeoutError:
                    continue
        except SandboxError as e:
            log.error("sandbox_abandoned", sandbox=worker.name, reason=str(e))  # noqa: TRY400
            if (pod := self.pod_of(worker.uid, worker.name)) is not None:
                self.end(pod)

    def _restore_pod(self, worker: Worker) -> None:
        """Restores the failed pod of a Sandbox that had failed before this cluster started."""
        status = worker.sandbox.get("status") or {}
        conditions = {c["type"]: c for c in status.get("conditions") or ()}
        finished = conditions.get("Finished", {})
        if finished.get("status") != "True" or worker.name in self.pods:
            return
        state = replace(
            model.new_pod(worker.sandbox),
            phase="Succeeded" if finished.get("reason") == "PodSucceeded" else "Failed",
            node=status.get("nodeName", ""),
            ips=tuple(status.get("podIPs") or ()),
            message=finished.get("message", ""),
        )
        self.pods[worker.name] = Pod(state)

    async def _make_pass(self, worker: Worker, pod: Pod | None) -> float | None:
        """Makes one pass; returns the seconds to the next if nothing happens before."""
        made = model.reconcile(worker.sandbox, pod.state if pod else None, time.time())
        if made.create_pod:
            pod = self.pods[worker.name] = Pod(model.new_pod(worker.sandbox))
        if made.delete_pod and pod is not None:
            pod.delete()
        if made.delete_sandbox:
            log.info("sandbox_expired", sandbox=worker.name)
            await self.resources.delete(worker.name, worker.uid, math.inf)
            return None
        annotations = worker.sandbox["metadata"].get("annotations") or {}
        if annotations.get(model.POD_NAME) != made.pod_name:
            change: Object = {"metadata": {"annotations": {model.POD_NAME: made.pod_name}}}
            if not await self._patch(worker, change):
                return None
        if made.status is not None:
            old = worker.sandbox.get("status") or {}
            change = {"status": {**dict.fromkeys(old), **made.status}}
            if not await self._patch(worker, change, status=True):
                return None
        if pod is not None and pod.state == model.new_pod(worker.sandbox) and pod.task is None:
            # Only after the status was written: a controller that may not write starts nothing.
            run = self._run(pod, self._workspace(worker))
            pod.task = self._tasks.spawn(run, f"local-pod:{worker.name}")
        return made.wait

    async def _patch(self, worker: Worker, change: Object, *, status: bool = False) -> bool:
        """Patches a Sandbox if it is unchanged since it was last seen, however long that takes.

        Returns:
            Whether it was unchanged; otherwise the pass has to be made again.
        """
        # By resourceVersion, since a status patch ignores the uid and would reach a successor of this name.
        version = worker.sandbox["metadata"]["resourceVersion"]
        body = {**change, "metadata": {**change.get("metadata", {}), "resourceVersion": version}}
        try:
            found = await self.resources.patch(worker.name, body, math.inf, status=status)
        except NotFoundError:  # Deleted; the watch will tell.
            return False
        except PreconditionError:
            found = await self.resources.get(worker.name, math.inf)
            if found is not None and metadata.uid(found) == worker.uid:
                self.changed(found)
            return False
        if found is not None:
            worker.sandbox = found
            self.claims.wake()
        return True
