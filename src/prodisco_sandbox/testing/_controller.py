"""agent-sandbox's controller and a node, on a fake API server: its pods only seem to run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from .._cluster.metadata import Object
from ._agent_sandbox import POD_NAME, Conditions, Pod, new_pod, pod_name, reconcile
from ._store import Change, Key, Store, copied, plain

Start = bool | float | Object | None
"""Whether a pod gets ready, after how many seconds, or the status to write instead."""
AutoReady = bool | float | Callable[[Object], Start]
CallLater = Callable[[float, Callable[[], None]], Callable[[], None]]
Reason = Literal["PodFailed", "PodSucceeded"]
Ended = Literal["Failed", "Succeeded"]

NODE = "node-1"
TIMER_SLACK = 0.001
_PHASES: dict[Reason, Ended] = {"PodFailed": "Failed", "PodSucceeded": "Succeeded"}


@dataclass(slots=True)
class _Record:
    """A Sandbox that is the controller's.

    Attributes:
        expires: Whether its spec.shutdownTime counts: not where the test alone gave it a pod.
        start: How the pod that it gets next becomes ready, if that is decided.
        fields: Fields of its status that the test has set, while it has that pod.
        written: The status that the controller wrote last.
    """

    expires: bool = False
    start: Start = None
    fields: Object = field(default_factory=dict)
    written: Object | None = None


class Controller:
    """Makes passes over Sandboxes when they or their pods change.

    A Sandbox is the controller's from the moment that `auto_ready` or the test gives it a pod,
    until somebody else writes its status.

    Args:
        termination: Seconds that a pod takes to end.
    """

    def __init__(
        self,
        store: Store,
        auto_ready: AutoReady,
        call_later: CallLater,
        now: Callable[[], float],
        termination: float,
    ) -> None:
        if isinstance(auto_ready, int | float) and not auto_ready >= 0:
            raise ValueError(f"auto_ready is {auto_ready!r}: seconds must be at least 0")
        self.termination = termination
        self._refusal = ""
        self._store = store
        self._auto_ready = auto_ready
        self._call_later = call_later
        self._now = now
        self._addresses = itertools.count(1)
        self._pods: dict[Key, Pod] = {}
        self._records: dict[str, _Record] = {}
        """By uid."""
        self._wakes: dict[Key, Callable[[], None]] = {}

    @property
    def pod_refusal(self) -> str:
        return self._refusal

    @pod_refusal.setter
    def pod_refusal(self, text: str) -> None:
        self._refusal = text
        for key in list(self._store.objects):
            self._make_pass(key)

    def changed(self, change: Change) -> None:
        """Somebody has changed a Sandbox; it may have been the controller."""
        old, new = change.old, change.new
        uid = (new or old or {})["metadata"]["uid"]
        if old is None:
            self._created(change.key, uid)
        elif new is None:
            self._deleted(change.key, uid, old)
        elif uid in self._records:
            status = new.get("status")
            if status != old.get("status") and status != self._records[uid].written:
                del self._records[uid]
            elif new["metadata"]["generation"] != old["metadata"]["generation"]:
                self._wake(change.key, 0.0)

    def _created(self, key: Key, uid: str) -> None:
        if key not in self._store.objects:
            return  # A listener that was called before has deleted it.
        start = self._decision(key)
        if start is None or start is False:
            return
        self._records[uid] = _Record(True, start)
        if isinstance(start, dict):
            self._call_later(0.0, lambda: self._write_once(key, uid, start))
        else:
            self._wake(key, 0.0)

    def _deleted(self, key: Key, uid: str, sandbox: Object) -> None:
        self._records.pop(uid, None)
        self._wake(key, None)
        pod_key = (key[0], pod_name(sandbox))
        pod = self._pods.get(pod_key)
        if pod is not None and pod.owner[1] == uid:
            self._end(pod_key, pod, "Succeeded")

    def _decision(self, key: Key) -> Start:
        decision = self._auto_ready
        return decision(copied(self._store.objects[key])) if callable(decision) else decision

    def _write_once(self, key: Key, uid: str, status: Object) -> None:
        sandbox = self._store.objects.get(key)
        if sandbox is not None and sandbox["metadata"]["uid"] == uid and uid in self._records:
            self.set_status(key, plain(status))

    # Changes by the test

    def set_status(self, key: Key, status: Object) -> None:
        self._store.set_status(key, status)

    def set_ready(self, key: Key, fields: Object) -> None:
        sandbox = self._store.find(*key)
        fields = plain(fields)
        pod = new_pod(sandbox)
        ips = tuple(fields.get("podIPs") or (self._address(),))
        self._pods[key[0], pod.name] = replace(pod, phase="Running", node=NODE, ips=ips, ready=True)
        self._records.setdefault(pod.owner[1], _Record()).fields = fields
        self._make_pass(key)

    def expire(self, key: Key) -> None:
        self._records.setdefault(self._store.find(*key)["metadata"]["uid"], _Record()).expires = True

    def set_claim_ready(self, store: Store, key: Key, fields: Object) -> None:
        """Writes the status of a claim whose Sandbox has its own name."""
        conditions = Conditions(store.find(*key), store.timestamp)
        conditions.set("Ready", "True", "DependenciesReady", "Pod is Ready")
        sandbox = {"name": key[1], "podIPs": fields.pop("podIPs", None) or [self._address()]}
        store.set_status(key, {"conditions": conditions.all, "sandbox": sandbox, **plain(fields)})

    def delete_pod(self, key: Key, reason: Reason, *, graceful: bool) -> None:
        pod_key, pod = self._pod(key)
        if graceful:
            self._end(pod_key, pod, _PHASES[reason])
        else:
            self._remove(pod_key, pod)

    def fail_pod(self, key: Key, reason: Reason, message: str) -> None:
        pod_key, pod = self._pod(key)
        self._set_pod(pod_key, replace(pod, phase=_PHASES[reason], ready=False, message=message))

    def _pod(self, key: Key) -> tuple[Key, Pod]:
        sandbox = self._store.find(*key)
        pod_key = (key[0], pod_name(sandbox))
        pod = self._pods.get(pod_key)
        if pod is None or pod.owner[1] != sandbox["metadata"]["uid"]:
            raise KeyError(f"Sandbox {key[1]!r} has no pod: auto_ready or set_ready gives it one")
        self._records.setdefault(pod.owner[1], _Record())
        return pod_key, pod

    # The node

    def _start(self, key: Key, pod: Pod, start: Start) -> None:
        """Schedules a new pod, and has it ready when `start` says."""
        pod_key, scheduled = (key[0], pod.name), replace(pod, node=NODE)
        ready = replace(scheduled, phase="Running", ready=True, ips=(self._address(),))

        def schedule() -> None:
            self._step(pod_key, pod, scheduled)
            if isinstance(start, dict):
                self._write_once(key, pod.owner[1], start)
            elif start is not None and start is not False and start != math.inf:
                seconds = 0.0 if start is True else float(start)
                self._call_later(seconds, lambda: self._step(pod_key, scheduled, ready))

        self._call_later(0.0, schedule)

    def _end(self, key: Key, pod: Pod, phase: Ended) -> None:
        """Ends a pod in its time, with the phase that it has for a moment before it is gone."""
        if pod.deleting:
            return
        ending = self._pods[key] = replace(pod, deleting=True)
        ended = ending if pod.phase in _PHASES.values() else replace(ending, phase=phase, ready=False)

        def end() -> None:
            self._step(key, ending, ended)
            self._call_later(self.termination / 2, lambda: self._remove(key, ended))

        self._call_later(self.termination / 2, end)

    def _step(self, key: Key, before: Pod, after: Pod) -> None:
        """Changes a pod, unless something else has happened to it meanwhile."""
        if self._pods.get(key) == before:
            self._set_pod(key, after)

    def _set_pod(self, key: Key, pod: Pod) -> None:
        self._pods[key] = pod
        self._make_pass((key[0], pod.owner[0]))

    def _remove(self, key: Key, pod: Pod) -> None:
        if self._pods.get(key) == pod:
            del self._pods[key]
            self._make_pass((key[0], pod.owner[0]))

    def _address(self) -> str:
        number = next(self._addresses)
        return f"10.244.{number // 250 % 256}.{number % 250 + 1}"

    # Passes

    def _make_pass(self, key: Key) -> None:
        """Makes one pass over the Sandbox of that name, if it is the controller's."""
        sandbox = self._store.objects.get(key)
        record = self._record(sandbox)
        if sandbox is None or record is None:
            return
        pod_key = (key[0], pod_name(sandbox))
        pod = self._pods.get(pod_key)
        if pod is None:
            record.fields = {}
        made = reconcile(sandbox, pod, self._now(), refusal=self._refusal, expires=record.expires)
        if made.create_pod:
            pod = new_pod(sandbox)
            self._pods[key[0], pod.name] = pod
            start = self._decision(key) if record.start is None else record.start
            record.start = None
            self._start(key, pod, start)
        if made.delete_pod and pod is not None:
            self._end(pod_key, pod, "Succeeded")
        self._wake(key, made.wait and made.wait + TIMER_SLACK)
        if made.delete_sandbox:
            self._store.delete(*key, {}, dry_run=False)
            return
        self._store.annotate(key, POD_NAME, made.pod_name)
        if made.status is not None and self._record(self._store.objects.get(key)) is record:
            record.written = {**made.status, **record.fields}
            self._store.set_status(key, record.written)

    def _record(self, sandbox: Object | None) -> _Record | None:
        return self._records.get(sandbox["metadata"]["uid"]) if sandbox else None

    def _wake(self, key: Key, seconds: float | None) -> None:
        """Plans the next pass over a Sandbox, in place of the one that was planned."""
        if (cancel := self._wakes.pop(key, None)) is not None:
            cancel()
        if seconds is not None:
            self._wakes[key] = self._call_later(seconds, lambda: self._make_pass(key))
