"""Files in MCP: the tools on them, what a run has made, and pictures."""

from __future__ import annotations

import base64
import importlib.util
import json
import struct
import zlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from mcp import Client
from mcp.shared.exceptions import MCPError
from mcp_types import (
    BlobResourceContents,
    CallToolResult,
    EmbeddedResource,
    ImageContent,
    ResourceLink,
    TextContent,
    TextResourceContents,
)

from prodisco_sandbox import (
    ExecutionChunk,
    ExecutionOutcome,
    ExecutionState,
    FileInfo,
    FileList,
    SandboxManager,
)
from prodisco_sandbox.local import LocalCluster
from prodisco_sandbox.mcp import _files, _serve
from prodisco_sandbox.testing import FakeStatus
from tests.support.mcp_server import (
    ERAS,
    connect,
    events,
    in_one_task,
    make_server,
    over_http,
    rig,
    run,
)

END = ExecutionChunk("e-1", "result", result=ExecutionOutcome(True, ExecutionState.COMPLETED))
SVG = '<svg xmlns="http://www.w3.org/2000/svg"/>'


def png(width: int = 1) -> bytes:
    """A picture of one black line."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, 1, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(width + 1), 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


class Talk:
    """A client that comes back to its sandbox, by its session or by the handle."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.known: dict[str, str] = {}

    async def call(self, tool: str, **arguments: Any) -> CallToolResult:
        result = await self.client.call_tool(tool, arguments | self.known)
        if handle := (result.structured_content or {}).get("sandbox"):
            self.known["sandbox"] = handle
        return result

    async def content(self, tool: str, **arguments: Any) -> dict[str, Any]:
        result = await self.call(tool, **arguments)
        assert not result.is_error, result
        assert isinstance(result.content[0], TextContent)
        found: dict[str, Any] = result.structured_content
        assert json.loads(result.content[0].text) == found
        return {name: value for name, value in found.items() if name != "sandbox"}

    async def error(self, tool: str, **arguments: Any) -> str:
        result = await self.call(tool, **arguments)
        assert result.is_error, result
        assert isinstance(result.content[0], TextContent)
        return result.content[0].text


@asynccontextmanager
async def talking(era: str, **options: Any) -> AsyncIterator[Talk]:
    """A client of a server whose sandboxes are real processes."""
    async with LocalCluster() as cluster:
        manager = SandboxManager(cluster.config(), custom_objects_api=cluster.custom_objects_api)
        async with Client(make_server(manager, **options)[0], mode=era) as client:
            yield Talk(client)
        await manager.shutdown()


@pytest.fixture
async def talk(request: pytest.FixtureRequest) -> AsyncIterator[Talk]:
    era = getattr(request, "param", "2026-07-28")
    async with in_one_task(talking(era)) as talk:
        yield talk


@pytest.mark.parametrize("talk", [pytest.param(ERAS[0], marks=pytest.mark.slow), ERAS[1]], indirect=True)
async def test_data_in_and_results_out(talk: Talk) -> None:
    data = await talk.content("write_file", path="data/in.csv", text="x,y\n1,2\n")
    assert data == {"path": "data/in.csv", "size": 8}
    code = "text = open('data/in.csv').read(); open('out.txt', 'w').write(text * 2); print(len(text))"
    made = await talk.content("run_sandbox", code=code)
    assert made["output"] == "8\n"
    handle = talk.known.get("sandbox", "-")
    assert made["files"] == [{"path": "out.txt", "size": 16, "uri": f"sandbox://files/{handle}/out.txt"}]
    read = await talk.content("read_file", path="out.txt")
    assert read == {"path": "out.txt", "size": 16, "text": "x,y\n1,2\n" * 2}
    listed = await talk.content("list_files")
    assert listed["files"] == [{"path": "data", "kind": "directory"}, {"path": "out.txt", "size": 16}]
    below = await talk.content("list_files", path="data")
    assert below["files"] == [{"path": "data/in.csv", "size": 8}]
    # What a run only reads is none of its own.
    assert "files" not in await talk.content("run_sandbox", code="open('out.txt').read()")


