"""The files of a sandbox."""

from __future__ import annotations

import os
from collections.abc import AsyncIterable, AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from .. import _telemetry
from .._checks import integer, wrong
from ..errors import SandboxError
from ..proto import files_pb2 as pb
from ..proto import metadata as names
from ..proto.paths import names_of
from ..proto.pieces import encoded
from ..results import FileInfo, FileKind, FileList
from .codec import text
from .connection import Connection, StreamCall
from .stream import CallStream

CHUNK = 1 << 20
"""Bytes of a file in one message."""

_KINDS: dict[int, FileKind] = {pb.FILE_KIND_FILE: "file", pb.FILE_KIND_DIRECTORY: "directory"}

Path = str | os.PathLike[str]
Data = bytes | bytearray | memoryview | str


class SandboxFiles:
    """The files in a sandbox's workspace, its code's working directory: what `SandboxClient.files` is.

    ::

        await client.files.write("data.csv", "x,y\\n1,2\\n")
        await client.execute("...")
        picture = await client.files.read("plot.png")

    Paths are relative to the workspace, with ``/`` between names; ``""`` is the workspace itself. Nothing
    leads out of it, and links are not followed. Every call may be made at the same time as others and is
    safe to cancel. The server has the client's ``call_timeout`` for each answer, and for each message of
    a file; a whole file may take longer. Besides what all calls of the client raise, there are

    - `ValueError`: a path that is absolute, has a ``..``, or cannot be one; nothing is sent;
    - `SandboxError` with the status "NOT_FOUND" for what is missing, "INVALID_ARGUMENT" for what leads
      through a link or is no regular file or directory, "UNIMPLEMENTED" for a server without files;
    - `SandboxCapacityError` where it does not fit into the workspace, or too many files are being read
      and written;
    - `SandboxPermissionError` where code has taken the rights to it away.
    """

    def __init__(self, connection: Connection, timeout: float) -> None:
        self._connection = connection
        self._timeout = timeout

    @property
    def supported(self) -> bool | None:
        """Whether the server has files; None: it has not answered any call yet."""
        features = self._connection.channel.features
        return None if features is None else names.FILES in features

    async def read(self, path: Path, *, offset: int = 0, length: int | None = None) -> bytes:
        """The content of a file, which must fit into memory; arguments as for `open_read`. Idempotent."""
        async with self.open_read(path, offset=offset, length=length) as chunks:
            return b"".join([chunk async for chunk in chunks])

    async def read_text(self, path: Path, *, encoding: str = "utf-8", errors: str = "strict") -> str:
        """The content of a file as text; `encoding` and `errors` as for `bytes.decode`. Idempotent.

        Raises:
            UnicodeDecodeError: It is none; a `ValueError`.
            LookupError: There is no such encoding.
        """
        "".encode(encoding)
        return (await self.read(path)).decode(encoding, errors)

    def open_read(self, path: Path, *, offset: int = 0, length: int | None = None) -> FileStream:
        """Reads a file piece by piece, in constant memory.

        Args:
            path: The file.
            offset: Bytes to skip; beyond its end there is nothing.
            length: At most so many bytes; None: to where the file ends when it is opened.

        Returns:
            An object that is both an async iterator of `bytes` and an async context manager. Best used
            in ``async with``, whose exit cancels the call.
        """
        most = 2**63 - 1
        request = pb.ReadRequest(
            path=_path(path),
            offset=integer("offset", offset, most=most),
            length=None if length is None else integer("length", length, most=most),
        )
        return FileStream(self._connection, request, self._timeout)

    async def write(self, path: Path, data: Data | AsyncIterable[Data]) -> FileInfo:
        """Makes or replaces a file, and the directories above it. Idempotent.

        It appears as a whole or not at all: whoever reads it meanwhile has the old content, and a write
        that fails or is cancelled changes nothing (one that is cancelled at the very end may have been
        done).

        Args:
            path: The file.
            data: Its content; text is encoded as UTF-8. An async iterable is sent piece by piece, in
                constant memory; where it raises, the write is given up.
        """
        if not isinstance(data, Data | AsyncIterable):
            raise wrong("data", type(data), "bytes, str or an async iterable of them")
        request = pb.WriteRequest(path=_path(path))
        content = _bytes(data) if isinstance(data, Data) else data
        with _explained(self._connection, "Write"), _telemetry.files("Write"):
            call = await self._connection.start_transfer("Write", self._timeout)
            try:
                await call.write(request.SerializeToString())
                size = 0
                async for piece in _pieces(content):
                    size += len(piece)
                    await call.write(encoded(piece))
                await call.write(pb.WriteRequest(size=size).SerializeToString())
                return _info(await call.answer())
            finally:
                call.end()

    async def list(
        self,
        path: Path = "",
        *,
        recursive: bool = False,
        limit: int = 1_000,
        since_execution: str | None = None,
    ) -> FileList:
        """What is in a directory, in order of path. Idempotent.

        Args:
            path: The directory.
            recursive: With everything below it.
            limit: At most so many, which are any; servers have a limit of their own (10,000).
            since_execution: The id of an execution: only files that were made or changed since it began,
                by whatever runs in the sandbox or writes to it; hidden ones (a name in the path begins
                with a dot) are left out. Status "NOT_FOUND" if the server does not know it.
        """
        request = pb.ListRequest(
            path=_path(path),
            recursive=bool(recursive),
            limit=integer("limit", limit, least=1),
            since_execution="" if since_execution is None else text("since_execution", since_execution),
        )
        answer = await self._call("List", request)
        return FileList(map(_info, answer.files), truncated=answer.truncated)

    async def stat(self, path: Path) -> FileInfo:
        """What there is of that name; a link is of kind "other". Idempotent."""
        return _info(await self._call("Stat", pb.StatRequest(path=_path(path))))

    async def remove(self, path: Path, *, recursive: bool = False) -> None:
        """Removes a file, a link, or a directory: an empty one, unless `recursive`.

        Not idempotent: what is gone already is "NOT_FOUND". Cancelled, it may go on on the server.
        """
        await self._call("Remove", pb.RemoveRequest(path=_path(path), recursive=bool(recursive)))

    async def make_directory(self, path: Path) -> FileInfo:
        """Makes a directory, and those above it. Idempotent: it may exist already."""
        return _info(await self._call("MakeDirectory", pb.MakeDirectoryRequest(path=_path(path))))

    async def _call(self, rpc: str, request: Any) -> Any:
        with _explained(self._connection, rpc), _telemetry.files(rpc):
            return await self._connection.use(rpc, request, self._timeout)


