"""The objects of one kind on a fake API server: versions, history, and what each request does to them.

Synchronous and pure, except for the wall clock. Objects are never changed in place, so that
answers, history and watches may share them; they are copied where they enter and leave.
"""

from __future__ import annotations

import base64
import collections
import datetime as dt
import json
import secrets
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from .._cluster.metadata import Object
from . import _status
from ._kinds import SANDBOX, Kind
from ._patches import check_content_type, patched
from ._selectors import Selector
from ._validation import (
    check_delete_options,
    check_object,
    check_patched,
    check_status,
    check_type,
    with_defaults,
)

Key = tuple[str, str]
EventType = Literal["ADDED", "MODIFIED", "DELETED"]

LINGERING = "foregroundDeletion"
"""The finalizer of a deletion that waits for something, as a foreground deletion has it."""

# Fields of metadata that the server sets: a client's values are ignored.
_OWN = ("uid", "creationTimestamp", "generation", "deletionTimestamp", "deletionGracePeriodSeconds")


@dataclass(frozen=True, slots=True)
class Change:
    """One step of the history: what an object was, and is.

    Attributes:
        revision: The resourceVersion of the step.
        old: The object before the step; None: it was created.
        new: The object after it; None: it is gone.
    """

    revision: int
    old: Object | None
    new: Object | None

    @property
    def key(self) -> Key:
        metadata = (self.new or self.old or {})["metadata"]
        return metadata["namespace"], metadata["name"]

    def seen_by(self, selector: Selector) -> tuple[EventType, Object] | None:
        """The event that a watch with that selector gets, if any.

        An object that leaves the selection is DELETED as it was while it was in it, with
        the resourceVersion of the change that took it out.
        """
        was, now = selector.matches(self.old), selector.matches(self.new)
        if now and self.new is not None:
            return ("MODIFIED" if was else "ADDED"), self.new
        if was and self.old is not None:
            metadata = {**self.old["metadata"], "resourceVersion": str(self.revision)}
            return "DELETED", {**self.old, "metadata": metadata}
        return None


class Revisions:
    """The counter of resourceVersions, one for all kinds.

    Attributes:
        newest: The resourceVersion of the newest change.
    """

    def __init__(self) -> None:
        # Just below 100, so that code which compares versions as text soon fails.
        self.newest = 97


