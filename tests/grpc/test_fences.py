"""A client that is meant for one machine, and servers that are another one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Self

import grpc
import pytest

from prodisco_sandbox import (
    SandboxClient,
    SandboxError,
    SandboxReplacedError,
    SandboxTimeoutError,
)
from prodisco_sandbox.proto import metadata
from prodisco_sandbox.testing import NEVER, FakeSandboxServer, FakeStatus
from tests.support.fake_servers import broken, reached, restart

POD = "sandbox-1"

Call = Callable[[SandboxClient], Awaitable[Any]]


async def stream(client: SandboxClient) -> list[Any]:
    async with client.execute_stream(code="1") as chunks:
        return [chunk async for chunk in chunks]


CALLS: dict[str, Call] = {
    "execute": lambda client: client.execute(code="1"),
    "execute_stream": stream,
    "execute_async": lambda client: client.execute_async(code="1"),
    "execute_test": lambda client: client.execute_test(tests=""),
    "get_execution": lambda client: client.get_execution("1"),
    "wait_for_execution": lambda client: client.wait_for_execution("1"),
    "cancel_execution": lambda client: client.cancel_execution("1"),
    "list_executions": lambda client: client.list_executions(),
    "clear_cache": lambda client: client.clear_cache(),
    "read": lambda client: client.files.read("a"),
    "write": lambda client: client.files.write("a", b"x"),
    "list_files": lambda client: client.files.list(),
    "remove": lambda client: client.files.remove("a"),
    "lsp_hover": lambda client: client.lsp_hover("a.py", 1, 0),
    "health_check": lambda client: client.health_check(),
}


class Meant:
    """A server, and a client of it as a manager makes it: meant for one pod.

    `_expect` is how a manager says so, and `_boot_id` what the client has learnt: without a manager
    there is no other way to either.
    """

    def __init__(self, *, margin: float = 5.0, **options: Any) -> None:
        self.server = FakeSandboxServer(files=True, **options)
        self._margin = margin
        self.reasons: list[str] = []
        self.looks = 0
        self.error: SandboxError | None = None

    async def look(self) -> None:
        self.looks += 1
        if self.error is not None:
            raise self.error

    async def __aenter__(self) -> Self:
        await self.server.start()
        self.client = SandboxClient(self.server.target, deadline_margin=self._margin)
        self.client._expect(POD, self.reasons.append, self.look)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.close()
        await self.server.kill()


@pytest.fixture
async def meant() -> AsyncIterator[Meant]:
    async with Meant(pod_name=POD) as meant:
        yield meant


@pytest.fixture
def server(meant: Meant) -> FakeSandboxServer:
    return meant.server


@pytest.mark.parametrize("name", CALLS)
async def test_no_call_runs_on_a_server_that_started_anew(
    server: FakeSandboxServer, meant: Meant, name: str
) -> None:
    await CALLS[name](meant.client)
    assert meant.client._boot_id == server.boot_id
    await restart(server)
    with pytest.raises(SandboxReplacedError, match=r"started anew.*nothing was run") as caught:
        await reached(lambda: CALLS[name](meant.client))
    assert not caught.value.ran
    assert server.calls == []
    assert len(meant.reasons) == 1


@pytest.mark.parametrize("name", CALLS)
async def test_first_contact_with_another_pod_is_refused(
    server: FakeSandboxServer, meant: Meant, name: str
) -> None:
    await restart(server, pod_name="sandbox-2")
    with pytest.raises(SandboxReplacedError, match=r"another pod.*nothing was run") as caught:
        await reached(lambda: CALLS[name](meant.client))
    assert not caught.value.ran
    assert server.calls == []
    assert meant.client._boot_id is None


async def test_waiting_for_health_ends_when_another_machine_answers(
    server: FakeSandboxServer, meant: Meant
) -> None:
    assert await meant.client.wait_for_healthy(5)
    await restart(server)
    assert not await meant.client.wait_for_healthy(60)
    assert isinstance(meant.client.health_error, SandboxReplacedError)


async def test_the_servers_own_health_call_is_fenced_too() -> None:
    async with Meant(health="own", pod_name=POD) as meant:
        assert await meant.client.wait_for_healthy(5)
        assert meant.client._boot_id == meant.server.boot_id
        await restart(meant.server)
        assert not await meant.client.wait_for_healthy(60)
        assert meant.server.calls == []


async def test_a_client_of_a_replaced_machine_sends_nothing_more(
    server: FakeSandboxServer, meant: Meant
) -> None:
    await meant.client.execute(code="1")
    boot_id = meant.client._boot_id
    await restart(server)
    for _ in range(3):
        with pytest.raises(SandboxReplacedError):
            await reached(lambda: CALLS["execute"](meant.client))
    assert len(meant.reasons) == 1
    assert meant.client._boot_id == boot_id, "it never means another machine"


@pytest.mark.parametrize("name", ["execute", "execute_stream", "health_check"])
async def test_a_server_without_fences_in_its_place_is_told(
    server: FakeSandboxServer, meant: Meant, name: str
) -> None:
    await meant.client.execute(code="1")
    await restart(server, fences=False)
    with pytest.raises(SandboxReplacedError, match=r"without fences.*the call ran there") as caught:
        await reached(lambda: CALLS[name](meant.client))
    assert caught.value.ran
    assert len(meant.reasons) == 1
    with pytest.raises(SandboxReplacedError, match="nothing was run"):
        await CALLS[name](meant.client)
    assert len(server.calls) == 1


async def test_a_failure_said_by_a_server_without_fences_is_told_too(
    server: FakeSandboxServer, meant: Meant
) -> None:
    await meant.client.execute(code="1")
    await restart(server, fences=False)
    server.script("GetExecution", FakeStatus("NOT_FOUND"))
    with pytest.raises(SandboxReplacedError) as caught:
        await reached(lambda: CALLS["get_execution"](meant.client))
    assert caught.value.ran
    assert len(meant.reasons) == 1


async def test_a_failure_whose_initial_metadata_is_lost_comes_from_the_same_machine() -> None:
    boot_id = ((metadata.BOOT_ID, "0" * 32),)

    async def healthy(_: Any, context: Any) -> bytes:
        await context.send_initial_metadata(boot_id)
        return b""

    async def not_found(_: Any, context: Any) -> None:
        await context.abort(grpc.StatusCode.NOT_FOUND, "", boot_id)

    handlers = {
        "HealthCheck": grpc.unary_unary_rpc_method_handler(healthy),
        "GetExecution": grpc.unary_unary_rpc_method_handler(not_found),
    }
    server = grpc.aio.server()
    service = grpc.method_handlers_generic_handler("prodisco.sandbox.v1.SandboxService", handlers)
    server.add_generic_rpc_handlers((service,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    reasons: list[str] = []
    try:
        async with SandboxClient(f"127.0.0.1:{port}") as client:
            client._expect(POD, reasons.append, lambda: asyncio.sleep(0))
            await client.health_check()
            assert client._boot_id == "0" * 32
            with pytest.raises(SandboxError) as caught:
                await client.wait_for_execution("1")
            assert caught.value.status == "NOT_FOUND"
        assert reasons == []
    finally:
        await server.stop(None)


@pytest.mark.parametrize("health", ["standard", "own"])
async def test_a_server_without_fences_is_accepted(health: Any) -> None:
    async with Meant(health=health, fences=False) as meant:
        assert await meant.client.wait_for_healthy(5)
        assert (await meant.client.execute(code="1")).success
        meant.server.script("GetExecution", FakeStatus("NOT_FOUND"))
        with pytest.raises(SandboxError) as caught:
            await meant.client.get_execution("1")
        assert caught.value.status == "NOT_FOUND"
        await restart(meant.server)
        await broken(meant.client)
        assert meant.looks == 0
        assert (await reached(lambda: CALLS["execute"](meant.client))).success
        assert meant.looks == 1, "before the call on the new connection, not before each"
        assert meant.reasons == []


class Proxy:
    """Answers every call over HTTP/2 by one status, as a proxy does that has no server behind it."""

    HEADERS, SETTINGS = 0x1, 0x4
    END_STREAM, END_HEADERS, ACK = 0x1, 0x4, 0x1

    def __init__(self, status: int) -> None:
        # A field of HPACK: ":status", by its index in the static table, and the value.
        self._status = b"\x08\x03" + str(status).encode()
        self.calls = 0
        self.tasks: set[Any] = set()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.tasks.add(asyncio.current_task())
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await reader.readexactly(len(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"))
            writer.write(self._frame(self.SETTINGS))
            while True:
                head = await reader.readexactly(9)
                await reader.readexactly(int.from_bytes(head[:3], "big"))
                kind, flags, stream = head[3], head[4], head[5:]
                if kind == self.HEADERS:
                    self.calls += 1
                    flags = self.END_STREAM | self.END_HEADERS
                    writer.write(self._frame(self.HEADERS, flags, stream, self._status))
                elif kind == self.SETTINGS and not flags:
                    writer.write(self._frame(self.SETTINGS, self.ACK))
        writer.close()

    def _frame(self, kind: int, flags: int = 0, stream: bytes = bytes(4), payload: bytes = b"") -> bytes:
        return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream + payload


@pytest.mark.parametrize(
    ("http", "status"), [(401, "UNAUTHENTICATED"), (403, "PERMISSION_DENIED"), (404, "UNIMPLEMENTED")]
)
@pytest.mark.parametrize("name", ["execute", "execute_async", "get_execution", "health_check"])
async def test_what_a_proxy_answers_is_no_other_machine(
    server: FakeSandboxServer, meant: Meant, name: str, http: int, status: str
) -> None:
    await meant.client.execute("1")
    await server.kill()
    proxy = Proxy(http)
    port = int(server.target.rpartition(":")[2])
    async with await asyncio.start_server(proxy.answer, "127.0.0.1", port):
        with pytest.raises(SandboxError) as caught:
            await reached(lambda: CALLS[name](meant.client))
        await meant.client.close()  # before the listener, which waits for connections from Python 3.12 on
        await asyncio.wait(proxy.tasks)
    assert proxy.calls
    assert caught.value.status == status
    assert not isinstance(caught.value, SandboxReplacedError)
    assert meant.reasons == []


async def test_an_error_of_the_look_comes_out_as_it_is() -> None:
    async with Meant(fences=False) as meant:
        await meant.client.execute("1")
        await restart(meant.server)
        await broken(meant.client)
        meant.error = SandboxTimeoutError("no answer about the pod")
        with pytest.raises(SandboxTimeoutError) as caught:
            await meant.client.execute("1")
        assert caught.value is meant.error


async def test_a_server_with_fences_in_the_place_of_one_without_is_told() -> None:
    async with Meant(fences=False) as meant:
        await meant.client.execute(code="1")
        await restart(meant.server, fences=True)
        with pytest.raises(SandboxReplacedError):
            await reached(lambda: CALLS["execute"](meant.client))


async def test_a_server_that_was_not_told_its_pod_is_fenced_by_its_boot_id() -> None:
    async with Meant() as meant:
        assert await meant.client.wait_for_healthy(5)
        await restart(meant.server)
        with pytest.raises(SandboxReplacedError):
            await reached(lambda: CALLS["execute"](meant.client))
        assert meant.server.calls == []


async def test_failures_of_the_connection_are_no_other_machine() -> None:
    async with Meant(pod_name=POD, margin=0.1) as meant:
        await meant.client.execute(code="1")
        meant.server.script("Execute", FakeStatus("UNAVAILABLE"), FakeStatus("INTERNAL"), NEVER)
        for timeout in (None, None, 1):
            with pytest.raises(SandboxError) as caught:
                await SandboxClient.execute(meant.client, code="1", timeout=timeout)
            assert not isinstance(caught.value, SandboxReplacedError)
        await meant.server.kill()
        with pytest.raises(SandboxError) as caught:
            await meant.client.execute(code="1")
        assert not isinstance(caught.value, SandboxReplacedError)
        assert meant.reasons == []


async def test_a_direct_client_is_meant_for_whoever_answers(server: FakeSandboxServer) -> None:
    async with SandboxClient(server.target) as client:
        await client.execute(code="1")
        for changes in ({}, {"pod_name": "sandbox-2"}, {"fences": False}):
            await restart(server, **changes)
            assert (await reached(lambda: CALLS["execute"](client))).success
        assert client.sandbox is None


def found_unused(client: SandboxClient) -> bool | None:
    return client._found_unused


@pytest.mark.parametrize("name", sorted(CALLS.keys() - {"health_check"}))
async def test_a_client_knows_whether_it_is_the_first_to_use_its_machine(meant: Meant, name: str) -> None:
    assert found_unused(meant.client) is None
    await meant.client.health_check()
    assert found_unused(meant.client) is False
    with contextlib.suppress(SandboxError):
        await CALLS[name](meant.client)
    await meant.client.execute(code="1")
    assert found_unused(meant.client) is True

    async with SandboxClient(meant.server.target) as other:
        assert found_unused(other) is None
        other._expect(POD, meant.reasons.append, meant.look)
        await CALLS["execute"](other)
        assert found_unused(other) is False


async def test_a_server_without_fences_does_not_tell_who_was_first() -> None:
    async with Meant(fences=False) as meant:
        await meant.client.execute(code="1")
        assert found_unused(meant.client) is None
