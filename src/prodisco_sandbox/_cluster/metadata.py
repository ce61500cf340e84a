"""What all kinds of objects have in common: names, labels, deadlines, metadata, conditions.

Pure functions over plain dicts.
"""

from __future__ import annotations

import datetime as dt
import hashlib
from typing import Any

from ..config import SHARED_PREFIX

LABEL_APP = "app"
LABEL_MANAGED_BY = "prodisco.dev/managed-by"
LABEL_INSTANCE = "prodisco.dev/instance"
LABEL_SESSION = "prodisco.dev/session"
LABEL_SANDBOX = "prodisco.dev/sandbox"
LABEL_OWNER = "prodisco.dev/owner"
APP = "sandbox-server"
MANAGED_BY = "mcp-server"

LATEST = dt.datetime(9999, 12, 31, 23, 59, 59, tzinfo=dt.UTC).timestamp()
"""The last second that RFC 3339 can write."""

Object = dict[str, Any]
"""An object as the API server returns it."""


def session_hash(session_id: str) -> str:
    """The session's label value: 40 hex digits of the SHA-256 of its id.

    A label value holds 63 characters. The id itself never leaves the process: MCP
    session ids are as good as credentials.
    """
    return _digest(session_id).hex()[:40]


def name_digest(session_id: str, incarnation: int = 0, group: str = "") -> str:
    """What tells the name of a session's object from others: 32 hex digits."""
    distinct = incarnation.to_bytes(8, "big") + group.encode()
    return hashlib.sha256(_digest(session_id) + distinct).hexdigest()[:32]


def owner_label(owner: str) -> str:
    """A caller's label value: like `session_hash`, since it may be anything."""
    return session_hash(owner)


def _digest(session_id: str) -> bytes:
    # Text from elsewhere may hold lone surrogates, which plain UTF-8 refuses.
    return hashlib.sha256(session_id.encode("utf-8", "surrogatepass")).digest()


def managed_selector(
    instance: str | None = None, session: str | None = None, *, managed_by: str = MANAGED_BY
) -> str:
    """Label selector of the managed objects, of one instance or session if given."""
    parts = [f"{LABEL_MANAGED_BY}={managed_by}"]
    if instance is not None:
        parts.append(f"{LABEL_INSTANCE}={instance}")
    if session is not None:
        parts.append(f"{LABEL_SESSION}={session}")
    return ",".join(parts)


def matches(obj: Object, selector: str) -> bool:
    found = labels(obj)
    return all(found.get(key) == value for key, value in (part.split("=", 1) for part in selector.split(",")))


def labels(obj: Object) -> dict[str, str]:
    return (obj.get("metadata") or {}).get("labels") or {}


def instance(obj: Object) -> str | None:
    return labels(obj).get(LABEL_INSTANCE)


def is_shared(obj: Object) -> bool:
    """Whether it belongs to a group of managers that share their sessions."""
    return (instance(obj) or "").startswith(SHARED_PREFIX)


def uid(obj: Object) -> str | None:
    value = (obj.get("metadata") or {}).get("uid")
    return value if isinstance(value, str) else None


def resource_version(obj: Object) -> str | None:
    return (obj.get("metadata") or {}).get("resourceVersion")


def name(obj: Object) -> str:
    return str((obj.get("metadata") or {}).get("name"))


def is_of(obj: Object, session: str, instance: str | None = None, *, managed_by: str = MANAGED_BY) -> bool:
    """Whether `managed_selector` of this session, and of this instance if given, finds it."""
    found = labels(obj)
    managed = found.get(LABEL_MANAGED_BY) == managed_by and found.get(LABEL_SESSION) == session
    return managed and (instance is None or found.get(LABEL_INSTANCE) == instance)


def is_deleting(obj: Object) -> bool:
    return bool((obj.get("metadata") or {}).get("deletionTimestamp"))


def generation(obj: Object | None) -> int:
    """How often its spec has changed; 0 where the API does not count."""
    value = ((obj or {}).get("metadata") or {}).get("generation")
    return value if isinstance(value, int) else 0


def conditions(obj: Object, since: int = 0) -> dict[Any, Object]:
    """The conditions by type, without those from before the generation `since`."""
    found = [c for c in (obj.get("status") or {}).get("conditions") or () if isinstance(c, dict)]
    return {c.get("type"): c for c in found if not _is_older(c.get("observedGeneration"), since)}


def _is_older(observed: object, since: int) -> bool:
    return isinstance(observed, int) and observed < since


def lease_time(now: float, duration: float) -> str:
    """RFC 3339 time `duration` seconds after the Unix time `now`, in whole seconds; at most `LATEST`."""
    end = dt.datetime.fromtimestamp(min(now + duration, LATEST), dt.UTC)
    return end.strftime("%Y-%m-%dT%H:%M:%SZ")


def timestamp(time: float) -> str:
    """RFC 3339 form of a Unix time, in microseconds."""
    return dt.datetime.fromtimestamp(time, dt.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def unix_time(text: object) -> float | None:
    """The Unix time of an RFC 3339 time; None of anything else."""
    if not isinstance(text, str):
        return None
    try:
        time = dt.datetime.fromisoformat(text)
    except ValueError:
        return None
    # The API server writes UTC; a time without an offset is no RFC 3339.
    return (time if time.tzinfo else time.replace(tzinfo=dt.UTC)).timestamp()
