"""Files for the model: the tools that read, write and list them, and what a run has made."""

from __future__ import annotations

import asyncio
import base64
import mimetypes
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

from mcp.server import MCPServer
from mcp.server.context import CallNext, HandlerResult, ServerRequestContext
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.resources import ResourceSecurity
from mcp.shared.exceptions import MCPError
from mcp_types import (
    INTERNAL_ERROR,
    INVALID_PARAMS,
    BlobResourceContents,
    CallToolResult,
    EmbeddedResource,
    ImageContent,
    ResourceLink,
    TextContent,
    ToolAnnotations,
)

from .._log import get_logger
from ..client import SandboxClient, SandboxFiles
from ..errors import SandboxCapacityError, SandboxError
from ..results import FileInfo
from . import _parameters as p
from . import _texts as texts
from ._output import FileOutput, NamedFile, SandboxOutput, result_of
from ._progress import Progress
from ._reading import WrongCallError, is_blank, read_name
from ._sandboxes import Use

if TYPE_CHECKING:
    from ._tool import SandboxTools

log = get_logger("mcp")

MOST_READ = 4 << 20
"""Bytes of a file that one result holds, before base64; also of all pictures of a run together."""
MOST_PICTURES = 4
"""Pictures that are attached to the result of one run."""
MOST_SVG = 30_000
"""Characters of an SVG picture that is attached, as text."""
MOST_NAMED = 50
"""Files that the result of a run names."""
MOST_LINKED = 10
"""Files of a run to which its result has a link."""
LINKS_SINCE = "2025-06-18"
"""The protocol that brought links to resources; clients of older ones refuse them."""
MOST_LISTED = 200
"""Entries that list_files names."""
LISTING_TIMEOUT = 5.0
"""Seconds that a run's result waits for its files; without them it is still a result."""
SCHEME = "sandbox://files/"
URI = SCHEME + "{sandbox}/{+path}"
BINARY = "application/octet-stream"
OWN = "-"
"""In a URI: the sandbox of the session, which has no handle."""

_SIGNATURES = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF87a", "image/gif"),
    (b"GIF89a", "image/gif"),
)
_PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg")


def add_file_tools(server: MCPServer[Any], tools: SandboxTools) -> list[str]:
    """Adds the tools for files, and the resources that runs make, beside the tool that runs code.

    Returns:
        The names of the tools.
    """
    files = FileTools(tools)
    reads = ToolAnnotations(
        read_only_hint=True, destructive_hint=False, idempotent_hint=True, open_world_hint=False
    )
    writes = ToolAnnotations(
        read_only_hint=False, destructive_hint=True, idempotent_hint=True, open_world_hint=False
    )
    for tool, title, description, hints in (
        (files.read_file, "Read a file of the sandbox", texts.READ_FILE, reads),
        (files.write_file, "Write a file into the sandbox", texts.WRITE_FILE, writes),
        (files.list_files, "List files of the sandbox", texts.LIST_FILES, reads),
    ):
        server.add_tool(
            tool, title=title, description=description, annotations=hints, structured_output=True
        )  # fmt: skip
    # The SDK would log what it refuses, by its URI.
    by_us = ResourceSecurity(exempt_params={"sandbox", "path"})
    server.resource(URI, name="sandbox_file", description=texts.FILE_RESOURCE, security=by_us)(files.resource)
    server.middleware.append(_typed)
    return ["read_file", "write_file", "list_files"]


