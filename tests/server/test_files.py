"""FileService: its attacks, its bounds, and that a write is done as a whole or not at all."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
import socket
import stat
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from prodisco_sandbox import SandboxCapacityError, SandboxClient, SandboxError, SandboxPermissionError
from prodisco_sandbox.proto import files_pb2 as pb
from prodisco_sandbox.proto import files_pb2_grpc, metadata
from prodisco_sandbox.server import _beneath, _files
from prodisco_sandbox.server._beneath import Beneath, Upload
from prodisco_sandbox.server._fence import Fence
from prodisco_sandbox.server._files import FileService, add_to_server
from prodisco_sandbox.server._usage import ENTRY, disk_usage
from tests.support.patience import PATIENCE, until
from tests.support.servers import Server, running

if TYPE_CHECKING:
    Stub = files_pb2_grpc.FileServiceAsyncStub
else:
    Stub = files_pb2_grpc.FileServiceStub

MIB = 1 << 20


class Here:
    """A FileService in this process, and a client of it."""

    def __init__(self, directory: Path) -> None:
        self.workspace = directory / "workspace"
        self.outside = directory / "outside"
        self.workspace.mkdir()
        self.outside.mkdir()
        self.limit = 4 * MIB

    @contextlib.asynccontextmanager
    async def served(self) -> AsyncIterator[Here]:
        service = FileService(
            self.workspace, self.limit, lambda enough: disk_usage([self.workspace], enough), lambda _: None
        )
        server = grpc.aio.server(interceptors=[Fence("boot", None, [metadata.FILES])])
        add_to_server(service, server)
        address = f"unix:{self.workspace.parent}/socket"
        server.add_insecure_port(address)
        await server.start()
        async with SandboxClient(address) as client, grpc.aio.insecure_channel(address) as channel:
            self.files, self.stub = client.files, Stub(channel)  # type: ignore[call-arg]
            yield self
        await server.stop(None)
        service.close()

    def names(self) -> list[str]:
        return sorted(path.relative_to(self.workspace).as_posix() for path in self.workspace.rglob("*"))


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[Here]:
    async with Here(tmp_path).served() as here:
        yield here


@pytest.fixture
def beneath(tmp_path: Path) -> Iterator[Beneath]:
    (tmp_path / "workspace").mkdir()
    (tmp_path / "outside").mkdir()
    beneath = Beneath(tmp_path / "workspace")
    yield beneath
    beneath.close()


@pytest.fixture(params=["unnamed", "named"])
def named(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the file system cannot make files without a name."""
    if request.param == "named":
        real = os.open

        def no_tmpfile(path: Any, flags: int, *arguments: Any, **named: Any) -> int:
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
            return real(path, flags, *arguments, **named)

        monkeypatch.setattr(os, "open", no_tmpfile)
    return bool(request.param == "named")


async def status_of(call: Any) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code().name


async def refused(call: Any) -> str | int | None:
    with pytest.raises(SandboxError) as caught:
        await call
    return caught.value.status


async def read(stub: Stub, path: str) -> bytes:
    return b"".join([message.data async for message in stub.Read(pb.ReadRequest(path=path))])


async def pieces(*data: bytes) -> AsyncIterator[bytes]:
    for each in data:
        yield each


# Paths that lead out


@pytest.mark.parametrize("path", ["/etc/passwd", "../outside/f", "a/../../f", "..", "a\0b", "x" * 5000])
async def test_a_forbidden_path_is_refused_by_the_server_too(here: Here, path: str) -> None:
    (here.outside / "f").write_text("secret")
    stub = here.stub

    async def writing() -> AsyncIterator[pb.WriteRequest]:
        yield pb.WriteRequest(path=path)
        yield pb.WriteRequest(size=0)

    calls = (
        *(stub.Stat(pb.StatRequest(path=path)), stub.List(pb.ListRequest(path=path))),
        *(stub.Remove(pb.RemoveRequest(path=path)), stub.MakeDirectory(pb.MakeDirectoryRequest(path=path))),
        *(read(stub, path), stub.Write(writing())),
    )
    for call in calls:
        assert await status_of(call) == "INVALID_ARGUMENT"
    assert (here.outside / "f").read_text() == "secret"
    assert here.names() == []


