"""Messages that hold a piece of a file, without the copies that protobuf would make of it.

`ReadResponse` and `WriteRequest` both have ``bytes data = 2``. Whatever else comes is for protobuf.
"""

from __future__ import annotations

_TAG = 2 << 3 | 2
"""Field 2, of a type with a length."""


def head(length: int) -> bytes:
    """What comes before so many bytes of data in a message."""
    found = bytearray([_TAG])
    while length > 0x7F:
        found.append(length & 0x7F | 0x80)
        length >>= 7
    found.append(length)
    return bytes(found)


def encoded(data: bytes | memoryview) -> bytes:
    """The message that holds this data."""
    return b"".join((head(len(data)), data))


def data_of(message: bytes) -> memoryview | None:
    """The data of a message that holds one piece and nothing else; None for every other message."""
    size = 2
    while size < len(message) and message[size - 1] & 0x80:
        size += 1
    if len(message) < size or not message.startswith(head(len(message) - size)):
        return None
    return memoryview(message)[size:]