async def test_a_resource_is_the_file(talk: Talk) -> None:
    code = "open('a b.txt', 'w').write('text'); open('b.bin', 'wb').write(b'\\xff\\x00')"
    made = await talk.content("run_sandbox", code=code)
    (text,) = (await talk.client.read_resource(made["files"][0]["uri"])).contents
    assert isinstance(text, TextResourceContents)
    assert text.text == "text"
    (blob,) = (await talk.client.read_resource(made["files"][1]["uri"])).contents
    assert isinstance(blob, BlobResourceContents)
    assert base64.b64decode(blob.blob) == b"\xff\x00"
    uri = made["files"][0]["uri"].rpartition("/")[0]
    for wrong in (f"{uri}/none", "sandbox://files/sbx_forged/a", f"{uri}/../x", f"{uri}/%2e%2e/x"):
        with pytest.raises(MCPError):
            await talk.client.read_resource(wrong)


@pytest.mark.parametrize("era", ERAS)
async def test_a_run_has_links_to_what_it_made(era: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_files, "MOST_READ", 1000)
    code = f"""
open('a b.csv', 'w').write('x,y\\n')
open('plot.png', 'wb').write({png()!r})
open('large', 'wb').write(bytes(1001))
"""
    async with talking(era, resource_links=True) as talk:
        made = await talk.call("run_sandbox", code=code)
        links = [block for block in made.content if isinstance(block, ResourceLink)]
        uri = f"sandbox://files/{talk.known.get('sandbox', '-')}/a%20b.csv"
        assert links == [
            ResourceLink(type="resource_link", uri=uri, name="a b.csv", mime_type="text/csv", size=4)
        ], "a picture is there, and a large file cannot be read"
        assert isinstance(made.content[-1], ImageContent)
        (read,) = (await talk.client.read_resource(links[0].uri)).contents
        assert isinstance(read, TextResourceContents)
        assert (read.text, read.mime_type, read.uri) == ("x,y\n", "text/csv", uri)
        picture = uri.replace("a%20b.csv", "plot.png")
        (blob,) = (await talk.client.read_resource(picture)).contents
        assert blob.mime_type == "image/png"
        many = await talk.call("run_sandbox", code="for n in range(12): open(f'{n}.txt', 'w').write('x')")
        assert len([block for block in many.content if isinstance(block, ResourceLink)]) == 10


