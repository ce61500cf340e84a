"""Which machine answers, and that no other one runs what was meant for it."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from prodisco_sandbox.proto import sandbox_pb2 as pb
from tests.support.patience import PATIENCE
from tests.support.servers import Server, code, running, with_tests

POD = "sandbox-1"


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("fences"), env={"SANDBOX_POD_NAME": POD}, zygote=True) as server:
        yield server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with running(tmp_path, env={"SANDBOX_POD_NAME": POD}) as server:
        yield server


@pytest.fixture
async def channel(shared_server: Server) -> AsyncIterator[grpc.aio.Channel]:
    async with shared_server.channel() as channel:
        yield channel


def method(channel: Any, name: str, *, streams: bool = False) -> Any:
    kind = channel.unary_stream if streams else channel.unary_unary
    return kind(f"/prodisco.sandbox.v1.SandboxService/{name}")


async def end(call: Any) -> tuple[grpc.StatusCode, dict[str, Any], dict[str, Any]]:
    """Status, initial and trailing metadata of a call, once it has ended."""
    if isinstance(call, grpc.aio.UnaryStreamCall):
        try:
            async for _ in call:
                pass
        except grpc.aio.AioRpcError:
            pass
    status = await call.code()
    return status, dict(iter(await call.initial_metadata())), dict(iter(await call.trailing_metadata()))


def may_lose_initial_metadata(call: Any, status: grpc.StatusCode) -> bool:
    """Whether grpc.aio may report none: it does for a stream that ends before it has read them."""
    if isinstance(call, grpc.aio.UnaryStreamCall):
        return status is not grpc.StatusCode.OK
    return isinstance(call, grpc.aio.StreamStreamCall)


def calls(channel: Any, metadata: Any = None) -> dict[str, Any]:
    """One call of each kind, by name; those that run code write a file of that name."""

    def run(name: str) -> bytes:
        return code(f"open({name!r}, 'w').close()").SerializeToString()

    async def none() -> AsyncIterator[bytes]:
        for request in list[bytes]():
            yield request

    options = {"metadata": metadata, "timeout": PATIENCE}
    return {
        "unary": method(channel, "Execute")(run("unary"), **options),
        "stream": method(channel, "ExecuteStream", streams=True)(run("stream"), **options),
        "async": method(channel, "ExecuteAsync")(run("async"), **options),
        "test": method(channel, "ExecuteTest")(
            with_tests("open('test', 'w').close()", "").SerializeToString(), **options
        ),
        "health": health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), **options),
        "own health": method(channel, "HealthCheck")(b"", **options),
        "not found": method(channel, "GetExecution")(b"\x0a\x01x", **options),
        "undecodable": method(channel, "Execute")(b"\xff\xff", **options),
        "undecodable stream": method(channel, "ExecuteStream", streams=True)(b"\xff\xff", **options),
        "unimplemented": method(channel, "LspHover")(b"", **options),
        "unknown": method(channel, "NoSuchMethod")(b"anything", **options),
        "reflection": channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")(
            none(), **options
        ),
    }


EXPECTED = {
    "unary": grpc.StatusCode.OK,
    "stream": grpc.StatusCode.OK,
    "async": grpc.StatusCode.OK,
    "test": grpc.StatusCode.OK,
    "health": grpc.StatusCode.OK,
    "own health": grpc.StatusCode.OK,
    "not found": grpc.StatusCode.NOT_FOUND,
    "undecodable": grpc.StatusCode.INTERNAL,
    "undecodable stream": grpc.StatusCode.INTERNAL,
    "unimplemented": grpc.StatusCode.UNIMPLEMENTED,
    "unknown": grpc.StatusCode.UNIMPLEMENTED,
    "reflection": grpc.StatusCode.OK,
}


async def test_every_answer_says_which_machine_it_comes_from(channel: grpc.aio.Channel) -> None:
    boots = set()
    for name, call in calls(channel).items():
        status, initial, trailing = await end(call)
        assert status is EXPECTED[name], name
        lost = not initial and may_lose_initial_metadata(call, status)
        for metadata in [trailing] if lost else [initial, trailing]:
            assert metadata["prodisco-pod-name"] == POD, name
            assert "fence" in metadata["prodisco-features"].split(","), name
            assert re.fullmatch(r"[0-9a-f]{32}", metadata["prodisco-boot-id"]), name
            assert "prodisco-fence" not in metadata, name
            boots.add(metadata["prodisco-boot-id"])
    assert len(boots) == 1


async def test_the_first_call_is_told_that_nothing_was_done_before(server: Server) -> None:
    """Neither health checks nor calls that are refused do anything."""
    request = code("pass").SerializeToString()
    elsewhere = [("prodisco-expect-boot", "0" * 32)]
    async with server.channel() as channel:
        in_turn: dict[str, Callable[[], Any]] = {
            "own health": lambda: method(channel, "HealthCheck")(b""),
            "health": lambda: health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest()),
            "refused": lambda: method(channel, "Execute")(request, metadata=elsewhere),
            "not found": lambda: method(channel, "GetExecution")(b"\x0a\x01x"),
            "stream": lambda: method(channel, "ExecuteStream", streams=True)(request),
        }
        told = []
        for name, begin in in_turn.items():
            _, _, trailing = await end(begin())
            assert "first" in trailing["prodisco-features"].split(","), name
            told += [name] * ("prodisco-first-call" in trailing)
    assert told == ["not found"]


async def test_a_watch_of_its_health_says_so_at_once(channel: grpc.aio.Channel) -> None:
    call = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
    assert (await call.read()).status == health_pb2.HealthCheckResponse.SERVING
    assert dict(iter(await call.initial_metadata()))["prodisco-pod-name"] == POD
    call.cancel()


ELSEWHERE: list[tuple[dict[str, str], str]] = [
    ({"pod": "sandbox-2"}, "pod"),
    ({"boot": "0" * 32}, "boot"),
    ({"pod": "sandbox-2", "boot": "0" * 32}, "pod"),
    ({"pod": POD, "boot": "0" * 32}, "boot"),
]


async def test_what_is_meant_for_another_machine_is_refused_and_does_not_run(server: Server) -> None:
    async with server.channel() as channel:
        for expect, fence in ELSEWHERE:
            metadata = [(f"prodisco-expect-{kind}", value) for kind, value in expect.items()]
            for name, call in calls(channel, metadata).items():
                status, initial, trailing = await end(call)
                told, refused = (expect, name), (grpc.StatusCode.FAILED_PRECONDITION, fence)
                assert (status, trailing["prodisco-fence"]) == refused, told
                assert trailing["prodisco-pod-name"] == POD, told
                if initial or not may_lose_initial_metadata(call, status):
                    assert initial["prodisco-pod-name"] == POD, told
    # Nothing was queued either: what comes later sees no file of theirs.
    async with server.connect() as stub:
        answer = await stub.Execute(code("import os; print(os.listdir())"))
        assert answer.output == "[]\n"
        listed = await stub.ListExecutions(pb.ListExecutionsRequest(include_completed_within_ms=60_000))
        assert len(listed.executions) == 1


async def test_what_is_meant_for_this_machine_runs(channel: grpc.aio.Channel) -> None:
    ended = {name: await end(call) for name, call in calls(channel).items()}
    initial = ended["health"][1]
    metadata = [
        ("prodisco-expect-pod", initial["prodisco-pod-name"]),
        ("prodisco-expect-boot", initial["prodisco-boot-id"]),
    ]
    for name, call in calls(channel, metadata).items():
        assert (await end(call))[0] is EXPECTED[name], name


async def test_without_a_pods_name_any_is_accepted_but_another_boot_is_not(tmp_path: Path) -> None:
    boots = []
    for _ in range(2):
        with running(tmp_path) as server:
            async with server.channel() as channel:
                any_pod = calls(channel, [("prodisco-expect-pod", "any")])
                status, initial, _ = {name: await end(call) for name, call in any_pod.items()}["unary"]
                assert status is grpc.StatusCode.OK
                assert "prodisco-pod-name" not in initial
                boots.append(initial["prodisco-boot-id"])
                if len(boots) == 2:
                    other_boot = calls(channel, [("prodisco-expect-boot", boots[0])])
                    for call in other_boot.values():
                        assert (await end(call))[2]["prodisco-fence"] == "boot"
    assert boots[0] != boots[1]
