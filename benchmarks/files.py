"""Scenario 11: files. A gibibyte through `client.files`, beside a bare gRPC stream of as many bytes.

Both servers are processes of their own on loopback, and the messages have the same size. The bare stream
has neither files nor messages of the protocol: its bytes are sent as they are. The workspace is in memory
where that can be had (/dev/shm), since the disk's speed is not what is asked for.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from prodisco_sandbox import SandboxClient

from .measure import Figure, compared, interleaved
from .scale import Setting

SHARED_MEMORY = "/dev/shm"
TARGET = 0.7
MIB = 1 << 20
_OPTIONS = [("grpc.max_receive_message_length", 64 * MIB)]
_READ, _WRITE, _STORE = "/bare/Read", "/bare/Write", "/bare/Store"


def _memory() -> str | None:
    """A directory in memory; None: there is none."""
    return SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else None


class _Bare(grpc.GenericRpcHandler):  # type: ignore[type-arg]
    """Sends as many mebibytes as the request says, and takes as many as come."""

    def service(self, details: Any) -> Any:
        async def read(request: bytes, _: Any) -> AsyncIterator[bytes]:
            block = bytes(MIB)
            for _ in range(int(request)):
                yield block

        async def write(requests: AsyncIterator[bytes], _: Any) -> bytes:
            return str(sum([len(block) async for block in requests])).encode()

        async def store(requests: AsyncIterator[bytes], _: Any) -> bytes:
            with tempfile.TemporaryFile(dir=_memory(), buffering=0) as file:
                return str(sum([file.write(block) async for block in requests])).encode()

        if details.method == _READ:
            return grpc.unary_stream_rpc_method_handler(read)
        return grpc.stream_unary_rpc_method_handler(store if details.method == _STORE else write)


async def _serve_bare() -> None:
    server = grpc.aio.server(options=_OPTIONS, handlers=[_Bare()])
    print(f"listening on 127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}", flush=True)
    await server.start()
    await asyncio.to_thread(sys.stdin.read)


@contextmanager
def _process(*arguments: str) -> Iterator[tuple[str, int]]:
    """A server that ends with its standard input; gives its target and process."""
    process = subprocess.Popen(
        [sys.executable, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process, process.stdin:
        yield process.stdout.readline().decode().removeprefix("listening on ").strip(), process.pid


def _processor_time(pid: int) -> float:
    """Seconds that this process and that one have worked."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return time.process_time() + (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def run(setting: Setting) -> list[Figure]:
    size = setting.scale.mebibytes
    with tempfile.TemporaryDirectory(prefix="bench-files-", dir=_memory()) as directory:
        server = (
            *("-m", "prodisco_sandbox.server", "--exit-with-parent", "--host", "127.0.0.1", "--port", "0"),
            *("--workspace", f"{directory}/workspace", "--cache-dir", f"{directory}/cache"),
            *("--workspace-limit-mb", str(4 * size + 64)),
        )
        with _process(*server) as (target, pid), _process("-m", __name__) as (bare_target, bare_pid):
            bare = grpc.aio.insecure_channel(bare_target, options=_OPTIONS)
            async with SandboxClient(target) as client, bare:
                found, worked = await _rounds(setting.scale.file_rounds, size, client, bare, pid, bare_pid)
    pairs = (
        ("writing a file", "bare write", "a bare stream that is thrown away"),
        ("writing a file", "bare store", "a bare stream into a file"),
        ("reading a file", "bare read", "a bare stream from memory"),
    )
    figures = []
    for what, other, against in pairs:
        about: dict[str, Any] = {"against": against, "note": f"beside {against}"}
        name = f"{what}, {size} MiB"
        figures += [
            compared(11, name, found[what], found[other], "MiB/s", target=TARGET, at_least=True, **about),
            compared(11, f"{name}, both processes' work", worked[what], worked[other], "s/GiB", **about),
        ]
    return figures


async def _rounds(
    rounds: int, size: int, client: SandboxClient, bare_channel: Any, pid: int, bare_pid: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """The rate of each transfer, and the work for a GiB."""
    block = bytes(MIB)

    async def content() -> AsyncIterator[bytes]:
        for _ in range(size):
            yield block

    async def write() -> None:
        assert (await client.files.write("large", content())).size == size * MIB

    async def read() -> None:
        total = 0
        async for piece in client.files.open_read("large"):
            total += len(piece)
        assert total == size * MIB

    async def bare_write(method: str = _WRITE) -> None:
        call = bare_channel.stream_unary(method)()
        async for piece in content():
            await call.write(piece)
        await call.done_writing()
        assert int(await call) == size * MIB

    async def bare_read() -> None:
        total = 0
        async for piece in bare_channel.unary_stream(_READ)(str(size).encode()):
            total += len(piece)
        assert total == size * MIB

    worked: dict[str, list[float]] = {}

    def speed(name: str, transfer: Any) -> Any:
        server = bare_pid if name.startswith("bare") else pid

        async def measured() -> float:
            begun, work = time.perf_counter(), _processor_time(server)
            await transfer()
            worked.setdefault(name, []).append((_processor_time(server) - work) * 1024 / size)
            return size / (time.perf_counter() - begun)

        return measured

    await write()  # There must be something to read, in whichever order they take turns.
    contenders: dict[str, Any] = {
        "writing a file": write,
        "bare write": bare_write,
        "bare store": lambda: bare_write(_STORE),
        "reading a file": read,
        "bare read": bare_read,
    }
    found = await interleaved(rounds, {name: speed(name, each) for name, each in contenders.items()})
    return found, worked


if __name__ == "__main__":
    asyncio.run(_serve_bare())
