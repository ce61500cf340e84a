"""client.files: what is sent, how it fails, and that a transfer counts as a use."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path, PurePosixPath
from typing import Any

import anyio
import pytest

from prodisco_sandbox import (
    FileInfo,
    FileList,
    SandboxCapacityError,
    SandboxClient,
    SandboxError,
    SandboxPermissionError,
    SandboxReplacedError,
    SandboxTimeoutError,
    SandboxUnavailableError,
)
from prodisco_sandbox.proto import files_pb2 as pb
from prodisco_sandbox.testing import NEVER, FakeSandboxServer, FakeStatus
from tests.support.fake_servers import ended
from tests.support.patience import PATIENCE, until

DATA = pb.ReadResponse(data=b"data")
INFO = FileInfo("a", 3, "file", 1.5)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[FakeSandboxServer]:
    async with FakeSandboxServer(workspace=tmp_path) as server:
        yield server


@pytest.fixture
async def client(server: FakeSandboxServer) -> AsyncIterator[SandboxClient]:
    async with SandboxClient(server.target) as client:
        yield client


async def pieces(*items: Any) -> AsyncIterator[Any]:
    for item in items:
        if isinstance(item, BaseException):
            raise item
        yield item


async def endless() -> AsyncIterator[bytes]:
    while True:
        yield bytes(1 << 20)


Call = Callable[[SandboxClient, Any], Awaitable[Any]]
CALLS: dict[str, Call] = {
    "read": lambda client, path: client.files.read(path),
    "read_text": lambda client, path: client.files.read_text(path),
    "write": lambda client, path: client.files.write(path, b"x"),
    "write pieces": lambda client, path: client.files.write(path, pieces(b"x")),
    "list": lambda client, path: client.files.list(path),
    "stat": lambda client, path: client.files.stat(path),
    "remove": lambda client, path: client.files.remove(path),
    "make_directory": lambda client, path: client.files.make_directory(path),
}


async def test_what_is_written_can_be_read(client: SandboxClient, tmp_path: Path) -> None:
    files = client.files
    assert [files.supported] == [None]
    written = await files.write("a/b/data.csv", "x,y\n1,ü\n")
    assert (written.path, written.size, written.kind) == ("a/b/data.csv", 9, "file")
    assert written.modified_at == pytest.approx((tmp_path / "a/b/data.csv").stat().st_mtime, abs=0.001)
    assert files.supported
    assert await files.read("a/b/data.csv") == b"x,y\n1,\xc3\xbc\n"
    assert await files.read_text("./a//b/data.csv") == "x,y\n1,ü\n"
    assert await files.read_text("a/b/data.csv", encoding="latin-1") == "x,y\n1,Ã¼\n"
    assert await files.read("a/b/data.csv", offset=4, length=1) == b"1"
    assert await files.read("a/b/data.csv", offset=100) == b""
    assert await files.read("a/b/data.csv", length=0) == b""
    assert await files.stat(PurePosixPath("a", "b", "data.csv")) == written
    assert [(info.path, info.kind) for info in await files.list()] == [("a", "directory")]
    found = await files.list(recursive=True)
    assert [info.path for info in found] == ["a", "a/b", "a/b/data.csv"]
    assert not found.truncated
    cut = await files.list("a", recursive=True, limit=1)
    assert len(cut) == 1
    assert cut.truncated
    assert (await files.make_directory("c/d")).kind == "directory"
    assert await files.make_directory("c/d") == await files.stat("c/d")
    await files.remove("a/b/data.csv")
    await files.remove("a/b")
    await files.remove("c", recursive=True)
    assert [info.path for info in await files.list("")] == ["a"]


@pytest.mark.parametrize(
    "data", [b"12", bytearray(b"12"), memoryview(b"x12")[1:], "12", pieces(b"1", "2"), pieces(b"", b"12", "")]
)
async def test_every_kind_of_data(client: SandboxClient, tmp_path: Path, data: Any) -> None:
    assert (await client.files.write("f", data)).size == 2
    assert (tmp_path / "f").read_bytes() == b"12"


async def test_an_empty_file(client: SandboxClient) -> None:
    for data in (b"", pieces()):
        assert (await client.files.write("empty", data)).size == 0
        assert await client.files.read("empty") == b""


async def test_large_content_goes_in_many_messages(server: FakeSandboxServer, client: SandboxClient) -> None:
    data = bytes(range(256)) * 12_300
    await client.files.write("large", data)
    await client.files.write("pieces", pieces(data, data))
    assert await client.files.read("large") == data
    assert await client.files.read("pieces", offset=len(data)) == data
    async with client.files.open_read("large") as stream:
        sizes = [len(piece) async for piece in stream]
        assert stream.info is not None
        assert stream.info.size == sum(sizes) == len(data)
    assert len(sizes) > 2
    assert [len(message.data) for message in server.calls[0].request][1:4] == [1 << 20] * 3


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("/etc/passwd", "absolute"),
        ("../x", '".."'),
        ("a/../../x", '".."'),
        ("..", '".."'),
        ("a\0b", "null character"),
        ("\udc80", "UTF-8"),
        ("a/" * 2001, "longer than"),
        (3, "string"),
        (b"a", "string"),
        (None, "string"),
    ],
)
async def test_a_forbidden_path_is_never_sent(
    server: FakeSandboxServer, client: SandboxClient, path: Any, problem: str
) -> None:
    for name, call in CALLS.items():
        with pytest.raises(ValueError, match=problem) as caught:
            await call(client, path)
        assert str(caught.value).startswith("path is "), name
        assert server.calls == [], name
        assert client.in_flight == 0, name


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        (lambda files: files.write("a", 3), "data is"),
        (lambda files: files.write("a", [b"x"]), "data is"),
        (lambda files: files.write("a", "\udc80"), "data cannot be encoded"),
        (lambda files: files.read("a", offset=-1), "offset is -1"),
        (lambda files: files.read("a", length=-1), "length is -1"),
        (lambda files: files.read("a", length=1.5), "length is 1.5"),
        (lambda files: files.list(limit=0), "limit is 0"),
        (lambda files: files.list(since_execution=""), "since_execution is ''"),
    ],
)
async def test_a_wrong_argument_is_never_sent(
    server: FakeSandboxServer, client: SandboxClient, wrong: Callable[[Any], Awaitable[Any]], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        await wrong(client.files)
    assert server.calls == []


async def test_an_unknown_encoding_is_noticed_before_anything_is_read(
    server: FakeSandboxServer, client: SandboxClient
) -> None:
    with pytest.raises(LookupError):
        await client.files.read_text("a", encoding="klingon")
    assert server.calls == []


async def test_a_source_that_fails_writes_nothing(client: SandboxClient, tmp_path: Path) -> None:
    await client.files.write("f", "old")
    with pytest.raises(ZeroDivisionError):
        await client.files.write("f", pieces(b"new", ZeroDivisionError()))
    with pytest.raises(ValueError, match="data is"):
        await client.files.write("f", pieces(b"new", 3))
    await until(lambda: [path.name for path in tmp_path.iterdir()] == ["f"])
    assert await client.files.read("f") == b"old"
    assert client.in_flight == 0


async def test_what_is_missing_or_no_file(client: SandboxClient, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc/passwd")
    (tmp_path / "directory" / "full").mkdir(parents=True)
    files = client.files
    expected: dict[str, list[Awaitable[Any]]] = {
        "NOT_FOUND": [files.read("none"), files.stat("none"), files.list("none"), files.remove("none")],
        "INVALID_ARGUMENT": [
            *(files.read("link"), files.write("link", b""), files.read("directory"), files.list("link")),
            *(
                files.write("directory", b""),
                files.write("", b""),
                files.remove(""),
                files.write("link/x", b""),
            ),
        ],
        "FAILED_PRECONDITION": [files.remove("directory")],
    }
    for status, calls in expected.items():
        for call in calls:
            with pytest.raises(SandboxError) as caught:
                await call
            assert caught.value.status == status, caught.value
    assert (await files.stat("link")).kind == "other"
    assert client.in_flight == 0


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("fences", [True, False])
async def test_a_server_without_files(name: str, fences: bool) -> None:
    async with FakeSandboxServer(fences=fences) as server, SandboxClient(server.target) as client:
        for known in (False, True):
            assert client.files.supported is (False if known else None)
            with pytest.raises(SandboxError, match="no files") as caught:
                await CALLS[name](client, "a")
            assert caught.value.status == "UNIMPLEMENTED"
            assert client.in_flight == 0
            await client.health_check()
        assert [call.rpc for call in server.calls] == ["Check", "Check"]


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        ("RESOURCE_EXHAUSTED", SandboxCapacityError),
        ("PERMISSION_DENIED", SandboxPermissionError),
        ("UNAVAILABLE", SandboxUnavailableError),
        ("ABORTED", SandboxError),
    ],
)
async def test_a_refusal_ends_a_write_at_once(
    server: FakeSandboxServer, client: SandboxClient, status: str, kind: type[SandboxError]
) -> None:
    server.script("Write", FakeStatus(status, "as it is"))
    suspected: list[int] = []
    client.on_suspect = lambda: suspected.append(1)
    with pytest.raises(kind, match="as it is") as caught:
        async with asyncio.timeout(PATIENCE):
            await client.files.write("a", endless())
    assert caught.value.status == status
    assert len(suspected) == (status == "UNAVAILABLE")
    assert client.in_flight == 0


async def test_a_failed_read(server: FakeSandboxServer, client: SandboxClient) -> None:
    server.script("Read", [INFO, DATA, FakeStatus("ABORTED", "shorter")])
    stream = client.files.open_read("a")
    assert await anext(stream) == b"data"
    with pytest.raises(SandboxError, match="shorter"):
        await anext(stream)
    assert [piece async for piece in stream] == []
    assert client.in_flight == 0


async def test_an_answer_that_is_none(server: FakeSandboxServer, client: SandboxClient) -> None:
    server.script("Read", [b"\xff"])
    server.script("Write", b"\xff")
    with pytest.raises(SandboxError, match="cannot be decoded"):
        await client.files.read("a")
    with pytest.raises(SandboxError, match="cannot be decoded"):
        await client.files.write("a", b"")
    assert client.in_flight == 0


async def test_scripted_lists(server: FakeSandboxServer, client: SandboxClient) -> None:
    server.script("List", FileList([INFO, FileInfo("b", kind="other")], truncated=True))
    found = await client.files.list(since_execution="e-1")
    assert tuple(found) == (INFO, FileInfo("b", kind="other"))
    assert found.truncated
    assert server.calls[0].request == pb.ListRequest(limit=1000, since_execution="e-1")


# A transfer is a use


async def test_a_read_is_a_use_until_its_end(server: FakeSandboxServer, client: SandboxClient) -> None:
    server.script("Read", [INFO, DATA, NEVER])
    async with client.files.open_read("a") as stream:
        assert await anext(stream) == b"data"
        assert client.in_flight == 1
        used = client.last_used
    assert client.in_flight == 0
    assert client.last_used > used
    assert await ended(server, "Read") == "cancelled"


async def test_a_read_that_is_dropped_ends(server: FakeSandboxServer, client: SandboxClient) -> None:
    server.script("Read", [DATA, NEVER])
    async for _ in client.files.open_read("a"):
        break
    gc.collect()
    assert await ended(server, "Read") == "cancelled"
    assert client.in_flight == 0


async def test_a_write_is_a_use_while_its_source_is_waited_for(
    server: FakeSandboxServer, client: SandboxClient
) -> None:
    going = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield b"1"
        await going.wait()

    writing = asyncio.create_task(client.files.write("a", slow()))
    await server.wait_for_call("Write")
    assert client.in_flight == 1
    going.set()
    assert (await writing).size == 1
    assert client.in_flight == 0


# What ends a transfer


async def test_the_server_has_call_timeout_for_each_message(server: FakeSandboxServer) -> None:
    server.script("Read", [DATA, NEVER])
    server.script("Write", NEVER)
    suspected: list[int] = []
    async with SandboxClient(server.target, call_timeout=0.2) as client:
        assert await client.wait_for_healthy(PATIENCE)  # Connecting may take longer.
        client.on_suspect = lambda: suspected.append(1)
        stream = client.files.open_read("a")
        await anext(stream)
        # The time that the caller takes does not count.
        await asyncio.sleep(0.3)
        begun = asyncio.get_running_loop().time()
        for waiting in (anext(stream), client.files.write("a", b"x"), client.files.write("a", endless())):
            with pytest.raises(SandboxTimeoutError, match=r"silent for 0\.2 s") as caught:
                await waiting
            assert caught.value.status == "DEADLINE_EXCEEDED"
        assert asyncio.get_running_loop().time() - begun >= 0.6
        assert client.in_flight == 0
    assert len(suspected) == 3


async def test_close_ends_transfers(server: FakeSandboxServer, client: SandboxClient) -> None:
    server.script("Read", [DATA, NEVER])
    server.script("Write", NEVER)
    stream = client.files.open_read("a")
    await anext(stream)
    started: list[Any] = [client.files.write("a", b"x"), client.files.write("a", endless())]
    waiting = [asyncio.create_task(call) for call in [*started, client.files.read("a")]]
    await server.wait_for_call("Write", count=2)
    await server.wait_for_call("Read", count=2)
    await client.close()
    for each in (*waiting, anext(stream)):
        with pytest.raises(SandboxUnavailableError, match="was closed"):
            await each
    assert client.in_flight == 0
    with pytest.raises(SandboxError, match="is closed"):
        await client.files.read("a")


@pytest.mark.parametrize("name", ["read", "write", "write pieces"])
async def test_a_cancelled_transfer_ends_on_the_server(
    server: FakeSandboxServer, client: SandboxClient, name: str
) -> None:
    server.script("Read", [DATA, NEVER])
    server.script("Write", NEVER)
    rpc = "Read" if name == "read" else "Write"
    task = asyncio.ensure_future(CALLS[name](client, "a"))
    await server.wait_for_call(rpc)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await ended(server, rpc) == "cancelled"
    assert client.in_flight == 0


@pytest.mark.parametrize("name", ["read", "write", "write pieces"])
async def test_a_cancel_scope_ends_with_its_own_cancellation(
    server: FakeSandboxServer, client: SandboxClient, name: str
) -> None:
    server.script("Read", [DATA, NEVER])
    server.script("Write", NEVER)
    with anyio.move_on_after(0.2) as scope:
        await CALLS[name](client, "a")
    assert scope.cancelled_caught
    assert client.in_flight == 0


async def test_a_server_that_dies(server: FakeSandboxServer, client: SandboxClient) -> None:
    server.script("Read", [DATA, NEVER])
    reading = asyncio.create_task(client.files.read("a"))
    await server.wait_for_call("Read")
    await server.kill()
    with pytest.raises(SandboxUnavailableError):
        await reading
    assert client.in_flight == 0


async def test_another_machine_gets_nothing(tmp_path: Path) -> None:
    async with FakeSandboxServer(workspace=tmp_path, pod_name="sandbox-2") as server:
        async with SandboxClient(server.target) as client:
            # As a manager says which pod is meant.
            client._expect("sandbox-1", lambda _: None, lambda: asyncio.sleep(0))
            with pytest.raises(SandboxReplacedError, match="nothing was run"):
                await client.files.write("a", endless())
        assert server.calls == []
    assert list(tmp_path.iterdir()) == []