class FileTools:
    """read_file, write_file, list_files, and the resources of the same files."""

    def __init__(self, tools: SandboxTools) -> None:
        self._tools = tools

    async def read_file(
        self, ctx: Context[Any, Any], path: p.Path, sandbox: p.Sandbox = p.ABSENT
    ) -> Annotated[CallToolResult, FileOutput]:
        """Its description is in _texts.py, as those of the others."""

        async def work(client: SandboxClient, handle: str | None) -> FileOutput:
            info, data = await _read(client.files, _path(path))
            output = FileOutput(path=info.path, size=info.size)
            whole = info.size <= len(data)
            kind, text = _picture(data), _text(data, whole=whole)
            if kind is not None and whole:
                output.blocks.append(_image(data, kind))
            elif text is not None:
                output.text = text[: self._tools.max_output]
                if len(output.text) < len(text) or not whole:
                    output.truncated = True
                    output.note = texts.text_is_cut(len(output.text))
            elif whole:
                output.blocks.append(_embedded(_uri(info.path, handle), data))
            else:
                raise WrongCallError(texts.too_large_to_read(info.size, MOST_READ))
            return output

        return await self._carry_out(ctx, "read_file", sandbox, work)

    async def write_file(
        self,
        ctx: Context[Any, Any],
        path: p.Path,
        text: p.Text = p.ABSENT,
        base64: p.Base64 = p.ABSENT,
        sandbox: p.Sandbox = p.ABSENT,
    ) -> Annotated[CallToolResult, FileOutput]:
        """Makes a new sandbox where none is named, as running code does."""

        async def work(client: SandboxClient, _: str | None) -> FileOutput:
            info = await client.files.write(_path(path), _content(text, base64))
            return FileOutput(path=info.path, size=info.size)

        return await self._carry_out(ctx, "write_file", sandbox, work, make=True)

    async def list_files(
        self, ctx: Context[Any, Any], path: p.Directory = p.ABSENT, sandbox: p.Sandbox = p.ABSENT
    ) -> Annotated[CallToolResult, FileOutput]:
        """One directory; the paths that it gives are what the others take."""

        async def work(client: SandboxClient, _: str | None) -> FileOutput:
            found = await client.files.list("" if is_blank(path) else _path(path), limit=MOST_LISTED)
            output = FileOutput(files=[_named(info) for info in found])
            if found.truncated:
                output.truncated, output.note = True, texts.listing_is_cut(len(found))
            return output

        return await self._carry_out(ctx, "list_files", sandbox, work)

    async def resource(self, ctx: Context[Any, Any], sandbox: str, path: str) -> str | bytes:
        """The content of a file, for ``resources/read``."""
        try:
            return await self._read(ctx, sandbox, path)
        except MCPError:  # The SDK would log any other with the URI, and so with the handle.
            raise
        except Exception as error:
            log.exception("resource_failed")
            raise MCPError(INTERNAL_ERROR, "The resource cannot be read") from error

    async def _read(self, ctx: Context[Any, Any], sandbox: str, path: str) -> str | bytes:
        found: list[bytes] = []

        async def work(client: SandboxClient, _: str | None) -> FileOutput:
            info, data = await _read(client.files, path)
            if len(data) < info.size:
                raise WrongCallError(texts.too_large_to_read(info.size, MOST_READ))
            found.append(data)
            return FileOutput()

        answer = await self._carry_out(ctx, "resource", None if sandbox == OWN else sandbox, work)
        if not found:
            (block, *_) = answer.content
            problem = block.text if isinstance(block, TextContent) else texts.NO_SUCH_FILE
            raise MCPError(INVALID_PARAMS, problem)
        text = _text(found[0], whole=True)
        return found[0] if text is None else text

    async def _carry_out(
        self,
        ctx: Context[Any, Any],
        tool: str,
        sandbox: object,
        work: Callable[[SandboxClient, str | None], Awaitable[FileOutput]],
        *,
        make: bool = False,
    ) -> CallToolResult:
        """Does what a tool is for, in the sandbox of its call, which may have a handle."""

        async def in_sandbox(use: Use, _: Progress) -> CallToolResult:
            output, problem = FileOutput(), None
            try:
                output = await self._tools.repeated(use, tool, lambda client: work(client, use.handle))
            except (ValueError, WrongCallError) as error:  # The message names the argument.
                problem = str(error)
            except SandboxError as error:
                log.warning("call_failed", mode=tool, error=str(error))
                problem = _failed(error, tool, self._tools)
            output.sandbox = use.handle
            if use.news is not None:
                output.add_note(use.news)
            return result_of(output, problem)

        try:
            handle = read_name("sandbox", sandbox, secret=True) or None
        except WrongCallError as error:
            return self._tools.invalid(ctx, str(error))
        return await self._tools.answer(ctx, tool, handle, in_sandbox, make=make)


async def name_files(
    client: SandboxClient, output: SandboxOutput, handle: str | None, *, links: bool
) -> None:
    """Adds to a run's result the files that it made or changed.

    Attaches the pictures among them, and with `links` links to the others. That they cannot be had does not
    make a failure of the run.
    """
    if not client.files.supported or not output.execution_id:
        return
    try:
        async with asyncio.timeout(LISTING_TIMEOUT):
            found = await client.files.list(
                recursive=True, limit=MOST_NAMED, since_execution=output.execution_id
            )
            if found:
                output.files = [_named(info, _uri(info.path, handle)) for info in found]
            if found.truncated:
                output.add_note(texts.more_files(len(found)))
            rest = await _attach(client.files, output, list(found))
            if links:
                output.blocks[:0] = [_link(info, handle) for info in rest[:MOST_LINKED]]
    except (SandboxError, TimeoutError) as error:
        log.info("files_unknown", execution=output.execution_id, error=str(error))


