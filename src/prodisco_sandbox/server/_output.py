"""Text that a running program prints: decoded, capped, and read by offset."""

from __future__ import annotations

import bisect
import codecs
import sys

_PART = 4096


class Output:
    """One output of an execution.

    Bytes are decoded as UTF-8, and invalid ones replaced. Offsets count
    characters. Past `limit` characters nothing more is kept, and the text says so.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._parts: list[str] = []
        self._starts: list[int] = []
        self._length = 0
        self.cut = False

    def __len__(self) -> int:
        return self._length

    @property
    def size(self) -> int:
        """Bytes of memory: a character may take four."""
        return sum(map(sys.getsizeof, self._parts))

    def feed(self, data: bytes, *, final: bool = False) -> None:
        """Adds what was printed; `final` ends a character that was left incomplete."""
        if self.cut:
            return
        text = self._decode(data, final)
        if self._length + len(text) > self._limit:
            self.cut = True
            text = text[: self._limit - self._length]
            text += f"\n[output cut: more than {self._limit:,} characters]\n"
        self._append(text)

    def _append(self, text: str) -> None:
        if not text:
            return
        if self._parts and len(self._parts[-1]) < _PART:
            self._parts[-1] += text
        else:
            self._parts.append(text)
            self._starts.append(self._length)
        self._length += len(text)

    def since(self, offset: int = 0) -> str:
        """The text from `offset` on; empty where there is none yet."""
        if offset >= self._length:
            return ""
        index = bisect.bisect_right(self._starts, offset) - 1
        first = self._parts[index][offset - self._starts[index] :]
        return "".join([first, *self._parts[index + 1 :]])
