"""agent-sandbox's controllers of claims and of one warm pool, whose members are local processes."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .._aio.pacing import backoff
from .._aio.tasks import OwnedTasks
from .._cluster import claim as claims
from .._cluster import metadata
from .._cluster.api_errors import NotFoundError, PreconditionError
from .._cluster.manifest import GROUP, pod_ips
from .._cluster.metadata import Object
from .._cluster.requests import SandboxResources
from .._log import get_logger
from ..config import SandboxManagerConfig
from ..errors import SandboxError
from ..testing import _warm_pools as model
from ..testing._kinds import CLAIM, SANDBOX
from ._follow import Follower

if TYPE_CHECKING:
    from ._controller import Controller

log = get_logger("local")

POOL = "local"
"""The name of the pool, which claims need not give."""
_TEMPLATE: Object = {
    "metadata": {"name": POOL},
    "spec": {
        "podTemplate": {"spec": {"containers": [{"name": "sandbox"}]}},
        "envVarsInjectionPolicy": "Disallowed",
    },
}
_MOST_PAUSE = 30.0
"""Seconds between members that fail one after the other, at most."""


class Claims(Follower):
    """Gives each claim of a namespace a Sandbox, and keeps servers started ahead for them.

    `model` decides what it does and writes, one write at a time, for one claim after the other.

    Args:
        config: The namespace.
        api: A CustomObjectsApi.
        sandboxes: Runs the Sandboxes.
        warm: How many members the pool has.
        poll_interval: As for `Follower`.
    """

    def __init__(
        self,
        config: SandboxManagerConfig,
        api: Any,
        sandboxes: Controller,
        *,
        warm: int,
        poll_interval: float,
    ) -> None:
        config = replace(config, api_version="auto")
        super().__init__(SandboxResources(config, api, resource=claims.CLAIM), poll_interval)
        self._claims: dict[str, tuple[Object, float]] = {}
        """By uid, and when each was last seen."""
        self._sandboxes = sandboxes
        self._pool: Object = {
            "metadata": {"name": POOL, "namespace": config.namespace},
            "spec": {"replicas": warm, "sandboxTemplateRef": {"name": POOL}},
        }
        self._woken = asyncio.Event()
        self._abandoned: set[str] = set()
        self._failures = 0
        self._retry_at = 0.0

    def wake(self) -> None:
        """Something has changed."""
        self._woken.set()

    def bound(self, name: str) -> str:
        """The name of the Sandbox that the claim of that name has; of a Sandbox: its own."""
        for claim, _ in self._claims.values():
            if metadata.name(claim) == name:
                return claims.machine(claim).pod or name
        return name

    # Calls of the watch

    def changed(self, obj: Object) -> None:
        if metadata.is_deleting(obj):
            self.deleted(obj)
            return
        self._claims[str(metadata.uid(obj))] = obj, asyncio.get_running_loop().time()
        self.wake()

    def deleted(self, obj: Object) -> None:
        self._claims.pop(str(metadata.uid(obj)), None)
        self._abandoned.discard(str(metadata.uid(obj)))
        self.wake()

    def seen_before(self, since: float) -> Iterable[Object]:
        return [claim for claim, seen_at in self._claims.values() if seen_at < since]

    # Passes

    async def run(self, tasks: OwnedTasks) -> None:
        """Starts, if the API server knows claims."""
        try:
            await self.resources.api_version(math.inf)
        except SandboxError as e:
            (log.warning if self._pool["spec"]["replicas"] else log.info)("no_claims", reason=str(e))
            return
        self.follow(tasks, "local-claims")
        tasks.supervise(self._make_passes, "local-claims-passes")

    async def _make_passes(self) -> None:
        # Before, members would be missed, and too many made.
        await self.listed.wait()
        await self._sandboxes.listed.wait()
        while True:
            self._woken.clear()
            waits = [await self._settle(uid) for uid in list(self._claims)]
            waits.append(await self._fill())
            await self._collect()
            try:
                async with asyncio.timeout(min((wait for wait in waits if wait is not None), default=None)):
                    await self._woken.wait()
            except TimeoutError:
                continue

    async def _settle(self, uid: str) -> float | None:
        """Does what is to be done for a claim; returns the seconds until the next look at it."""
        refusal = ""
        while uid in self._claims and uid not in self._abandoned:
            claim, _ = self._claims[uid]
            ready = filter(self._is_ready, self._members())
            found = self._sandboxes.sandbox
            world = model.World(found, ready, self._pool, _TEMPLATE, time.time(), refusal)
            step = model.claim_step(claim, world)
            if not isinstance(step, model.Step):
                return step
            try:
                refusal = await self._carry_out(step, claim)
            except SandboxError as e:
                log.error("claim_abandoned", claim=metadata.name(claim), reason=str(e))  # noqa: TRY400
                self._abandoned.add(uid)
        return None

    async def _fill(self) -> float | None:
        """Replaces members that are gone; returns the seconds until the next look at them."""
        members = self._members()
        if any(self._is_ready(member) for member in members):
            self._failures = 0
        now = asyncio.get_running_loop().time()
        for member in members:
            if "Finished" in metadata.conditions(member):
                self._failures += 1
                pause = (
                    backoff(self._failures - 1, first=1.0, most=_MOST_PAUSE) if self._failures > 1 else 0.0
                )
                self._retry_at = now + pause
                await self._carry_out(model.Step("delete", SANDBOX, metadata.name(member), {}), member)
        if now < self._retry_at:
            return self._retry_at - now
        while True:
            step = model.pool_step(self._pool, self._members(), _TEMPLATE, time.time())
            if not isinstance(step, model.Step):
                return step
            if reason := await self._carry_out(step, self._pool):
                log.warning("pool_not_filled", reason=reason)
                return _MOST_PAUSE

    async def _collect(self) -> None:
        """Deletes the Sandboxes of claims that are gone, in place of Kubernetes' garbage collector."""
        for sandbox in self._sandboxes.sandboxes():
            for owner in sandbox["metadata"].get("ownerReferences") or ():
                if owner["kind"] == claims.KIND and owner["uid"] not in self._claims:
                    found = await self.resources.get(owner["name"], math.inf)
                    if metadata.uid(found or {}) != owner["uid"]:
                        step = model.Step("delete", SANDBOX, metadata.name(sandbox), {})
                        await self._carry_out(step, sandbox)

    def _members(self) -> list[Object]:
        found = [s for s in self._sandboxes.sandboxes() if model.MEMBER in metadata.labels(s)]
        return sorted(found, key=lambda member: str(member["metadata"].get("creationTimestamp")))

    def _is_ready(self, sandbox: Object) -> bool:
        return bool(pod_ips(sandbox)) and self._sandboxes.target(sandbox) is not None

    async def _carry_out(self, step: model.Step, claim: Object) -> str:
        """Makes a write; returns why a Sandbox could not be created."""
        if step.verb == "create":
            return await self._create(step.body)
        of: Follower = self if step.of is CLAIM else self._sandboxes
        old = claim if of is self else self._sandboxes.sandbox(step.name)
        if old is None:
            return ""
        if step.verb == "delete":
            await of.resources.delete(step.name, metadata.uid(old), math.inf)
            of.deleted(old)
            return ""
        version = {"resourceVersion": metadata.resource_version(old)}
        body = {**step.body, "metadata": {**step.body.get("metadata", {}), **version}}
        try:
            found = await of.resources.patch(step.name, body, math.inf, status=step.verb == "patch_status")
        except NotFoundError:
            found = None
        except PreconditionError:
            found = await of.resources.get(step.name, math.inf)
        if found is not None and metadata.uid(found) == metadata.uid(old):
            of.changed(found)
        else:
            of.deleted(old)
        return ""

    async def _create(self, body: Object) -> str:
        resources = self._sandboxes.resources
        body = {**body, "apiVersion": f"{GROUP}/{await resources.api_version(math.inf)}"}
        body["metadata"]["labels"][metadata.LABEL_APP] = metadata.APP
        if model.MEMBER in body["metadata"]["labels"]:
            del body["metadata"]["ownerReferences"]  # The pool is no object.
        try:
            found = await resources.create(body)
        except SandboxError as e:
            return str(e)
        if found is not None:
            self._sandboxes.changed(found)
        return ""
