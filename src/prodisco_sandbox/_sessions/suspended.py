"""Suspended objects: those of idle sessions, kept until the sessions are used again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .._cluster import metadata
from .._cluster.metadata import Object
from .table import Session


@dataclass(slots=True)
class Suspended:
    """An object of this instance that no session has.

    Attributes:
        object: As it was seen last, without its pod template.
        incarnation: Of the session that had it.
        is_own: A session of this manager has left it.
    """

    object: Object
    incarnation: int = 0
    is_own: bool = False

    @property
    def name(self) -> str:
        return metadata.name(self.object)

    @property
    def until(self) -> str:
        """Its deadline, the earliest for the one that was suspended first."""
        return str((self.object.get("spec") or {}).get("shutdownTime") or "")


class SuspendedObjects:
    """The suspended objects of an instance, by their sessions' hash; kept up to date by the watch."""

    def __init__(self, on_gone: Callable[[str], object]) -> None:
        self._by_session: dict[str, Suspended] = {}
        self._on_gone = on_gone

    def __len__(self) -> int:
        return len(self._by_session)

    def of(self, session_hash: str) -> Suspended | None:
        return self._by_session.get(session_hash)

    def take(self, session_hash: str) -> Suspended | None:
        """Removes and returns the record of a session that is used again, or closed."""
        return self._by_session.pop(session_hash, None)

    def take_all(self) -> list[Suspended]:
        found = list(self._by_session.values())
        self._by_session.clear()
        return found

    def find(self, obj: Object) -> Suspended | None:
        """The record of this object, compared by uid."""
        found = self._by_session.get(metadata.labels(obj).get(metadata.LABEL_SESSION, ""))
        same = found is not None and metadata.uid(found.object) == metadata.uid(obj)
        return found if same else None

    def is_own(self, obj: Object) -> bool:
        found = self.find(obj)
        return found is not None and found.is_own

    def left(self, session: Session, obj: Object) -> None:
        self._by_session[session.session_hash] = Suspended(_without_template(obj), session.incarnation, True)

    def seen(self, obj: Object, *, is_suspended: bool) -> None:
        """An object that no session has was added or modified."""
        found = self.find(obj)
        if metadata.is_deleting(obj):
            self.gone(obj)
        elif found is not None:
            # The watch may lag behind the answer to the suspension.
            if metadata.generation(obj) >= metadata.generation(found.object):
                found.object = _without_template(obj)
        elif is_suspended:
            session = metadata.labels(obj).get(metadata.LABEL_SESSION, "")
            self._by_session.setdefault(session, Suspended(_without_template(obj)))

    def gone(self, obj: Object) -> None:
        if self.find(obj) is not None:
            session = metadata.labels(obj)[metadata.LABEL_SESSION]
            del self._by_session[session]
            self._on_gone(session)

    def listed(self, objects: Iterable[Object]) -> None:
        """All objects of the instance: those that are not among them are gone."""
        uids = {metadata.uid(obj) for obj in objects}
        for found in list(self._by_session.values()):
            if metadata.uid(found.object) not in uids:
                self.gone(found.object)

    def beyond(self, most: int) -> list[Suspended]:
        """Those beyond `most`, the earliest deadline first."""
        found = sorted(self._by_session.values(), key=lambda suspended: suspended.until)
        return found[: max(0, len(found) - most)]


def _without_template(obj: Object) -> Object:
    """A copy for the record: nobody reads the pod template, which is most of its size."""
    spec = {key: value for key, value in (obj.get("spec") or {}).items() if key != "podTemplate"}
    return {**obj, "spec": spec}
