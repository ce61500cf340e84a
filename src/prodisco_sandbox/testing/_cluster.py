"""The test's side of the fake API server: reading and changing its state."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
import time
from collections.abc import Callable, Iterable
from typing import Any, Self

from .._cluster.claim import machine
from .._cluster.manifest import API_VERSIONS
from .._cluster.metadata import Object
from ._agent_sandbox import Conditions
from ._arguments import verbs_of
from ._claims import ClaimController
from ._controller import AutoReady, Controller, Reason
from ._faults import VERBS, Faults, Request, Verb
from ._kinds import CLAIM, KINDS, POOL, SANDBOX, TEMPLATE
from ._patches import MERGE_PATCH
from ._store import Change, EventType, Key, Revisions, Store, copied, plain, shown
from ._watch import Watch


class FakeCluster:
    """Sandboxes in memory, with the methods by which a test reads and changes them.

    `FakeCustomObjectsApi` is this with the methods of CustomObjectsApi.
    """

    def __init__(
        self,
        *,
        versions: Iterable[str] = API_VERSIONS,
        auto_ready: AutoReady = False,
        namespaces: Iterable[str] | None = None,
        user: str = "system:serviceaccount:prodisco:mcp-server",
        now: Callable[[], float] = time.time,
        history: int = 10_000,
        bookmark_interval: float = 60.0,
        pod_termination: float = 0.7,
        extensions: bool = True,
    ) -> None:
        self.faults = Faults(self._call_later)
        self.extensions = extensions
        revisions = Revisions()
        self._stores = {of: Store(of, revisions, now, history) for of in KINDS}
        for store in self._stores.values():
            store.on_change = functools.partial(self._changed, store)
        self._store = self._stores[SANDBOX]
        self._controller = Controller(self._store, auto_ready, self._call_later, now, pod_termination)
        self._claims = ClaimController(
            self._stores, self._call_later, now, lambda: self.pod_termination, runs=auto_ready is not False
        )
        self._versions = tuple(versions)
        self._namespaces = None if namespaces is None else frozenset(namespaces)
        self._user = user
        self._bookmark_interval = bookmark_interval
        self._forbidden: set[Verb] = set()
        self._watches: dict[Watch, None] = {}
        self._subscribers: dict[object, Callable[[EventType, Object], object]] = {}
        self._requests: collections.deque[Request] = collections.deque(maxlen=history)
        self._counts: collections.Counter[str] = collections.Counter()
        self._pokes: list[asyncio.Future[None]] = []
        self._timers: set[asyncio.TimerHandle] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Ends all watches, timers and faults; later requests raise RuntimeError. Idempotent."""
        self._closed = True
        self.faults.clear()
        self.cut_watches()
        self._subscribers.clear()
        while self._timers:
            self._timers.pop().cancel()

    @property
    def objects(self) -> list[Object]:
        """Copies of all Sandboxes, by namespace and name, in the first version that is served."""
        return [self._copy(self._store.objects[key]) for key in sorted(self._store.objects)]

    @property
    def claims(self) -> list[Object]:
        """Copies of all SandboxClaims, by namespace and name."""
        objects = self._stores[CLAIM].objects
        return [self._copy(objects[key]) for key in sorted(objects)]

    def get(self, name: str, namespace: str | None = None, *, kind: str | None = None) -> Object | None:
        """A copy of the object of that name; None: there is none.

        Args:
            name: Its name.
            namespace: Its namespace; None: any.
            kind: Such as ``"Sandbox"``; None: any, a SandboxClaim before a Sandbox.
        """
        found = self._find(name, namespace, kind)
        return None if found is None else self._copy(found[0].objects[found[1]])

    @property
    def requests(self) -> list[Request]:
        """The requests so far, refused ones too, in the order of their arrival."""
        return list(self._requests)

    def count(self, verb: Verb, name: str | None = None) -> int:
        """How many requests of that verb there have been, for that name if one is given."""
        if name is None:
            return self._counts[verb]
        return sum(1 for request in self._requests if (request.verb, request.name) == (verb, name))

    @property
    def watches(self) -> list[Watch]:
        """The watches that are open: `Watch.cut`, `Watch.silence` and `Watch.feed` break one."""
        return list(self._watches)

    @property
    def resource_version(self) -> str:
        """The newest resourceVersion."""
        return str(self._store.revision)

    async def until(self, condition: Callable[[], object], *, timeout: float = 60.0) -> None:
        """Waits until a condition holds; it is looked at upon each request, change and watch.

        Raises:
            TimeoutError: Not within `timeout` seconds.
        """
        async with asyncio.timeout(timeout):
            while not condition():
                poke = asyncio.get_running_loop().create_future()
                self._pokes.append(poke)
                await poke

    def subscribe(self, callback: Callable[[EventType, Object], object]) -> Callable[[], None]:
        """Calls ``callback(type, object)`` upon each change, with a copy of the object as it
        is, or as it was where it was DELETED. Returns a function that ends this."""
        key = object()
        self._subscribers[key] = callback

        def end() -> None:
            self._subscribers.pop(key, None)

        return end

    # Changes by tests

    @property
    def versions(self) -> tuple[str, ...]:
        """The API versions that are served. Setting them ends all watches, as a change of the
        definition does; objects are there in every version. Claims have v1beta1 alone."""
        return self._versions

    @versions.setter
    def versions(self, versions: Iterable[str]) -> None:
        self._versions = tuple(versions)
        self.cut_watches()

    @property
    def linger_deletes(self) -> bool:
        """Whether deleted objects stay, with a deletionTimestamp, until `finish_deletes`."""
        return self._store.lingers

    @linger_deletes.setter
    def linger_deletes(self, lingers: bool) -> None:
        for store in self._stores.values():
            store.lingers = lingers

    @property
    def quota(self) -> int | None:
        """How many Sandboxes there may be; None: any number."""
        return self._store.quota

    @quota.setter
    def quota(self, quota: int | None) -> None:
        self._store.quota = quota

    @property
    def claim_quota(self) -> int | None:
        """How many SandboxClaims there may be; None: any number."""
        return self._stores[CLAIM].quota

    @claim_quota.setter
    def claim_quota(self, quota: int | None) -> None:
        self._stores[CLAIM].quota = quota

    def forbid(self, *verbs: Verb) -> None:
        """Answers these requests with the 403 of missing RBAC rules, until `allow`."""
        self._forbidden.update(verbs_of(verbs))

    def allow(self, *verbs: Verb) -> None:
        """Takes `forbid` back, of all verbs if none is given."""
        self._forbidden.difference_update(verbs_of(verbs) or VERBS)

    def compact(self) -> None:
        """Forgets the history: watches and lists from older versions get 410."""
        for store in self._stores.values():
            store.compact()

    def add_warm_pool(self, name: str, replicas: int = 1, *, namespace: str = "prodisco") -> None:
        """Makes a SandboxWarmPool, and a SandboxTemplate of the same name; or scales that pool.

        With `auto_ready`, the pool's Sandboxes become ready as all others do.
        """
        key = (namespace, name)
        if key in self._stores[POOL].objects:
            self._stores[POOL].patch(
                *(namespace, "v1beta1", name, {"spec": {"replicas": replicas}}), MERGE_PATCH
            )
            return
        pod = {"spec": {"containers": [{"name": "sandbox", "image": "sandbox-server"}]}}
        for of, spec in (
            (TEMPLATE, {"podTemplate": pod}),
            (POOL, {"replicas": replicas, "sandboxTemplateRef": {"name": name}}),
        ):
            body = {"apiVersion": f"{of.group}/v1beta1", "kind": of.kind, "metadata": {"name": name}}
            self._stores[of].create(namespace, "v1beta1", {**body, "spec": spec})

    def cut_watches(self, error: BaseException | None = None) -> None:
        """Ends all open watches: `Watch.cut`."""
        for watch in self.watches:
            watch.cut(error)

    def silence_watches(self) -> None:
        """Makes all open watches half-open: `Watch.silence`. Later ones are sound."""
        for watch in self.watches:
            watch.silence()

    def set_ready(self, name: str, *, namespace: str | None = None, **status: Any) -> None:
        """Writes what the controller of agent-sandbox does once the pod is ready: podIPs,
        serviceFQDN where the spec asks for a Service, and the Ready condition.

        Args:
            name: The name of the Sandbox, or of a SandboxClaim: its Sandbox is meant, and if it
                has none, a cold one is pretended.
            namespace: Its namespace; None: whichever has one of that name.
            status: Fields of the status to set otherwise: ``podIPs=["10.0.0.7"]``.
        """
        store, key = self._existing(name, namespace)
        if store.of is CLAIM and not machine(store.objects[key]).pod:
            self._controller.set_claim_ready(store, key, status)
        else:
            self._controller.set_ready(self._sandbox(name, namespace), status)

    def delete_pod(
        self,
        name: str,
        *,
        graceful: bool = True,
        reason: Reason = "PodSucceeded",
        namespace: str | None = None,
    ) -> None:
        """Deletes a Sandbox's pod, as a drained node or ``kubectl delete pod`` does.

        The pod ends within `pod_termination` seconds. On its way out it is Succeeded or Failed
        for a moment, and the Sandbox's condition Finished is True; then the controller makes
        another pod in the same Sandbox, and `auto_ready` makes that ready.

        Args:
            name: The Sandbox's name, or that of its SandboxClaim.
            graceful: False: the pod is gone at once, as with ``--force``.
            reason: How its containers end.
            namespace: The Sandbox's namespace; None: whichever has one of that name.

        Raises:
            KeyError: There is no such Sandbox, or it has no pod.
        """
        self._controller.delete_pod(self._sandbox(name, namespace), reason, graceful=graceful)

    def fail_pod(
        self,
        name: str,
        *,
        reason: Reason = "PodFailed",
        message: str = "",
        namespace: str | None = None,
    ) -> None:
        """Ends a Sandbox's pod by itself: a crash, an eviction, no memory. The pod stays as it
        is, as under restartPolicy Never, until it is deleted.

        Args:
            name: The Sandbox's name, or that of its SandboxClaim.
            reason: PodFailed, or PodSucceeded where all containers end with status 0.
            message: The conditions' message; empty: the controller's own words.
            namespace: The Sandbox's namespace; None: whichever has one of that name.

        Raises:
            KeyError: There is no such Sandbox, or it has no pod.
        """
        self._controller.fail_pod(self._sandbox(name, namespace), reason, message)

    def suspend(self, name: str, *, namespace: str | None = None) -> None:
        """Patches ``spec.operatingMode`` to Suspended, as somebody else would with kubectl:
        the controller deletes the pod, and the Sandbox stays."""
        self._patch_mode(name, namespace, "Suspended", 0)

    def resume(self, name: str, *, namespace: str | None = None) -> None:
        """Patches ``spec.operatingMode`` to Running: the controller makes a pod again."""
        self._patch_mode(name, namespace, "Running", 1)

    def expire(self, name: str, *, namespace: str | None = None) -> None:
        """Patches the shutdownTime of a SandboxClaim or a Sandbox to now: the controller writes
        ClaimExpired or SandboxExpired, and soon after it is gone, if its shutdownPolicy is Delete,
        or else its pod."""
        store, key = self._existing(name, namespace)
        fields: Object = {"shutdownTime": self._store.timestamp()}
        if store.of is SANDBOX:
            self._controller.expire(key)
        self._patch_spec(store, key, {"lifecycle": fields} if store.of is CLAIM else fields)

    def set_condition(
        self,
        name: str,
        kind: str,
        status: str,
        reason: str = "Test",
        message: str = "",
        *,
        namespace: str | None = None,
    ) -> None:
        """Writes one condition of the status: ``set_condition(name, "Ready", "False", "PodFailed")``."""
        store, key = self._existing(name, namespace)
        obj = store.objects[key]
        conditions = Conditions(obj, store.timestamp)
        conditions.set(kind, status, reason, message)
        store.set_status(key, {**(obj.get("status") or {}), "conditions": conditions.all})

    def set_status(self, name: str, status: Object, *, namespace: str | None = None) -> None:
        """Replaces the whole status."""
        store, key = self._existing(name, namespace)
        store.set_status(key, plain(status))

    def delete_now(self, name: str, *, namespace: str | None = None, kind: str | None = None) -> None:
        """Takes an object away at once, finalizers or not, as if somebody else had deleted it.

        Args:
            name: Its name.
            namespace: Its namespace; None: whichever has one of that name.
            kind: Such as ``"Sandbox"``; None: any, a SandboxClaim before a Sandbox.
        """
        store, key = self._existing(name, namespace, kind)
        store.remove(*key)

    @property
    def pod_termination(self) -> float:
        """Seconds that a pod takes to end."""
        return self._controller.termination

    @pod_termination.setter
    def pod_termination(self, seconds: float) -> None:
        self._controller.termination = seconds

    @property
    def pod_refusal(self) -> str:
        """Why the API server refuses pods; "": it does not."""
        return self._controller.pod_refusal

    @pod_refusal.setter
    def pod_refusal(self, text: str) -> None:
        self._controller.pod_refusal = text

    def finish_deletes(self) -> None:
        """Takes away all objects that are being deleted, and ends `linger_deletes`."""
        self.linger_deletes = False
        for store in self._stores.values():
            for key, obj in list(store.objects.items()):
                if "deletionTimestamp" in obj["metadata"]:
                    store.remove(*key)

    def _patch_mode(self, name: str, namespace: str | None, mode: str, replicas: int) -> None:
        key = self._sandbox(name, namespace)
        spec = self._store.objects[key]["spec"]
        is_old = "replicas" in spec and "operatingMode" not in spec
        self._patch_spec(self._store, key, {"replicas": replicas} if is_old else {"operatingMode": mode})

    def _patch_spec(self, store: Store, key: Key, fields: Object) -> None:
        version = store.objects[key]["apiVersion"].rpartition("/")[2]
        store.patch(key[0], version, key[1], {"spec": fields}, MERGE_PATCH)

    def _watch_ended(self, watch: Watch) -> None:
        self._watches.pop(watch, None)
        self._poke()

    def _changed(self, store: Store, change: Change) -> None:
        for watch in self.watches:
            if watch.kind is store.of:
                watch.offer(change)
        kind: EventType = "DELETED" if change.new is None else "MODIFIED" if change.old else "ADDED"
        for callback in list(self._subscribers.values()):
            callback(kind, self._copy(change.new or change.old or {}))
        if store.of is SANDBOX:
            self._controller.changed(change)
        self._claims.changed(store.of, change)
        self._poke()

    def _poke(self) -> None:
        while self._pokes:
            poke = self._pokes.pop()
            if not poke.done():
                poke.set_result(None)

    def _call_later(self, delay: float, callback: Callable[[], None]) -> Callable[[], None]:
        """Plans a call; returns what takes it back."""

        def fire() -> None:
            self._timers.discard(handle)
            callback()

        def cancel() -> None:
            self._timers.discard(handle)
            handle.cancel()

        # The test may change things while no loop runs, between two runs of one or after the last.
        with contextlib.suppress(RuntimeError):
            self._loop = asyncio.get_running_loop()
        if self._loop is None or self._loop.is_closed():
            return lambda: None
        handle = self._loop.call_later(delay, fire)
        self._timers.add(handle)
        return cancel

    def _copy(self, obj: Object) -> Object:
        versions = self._versions or API_VERSIONS
        return dict(copied(shown(obj, versions[0]) if obj["kind"] == SANDBOX.kind else obj))

    def _find(self, name: str, namespace: str | None, kind: str | None = None) -> tuple[Store, Key] | None:
        for store in self._stores.values():
            for key in store.objects if kind in (None, store.of.kind) else ():
                if key[1] == name and namespace in (None, key[0]):
                    return store, key
        return None

    def _existing(self, name: str, namespace: str | None, kind: str | None = None) -> tuple[Store, Key]:
        found = self._find(name, namespace, kind)
        if found is None:
            known = {key[1] for store in self._stores.values() for key in store.objects}
            names = ", ".join(sorted(known)) or "none"
            raise KeyError(f"there is no {kind or 'Sandbox'} {name!r}; there are: {names}")
        return found

    def _sandbox(self, name: str, namespace: str | None) -> Key:
        """The Sandbox of that name, or of the claim of that name."""
        store, key = self._existing(name, namespace)
        if store.of is CLAIM:
            bound = machine(store.objects[key]).pod
            _, key = self._existing(bound or name, key[0], SANDBOX.kind)
        return key