class FileStream(CallStream[bytes]):
    """The content of a file, piece by piece: what `SandboxFiles.open_read` returns.

    An async iterator of `bytes`, and an async context manager; used as `ExecutionStream` is.

    Attributes:
        info: The file, as it was opened; None before the first piece.
    """

    def __init__(self, connection: Connection, request: pb.ReadRequest, timeout: float) -> None:
        super().__init__(connection)
        self._request = request
        self._timeout = timeout
        self.info: FileInfo | None = None

    async def __anext__(self) -> bytes:
        """The next piece.

        Raises:
            SandboxError: See `SandboxFiles`; status "ABORTED": the file became shorter meanwhile.
        """
        with _explained(self._connection, "Read"):
            return await super().__anext__()

    async def _begin(self) -> StreamCall:
        with _explained(self._connection, "Read"):
            return await self._connection.start_transfer("Read", self._timeout, self._request)

    def _take(self, message: pb.ReadResponse | bytes) -> bytes | None:
        if isinstance(message, bytes):
            return message or None
        if message.WhichOneof("part") == "info":
            self.info = _info(message.info)
        return message.data or None


@contextmanager
def _explained(connection: Connection, rpc: str) -> Iterator[None]:
    """Says of a server without files that this is what it lacks; asks none that is known to be one."""
    text = f"{rpc} on {connection.target}: UNIMPLEMENTED: this sandbox's server has no files (no FileService)"
    if names.FILES not in (connection.channel.features or {names.FILES}) and not connection.channel.closed:
        raise SandboxError(text, status="UNIMPLEMENTED")
    try:
        yield
    except SandboxError as error:
        if error.status != "UNIMPLEMENTED":
            raise
        raise SandboxError(text, status="UNIMPLEMENTED") from error


def _path(path: object) -> str:
    value = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(value, str):
        raise wrong("path", path, "a string, relative to the workspace")
    return "/".join(names_of(value))


def _bytes(data: object) -> memoryview:
    if isinstance(data, str):
        try:
            return memoryview(data.encode())
        except UnicodeEncodeError as error:
            raise ValueError(f"data cannot be encoded as UTF-8: {error.reason}") from None
    if isinstance(data, bytes | bytearray | memoryview):
        return memoryview(data).cast("B")
    raise wrong("data", type(data), "bytes or str, or an async iterable of nothing else")


async def _pieces(data: memoryview | AsyncIterable[Data]) -> AsyncIterator[memoryview]:
    if isinstance(data, memoryview):
        for begin in range(0, len(data), CHUNK):
            yield data[begin : begin + CHUNK]
    else:
        async for item in data:
            view = _bytes(item)
            for begin in range(0, len(view), CHUNK):
                yield view[begin : begin + CHUNK]


def _info(message: pb.FileInfo) -> FileInfo:
    kind = _KINDS.get(message.kind, "other")
    return FileInfo(message.path, message.size, kind, message.modified_at_ms / 1000)
