"""The RPCs on files in the workspace."""

# ruff: noqa: N802 (the protocol names its methods)

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import grpc
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

from prodisco_sandbox.proto import files_pb2 as pb
from prodisco_sandbox.proto import pieces
from prodisco_sandbox.proto.paths import names_of

from ._beneath import Beneath, Entry, Upload, outlast
from ._usage import ENTRY

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
_T = TypeVar("_T")

CHUNK = 1 << 20
"""Bytes of a file in one message."""
BATCH = 2 << 20
"""Bytes, and `IOV_MAX` the pieces, that are gathered for a thread to write."""
IOV_MAX = os.sysconf("SC_IOV_MAX")
DEFAULT_LISTED = 1_000
MOST_LISTED = 10_000
"""Entries of one answer: the longest paths still fit into a message."""
MOST_TRANSFERS = 16
"""Files that are read or written at the same time: each takes a descriptor and some MiB."""
_HEAD = 8
"""Bytes that are left free before a piece, for the head of its message."""

_Code = grpc.StatusCode
_STATUSES = {
    errno.ENOENT: (_Code.NOT_FOUND, "there is no such file or directory"),
    errno.ENOTDIR: (_Code.INVALID_ARGUMENT, "a link, or no directory, where a directory must be"),
    errno.EISDIR: (_Code.INVALID_ARGUMENT, "it is a directory"),
    errno.EINVAL: (_Code.INVALID_ARGUMENT, None),
    errno.ELOOP: (_Code.INVALID_ARGUMENT, "links are not followed"),
    errno.ENAMETOOLONG: (_Code.INVALID_ARGUMENT, "a name is too long"),
    errno.EXDEV: (_Code.INVALID_ARGUMENT, "it is on another file system than the workspace"),
    errno.ENOTEMPTY: (_Code.FAILED_PRECONDITION, None),
    errno.EACCES: (_Code.PERMISSION_DENIED, "code in the sandbox has locked it"),
    errno.EPERM: (_Code.PERMISSION_DENIED, None),
    errno.ESTALE: (_Code.ABORTED, None),
}  # fmt: skip
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class FileService:
    """FileService over the files below one directory; `add_to_server` has it served.

    Args:
        workspace: The directory.
        limit: Bytes that may be in it, the overhead of entries included.
        usage: How many there are; blocking. It stops counting past the number that it is given.
        began: When an execution began, as `file_time` says; None: unknown.
    """

    def __init__(
        self,
        workspace: Path,
        limit: int,
        usage: Callable[[int], int],
        began: Callable[[str], int | None],
    ) -> None:
        self._beneath = Beneath(workspace)
        self._limit = limit
        self._usage = usage
        self._began = began
        self._transfers = 0
        # What was last counted, and what unfinished writes hold, which nobody can count.
        self._used = self._unfinished = 0
        # Else a file that is committed while files are counted might count twice, or not at all.
        self._counting = asyncio.Lock()

    def close(self) -> None:
        self._beneath.close()

    async def Read(self, request: pb.ReadRequest, context: Context) -> AsyncIterator[pb.ReadResponse | bytes]:
        names = await _names(request.path, context)
        if request.offset < 0 or request.length < 0:
            await context.abort(_Code.INVALID_ARGUMENT, "offset and length must not be negative")
        opened: list[int] = []
        buffer = memoryview(bytearray(_HEAD + CHUNK))
        async with self._transfer(context), _failures(context, request.path):
            try:
                await _in_thread(lambda: opened.append(self._beneath.open(names)))
                status = os.fstat(opened[0])
                yield pb.ReadResponse(info=_info(Entry("/".join(names), status)))
                # To where it ends now: one that grows would have no end.
                at, end = request.offset, status.st_size
                if request.HasField("length"):
                    end = min(end, at + request.length)
                while at < end:
                    size = await _read(opened[0], buffer[_HEAD : _HEAD + end - at], at)
                    if not size:
                        raise OSError(errno.ESTALE, "it became shorter while it was read")
                    at += size
                    head = pieces.head(size)
                    buffer[_HEAD - len(head) : _HEAD] = head
                    yield bytes(buffer[_HEAD - len(head) : _HEAD + size])
            finally:
                for descriptor in opened:
                    os.close(descriptor)

    async def Write(
        self, requests: AsyncIterator[pb.WriteRequest | memoryview], context: Context
    ) -> pb.FileInfo:
        first = await anext(aiter(requests), None)
        if not isinstance(first, pb.WriteRequest) or first.WhichOneof("part") != "path":
            await context.abort(_Code.INVALID_ARGUMENT, "the first message must hold the path")
        names = await _names(first.path, context)
        upload = Upload(self._beneath, names)
        size = batched = 0
        batch: list[bytes | memoryview] = []
        writing: asyncio.Future[None] | None = None  # While the next batch comes.
        async with self._transfer(context), _failures(context, first.path):
            try:
                await _in_thread(upload.begin)
                await self._count()
                await self._check_room(ENTRY, context)
                async for request in requests:
                    data = _data(request)
                    if data is None:
                        break
                    size += len(data)
                    self._unfinished += len(data)
                    await self._check_room(ENTRY, context)
                    batch.append(data)
                    if size - batched < BATCH and len(batch) < IOV_MAX:
                        continue
                    if writing is not None:
                        await _done(writing)
                    writing = asyncio.get_running_loop().run_in_executor(None, upload.write, batch)
                    batch, batched = [], size
                else:
                    await context.abort(
                        _Code.INVALID_ARGUMENT, "it ended without its size: nothing was written"
                    )
                if writing is not None:
                    await _done(writing)
                if batch:
                    await _in_thread(lambda: upload.write(batch))
                if _size(request) != size:
                    text = f"the last message must hold the size, of {size:,} bytes: nothing was written"
                    await context.abort(_Code.INVALID_ARGUMENT, text)
                async with self._counting:
                    entry = await _in_thread(upload.commit)
                    self._used += size + ENTRY
            finally:
                self._unfinished -= size
                if writing is not None and not writing.done():
                    await asyncio.wait([writing])
                await _in_thread(upload.close)
        # No execution that begins from now on takes the file for one of its own.
        await _in_thread(lambda: outlast(entry))
        return _info(entry)

    async def List(self, request: pb.ListRequest, context: Context) -> pb.ListResponse:
        names = await _names(request.path, context)
        since = None
        if request.since_execution:
            since = self._began(request.since_execution)
            if since is None:
                text = f"no execution has the id {request.since_execution[:100]!r}, or it ended too long ago"
                await context.abort(_Code.NOT_FOUND, text)
        limit = min(request.limit, MOST_LISTED) if request.limit > 0 else DEFAULT_LISTED
        async with _failures(context, request.path):
            found, truncated = await _in_thread(
                lambda: self._beneath.listing(names, limit, recursive=request.recursive, since=since)
            )
        return pb.ListResponse(files=map(_info, found), truncated=truncated)

    async def Stat(self, request: pb.StatRequest, context: Context) -> pb.FileInfo:
        names = await _names(request.path, context)
        async with _failures(context, request.path):
            return _info(await _in_thread(lambda: self._beneath.stat(names)))

    async def Remove(self, request: pb.RemoveRequest, context: Context) -> pb.RemoveResponse:
        names = await _names(request.path, context)
        async with _failures(context, request.path):
            await _in_thread(lambda: self._beneath.remove(names, recursive=request.recursive))
        return pb.RemoveResponse()

    async def MakeDirectory(self, request: pb.MakeDirectoryRequest, context: Context) -> pb.FileInfo:
        names = await _names(request.path, context)
        async with _failures(context, request.path):
            await self._count()
            await self._check_room(ENTRY * len(names), context)
            return _info(await _in_thread(lambda: self._beneath.make_directory(names)))

    async def _count(self) -> None:
        async with self._counting:
            self._used = await _in_thread(lambda: self._usage(self._limit))

    async def _check_room(self, needed: int, context: Context) -> None:
        if self._used + self._unfinished + needed > self._limit:
            text = (
                f"no room: the workspace may hold {self._limit >> 20} MiB (--workspace-limit-mb):"
                " remove files first"
            )
            await context.abort(_Code.RESOURCE_EXHAUSTED, text)

    @contextlib.asynccontextmanager
    async def _transfer(self, context: Context) -> AsyncIterator[None]:
        if self._transfers >= MOST_TRANSFERS:
            text = f"{MOST_TRANSFERS} files are being read or written: wait for one to end"
            await context.abort(_Code.RESOURCE_EXHAUSTED, text)
        self._transfers += 1
        try:
            yield
        finally:
            self._transfers -= 1