@pytest.mark.parametrize(
    ("version", "options", "linked"),
    [
        ("2025-03-26", {"resource_links": True}, False),
        ("2025-06-18", {"resource_links": True}, True),
        ("2025-06-18", {}, False),
    ],
)
async def test_links_are_for_clients_that_take_them(
    version: str, options: dict[str, Any], linked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mcp.client.session.LATEST_HANDSHAKE_VERSION", version)
    async with (
        rig(sandbox_options={"files": True}, **options) as rig_,
        Client(rig_.server, mode="legacy") as client,
    ):
        rig_.sandbox.script("ExecuteStream", [END])
        rig_.sandbox.script("List", FileList([FileInfo("out.csv", 4)]))
        result = await client.call_tool("run_sandbox", {"code": "x"})
    assert any(isinstance(block, ResourceLink) for block in result.content) is linked


@pytest.mark.parametrize("era", ["legacy", "auto"])
async def test_a_template_is_offered_and_the_list_is_empty(era: str) -> None:
    async with (
        rig() as rig_,
        over_http(_serve.make_server(rig_.manager)[0]) as url,
        connect(url, era) as client,
    ):
        assert client.server_capabilities.resources is not None
        (template,) = (await client.list_resource_templates()).resource_templates
        assert template.uri_template == "sandbox://files/{sandbox}/{+path}"
        assert (await client.list_resources()).resources == []


async def test_a_resource_is_for_whom_its_handle_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("DEBUG")
    async with (
        rig(sandbox_options={"workspace": tmp_path}, auth=True) as rig_,
        over_http(rig_.server) as url,
        connect(url, "2026-07-28", token="alice") as alice,
        connect(url, "2026-07-28", token="bob") as bob,
    ):
        written = await alice.call_tool("write_file", {"path": "a.txt", "text": "hers"})
        handle = (written.structured_content or {})["sandbox"]
        uri = f"sandbox://files/{handle}/a.txt"
        (read,) = (await alice.read_resource(uri)).contents
        assert isinstance(read, TextResourceContents)
        assert read.text == "hers"
        for reader, wrong, text in (
            (bob, uri, "no sandbox with this handle"),
            (bob, "sandbox://files/-/a.txt", "`sandbox`"),
            (alice, "sandbox://files/-/a.txt", "`sandbox`"),
            (alice, f"sandbox://files/{handle}/../a.txt", '".."'),
            (alice, f"sandbox://files/{handle}//etc/passwd", "absolute"),
            (alice, f"sandbox://files/{handle}/none", "no such file"),
        ):
            with pytest.raises(MCPError, match=text):
                await reader.read_resource(wrong)
        monkeypatch.setattr(_files, "_text", lambda *_, **__: 1 / 0)
        with pytest.raises(MCPError, match="cannot be read"):
            await alice.read_resource(uri)
    loggers = ("prodisco", "mcp.server.mcpserver")
    own = [record for record in caplog.records if record.name.startswith(loggers)]
    logged = "\n".join(map(caplog.handler.format, own))
    assert "ZeroDivisionError" in logged
    assert handle not in logged


async def test_a_session_has_its_own_resources_alone() -> None:
    async with LocalCluster() as cluster, AsyncExitStack() as stack:
        manager = SandboxManager(cluster.config(), custom_objects_api=cluster.custom_objects_api)
        url = await stack.enter_async_context(over_http(make_server(manager)[0]))
        alice, bob = [await stack.enter_async_context(connect(url, "legacy")) for _ in range(2)]
        await alice.call_tool("write_file", {"path": "a.bin", "base64": "/wA="})
        await bob.call_tool("write_file", {"path": "b.txt", "text": "his"})
        assert (await alice.read_resource("sandbox://files/-/a.bin")).contents
        with pytest.raises(MCPError, match="no such file"):
            await bob.read_resource("sandbox://files/-/a.bin")
        other = await alice.call_tool("write_file", {"path": "a.bin", "base64": "//8=", "sandbox": "new"})
        handle = (other.structured_content or {})["sandbox"]
        read = await alice.call_tool("read_file", {"path": "a.bin", "sandbox": handle})
        resource = read.content[-1]
        assert isinstance(resource, EmbeddedResource)
        assert resource.resource.uri == f"sandbox://files/{handle}/a.bin", "the session has one of that name"


async def test_pictures_are_seen(talk: Talk) -> None:
    source = f"""
open('a.png', 'wb').write({png()!r})
open('b.JPG', 'wb').write(b'\\xff\\xd8\\xff\\xe0')
open('c.gif', 'wb').write(b'GIF89a')
open('d.webp', 'wb').write(b'RIFF\\x00\\x00\\x00\\x00WEBP')
open('e.svg', 'w').write({SVG!r})
open('0.png', 'w').write('no picture')
"""
    result = await talk.call("run_sandbox", code=source)
    assert result.structured_content is not None
    assert [info["path"] for info in result.structured_content["files"]] == [
        *("0.png", "a.png", "b.JPG", "c.gif", "d.webp", "e.svg")
    ]
    images = [block for block in result.content if isinstance(block, ImageContent)]
    kinds = [image.mime_type for image in images]
    assert kinds == ["image/png", "image/jpeg", "image/gif", "image/webp"]
    assert base64.b64decode(images[0].data) == png()
    assert "1 more pictures" in result.structured_content["note"]
    vector = await talk.call("run_sandbox", code=f"open('e.svg', 'w').write({SVG!r})")
    assert isinstance(vector.content[-1], TextContent)
    assert vector.content[-1].text == SVG
    # A picture that fails halfway is seen as well.
    failed = await talk.call("run_sandbox", code=f"open('a.png', 'wb').write({png()!r}); 1 / 0")
    assert isinstance(failed.content[-1], ImageContent)
    read = await talk.call("read_file", path="a.png")
    assert isinstance(read.content[-1], ImageContent)
    assert base64.b64decode(read.content[-1].data) == png()


async def test_an_asynchronous_run_shows_its_files_once_it_has_ended(talk: Talk) -> None:
    started = await talk.content(
        "run_sandbox", mode="async", code=f"open('a.png', 'wb').write({png()!r}); print(1)"
    )
    ended = await talk.call("run_sandbox", mode="status", execution_id=started["execution_id"], wait=True)
    assert ended.structured_content is not None
    assert [info["path"] for info in ended.structured_content["files"]] == ["a.png"]
    assert isinstance(ended.content[-1], ImageContent)


async def test_bytes_go_both_ways(talk: Talk) -> None:
    data = bytes(range(256))
    encoded = base64.b64encode(data).decode()
    await talk.content("write_file", path="a.bin", base64=f"{encoded[:100]}\n{encoded[100:]}", text="")
    read = await talk.call("read_file", path="a.bin")
    resource = read.content[-1]
    assert isinstance(resource, EmbeddedResource)
    assert isinstance(resource.resource, BlobResourceContents)
    assert base64.b64decode(resource.resource.blob) == data
    assert await talk.content("write_file", path="empty", text="", base64=None) == {
        "path": "empty",
        "size": 0,
    }


async def test_what_is_too_much_is_cut_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_files, "MOST_READ", 1000)
    monkeypatch.setattr(_files, "MOST_NAMED", 3)
    monkeypatch.setattr(_files, "MOST_LISTED", 4)
    async with talking("legacy", max_output=100) as talk:
        many = await talk.content("run_sandbox", code="for n in range(5): open(f'{n}.txt', 'w').write('x')")
        assert len(many["files"]) == 3
        assert "Only 3" in many["note"]
        listed = await talk.content("list_files")
        assert (len(listed["files"]), listed["truncated"]) == (4, True)
        await talk.content("write_file", path="t", text="ä" * 600)
        text = await talk.content("read_file", path="t")
        assert (text["text"], text["truncated"], text["size"]) == ("ä" * 100, True, 1200)
        assert "100 characters" in text["note"]
        await talk.content("write_file", path="b", base64=base64.b64encode(b"\xff" * 1001).decode())
        assert "1,001 bytes" in await talk.error("read_file", path="b")
        large = await talk.call("run_sandbox", code=f"open('a.png', 'wb').write({png(2000)!r})")
        assert not [block for block in large.content if isinstance(block, ImageContent)]
        assert "1 more pictures" in (large.structured_content or {})["note"]