async def test_no_link_is_followed(here: Here) -> None:
    (here.outside / "f").write_text("secret")
    (here.workspace / "file").symlink_to(here.outside / "f")
    (here.workspace / "directory").symlink_to(here.outside)
    (here.workspace / "within").symlink_to("file")
    files = here.files
    for path in ("file", "directory/f", "within"):
        assert await refused(files.read(path)) == "INVALID_ARGUMENT"
        assert await refused(files.write(path, b"x")) == "INVALID_ARGUMENT"
    for call in (
        *(files.list("directory"), files.stat("directory/f"), files.remove("directory/f")),
        *(files.make_directory("directory/x"), files.write("directory/x/y", b"")),
    ):
        assert await refused(call) == "INVALID_ARGUMENT"
    assert [info.kind for info in await files.list(recursive=True)] == ["other"] * 3
    # Links are removed themselves.
    await files.remove("file")
    await files.remove("directory", recursive=True)
    assert [path.name for path in here.outside.iterdir()] == ["f"]
    assert here.names() == ["within"]


async def test_links_are_swapped_while_files_are_written_and_read(here: Here) -> None:
    (here.outside / "f").write_text("secret")
    (here.workspace / "d").mkdir()
    (here.workspace / "d" / "f").write_text("own")
    (here.workspace / "link").symlink_to(here.outside)
    exchange, over = ctypes.CDLL(None, use_errno=True).renameat2, threading.Event()
    one, other = (os.fsencode(here.workspace / name) for name in ("d", "link"))

    def swap() -> None:
        while not over.is_set():
            assert exchange(-100, one, -100, other, 2) == 0, os.strerror(ctypes.get_errno())
            time.sleep(0.0001)

    swapping = threading.Thread(target=swap)
    swapping.start()
    outcomes: set[str] = set()
    try:
        async with asyncio.timeout(PATIENCE):
            while not outcomes >= {"own", "written", "INVALID_ARGUMENT"}:
                for call in (here.files.write("d/f", "own"), here.files.read_text("d/f")):
                    try:
                        found = await call
                        outcomes.add(found if isinstance(found, str) else "written")
                    except SandboxError as error:
                        outcomes.add(str(error.status))
    finally:
        over.set()
        swapping.join()
    assert outcomes == {"own", "written", "INVALID_ARGUMENT"}
    assert (here.outside / "f").read_text() == "secret"
    assert [path.name for path in here.outside.iterdir()] == ["f"]


def test_a_directory_becomes_a_link_under_a_write(beneath: Beneath, tmp_path: Path, named: bool) -> None:
    workspace, outside = tmp_path / "workspace", tmp_path / "outside"
    (workspace / "d").mkdir()
    upload = Upload(beneath, ["d", "f"])
    upload.begin()
    upload.write([b"content"])
    (workspace / "d").rmdir()
    (workspace / "d").symlink_to(outside)
    with pytest.raises(NotADirectoryError):
        upload.commit()
    upload.close()
    assert [path.name for path in workspace.iterdir()] == ["d"]
    assert list(outside.iterdir()) == []


def test_a_file_becomes_a_link_under_a_write(beneath: Beneath, tmp_path: Path, named: bool) -> None:
    workspace, outside = tmp_path / "workspace", tmp_path / "outside"
    (outside / "f").write_text("secret")
    upload = Upload(beneath, ["f"])
    upload.begin()
    upload.write([b"content"])
    (workspace / "f").symlink_to(outside / "f")
    upload.commit()
    upload.close()
    assert (outside / "f").read_text() == "secret"
    assert (workspace / "f").read_bytes() == b"content"
    assert not (workspace / "f").is_symlink()


