"""Code puts links in the places of directories that it may write to: nobody follows them."""

from __future__ import annotations

import os
from pathlib import Path

import grpc
import pytest

from prodisco_sandbox.server._shared_memory import _refusal
from prodisco_sandbox.server._usage import disk_usage
from tests.support.servers import Stub, code, needs_bubblewrap, needs_landlock, running, tls_options


async def replace(stub: Stub, place: str, target: Path) -> None:
    """Puts a link in the place of a directory; `place` is an expression."""
    source = f"""
import os
place = {place}
os.rename(place, place + ".gone")
os.symlink({str(target)!r}, place)
"""
    answer = await stub.Execute(code(source))
    assert answer.success, answer.error


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    (tmp_path / "outside" / "a" / "b").mkdir(parents=True)
    return tmp_path / "outside"


@pytest.fixture
def inside(tmp_path: Path) -> Path:
    """Where everything of the server's is, and code may write, as the image has it."""
    (tmp_path / "inside").mkdir()
    return tmp_path / "inside"


@needs_landlock
@pytest.mark.parametrize("isolation", ["process", pytest.param("bwrap", marks=needs_bubblewrap)])
async def test_a_replaced_workspace_opens_nothing_else(inside: Path, outside: Path, isolation: str) -> None:
    options = ["--writable", str(inside), "--isolation", isolation, "--spare-interpreters", "0"]
    with running(inside, *options) as server:
        async with server.connect() as stub:
            assert not (await stub.Execute(code(f"open({str(outside / 'x')!r}, 'w')"))).success
            await replace(stub, "os.getcwd()", outside)
            await stub.Execute(code("import os; open(os.environ['HOME'] + '/x', 'w')"))
    assert os.listdir(outside) == ["a"]


@needs_bubblewrap
async def test_a_replaced_tmp_is_not_what_bubblewrap_binds(inside: Path, outside: Path) -> None:
    options = ["--writable", str(inside), "--isolation", "bwrap", "--spare-interpreters", "0"]
    with running(inside, *options) as server:
        async with server.connect() as stub:
            await replace(stub, "os.path.dirname(os.getcwd()) + '/tmp'", outside)
            answer = await stub.Execute(code("open('/tmp/x', 'w')"))
            assert answer.success, answer.error
    assert os.listdir(outside) == ["a"]


@needs_landlock
@pytest.mark.skipif(_refusal() is not None, reason=f"no namespaces: {_refusal()}")
@pytest.mark.parametrize("link", ["outside", "itself"])
async def test_a_replaced_tmp_is_not_what_is_mounted(tmp_path: Path, outside: Path, link: str) -> None:
    # A TMPDIR that is too long a path for sockets is mounted at a short one.
    inside = tmp_path / "a-name-that-makes-the-path-too-long-for-sockets"
    options = ["--writable", str(inside), "--spare-interpreters", "0"]
    with running(inside, *options) as server:
        async with server.connect() as stub:
            where = await stub.Execute(code("import os; print(os.environ['TMPDIR'])"))
            assert where.output == "/dev/shm/tmp\n"
            target = outside if link == "outside" else Path("tmp")
            await replace(stub, "os.path.dirname(os.getcwd()) + '/tmp'", target)
            answer = await stub.Execute(
                code("import os; print(os.listdir('/dev/shm/tmp')); open('/dev/shm/tmp/x', 'w')")
            )
            assert answer.success, answer.error
            assert "'a'" not in answer.output
    assert os.listdir(outside) == ["a"]


@needs_bubblewrap
async def test_what_bubblewrap_finds_its_directories_by_is_not_inherited(inside: Path) -> None:
    """From a directory that was opened outside, ``..`` leads outside."""
    source = """
import os
for pid in filter(str.isdigit, os.listdir("/proc")):
    for number in os.listdir(f"/proc/{pid}/fd"):
        print(pid == str(os.getpid()), number)
"""
    with running(inside, "--isolation", "bwrap", "--spare-interpreters", "0") as server:
        async with server.connect() as stub:
            lines = (await stub.Execute(code(source))).output.splitlines()
    supervisors = [line.split()[1] for line in lines if line.startswith("False")]
    assert supervisors
    # The standard ones, the answer's, and its own pipes and ends.
    assert len(supervisors) <= 8, supervisors


@needs_landlock
async def test_the_key_stays_hidden(inside: Path, certificates: dict[str, Path]) -> None:
    read = code(f"print(open({str(certificates['server.key'])!r}).read())")
    with running(inside, *tls_options(certificates, "tls"), "--writable", str(inside)) as server:
        credentials = grpc.ssl_channel_credentials(certificates["ca"].read_bytes())
        async with server.connect(credentials, ssl_target_name_override="localhost") as stub:
            assert "PermissionError" in (await stub.Execute(read)).error
            await replace(stub, "os.getcwd()", Path("/"))
            assert "PRIVATE KEY" not in (await stub.Execute(read)).output


async def test_cleaning_up_leaves_what_a_link_points_to(inside: Path, outside: Path) -> None:
    outside.chmod(0o755)
    with running(inside, "--writable", str(inside)) as server:
        async with server.connect() as stub:
            await replace(stub, "os.path.dirname(os.getcwd()) + '/tmp'", outside)
    assert (outside / "a" / "b").is_dir()
    assert outside.stat().st_mode & 0o777 == 0o755


async def test_a_replaced_cache_is_not_written_to(inside: Path, outside: Path) -> None:
    with running(inside, "--writable", str(inside)) as server:
        async with server.connect() as stub:
            await replace(stub, repr(str(inside / "cache")), outside)
            assert (await stub.Execute(code("print('kept by the server')"))).success
    assert os.listdir(outside) == ["a"]


def test_a_link_to_itself_does_not_end_the_counting(tmp_path: Path) -> None:
    """As code can put one in the place of a directory while it is looked at."""
    (tmp_path / "l").symlink_to("l")
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    assert disk_usage([tmp_path / "l"], 1 << 30) == 0
    (tmp_path / "m").symlink_to(tmp_path)
    assert disk_usage([tmp_path / "m"], 1 << 30) == 0
    assert disk_usage([tmp_path / "l", tmp_path], 1 << 30) >= 1 << 20