async def test_wrong_calls_are_told_what_is_right(talk: Talk) -> None:
    await talk.content("run_sandbox", code="import os; os.mkdir('d'); os.symlink('/etc/passwd', 'link')")
    assert "no such file" in await talk.error("read_file", path="missing")
    assert "list_files" in await talk.error("list_files", path="missing")
    assert "absolute" in await talk.error("read_file", path="/etc/passwd")
    assert '".."' in await talk.error("write_file", path="../x", text="")
    assert "link" in await talk.error("read_file", path="link")
    assert "is a directory" in await talk.error("write_file", path="d", text="")
    assert "`path` is missing" in await talk.error("read_file", path=" ")
    assert "`path` is 3" in await talk.error("read_file", path=3)
    assert "Both" in await talk.error("write_file", path="x", text="a", base64="YQ==")
    assert "Neither" in await talk.error("write_file", path="x")
    assert "`base64` is none" in await talk.error("write_file", path="x", base64="a")
    assert "`text` is 3" in await talk.error("write_file", path="x", text=3)


@pytest.mark.parametrize("tool", ["read_file", "list_files"])
async def test_reading_needs_a_sandbox(tool: str) -> None:
    async with talking("2026-07-28") as talk:
        assert "`sandbox`" in await talk.error(tool, path="x")
        assert "no sandbox with this handle" in await talk.error(tool, path="x", sandbox="sbx_forged")