def test_what_is_written_is_replaced_under_the_write(
    beneath: Beneath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    workspace = tmp_path / "workspace"
    real = os.rename

    def swapped(source: str, *arguments: Any, **named: Any) -> None:
        (workspace / source).unlink()
        (workspace / source).write_text("forged")
        real(source, *arguments, **named)

    monkeypatch.setattr(os, "rename", swapped)
    upload = Upload(beneath, ["f"])
    upload.begin()
    upload.write([b"content"])
    with pytest.raises(OSError, match="replaced"):
        upload.commit()
    upload.close()


async def test_the_workspace_itself_becomes_a_link(here: Here) -> None:
    here.workspace.rename(here.workspace.parent / "moved")
    here.workspace.symlink_to(here.outside)
    await here.files.write("f", b"x")
    assert list(here.outside.iterdir()) == []
    here.workspace.unlink()
    (here.workspace.parent / "moved").rename(here.workspace)


# What is no file


async def test_a_fifo_a_socket_and_a_device(here: Here) -> None:
    fifo = here.workspace / "fifo"
    os.mkfifo(fifo)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(here.workspace / "socket"))
    names = ["fifo", "socket"]
    with contextlib.suppress(PermissionError):
        os.mknod(here.workspace / "device", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        names.append("device")
    for name in names:
        assert (await here.files.stat(name)).kind == "other"
        for call in (here.files.read(name), here.files.write(name, b"x")):
            async with asyncio.timeout(PATIENCE):
                assert await refused(call) == "INVALID_ARGUMENT"
    # Nobody has opened it: a writer that does not wait finds no reader.
    with pytest.raises(OSError) as caught:
        os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
    assert caught.value.errno == errno.ENXIO
    for name in names:
        await here.files.remove(name)
    assert here.names() == []


async def test_names_that_are_not_utf8(here: Here) -> None:
    os.mkdir(os.fsencode(here.workspace) + b"/\xff")
    (Path(os.fsdecode(os.fsencode(here.workspace) + b"/\xff")) / "f").touch()
    await here.files.write("ü\n", b"x")
    found = await here.files.list(recursive=True)
    assert [(info.path, info.kind) for info in found] == [("\\xff", "other"), ("ü\n", "file")]
    assert await here.files.read("ü\n") == b"x"
    assert await refused(here.files.stat("\\xff")) == "NOT_FOUND"


async def test_a_path_that_is_not_utf8(here: Here, caplog: pytest.LogCaptureFixture) -> None:
    async def writing(*messages: bytes) -> AsyncIterator[bytes]:
        for message in messages:
            yield message

    async with grpc.aio.insecure_channel(f"unix:{here.workspace.parent}/socket") as channel:
        untyped: Any = channel
        write = untyped.stream_unary("/prodisco.sandbox.v1.FileService/Write")
        path = pb.WriteRequest(path="f").SerializeToString()
        for messages in ([b"\x0a\x01\xff"], [path, b"\x0a\x01\xff"], [path, b"\xff"]):
            assert await status_of(write(writing(*messages))) == "INVALID_ARGUMENT"
    assert not [record for record in caplog.records if record.exc_info]
    await until(lambda: here.names() == [])


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
async def test_what_code_has_locked(here: Here) -> None:
    await here.files.write("d/f", b"x")
    (here.workspace / "d" / "f").chmod(0)
    with pytest.raises(SandboxPermissionError):
        await here.files.read("d/f")
    (here.workspace / "d").chmod(0)
    with pytest.raises(SandboxPermissionError):
        await here.files.list("d")
    assert [info.path for info in await here.files.list(recursive=True)] == ["d"]
    (here.workspace / "d").chmod(0o700)


# Listing


async def test_a_listing_looks_at_a_bounded_number_of_entries(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_beneath, "MOST_SEEN", 50)
    for number in range(60):
        (here.workspace / str(number)).touch()
    found = await here.files.list(limit=10_000)
    assert len(found) == 50
    assert found.truncated
    assert sorted(found, key=lambda info: info.path) == list(found)


def test_counting_ends_within_a_directory(tmp_path: Path) -> None:
    for number in range(60):
        (tmp_path / str(number)).touch()
    assert disk_usage([tmp_path], 10 * ENTRY) == 11 * ENTRY


async def test_the_server_bounds_the_answer(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_files, "MOST_LISTED", 5)
    for number in range(6):
        (here.workspace / str(number)).touch()
    assert len(await here.files.list(limit=6)) == 5
    (here.workspace / "0").unlink()
    assert not (await here.files.list(limit=6)).truncated


async def test_directories_deeper_than_any_path(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_beneath, "LONGEST", 20)
    (here.workspace / "aaaaaaaa" / "bbbbbbbb" / "cccccccc" / "d").mkdir(parents=True)
    found = await here.files.list(recursive=True)
    assert [info.path for info in found] == ["aaaaaaaa", "aaaaaaaa/bbbbbbbb", "aaaaaaaa/bbbbbbbb/cccccccc"]
    assert found.truncated


async def test_removing_is_bounded_and_follows_nothing(here: Here) -> None:
    (here.outside / "f").touch()
    deep = here.workspace / "d"
    for _ in range(_beneath.MOST_NESTED + 5):
        deep.mkdir()
        (deep / "link").symlink_to(here.outside)
        deep = deep / "d"
    assert await refused(here.files.remove("d")) == "FAILED_PRECONDITION"
    assert await refused(here.files.remove("d", recursive=True)) == "FAILED_PRECONDITION"
    await here.files.remove("/".join("d" * 50), recursive=True)
    await here.files.remove("d", recursive=True)
    assert here.names() == []
    assert [path.name for path in here.outside.iterdir()] == ["f"]


# Reading


async def test_a_file_grows_while_it_is_read(here: Here) -> None:
    await here.files.write("f", bytes(3 * MIB))
    async with here.files.open_read("f") as stream:
        size = len(await anext(stream))
        with (here.workspace / "f").open("ab") as file:
            file.write(bytes(MIB))
        size += sum([len(piece) async for piece in stream])
    assert size == 3 * MIB


async def test_a_file_becomes_shorter_while_it_is_read(here: Here) -> None:
    # Longer than what is on its way at any time.
    with (here.workspace / "f").open("wb") as file:
        file.truncate(64 * MIB)
    async with here.files.open_read("f") as stream:
        await anext(stream)
        os.truncate(here.workspace / "f", MIB)
        with pytest.raises(SandboxError, match="shorter") as caught:
            async for _ in stream:
                pass
    assert caught.value.status == "ABORTED"


async def test_a_reader_keeps_what_it_has_opened(here: Here) -> None:
    await here.files.write("f", b"o" * 3 * MIB)
    async with here.files.open_read("f") as stream:
        data = await anext(stream)
        await here.files.write("f", b"new")
        data += b"".join([piece async for piece in stream])
    assert data == b"o" * 3 * MIB
    assert await here.files.read("f") == b"new"


async def test_transfers_at_the_same_time_are_bounded(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_files, "MOST_TRANSFERS", 2)
    with (here.workspace / "f").open("wb") as file:
        file.truncate(64 * MIB)
    async with here.files.open_read("f") as one, here.files.open_read("f") as two:
        await anext(one), await anext(two)
        for call in (here.files.read("f"), here.files.write("g", b"x")):
            with pytest.raises(SandboxCapacityError, match="2 files"):
                await call
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                await here.files.write("g", b"x")
                break
            except SandboxCapacityError:
                await asyncio.sleep(0.01)


# Writing


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [pb.WriteRequest(data=b"x")],
        [pb.WriteRequest(path="f")],
        [pb.WriteRequest(path="f"), pb.WriteRequest(data=b"half")],
        [pb.WriteRequest(path="f"), pb.WriteRequest(data=b"x"), pb.WriteRequest(size=2)],
        [pb.WriteRequest(path="f"), pb.WriteRequest(path="g"), pb.WriteRequest(size=0)],
        [pb.WriteRequest(path="f"), pb.WriteRequest()],
    ],
)
async def test_an_incomplete_write_changes_nothing(
    here: Here, messages: list[pb.WriteRequest], named: bool
) -> None:
    await here.files.write("f", b"old")

    async def writing() -> AsyncIterator[pb.WriteRequest]:
        for message in messages:
            yield message

    assert await status_of(here.stub.Write(writing())) == "INVALID_ARGUMENT"
    await until(lambda: here.names() == ["f"])
    assert await here.files.read("f") == b"old"


