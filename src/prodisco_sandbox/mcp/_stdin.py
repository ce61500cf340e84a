"""Standard input that can be ended from within."""

from __future__ import annotations

import fcntl
import io
import os
import select
import sys


class EndableStdin(io.RawIOBase):
    """Standard input for the SDK's reader, which a signal can end.

    The SDK reads in a thread, where nothing can interrupt it: without this, a server on
    stdio that is told to terminate waits for its client to say one thing more.
    """

    def __init__(self) -> None:
        self._input = fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, 3)
        self._ended, self._end = os.pipe2(os.O_CLOEXEC)

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
        ready, _, _ = select.select([self._input, self._ended], [], [])
        return 0 if self._ended in ready else os.readv(self._input, [buffer])