# On a scripted server


async def test_a_server_without_files_has_runs_as_before() -> None:
    async with rig() as rig_, Client(rig_.server) as client:
        result = await run(client, "x")
        assert result["success"]
        assert "files" not in result
        answer = await client.call_tool("write_file", {"path": "x", "text": ""})
        assert answer.is_error
        assert isinstance(answer.content[0], TextContent)
        assert "no tools for files" in answer.content[0].text
        assert {call.rpc for call in rig_.sandbox.calls} <= {"Check", "ExecuteStream"}


async def test_a_run_whose_files_cannot_be_had_is_no_failure() -> None:
    async with rig(sandbox_options={"files": True}) as rig_, Client(rig_.server) as client:
        rig_.sandbox.script("ExecuteStream", [END])
        for refusal in (FakeStatus("NOT_FOUND"), FakeStatus("INTERNAL", "no")):
            rig_.sandbox.script("List", refusal)
            result = await run(client, "x")
            assert result["success"]
            assert "files" not in result
        assert [call.rpc for call in rig_.sandbox.calls].count("List") == 2


async def test_calls_on_files_are_drained_and_in_the_audit_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "prodisco_sandbox")
    async with rig(sandbox_options={"files": True}) as rig_, Client(rig_.server) as client:
        rig_.sandbox.script("Stat", FakeStatus("NOT_FOUND"))
        await client.call_tool("write_file", {"path": "secret", "text": "secret"})
        await client.call_tool("write_file", {"path": "x", "sandbox": 1.5})
        assert await rig_.tools.drain(1)
        refused = await client.call_tool("write_file", {"path": "x", "text": ""})
        assert refused.is_error
    logged = events(caplog, "sandbox_call")
    assert [(event["mode"], event["outcome"]) for event in logged][1:] == [
        (None, "invalid"),
        ("write_file", "refused"),
    ]
    assert logged[0]["mode"] == "write_file"
    assert "secret" not in str(logged)


async def test_sandboxes_of_a_language_without_files_have_no_such_tools() -> None:
    async with rig(language="TypeScript") as rig_, Client(rig_.server) as client:
        assert [tool.name for tool in (await client.list_tools()).tools] == ["run_sandbox"]
    async with rig(file_tools=False) as rig_, Client(rig_.server) as client:
        assert [tool.name for tool in (await client.list_tools()).tools] == ["run_sandbox"]


# A model's way from data to a picture


@pytest.mark.slow
@pytest.mark.science
@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
async def test_a_model_plots_a_table_and_sees_the_plot(talk: Talk) -> None:
    await talk.content("write_file", path="sales.csv", text="month,units\nJan,3\nFeb,5\nMar,4\n")
    code = """
import csv
import matplotlib.pyplot as plt
rows = list(csv.DictReader(open('sales.csv')))
plt.bar([row['month'] for row in rows], [int(row['units']) for row in rows])
plt.title('Units sold')
plt.show()
"""
    result = await talk.call("run_sandbox", code=code, timeout_ms=120_000)
    content = result.structured_content or {}
    assert content["success"], content
    assert [info["path"] for info in content["files"]] == ["figure-1.png"]
    picture = result.content[-1]
    assert isinstance(picture, ImageContent)
    assert base64.b64decode(picture.data).startswith(b"\x89PNG")
