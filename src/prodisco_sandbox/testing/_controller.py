"""The part of agent-sandbox's controller that writes a Sandbox's status."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from ..manifest import Object
from ._store import Key, Store, copied, plain

AutoReady = bool | float | Callable[[Object], bool | float | Object | None]


class Controller:
    """Writes statuses into a store, at once or later."""

    def __init__(
        self, store: Store, auto_ready: AutoReady, call_later: Callable[[float, Callable[[], None]], None]
    ) -> None:
        if isinstance(auto_ready, int | float) and not auto_ready >= 0:
            raise ValueError(f"auto_ready is {auto_ready!r}: seconds must be at least 0")
        self._store = store
        self._auto_ready = auto_ready
        self._call_later = call_later
        self._addresses = itertools.count(1)

    def added(self, key: Key) -> None:
        """Somebody has created a Sandbox."""
        decision = self._auto_ready
        sandbox = self._store.objects.get(key)
        if sandbox is None:
            return  # Who heard of it first has deleted it.
        chosen = decision(copied(sandbox)) if callable(decision) else decision
        if chosen is None or chosen is False:
            return
        uid = sandbox["metadata"]["uid"]
        delay = chosen if isinstance(chosen, int | float) and chosen is not True else 0.0

        def write() -> None:
            found = self._store.objects.get(key)
            if found is None or found["metadata"]["uid"] != uid or "deletionTimestamp" in found["metadata"]:
                return
            if isinstance(chosen, dict):
                self.set_status(key, plain(chosen))
            else:
                self.set_ready(key, {})

        self._call_later(delay, write)

    def set_status(self, key: Key, status: Object) -> None:
        self._store.set_status(key, status)

    def set_ready(self, key: Key, fields: Object) -> None:
        sandbox = self._store.find(*key)
        namespace, name = key
        ready = self._conditions(sandbox, "Ready", "True", "DependenciesReady", "Pod is Ready")
        status: Object = {**(sandbox.get("status") or {}), "podIPs": [self._address()], "conditions": ready}
        if sandbox["spec"].get("service"):
            status |= {"service": name, "serviceFQDN": f"{name}.{namespace}.svc.cluster.local"}
        self.set_status(key, {**status, **plain(fields)})

    def set_condition(self, key: Key, kind: str, status: str, reason: str, message: str) -> None:
        sandbox = self._store.find(*key)
        conditions = self._conditions(sandbox, kind, status, reason, message)
        self.set_status(key, {**(sandbox.get("status") or {}), "conditions": conditions})

    def _conditions(self, sandbox: Object, kind: str, status: str, reason: str, message: str) -> list[Object]:
        """The Sandbox's conditions with that one written, which keeps its time if its status stays."""
        conditions = {c["type"]: c for c in (sandbox.get("status") or {}).get("conditions") or ()}
        before = conditions.get(kind, {})
        same = before.get("status") == status
        conditions[kind] = {
            "type": kind,
            "status": status,
            "reason": reason,
            "message": message,
            "observedGeneration": sandbox["metadata"]["generation"],
            "lastTransitionTime": before["lastTransitionTime"] if same else self._store.timestamp(),
        }
        return list(conditions.values())

    def _address(self) -> str:
        number = next(self._addresses)
        return f"10.244.{number // 250 % 256}.{number % 250 + 1}"
