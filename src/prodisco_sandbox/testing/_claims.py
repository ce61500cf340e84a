"""agent-sandbox's controllers of claims and warm pools, and garbage collection, on a fake API server."""

from __future__ import annotations

import collections
import functools
import json
from collections.abc import Callable, Iterator, Mapping

from .._cluster import metadata
from .._cluster.claim import machine
from .._cluster.metadata import Object
from ._controller import TIMER_SLACK, CallLater
from ._kinds import CLAIM, POOL, SANDBOX, TEMPLATE, Kind
from ._libraries import api_exceptions
from ._patches import MERGE_PATCH
from ._store import LINGERING, Change, Key, Store
from ._warm_pools import Step, World, claim_step, owner, pool_status, pool_step

STATUS_LAG = 1.0
"""Seconds by which a pool's counts are late, as seen on a cluster."""
_RETRY = 1.0
"""Seconds until a Sandbox that was refused is tried again."""


class ClaimController:
    """Makes passes over claims and pools when they or their Sandboxes change.

    A claim is left alone once somebody else has written its status.

    Attributes:
        termination: Seconds that a pod takes to end.
    """

    def __init__(
        self,
        stores: Mapping[Kind, Store],
        call_later: CallLater,
        now: Callable[[], float],
        termination: Callable[[], float],
        *,
        runs: bool,
    ) -> None:
        self._stores = stores
        self._call_later = call_later
        self._now = now
        self._termination = termination
        self._runs = runs
        self._writes = False
        self._abandoned: set[str] = set()
        self._wakes: dict[tuple[Kind, Key], Callable[[], None]] = {}
        self._dependents = collections.defaultdict[str | None, dict[Key, None]](dict)
        """Sandboxes by the uid of their owner, in the order in which they became its."""

    def changed(self, of: Kind, change: Change) -> None:
        """Somebody has changed an object; it may have been this controller."""
        old, new, key = change.old, change.new, change.key
        owners = owner(old or {}), owner(new or {})
        if of is SANDBOX and owners[0] != owners[1]:
            self._dependents[owners[0].get("uid")].pop(key, None)
            if owners[1]:
                self._dependents[owners[1]["uid"]][key] = None
        if of in (CLAIM, POOL):
            self._collect(of, key, old or new or {}, new)
        if not self._runs:
            return
        if of is SANDBOX:
            for reference in owners:
                for kind in (CLAIM, POOL):
                    if reference.get("kind") == kind.kind:
                        self._wake(kind, (key[0], reference["name"]), 0.0)
        elif of is TEMPLATE:
            self._wake_where(POOL, lambda pool: pool["spec"]["sandboxTemplateRef"]["name"] == key[1])
        elif of is POOL:
            self._wake(POOL, key, 0.0)
            if old is None or new is None or metadata.generation(old) != metadata.generation(new):
                self._wake_where(CLAIM, lambda claim: _waits_for(claim, key[1]))
        elif new is not None:
            if old is not None and old.get("status") != new.get("status") and not self._writes:
                self._abandoned.add(str(metadata.uid(new)))
            self._wake(CLAIM, key, 0.0)

    def _wake_where(self, of: Kind, condition: Callable[[Object], bool]) -> None:
        for key, obj in self._stores[of].objects.items():
            if condition(obj):
                self._wake(of, key, 0.0)

    def _wake(self, of: Kind, key: Key, seconds: float) -> None:
        """Plans the next pass, in place of the one that was planned."""
        if (cancel := self._wakes.pop((of, key), None)) is not None:
            cancel()
        make = self._claim_pass if of is CLAIM else self._pool_pass
        self._wakes[of, key] = self._call_later(seconds, lambda: make(key))

    def _claim_pass(self, key: Key) -> None:
        refusal = ""
        while (claim := self._stores[CLAIM].objects.get(key)) is not None:
            if metadata.uid(claim) in self._abandoned:
                return
            pool = self._stores[POOL].objects.get((key[0], claim["spec"]["warmPoolRef"]["name"]))
            world = World(
                sandbox=lambda name: self._stores[SANDBOX].objects.get((key[0], name)),
                members=self._owned(pool),
                pool=pool,
                template=self._template(key[0], pool),
                now=self._now(),
                refusal=refusal,
            )
            step = claim_step(claim, world)
            if isinstance(step, Step):
                refusal = self._carry_out(key[0], step)
                if not refusal or step.verb == "create":
                    continue
                step = _RETRY
            if step is not None:
                self._wake(CLAIM, key, step + TIMER_SLACK)
            return

    def _pool_pass(self, key: Key) -> None:
        while (pool := self._stores[POOL].objects.get(key)) is not None:
            members = list(self._owned(pool))
            step = pool_step(pool, members, self._template(key[0], pool), self._now())
            if not isinstance(step, Step):
                late = functools.partial(self._write_pool_status, key, pool_status(pool, members))
                self._call_later(STATUS_LAG, late)
                if step is not None:
                    self._wake(POOL, key, step + TIMER_SLACK)
                return
            if self._carry_out(key[0], step):
                self._wake(POOL, key, _RETRY)
                return

    def _write_pool_status(self, key: Key, status: Object) -> None:
        if key in self._stores[POOL].objects:
            self._stores[POOL].set_status(key, status)

    def _carry_out(self, namespace: str, step: Step) -> str:
        """Makes a write; returns why it was refused."""
        store, version = self._stores[step.of], step.of.versions[0]
        self._writes = True
        try:
            if step.verb == "create":
                store.create(namespace, version, step.body)
            elif step.verb == "delete":
                store.delete(namespace, step.name, step.body, dry_run=False)
            else:
                status = step.verb == "patch_status"
                store.patch(namespace, version, step.name, step.body, MERGE_PATCH, status=status)
        except api_exceptions() as refusal:
            return str(json.loads(refusal.body)["message"])
        finally:
            self._writes = False
        return ""

    def _owned(self, obj: Object | None) -> Iterator[Object]:
        for key in list(self._dependents[metadata.uid(obj)]) if obj is not None else ():
            if (sandbox := self._stores[SANDBOX].objects.get(key)) is not None:
                yield sandbox

    def _template(self, namespace: str, pool: Object | None) -> Object | None:
        name = pool["spec"]["sandboxTemplateRef"]["name"] if pool is not None else None
        return self._stores[TEMPLATE].objects.get((namespace, name)) if name is not None else None

    # Garbage collection

    def _collect(self, of: Kind, key: Key, obj: Object, new: Object | None) -> None:
        """Deletes the Sandboxes of an owner that is gone, or that waits for them to be gone."""
        if new is None:
            self._call_later(0.0, lambda: self._delete_owned(key[0], obj))
        elif LINGERING in (new["metadata"].get("finalizers") or ()) and not self._stores[of].lingers:
            seconds = self._termination() if any(self._owned(obj)) else 0.0
            self._call_later(0.0, lambda: self._delete_owned(key[0], obj))
            self._call_later(seconds + TIMER_SLACK, lambda: self._finish(of, key, obj))

    def _delete_owned(self, namespace: str, obj: Object) -> None:
        for sandbox in self._owned(obj):
            if not metadata.is_deleting(sandbox):
                self._stores[SANDBOX].delete(namespace, metadata.name(sandbox), {}, dry_run=False)

    def _finish(self, of: Kind, key: Key, obj: Object) -> None:
        found = self._stores[of].objects.get(key)
        if found is not None and metadata.uid(found) == metadata.uid(obj):
            self._stores[of].remove(*key)


def _waits_for(claim: Object, pool: str) -> bool:
    return claim["spec"]["warmPoolRef"]["name"] == pool and not machine(claim).pod
