"""Standard input and output for the SDK's transport."""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
import threading

from .._log import get_logger
from ._lines import MAX_LINE, TAIL, answers_to_long_line, check_line

log = get_logger("mcp")

_CHUNK = 1 << 16


class Stdio(io.RawIOBase):
    """Standard input for the SDK's reader: readable lines only, and an end of file on demand.

    Other lines are answered here. The SDK reads in a thread that cannot be interrupted. Without
    this class, a server on stdio that is terminated, or whose standard output is broken, would hang
    until its client sends another line.
    """

    def __init__(self) -> None:
        import fcntl  # Windows has none: the program serves HTTP there.

        self._input = fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, 3)
        self._output = LineWriter(fcntl.fcntl(1, fcntl.F_DUPFD_CLOEXEC, 3))
        self._ended, self._end = os.pipe()
        self._news = select.poll()
        self._news.register(self._input, select.POLLIN)
        self._news.register(self._ended, select.POLLIN)
        # For no event: poll still reports when the other end is closed.
        self._news.register(self._output.fileno(), 0)
        self._line = bytearray()  # one that has not ended yet; not more than MAX_LINE of it
        self._tail: bytearray | None = None  # the end of a line that is longer
        self._checked = bytearray()  # what the SDK may read

    def install(self) -> None:
        """Becomes ``sys.stdin`` and ``sys.stdout``.

        Tools and child processes get an empty descriptor 0, and standard error as descriptor 1.
        """
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        try:
            os.dup2(2, 1)
        except OSError:  # It is closed.
            os.dup2(null, 1)
        os.close(null)
        sys.stdin = io.TextIOWrapper(io.BufferedReader(self, _CHUNK))
        sys.stdout = _Stdout(self._output)

    def end(self) -> None:
        """Gives the reader an end of file, for good. Idempotent."""
        os.write(self._end, b"\0")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        while not self._checked:
            data = self._read()
            if not data:
                # A last line may lack its end.
                self._take(b"\n" if self._line else b"")
                break
            self._take(data)
        size = min(len(buffer), len(self._checked))
        buffer[:size] = self._checked[:size]
        del self._checked[:size]
        return size

    def _read(self) -> bytes:
        ready = {descriptor for descriptor, _ in self._news.poll()}
        return os.read(self._input, _CHUNK) if ready == {self._input} else b""

    def _take(self, data: bytes) -> None:
        while data:
            part, newline, data = data.partition(b"\n")
            if self._tail is not None:
                self._tail = (self._tail + part)[-TAIL:]
            elif len(self._line) + len(part) > MAX_LINE:
                self._tail = (self._line[-TAIL:] + part)[-TAIL:]
            else:
                self._line += part
            if newline:
                self._finish_line()

    def _finish_line(self) -> None:
        line, tail = bytes(self._line), self._tail
        self._line, self._tail = bytearray(), None
        if tail is None:
            checked, reason, answers = check_line(line)
            self._checked += checked
        else:
            reason, answers = answers_to_long_line(line, bytes(tail))
        if reason:
            log.warning("line_refused", reason=reason, answered=len(answers))
            with contextlib.suppress(BrokenPipeError):  # The next read shows it.
                self._output.write_lines(b"".join(answers))


class LineWriter(io.RawIOBase):
    """Standard output for the SDK's writer and for our own answers; writes whole lines."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self._begun = bytearray()

    def fileno(self) -> int:
        return self._descriptor

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        """For the SDK: an unfinished line is kept until its end comes."""
        self._begun += data
        end = self._begun.rfind(b"\n") + 1
        if end:
            lines = bytes(self._begun[:end])
            del self._begun[:end]
            self.write_lines(lines)
        return len(data)

    def write_lines(self, lines: bytes) -> None:
        """Writes whole lines, from any thread."""
        left = memoryview(lines)
        with self._lock:
            while left:
                try:
                    left = left[os.write(self._descriptor, left) :]
                except BlockingIOError:  # The parent process has made it non-blocking.
                    select.select([], [self._descriptor], [])


class _Stdout(io.TextIOWrapper):
    """Prints to descriptor 1; its `buffer`, which the SDK's transport uses, writes to the client."""

    def __init__(self, buffer: LineWriter) -> None:
        super().__init__(io.FileIO(1, "w", closefd=False), line_buffering=True)
        self._wire = buffer

    @property
    def buffer(self) -> LineWriter:  # type: ignore[override]
        return self._wire
