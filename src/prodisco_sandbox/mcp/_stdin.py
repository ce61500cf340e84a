"""Standard input that can be ended from within."""

from __future__ import annotations

import fcntl
import io
import os
import select
import sys


class EndableStdin(io.RawIOBase):
    """Standard input for the SDK's reader, which a signal can end, or a client that reads no more.

    The SDK reads in a thread, where nothing can interrupt it: without this, a server on
    stdio that is told to terminate waits for its client to say one thing more, and so does
    one whose standard output is broken, deaf to everything.
    """

    def __init__(self) -> None:
        self._input = fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, 3)
        self._ended, self._end = os.pipe2(os.O_CLOEXEC)
        self._news = select.poll()
        self._news.register(self._input, select.POLLIN)
        self._news.register(self._ended, select.POLLIN)
        # For no event, so that it only shows when nobody reads the other end any more.
        # Of its own, since the SDK makes descriptor 1 another one.
        self._news.register(fcntl.fcntl(1, fcntl.F_DUPFD_CLOEXEC, 3), 0)

    def install(self) -> None:
        """Becomes ``sys.stdin``; descriptor 0 becomes empty, for tools and child processes."""
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        sys.stdin = io.TextIOWrapper(io.BufferedReader(self))

    def end(self) -> None:
        """The reader gets an end of file, now and ever after. Idempotent."""
        os.write(self._end, b"\0")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        ready = {descriptor for descriptor, _ in self._news.poll()}
        return os.readv(self._input, [buffer]) if ready == {self._input} else 0