class Store:
    """All objects of a kind.

    Attributes:
        of: The kind.
        objects: By namespace and name.
        compacted: The newest resourceVersion that the history no longer holds.
        quota: How many objects a namespace may hold; None: any number.
        lingers: Whether deletions wait until somebody removes the finalizer.
    """

    def __init__(self, of: Kind, revisions: Revisions, now: Callable[[], float], history: int) -> None:
        self.of = of
        self.objects: dict[Key, Object] = {}
        self._revisions = revisions
        self.compacted = revisions.newest
        self.quota: int | None = None
        self.lingers = False
        self.on_change: Callable[[Change], None] = lambda change: None
        self._now = now
        self._history: collections.deque[Change] = collections.deque()
        self._most = history

    @property
    def revision(self) -> int:
        """The newest resourceVersion, of any kind."""
        return self._revisions.newest

    def find(self, namespace: str, name: str) -> Object:
        """The object.

        Raises:
            ApiException: 404 with a Status.
        """
        try:
            return self.objects[namespace, name]
        except KeyError:
            raise _status.not_found(self.of, name) from None

    def create(self, namespace: str, version: str, body: Any, *, dry_run: bool = False) -> Object:
        check_type(self.of, body, version)
        given = _without_null(body.get("metadata"))
        self._check_kind(given.get("name", ""), body["kind"])
        if given.get("namespace", namespace) != namespace:
            raise _status.bad_request(
                "the namespace of the provided object does not match the namespace sent on the request"
            )
        if given.pop("resourceVersion", ""):
            text = "resourceVersion should not be set on objects to be created"
            raise _status.api_error(500, text, reason="")
        if not given.get("name") and given.get("generateName"):
            given["name"] = given["generateName"] + secrets.token_hex(3)[:5]
        own = {"uid": str(uuid.uuid4()), "creationTimestamp": self.timestamp(), "generation": 1}
        metadata = {**_without_own(given), "namespace": namespace, **own}
        sandbox = with_defaults({**body, "metadata": metadata}, self.of.schema)
        sandbox.pop("status", None)
        check_object(self.of, sandbox)
        name = metadata["name"]
        self._check_quota(namespace, name)
        if (existing := self.objects.get((namespace, name))) is not None:
            raise _status.already_exists(self.of, name, deleting="deletionTimestamp" in existing["metadata"])
        return sandbox if dry_run else self._put((namespace, name), sandbox)

    def patch(
        self,
        namespace: str,
        version: str,
        name: str,
        body: Any,
        kind: str,
        *,
        status: bool = False,
        dry_run: bool = False,
    ) -> Object:
        """Applies a patch of content type `kind`, to the status alone or to all but the status."""
        check_content_type(kind)
        current = self.find(namespace, name)
        wanted = patched(shown(current, version), body, kind)
        check_patched(self.of, wanted)
        given = _without_null(wanted.get("metadata"))
        if not given.get("name"):
            raise _status.bad_request(
                f"the name of the object ({name} based on URL) was undeterminable: name must be provided"
            )
        _check_address(given, namespace, name)
        self._check_kind(name, wanted.get("kind", ""))
        if wanted.get("apiVersion") != f"{self.of.group}/{version}":
            text = f'Invalid value: "{wanted.get("apiVersion")}": must be {self.of.group}/{version}'
            raise _status.invalid(self.of, name, [("FieldValueInvalid", "apiVersion", text)])
        self._check_version(current, given)
        if not status and given.get("uid", current["metadata"]["uid"]) != current["metadata"]["uid"]:
            text = f'Invalid value: "{given["uid"]}": field is immutable'
            raise _status.invalid(self.of, name, [("FieldValueInvalid", "metadata.uid", text)] * 2)
        return self._update(current, wanted, given, status=status, dry_run=dry_run)

    def replace(
        self, namespace: str, version: str, name: str, body: Any, *, status: bool, dry_run: bool
    ) -> Object:
        check_type(self.of, body, version)
        self._check_kind(name, body["kind"])
        given = _without_null(body.get("metadata"))
        _check_address(given, namespace, name)
        current = self.find(namespace, name)
        if not given.get("resourceVersion"):
            text = "Invalid value: 0x0: must be specified for an update"
            cause = ("FieldValueInvalid", "metadata.resourceVersion", text)
            raise _status.invalid(self.of, name, [cause], kind=self.of.plural)
        uid = current["metadata"]["uid"]
        if given.get("uid", uid) != uid:
            why = f"Precondition failed: UID in precondition: {given['uid']}, UID in object meta: {uid}"
            raise _status.conflict(self.of, name, why)
        self._check_version(current, given)
        return self._update(current, body, given, status=status, dry_run=dry_run)

    def delete(self, namespace: str, name: str, options: Any, *, dry_run: bool) -> Object:
        """Deletes, or marks as being deleted; returns a Status, or the object that lingers."""
        check_delete_options(options)
        dry_run = dry_run or bool(options.get("dryRun"))
        current = self.find(namespace, name)
        metadata = current["metadata"]
        wanted = options.get("preconditions") or {}
        for field, label, hint in (
            ("uid", "UID", "The object might have been deleted and then recreated"),
            ("resourceVersion", "ResourceVersion", "The object might have been modified"),
        ):
            if wanted.get(field) is not None and wanted[field] != metadata[field]:
                why = (
                    f"the {label} in the precondition ({wanted[field]}) does not match"
                    f" the {label} in record ({metadata[field]}). {hint}"
                )
                raise _status.conflict(self.of, name, why, self.of.kind)
        finalizers = list(metadata.get("finalizers") or ())
        waits = options.get("propagationPolicy") == "Foreground" and self.of is not SANDBOX
        if (self.lingers or waits) and LINGERING not in finalizers:
            finalizers.append(LINGERING)
        if not finalizers:
            if not dry_run:
                self.remove(namespace, name)
            details = {"name": name, "group": self.of.group, "kind": self.of.plural, "uid": metadata["uid"]}
            answer: Object = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}
            return {**answer, "details": details}
        if "deletionTimestamp" in metadata:
            return current
        marks = {"deletionTimestamp": self.timestamp(), "deletionGracePeriodSeconds": 0}
        metadata = {**metadata, **marks, "finalizers": finalizers, "generation": metadata["generation"] + 1}
        sandbox = {**current, "metadata": metadata}
        return sandbox if dry_run else self._put((namespace, name), sandbox)

    def remove(self, namespace: str, name: str) -> None:
        """Takes the object away at once, finalizers or not."""
        self._record(self.objects.pop((namespace, name)), None)

    def set_status(self, key: Key, status: Object) -> None:
        """Replaces the whole status, as a controller does."""
        self._update(self.find(*key), {"status": status}, {}, status=True, dry_run=False)

    def annotate(self, key: Key, annotation: str, value: str | None) -> None:
        """Sets an annotation, or takes it off, as a controller does."""
        current = self.find(*key)
        annotations = dict(current["metadata"].get("annotations") or {})
        if annotations.get(annotation) == value:
            return
        annotations = {k: v for k, v in {**annotations, annotation: value}.items() if v is not None}
        metadata = {k: v for k, v in current["metadata"].items() if k != "annotations"}
        metadata |= {"annotations": annotations} if annotations else {}
        self._put(key, {**current, "metadata": metadata})

    def list(
        self,
        selector: Selector,
        *,
        limit: int = 0,
        token: str | None = None,
        revision: int | None = None,
        exact: bool = False,
    ) -> tuple[list[Object], Object]:
        """The objects and the list's metadata.

        Raises:
            ApiException: 400 for a bad token, 410 where the history is gone, 504 for a
                resourceVersion that is still to come.
        """
        start, at = "", self.revision
        if token:
            start, at = self._resumed(token)
        elif revision is not None and revision > self.revision:
            text = f"Timeout: Too large resource version: {revision}, current: {self.revision}"
            raise _status.api_error(504, text, retry_after=1)
        elif revision and exact:
            at = revision
            if at < self.compacted:
                raise _status.api_error(410, "The resourceVersion for the provided list is too old.")
        objects = self._objects_at(at)
        names = sorted(name for namespace, name in objects if namespace == selector.namespace)
        rest = [objects[selector.namespace, name] for name in names if name >= start]
        items = [sandbox for sandbox in rest if selector.matches(sandbox)]
        metadata: Object = {"continue": "", "resourceVersion": str(at)}
        if 0 < limit < len(items):
            if selector.everything:
                metadata["remainingItemCount"] = len(items) - limit
            items = items[:limit]
            metadata["continue"] = _token(at, items[-1]["metadata"]["name"] + "\0")
        return items, metadata

    def since(self, revision: int) -> Iterable[Change]:
        return [change for change in self._history if change.revision > revision]

    def compact(self) -> None:
        """Forgets the history: older resourceVersions and continue tokens have expired."""
        self.compacted = self.revision
        self._history.clear()

    def timestamp(self) -> str:
        return dt.datetime.fromtimestamp(self._now(), dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

    def _update(
        self, current: Object, wanted: Object, given: Object, *, status: bool, dry_run: bool
    ) -> Object:
        old = current["metadata"]
        if status:
            sandbox = {**current, "status": wanted.get("status")}
            check_status(self.of, sandbox)
        else:
            own = {field: old[field] for field in _OWN if field in old}
            kept = {"name": old["name"], "namespace": old["namespace"], **own}
            kept["resourceVersion"] = old["resourceVersion"]
            metadata = {**_without_own(given), **kept}
            self._check_finalizers(old, metadata)
            sandbox = {**wanted, "metadata": metadata, "status": current.get("status")}
            sandbox = with_defaults({**sandbox, "apiVersion": current["apiVersion"]}, self.of.schema)
            if _desired(sandbox) != _desired(current):
                metadata["generation"] = old["generation"] + 1
            check_object(self.of, sandbox)
        if sandbox["status"] is None:
            del sandbox["status"]
        if dry_run or sandbox == current:
            return sandbox
        key = (old["namespace"], old["name"])
        if "deletionTimestamp" in old and not sandbox["metadata"].get("finalizers"):
            self.remove(*key)
            return sandbox
        return self._put(key, sandbox)

    def _put(self, key: Key, sandbox: Object) -> Object:
        metadata = {**sandbox["metadata"], "resourceVersion": str(self.revision + 1)}
        sandbox = {**sandbox, "metadata": metadata}
        old = self.objects.get(key)
        self.objects[key] = sandbox
        self._record(old, sandbox)
        return sandbox

    def _record(self, old: Object | None, new: Object | None) -> None:
        self._revisions.newest += 1
        change = Change(self.revision, old, new)
        self._history.append(change)
        if len(self._history) > self._most:
            self.compacted = self._history.popleft().revision
        self.on_change(change)

    def _check_quota(self, namespace: str, name: str) -> None:
        if self.quota is not None:
            used = sum(1 for key in self.objects if key[0] == namespace)
            if used >= self.quota:
                raise _status.quota_exceeded(self.of, name, self.quota, used)

    def _objects_at(self, revision: int) -> dict[Key, Object]:
        if revision == self.revision:
            return self.objects
        objects = dict(self.objects)
        for change in reversed(self._history):
            if change.revision <= revision:
                break
            if change.old is None:
                del objects[change.key]
            else:
                objects[change.key] = change.old
        return objects

    def _resumed(self, token: str) -> tuple[str, int]:
        try:
            content = json.loads(base64.urlsafe_b64decode(token + "=="))
            start, revision = str(content["start"]), int(content["rv"])
        except (ValueError, TypeError, KeyError):
            raise _status.bad_request("invalid continue token: continue key is not valid") from None
        if revision == -1:  # the token of a 410: go on in what is there now
            return start, self.revision
        if revision < self.compacted:
            raise _status.api_error(
                410,
                "The provided continue parameter is too old to display a consistent list result."
                " You can start a new list without the continue parameter, or use the continue token in"
                " this response to retrieve the remainder of the results.",
                metadata={"continue": _token(-1, start)},
            )
        return start, revision

    def _check_kind(self, name: str, kind: str) -> None:
        if kind != self.of.kind:
            text = f'Invalid value: "{kind}": must be {self.of.kind}'
            raise _status.invalid(self.of, name, [("FieldValueInvalid", "kind", text)], kind=kind)

    def _check_version(self, current: Object, given: Object) -> None:
        if (
            given.get("resourceVersion", current["metadata"]["resourceVersion"])
            != current["metadata"]["resourceVersion"]
        ):
            raise _status.modified(self.of, current["metadata"]["name"])

    def _check_finalizers(self, old: Object, metadata: Object) -> None:
        added = [f for f in metadata.get("finalizers") or () if f not in (old.get("finalizers") or ())]
        if "deletionTimestamp" in old and added:
            text = (
                "Forbidden: no new finalizers can be added if the object is being deleted,"
                f" found new finalizers {added}"
            )
            raise _status.invalid(
                self.of, old["name"], [("FieldValueForbidden", "metadata.finalizers", text)] * 2
            )


def shown(sandbox: Object, version: str) -> Object:
    """An object as a version shows it; a view that shares its parts."""
    return {**sandbox, "apiVersion": f"{sandbox['apiVersion'].rpartition('/')[0]}/{version}"}


_SCALARS = frozenset({str, int, float, bool, type(None)})


def copied(value: Any) -> Any:
    """A copy of plain JSON values."""
    if type(value) is dict:
        return {key: item if type(item) in _SCALARS else copied(item) for key, item in value.items()}
    if type(value) is list:
        return [item if type(item) in _SCALARS else copied(item) for item in value]
    return value


def plain(value: Any) -> Any:
    """A copy of what a caller gave, as it arrives at the server: plain JSON values.

    Raises:
        TypeError: It cannot be sent as JSON.
    """
    if type(value) in _SCALARS:
        return value
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, str | int | float):  # an enumeration, for one
        return json.loads(json.dumps(value))
    if isinstance(value, dt.date):  # a datetime is one too
        return value.isoformat()
    if hasattr(value, "openapi_types"):  # a model of kubernetes_asyncio
        fields = {name: getattr(value, name) for name in value.openapi_types}
        return {value.attribute_map[name]: plain(item) for name, item in fields.items() if item is not None}
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


def _without_null(metadata: Any) -> Object:
    return {key: value for key, value in (metadata or {}).items() if value is not None}


def _without_own(metadata: Object) -> Object:
    return {key: value for key, value in metadata.items() if key not in _OWN and value not in ([], {})}


def _desired(sandbox: Object) -> Object:
    return {key: value for key, value in sandbox.items() if key not in ("metadata", "status")}


def _check_address(given: Object, namespace: str, name: str) -> None:
    if given.get("name", name) != name:
        raise _status.bad_request(
            f"the name of the object ({given['name']}) does not match the name on the URL ({name})"
        )
    if given.get("namespace", namespace) != namespace:
        raise _status.bad_request(
            f"the namespace of the object ({given['namespace']})"
            f" does not match the namespace on the request ({namespace})"
        )


def _token(revision: int, start: str) -> str:
    content = json.dumps({"v": "meta.k8s.io/v1", "rv": revision, "start": start}, separators=(",", ":"))
    return base64.urlsafe_b64encode(content.encode()).decode().rstrip("=")