async def _names(path: str, context: Context) -> list[str]:
    try:
        return names_of(path)
    except ValueError as error:
        await context.abort(_Code.INVALID_ARGUMENT, str(error))
    raise AssertionError("abort returned")


@contextlib.asynccontextmanager
async def _failures(context: Context, path: str) -> AsyncIterator[None]:
    """Ends the call with the status that fits an error of the operating system."""
    try:
        yield
    except OSError as error:
        await _abort(context, path, error)


async def _abort(context: Context, path: str, error: OSError) -> NoReturn:
    code, text = _STATUSES.get(error.errno or 0, (_Code.INTERNAL, None))
    if error.errno in _FULL:
        code = _Code.RESOURCE_EXHAUSTED
    elif code is _Code.INTERNAL:
        log.error("a file call failed: %s", error)
    # Shortened: clients refuse a long status message.
    await context.abort(code, f"{path[:100]!a}: {text or error.strerror or error}")
    raise AssertionError("abort returned")


async def _in_thread(work: Callable[[], _T]) -> _T:
    """Runs blocking work."""
    return await _done(asyncio.get_running_loop().run_in_executor(None, work))


async def _done(future: asyncio.Future[_T]) -> _T:
    """Waits for blocking work; a cancelled caller goes on only when it is done, so that it can clean up."""
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        future.exception()
        raise cancelled
    return future.result()