async def _attach(files: SandboxFiles, output: SandboxOutput, found: list[FileInfo]) -> list[FileInfo]:
    """Attaches pictures; returns the other files, if a resource can hold them."""
    rest = [info for info in found if info.size <= MOST_READ]
    room, left_out = MOST_READ, 0
    pictures = [info for info in found if info.path.lower().endswith(_PICTURES) and info.size]
    for info in pictures:
        if len(output.blocks) == MOST_PICTURES or info.size > room:
            left_out += 1
            continue
        data = await files.read(info.path, length=room)
        kind = _picture(data)
        svg = _text(data, whole=True) if info.path.lower().endswith(".svg") else None
        if kind is not None:
            output.blocks.append(_image(data, kind))
        elif svg is not None and len(svg) <= MOST_SVG:
            output.blocks.append(TextContent(type="text", text=svg))
        else:
            continue
        room -= len(data)
        rest.remove(info)
    if left_out:
        output.add_note(texts.pictures_left_out(left_out))
    return rest


async def _read(files: SandboxFiles, path: str) -> tuple[FileInfo, bytes]:
    """A file, and as much of its content as a result holds."""
    async with files.open_read(path, length=MOST_READ) as stream:
        data = b"".join([piece async for piece in stream])
        return stream.info or FileInfo(path, len(data)), data


def _picture(data: bytes) -> str | None:
    """The MIME type of a picture that models take."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    return next((kind for start, kind in _SIGNATURES if data.startswith(start)), None)


def _text(data: bytes, *, whole: bool) -> str | None:
    """The content as text; None where it is none. Its last character may be cut, unless it is the whole."""
    for cut in range(1 if whole else 4):
        try:
            text = data[: len(data) - cut].decode()
        except UnicodeDecodeError:
            continue
        return None if "\0" in text else text
    return None


def _image(data: bytes, kind: str) -> ImageContent:
    return ImageContent(type="image", data=base64.b64encode(data).decode(), mime_type=kind)


def _embedded(uri: str, data: bytes) -> EmbeddedResource:
    kind = _kind(uri) or BINARY
    contents = BlobResourceContents(uri=uri, mime_type=kind, blob=base64.b64encode(data).decode())
    return EmbeddedResource(type="resource", resource=contents)


def _link(info: FileInfo, handle: str | None) -> ResourceLink:
    uri, kind = _uri(info.path, handle), _kind(info.path)
    return ResourceLink(type="resource_link", uri=uri, name=info.path, mime_type=kind, size=info.size)


def _kind(path: str) -> str | None:
    """The MIME type of a file, by its name, which may also end a URI."""
    return mimetypes.guess_type(path.rpartition("/")[2])[0]


async def _typed(ctx: ServerRequestContext[Any, Any], call_next: CallNext) -> HandlerResult:
    """Middleware that says which type each file has: to the SDK, all resources of a template have one."""
    result = await call_next(ctx)
    if ctx.method == "resources/read" and isinstance(result, Mapping):
        for contents in result["contents"]:
            if contents["uri"].startswith(SCHEME):
                otherwise = "text/plain" if "text" in contents else BINARY
                contents["mimeType"] = _kind(contents["uri"]) or otherwise
    return result


def _uri(path: str, handle: str | None) -> str:
    return f"{SCHEME}{handle or OWN}/{quote(path)}"


def _named(info: FileInfo, uri: str | None = None) -> NamedFile:
    kind = None if info.kind == "file" else info.kind
    return NamedFile(path=info.path, size=info.size if kind is None else None, kind=kind, uri=uri)


def _failed(error: SandboxError, tool: str, tools: SandboxTools) -> str:
    if error.status == "NOT_FOUND":
        return texts.NO_SUCH_FILE
    if error.status == "UNIMPLEMENTED":
        return texts.NO_FILES
    if error.status in ("INVALID_ARGUMENT", "FAILED_PRECONDITION", "PERMISSION_DENIED", "ABORTED"):
        return texts.file_refused(str(error).partition(f"{error.status}: ")[2])
    if isinstance(error, SandboxCapacityError):
        return texts.file_refused(str(error).partition("RESOURCE_EXHAUSTED: ")[2])
    return texts.failed_call(error, tool, tools.language)


def _path(path: object) -> str:
    if path is None or (isinstance(path, str) and not path.strip()):
        raise WrongCallError("`path` is missing: give the file's path, relative to the working directory.")
    if not isinstance(path, str):
        raise WrongCallError(f"`path` is {path!r:.40}: it must be a string.")
    return path


def _content(text: object, encoded: object) -> str | bytes:
    if not is_blank(encoded):
        if not is_blank(text):
            raise WrongCallError("Both `text` and `base64` are given: give one of them.")
        try:
            return base64.b64decode("".join(str(encoded).split()), validate=True)
        except ValueError:
            raise WrongCallError("`base64` is none: give the file's bytes in base64, or `text`.") from None
    if isinstance(text, str):
        return text
    if text is None:
        raise WrongCallError("Neither `text` nor `base64` is given: give the file's content in one of them.")
    raise WrongCallError(f"`text` is {text!r:.40}: it must be a string.")