@pytest.mark.parametrize("batch", [1, 2 * MIB])
async def test_a_write_that_is_cut_off_leaves_nothing(
    here: Here, named: bool, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_files, "BATCH", batch)
    call: Any = here.stub.Write()  # type: ignore[call-arg]
    await call.write(pb.WriteRequest(path="a/f"))
    await call.write(pb.WriteRequest(data=bytes(MIB)))
    if named:
        await until(lambda: here.names() != [])
        assert [info.path for info in await here.files.list()] != ["a"]
    else:
        assert here.names() == []
    call.cancel()
    await until(lambda: here.names() == [])
    # Its room is free again.
    await here.files.write("f", bytes(3 * MIB))


async def test_pieces_of_any_size_make_one_file(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_files, "BATCH", 5_000)
    monkeypatch.setattr(_files, "IOV_MAX", 10)
    sizes = [0, 1, 4_999, 5_000, 12_345, *[1] * 25, 0]
    data = [bytes([number]) * size for number, size in enumerate(sizes)]
    await here.files.write("f", pieces(*data))
    assert await here.files.read("f") == b"".join(data)


def test_the_kernel_writes_less_than_it_is_given(
    beneath: Beneath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.writev
    monkeypatch.setattr(os, "writev", lambda file, buffers: real(file, [buffers[0], buffers[1][:2]]))
    upload = Upload(beneath, ["f"])
    upload.begin()
    upload.write([b"one", b"two", memoryview(b"three")])
    upload.commit()
    upload.close()
    assert (tmp_path / "workspace/f").read_bytes() == b"onetwothree"


@pytest.mark.parametrize("named", ["named"], indirect=True)
def test_what_a_killed_server_left_is_removed(beneath: Beneath, tmp_path: Path, named: bool) -> None:
    upload = Upload(beneath, ["f"])
    upload.begin()
    assert len(list((tmp_path / "workspace").iterdir())) == 1
    Beneath(tmp_path / "workspace").close()
    assert list((tmp_path / "workspace").iterdir()) == []
    upload.close()


async def test_the_workspace_limit(here: Here, named: bool) -> None:
    with pytest.raises(SandboxCapacityError, match="workspace-limit-mb"):
        await here.files.write("f", pieces(*[bytes(MIB)] * 5))
    await until(lambda: here.names() == [])
    await here.files.write("f", bytes(3 * MIB))
    for call in (here.files.write("f", bytes(2 * MIB)), here.files.write("g", bytes(2 * MIB))):
        with pytest.raises(SandboxCapacityError):
            await call
    await until(lambda: here.names() == ["f"])
    # Code has filled it beyond the limit: nothing more, but removing helps.
    (here.workspace / "more").write_bytes(bytes(3 * MIB))
    for call in (here.files.write("g", b""), here.files.make_directory("d")):
        with pytest.raises(SandboxCapacityError):
            await call
    await here.files.remove("more")
    await here.files.write("g", b"x")


async def test_writes_at_the_same_time_share_the_room(here: Here) -> None:
    met = asyncio.Barrier(3)

    async def content() -> AsyncIterator[bytes]:
        yield b"x"
        await met.wait()
        yield bytes(2 * MIB)

    writes = (here.files.write(str(number), content()) for number in range(3))
    outcomes = await asyncio.gather(*writes, return_exceptions=True)
    failed = [outcome for outcome in outcomes if isinstance(outcome, SandboxCapacityError)]
    # All three where each has written half of its own when the room is used up.
    assert len(failed) >= 2, outcomes
    await until(lambda: len(here.names()) == 3 - len(failed))


async def test_empty_files_are_not_free(here: Here) -> None:
    for number in range(10):
        await here.files.make_directory("/".join([str(number)] * 50))
    with pytest.raises(SandboxCapacityError):
        await here.files.make_directory("/".join("x" * 50))
    assert len(here.names()) == 500


# A real server


async def test_files_and_executions(server: Server) -> None:
    async with SandboxClient(server.target) as client:
        files = client.files
        await files.write("data.csv", "x\n1\n")
        started = await client.execute_async(
            "import os\n"
            "open('result.txt', 'w').write(open('data.csv').read() * 2)\n"
            "open('old.txt', 'w'); os.utime('old.txt', (0, 0))\n"
            "os.makedirs('.cache/x'); open('.cache/x/f', 'w'); open('.hidden', 'w')\n"
            "os.mkdir('plots'); open('plots/a.png', 'w'); os.mkfifo('fifo')"
        )
        await client.wait_for_execution(started.execution_id)
        await files.stat("data.csv")
        made = await files.list(recursive=True, since_execution=started.execution_id)
        assert [info.path for info in made] == ["old.txt", "plots/a.png", "result.txt"]
        assert await files.read_text("result.txt") == "x\n1\nx\n1\n"
        second = await client.execute_async("open('data.csv', 'a').write('2')")
        await client.wait_for_execution(second.execution_id)
        made = await files.list(recursive=True, since_execution=second.execution_id)
        assert [info.path for info in made] == ["data.csv"]
        assert await refused(files.list(since_execution="none")) == "NOT_FOUND"
        for name in ("data.csv", "result.txt", "old.txt", "plots", ".cache", ".hidden", "fifo"):
            await files.remove(name, recursive=True)


async def test_a_file_that_is_written_just_before_is_not_the_executions(server: Server) -> None:
    async with SandboxClient(server.target) as client:
        for _ in range(10):
            await client.files.write("before", b"x")
            started = await client.execute_async("")
            await client.wait_for_execution(started.execution_id)
            assert await client.files.list(since_execution=started.execution_id) == ()
        await client.files.remove("before")


async def test_a_server_that_is_killed_under_a_write_leaves_nothing(tmp_path: Path) -> None:
    workspace = tmp_path / "workspace"
    with running(tmp_path / "server", "--workspace", str(workspace)) as server:
        async with grpc.aio.insecure_channel(server.target) as channel:
            stub = Stub(channel)  # type: ignore[call-arg]
            call: Any = stub.Write()  # type: ignore[call-arg]
            await call.write(pb.WriteRequest(path="f"))
            await call.write(pb.WriteRequest(data=bytes(MIB)))
            await stub.Stat(pb.StatRequest())
            server.kill()
            call.cancel()
    assert list(workspace.iterdir()) == []


@pytest.mark.slow
async def test_a_gibibyte_both_ways_in_constant_memory(tmp_path: Path) -> None:
    await large(tmp_path, 1 << 30)


async def test_many_mebibytes_both_ways_in_constant_memory(tmp_path: Path) -> None:
    await large(tmp_path, 96 * MIB)


@pytest.mark.slow
async def test_the_memory_of_a_message_is_used_for_the_next(tmp_path: Path) -> None:
    taken = []
    with running(tmp_path) as server:
        async with SandboxClient(server.target) as client:
            for _ in range(6):  # The first ones make the heaps as large as they get.
                before = page_faults(server.pid)
                await client.files.write("f", bytes(32 * MIB))
                taken.append((page_faults(server.pid) - before) // 32)
    # Memory that goes back to the kernel after each message takes more than 30 pages for each MiB.
    assert min(taken) < 10, taken


async def large(directory: Path, size: int) -> None:
    """Writes and reads a file of that size; neither side may hold more than a part of it."""
    block = os.urandom(MIB)

    async def content() -> AsyncIterator[bytes]:
        for _ in range(size // MIB):
            yield block

    with running(directory, "--workspace-limit-mb", "4096") as server:
        async with SandboxClient(server.target) as client:
            await client.files.write("warm", block)
            await client.files.read("warm")
            before = peak(server.pid), peak(os.getpid())
            assert (await client.files.write("large", content())).size == size
            read = 0
            async for piece in client.files.open_read("large"):
                read += len(piece)
                assert piece == block[: len(piece)]
            assert read == size
            after = peak(server.pid), peak(os.getpid())
    assert max(b - a for a, b in zip(before, after, strict=True)) < 48 * MIB, (before, after)


def peak(pid: int) -> int:
    """The most memory that a process has had so far, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def page_faults(pid: int) -> int:
    """How often the kernel has given a page of memory to a process."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[7])
