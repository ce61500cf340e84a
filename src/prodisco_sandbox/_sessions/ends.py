"""How sessions end: for which reasons, and what each means for the session's object."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from .. import _telemetry
from .._cluster import manifest
from ..errors import SandboxError, SandboxFailedError
from .table import Session, SessionState

if TYPE_CHECKING:
    from .parts import Parts


class LostError(SandboxError):
    """The session's object is no more, or no longer ours: there is nothing to delete."""


class SpentError(SandboxFailedError):
    """The object has come to its end and holds nothing: delete it, and make another."""


class SuspendedError(SandboxFailedError):
    """The object is suspended, and starting it was refused: it is kept."""


Reason = Literal["closed", "evicted", "reaped", "shutdown", "failed", "lost", "queued", "withdrawn"]
"""``"queued"``: for too long; ``"withdrawn"``: nobody waits any more. Neither has an object."""

FATES: dict[Reason, tuple[str, str]] = {
    # with one manager, and with `shared`, where the cluster ends what nobody has asked to end
    "closed": ("delete", "delete"),
    "evicted": ("suspend", "delete"),
    "reaped": ("suspend", "keep"),
    "shutdown": ("suspend", "keep"),
    "failed": ("spare", "keep"),
    "lost": ("spare", "keep"),
    "queued": ("delete", "keep"),
    "withdrawn": ("delete", "keep"),
}
"""What becomes of the object of a session that ends.

``"suspend"``: suspended with `on_idle` of that name, else deleted. ``"spare"``: suspended or kept where it
may hold what a user wants back, else deleted.
"""


class Ends:
    """Ends sessions: one transition of the table, and what is remembered of it."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def end(self, session: Session, reason: Reason, error: SandboxError | None = None) -> None:
        """Takes a session out of use at once; its life goes on with the removal.

        What has ended already stays as it is. Those who wait get `error`; None: they ask again.
        """
        parts = self._parts
        fate = FATES[reason][parts.shared is not None]
        keep = fate == "keep" or (fate == "spare" and self.must_keep(session))
        suspend = (keep or fate == "suspend") and self._may_suspend(session)
        if not parts.table.close(session, error, reason, keep=keep, suspend=suspend):
            return
        session.trace = _telemetry.here(after=session.trace)
        if session.remains.what == "kept" and parts.shared is None:
            parts.log.warning("sandbox_kept", sandbox=session.name, reason=reason)
        if reason == "evicted" or not (session.suspends or (parts.shared is not None and reason == "reaped")):
            parts.past.ended(session)
        parts.leases.drop(session)

    def must_keep(self, session: Session) -> bool:
        """Whether a session that fails leaves its object: it may hold what a user wants back."""
        known = session.known
        observed = known.object or {}
        being_started = known.generation > 0  # since it was suspended
        return known.used and (
            manifest.holds_volumes(observed)
            or being_started
            or self._parts.reading(observed).phase == "suspended"
        )

    def _may_suspend(self, session: Session) -> bool:
        known = session.known
        return self._parts.config.on_idle == "suspend" and known.used and known.claimed

    def lose(self, session: Session, reason: str, error: SandboxError | None = None) -> None:
        """Ends a session whose object is gone, or is of no more use."""
        lived = self._parts.since(session.since)
        if session.machine.lost:
            self._parts.log.warning("sandbox_gone", sandbox=session.name, reason=reason, duration=lived)
        else:
            self._parts.log.warning("sandbox_lost", sandbox=session.name, reason=reason, duration=lived)
        self.end(session, "lost", error)

    def dropped(self, session: Session, reason: str) -> None:
        """Ends a ready session whose object somebody has deleted."""
        self._parts.table.dropped(session)
        self.lose(session, reason)

    def fail(self, session: Session, error: SandboxError) -> None:
        took = self._parts.since(session.since)
        self._parts.log.warning("sandbox_failed", sandbox=session.name, **_told(error), duration=took)
        self.end(session, "failed", error)

    def refused(self, session: Session, error: SandboxError) -> None:
        took = self._parts.since(session.since)
        self._parts.log.info("session_refused", sandbox=session.name, **_told(error), duration=took)

    async def outcome(self, session: Session) -> SandboxError | None:
        """Waits for the outcome of a creation or check; returns the error that it had."""
        outcome = session.outcome
        session.waiters += 1
        try:
            await outcome.wait()
        finally:
            session.waiters -= 1
            session.last_used = self._parts.now()
            if session.state is SessionState.QUEUED and not session.waiters:
                self.end(session, "withdrawn")
        # One that became ready and was closed in the same pass of the loop has been closed.
        return session.outcome.error if session.inbox.closed else outcome.error


def _told(error: SandboxError) -> dict[str, str]:
    """What events say of an error; its class is one of the public ones."""
    public = next(kind for kind in type(error).__mro__ if kind.__module__ == SandboxError.__module__)
    return {"reason": str(error), "error": public.__name__}
