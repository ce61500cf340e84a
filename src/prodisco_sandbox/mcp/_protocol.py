"""uvicorn's protocol with a bound. h11 takes 20 ms to import: only what serves HTTP loads this module."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from . import _connections


class BoundedProtocol(H11Protocol):
    """uvicorn's, which would wait for ever for the rest of a request, and keep any number of connections."""

    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > _connections.most_connections():
            self._make_room()
        self._look()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop()

    def _look(self) -> None:
        """Starts the clock where a request is incomplete; what trickles in does not start it anew."""
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._stop()
        elif self._patience is None and not self.transport.is_closing():
            self._patience = self.loop.call_later(_connections.REQUEST_TIMEOUT, self.transport.close)

    def _make_room(self) -> None:
        """Closes the connection that has been waiting for a request for longest."""
        waiting = [
            (timer.when(), id(each), each)
            for each in self.connections
            if isinstance(each, BoundedProtocol) and (timer := each._patience or each.timeout_keep_alive_task)
        ]
        if waiting:
            *_, longest = min(waiting)
            longest._stop()
            longest._unset_keepalive_if_required()
            longest.transport.abort()

    def _stop(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
