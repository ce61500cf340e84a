"""The script cache: on disk, and through the RPCs."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

import pytest

from prodisco_sandbox.proto import sandbox_pb2 as pb
from prodisco_sandbox.server._cache import ScriptCache, describe
from tests.support.servers import code, running


@pytest.fixture
def cache(tmp_path: Path) -> ScriptCache:
    return ScriptCache(tmp_path, 1000)


@pytest.mark.parametrize(
    ("source", "description"),
    [
        ('"""List pods.\n\nAnd more."""\nprint(1)', "List pods."),
        ("#!/usr/bin/env python\n# Count nodes  \nprint(1)", "Count nodes"),
        ("x = 1  # the first comment\n# the second", "the first comment"),
        ("x = '# no comment'", ""),
        ("", ""),
        ("def f(:", ""),
        ("#\nx = 1", ""),
        ("# " + "é" * 500, "é" * 200),
    ],
)
def test_descriptions(source: str, description: str) -> None:
    assert describe(source) == description


def test_added_once_and_found(cache: ScriptCache, tmp_path: Path) -> None:
    source = "# List all the Pods, quickly!\nprint('é')"
    entry = cache.add(source)
    assert entry is not None
    assert entry.content_hash == hashlib.sha256(source.encode()).hexdigest()
    assert entry.name == f"list-all-the-pods-quickly-{entry.content_hash[:12]}"
    assert cache.add(source) is None
    assert cache.source(entry.name) == source
    assert cache.entries() == ScriptCache(tmp_path, 1000).entries() == [entry]
    assert [path.name for path in tmp_path.iterdir()] == [f"{entry.name}.py"]


def test_blank_and_oversized_scripts_are_not_kept(cache: ScriptCache) -> None:
    assert cache.add(" \n") is None
    assert cache.add("#" * 1001) is None
    assert cache.entries() == []


def test_filter_and_order(cache: ScriptCache, tmp_path: Path) -> None:
    for number, word in enumerate(("Pods", "nodes", "pod logs")):
        entry = cache.add(f"# {word}\n")
        assert entry
        os.utime(tmp_path / f"{entry.name}.py", (number, number))
    assert [entry.description for entry in cache.entries()] == ["pod logs", "nodes", "Pods"]
    assert [entry.description for entry in cache.entries("POD")] == ["pod logs", "Pods"]


def test_the_oldest_go_when_it_is_full(cache: ScriptCache, tmp_path: Path) -> None:
    for number in range(3):
        entry = cache.add(f"# {number}\n" + "#" * 390)
        assert entry
        os.utime(tmp_path / f"{entry.name}.py", (number, number))
    assert [entry.description for entry in cache.entries()] == ["2", "1"]


def test_clear_counts_and_leaves_other_files(cache: ScriptCache, tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text("mine")
    cache.add("# a")
    cache.add("# b")
    assert cache.clear() == 2
    assert cache.entries() == []
    assert [path.name for path in tmp_path.iterdir()] == ["other.py"]


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../secret", "/etc/passwd", "a/../b", "secret", "x\0y", "é", "A" * 5000]
)
def test_names_are_no_paths(cache: ScriptCache, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.py").write_text("password")
    (tmp_path.parent / "secret.py").write_text("password")
    assert cache.source(name) is None


def test_what_was_changed_is_ignored(
    cache: ScriptCache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entry = cache.add("# good")
    assert entry
    path = tmp_path / f"{entry.name}.py"
    path.write_text("# evil")
    with caplog.at_level(logging.WARNING):
        assert cache.source(entry.name) is None
        assert cache.entries() == []
    assert "does not match its hash" in caplog.text
    path.unlink()
    path.symlink_to("/etc/passwd")
    assert cache.entries() == []
    path.unlink()
    os.mkfifo(path)
    assert cache.entries() == []


async def test_through_the_rpcs(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        async with server.connect() as stub:
            await stub.Execute(code("# Failing\n1/0"))
            first = await stub.Execute(code("# Hello\nprint('hello')"))
            assert first.cached.description == "Hello"
            again = await stub.Execute(code("# Hello\nprint('hello')"))
            assert not again.HasField("cached")
            chunks = [c async for c in stub.ExecuteStream(code("# Streamed\n"))]
            assert chunks[-1].result.cached.description == "Streamed"
            by_name = pb.ExecuteRequest(cached=first.cached.name)
            answer = await stub.Execute(by_name)
            assert answer.output == "hello\n"
            assert not answer.HasField("cached")
            started = await stub.ExecuteAsync(by_name)
            listed = (await stub.ListExecutions(pb.ListExecutionsRequest(limit=1))).executions[0]
            assert (listed.is_cached, listed.cached_name) == (True, first.cached.name)
            await stub.GetExecution(pb.GetExecutionRequest(execution_id=started.execution_id, wait=True))
        assert server.stop() == 0
    with running(tmp_path) as server:
        async with server.connect() as stub:
            entries = (await stub.ListCache(pb.ListCacheRequest())).entries
            assert {entry.description for entry in entries} == {"Hello", "Streamed"}
            assert list((await stub.ListCache(pb.ListCacheRequest(filter="hell"))).entries) == [first.cached]
            assert (await stub.ClearCache(pb.ClearCacheRequest())).deleted_count == 2
            assert not (await stub.ListCache(pb.ListCacheRequest())).entries


NO_TEXT = b"\xff"


@pytest.mark.parametrize("kind", ["bytes", "pipe", "directory", "link"])
def test_what_code_puts_into_the_cache_ends_nothing(cache: ScriptCache, tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"x-{hashlib.sha256(NO_TEXT).hexdigest()[:12]}.py"
    held = -1
    if kind == "bytes":
        path.write_bytes(NO_TEXT)
    elif kind == "pipe":
        os.mkfifo(path)
        held = os.open(path, os.O_RDWR)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("/etc/passwd")
    open_before = len(os.listdir("/proc/self/fd"))
    try:
        assert cache.source(path.stem) is None
        assert cache.add("# good") is not None
        assert [entry.description for entry in cache.entries()] == ["good"]
        assert len(os.listdir("/proc/self/fd")) == open_before
    finally:
        if held >= 0:
            os.close(held)


async def test_a_file_of_code_does_not_end_later_executions(tmp_path: Path) -> None:
    name = f"x-{hashlib.sha256(NO_TEXT).hexdigest()[:12]}.py"
    source = f"open({str(tmp_path / 'cache' / name)!r}, 'wb').write({NO_TEXT!r})"
    with running(tmp_path, "--writable", str(tmp_path / "cache")) as server:
        async with server.connect() as stub:
            assert (await stub.Execute(code(source))).success
            answer = await stub.Execute(code("print('later')"))
            assert answer.success, answer.error
            await stub.ListCache(pb.ListCacheRequest())


def test_long_scripts_are_not_parsed_for_a_description() -> None:
    """A literal of 4 MB takes seconds and gigabytes, in the server itself."""
    assert describe('"""A module."""\n' + "x = 1\n" * 20_000) == ""
