"""Pipes between the server and its child processes, read and written by the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import Callable
from typing import Any

_READ = 1 << 18


class PipeReader:
    """Hands what arrives in a pipe to a callback."""

    def __init__(self, descriptor: int, on_data: Callable[[bytes], Any]) -> None:
        self._loop = asyncio.get_running_loop()
        self._descriptor = descriptor
        self._on_data = on_data
        self.closed: asyncio.Future[None] = self._loop.create_future()
        os.set_blocking(descriptor, False)
        self._loop.add_reader(descriptor, self._read)

    def _read(self) -> None:
        try:
            data = os.read(self._descriptor, _READ)
        except BlockingIOError:
            return
        if data:
            self._on_data(data)
        else:
            self.close()

    def close(self) -> None:
        if not self.closed.done():
            self._loop.remove_reader(self._descriptor)
            os.close(self._descriptor)
            self.closed.set_result(None)


class PipeWriter:
    """Writes to a pipe without blocking. Its reader may vanish at any time."""

    def __init__(self, descriptor: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._descriptor = descriptor
        self._queue: deque[memoryview] = deque()
        self._closed = False
        os.set_blocking(descriptor, False)

    def write(self, data: bytes) -> None:
        if self._closed:
            return
        self._queue.append(memoryview(data))
        if len(self._queue) == 1:
            self._loop.add_writer(self._descriptor, self._flush)
            self._flush()

    def _flush(self) -> None:
        try:
            while self._queue:
                written = os.write(self._descriptor, self._queue[0])
                rest = self._queue[0][written:]
                if rest:
                    self._queue[0] = rest
                else:
                    self._queue.popleft()
        except BlockingIOError:
            return
        except ConnectionError:
            self._queue.clear()
        self._loop.remove_writer(self._descriptor)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._loop.remove_writer(self._descriptor)
            os.close(self._descriptor)


def pipe(undo: contextlib.ExitStack, theirs: contextlib.ExitStack, ours: str) -> tuple[int, int]:
    """A pipe: our end, which `undo` closes, and the child's, which `theirs` closes."""
    read, write = os.pipe2(os.O_CLOEXEC)
    mine, its = (read, write) if ours == "read" else (write, read)
    undo.callback(os.close, mine)
    theirs.callback(os.close, its)
    return mine, its
