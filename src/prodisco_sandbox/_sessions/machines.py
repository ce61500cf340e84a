"""Machines: which session's client leads where, so that no two sessions share one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .._cluster import resource
from .inbox import News

if TYPE_CHECKING:
    from ..client import SandboxClient
    from .table import Session


_NOBODY: frozenset[Session] = frozenset()


@dataclass(slots=True, kw_only=True)
class Machine:
    """What is known of a session's machine.

    A machine is what a pod is until it ends: its server's boot id tells it or, of a server
    without fences, its addresses.
    """

    target: str | None = None
    """Where the client leads; None: there is no client, or one of its users has closed it."""
    pod: str = ""
    """The pod that the client is to meet."""
    ips: tuple[str, ...] = ()
    place: tuple[object, ...] = ()
    """Where the object's status said last that the machine is; see `Reading.place`."""
    placed_at: float = 0.0
    """When it said so first, on the loop's clock."""
    addresses: tuple[str, ...] = ()
    """Target and addresses that no other session has meanwhile; see `Machines.occupy`."""
    waiting: frozenset[Session] = _NOBODY
    """Sessions whose status names one of its addresses, too."""
    misplaced: bool = False
    """The machine is not where the status says, and news of that is waited for."""
    boot_ids: dict[str, float] = field(default_factory=dict)
    """Of all machines that the session has had, and when it met them on the loop's clock."""
    identity: str | tuple[str, ...] = ()
    """The machine met last: its boot id or its addresses."""
    met: SandboxClient | None = None
    """The client that met it."""
    lost: bool = False
    """It is gone; the next client leads to another."""

    def differs(self, said: resource.Machine) -> bool:
        """Whether the object's status names another pod or other addresses."""
        moved = bool(said.ips and self.ips and said.ips != self.ips)
        return moved or self.is_another(said)

    def is_another(self, said: resource.Machine) -> bool:
        """Whether the object's status names another pod: a claim may be rebound while it stays Ready."""
        return bool(said.pod and self.pod and said.pod != self.pod)


class Machines:
    """Who has which address, and who has met which machine. No two sessions share either."""

    def __init__(self) -> None:
        self._by_address: dict[str, Session] = {}
        self._by_boot_id: dict[str, Session] = {}

    def occupy(self, session: Session, addresses: tuple[str, ...]) -> list[Session] | None:
        """Gives a session the addresses that its object's status names.

        A status may lag behind, so two can name one address. The one that has named it
        for the shorter time is taken to be right, until a server says otherwise.

        Returns:
            The sessions that have lost an address, whose status must be read again; None:
            another session's status is newer, and this one's must change.
        """
        machine = session.machine
        if machine.addresses == addresses:
            return []
        self.vacate(session)
        holders = {self._by_address.get(address) for address in addresses}
        others = [holder for holder in holders if holder is not None]
        for other in others:
            if other.machine.placed_at >= machine.placed_at:
                other.machine.waiting |= {session}
                return None
        for other in others:
            self.vacate(other)
        machine.addresses = addresses
        self._by_address |= dict.fromkeys(addresses, session)
        return others

    def vacate(self, session: Session) -> None:
        """Takes a session's addresses away, and wakes those that wait for one."""
        machine = session.machine
        for address in machine.addresses:
            del self._by_address[address]
        machine.addresses = ()
        for waiting in machine.waiting:
            waiting.inbox.post(News.SEEN)
        machine.waiting = _NOBODY

    def meet(self, session: Session, boot_id: str, now: float) -> Session | None:
        """Notes which machine a session has.

        Returns:
            Another current session that has met it before: then it is not this one's. But at a
            loopback address, which no pod has, a server that was met before this session's first
            object was made is meant for several sessions, as in tests.
        """
        other = self._by_boot_id.get(boot_id)
        if other is None:
            self._by_boot_id[boot_id] = session
            session.machine.boot_ids[boot_id] = now
            return None
        met_before = other.machine.boot_ids[boot_id] < session.known.since
        shared = met_before and not session.known.used and _are_loopback(session.machine.ips)
        return None if other is session or shared else other

    def forget(self, session: Session) -> None:
        self.vacate(session)
        session.client = session.machine.target = None
        session.machine.ips = ()

    def leave(self, session: Session) -> None:
        self.vacate(session)
        for boot_id in session.machine.boot_ids:
            del self._by_boot_id[boot_id]
        session.machine.boot_ids.clear()


def _are_loopback(addresses: tuple[str, ...]) -> bool:
    return bool(addresses) and all(address.startswith("127.") or address == "::1" for address in addresses)