async def _read(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Reads into a buffer: at once what is in memory, in a thread what is not."""
    try:
        return os.preadv(descriptor, [buffer], offset, os.RWF_NOWAIT)
    except (BlockingIOError, OSError) as error:
        if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
            raise
    return await _in_thread(lambda: os.preadv(descriptor, [buffer], offset))


def _data(request: pb.WriteRequest | memoryview) -> bytes | memoryview | None:
    if isinstance(request, memoryview):
        return request
    return request.data if request.WhichOneof("part") == "data" else None


def _size(request: pb.WriteRequest | memoryview) -> int | None:
    if isinstance(request, memoryview) or request.WhichOneof("part") != "size":
        return None
    return request.size


def add_to_server(service: FileService, server: grpc.aio.Server) -> None:
    """As the generated function does, but pieces of files go through without protobuf's copies."""
    methods = {}
    for method in pb.DESCRIPTOR.services_by_name["FileService"].methods:
        kinds = ["stream" if many else "unary" for many in (method.client_streaming, method.server_streaming)]
        make = getattr(grpc, f"{'_'.join(kinds)}_rpc_method_handler")
        decode: Any = GetMessageClass(method.input_type).FromString
        if method.name == "Write":
            decode = _decode_write
        methods[method.name] = make(getattr(service, method.name), decode, _serialized)
    name = pb.DESCRIPTOR.services_by_name["FileService"].full_name
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, methods),))


def _decode_write(message: bytes) -> pb.WriteRequest | memoryview:
    data = pieces.data_of(message)
    if data is not None:
        return data
    try:
        return pb.WriteRequest.FromString(message)
    except DecodeError:  # gRPC would log a traceback, and answer UNKNOWN.
        return pb.WriteRequest()


def _serialized(message: Any) -> bytes:
    found: bytes = message if isinstance(message, bytes) else message.SerializeToString()
    return found


def _info(entry: Entry) -> pb.FileInfo:
    info = pb.FileInfo(path=entry.path, kind=pb.FILE_KIND_OTHER)
    if entry.status is not None:
        info.modified_at_ms = entry.status.st_mtime_ns // 1_000_000
    if entry.is_file and entry.status is not None:
        info.kind, info.size = pb.FILE_KIND_FILE, entry.status.st_size
    elif entry.is_directory:
        info.kind = pb.FILE_KIND_DIRECTORY
    return info
