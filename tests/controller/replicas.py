"""Replicas of the MCP program in processes of their own, and a proxy that gives each request to the next."""

from __future__ import annotations

import asyncio
import contextlib
import re
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import httpx2
from _patience import PATIENCE, until


class Replica:
    """`prodisco-sandbox-mcp` over HTTP.

    Attributes:
        clients: Who waits for its answers: the proxy's clients, by their numbers.
        arriving: How many requests the proxy is about to give to it.
        killed: Whether it was.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self.port = 0
        self.clients: list[int] = []
        self.arriving = 0
        self.killed = False

    async def start(self, environment: dict[str, str]) -> None:
        """Returns once /readyz says yes, as a Service waits for it."""
        with self._log.open("w") as log:
            self.process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "prodisco_sandbox.mcp", "--kubernetes", "--language", "Python"),
                *("--transport", "http", "--port", "0", "--drain-timeout", str(PATIENCE)),
                env=environment,
                stderr=log,
            )
        await until(self._has_begun, 3 * PATIENCE)
        found = re.search(r"listening on http://127\.0\.0\.1:(\d+)/", self._log.read_text())
        assert found is not None, self._log.read_text()
        self.port = int(found[1])
        await until(self.is_ready)

    def _has_begun(self) -> bool:
        return self.process.returncode is not None or "listening on " in self._log.read_text()

    async def is_ready(self) -> bool:
        async with httpx2.AsyncClient(timeout=PATIENCE, verify=False) as http:
            return (await http.get(f"http://127.0.0.1:{self.port}/readyz")).status_code == 200

    async def stop(self) -> None:
        """SIGTERM, and its own end."""
        self.process.terminate()
        async with asyncio.timeout(PATIENCE):
            assert await self.process.wait() == 0, self._log.read_text()

    async def kill(self) -> None:
        self.killed = True
        self.process.kill()
        await self.process.wait()

    def warnings(self) -> list[str]:
        return re.findall(r"^.* (?:WARNING|ERROR) .*$", self._log.read_text(), re.MULTILINE)


class Proxy:
    """An HTTP proxy that gives each request to the next replica in turn.

    A replica that refuses the connection has seen nothing of the request: the next one gets it.
    A client says its number in the header ``X-Client``.

    Args:
        on_cut: Called with a client's number where a replica was killed that had a request of it.
    """

    def __init__(self, on_cut: Callable[[int], None]) -> None:
        self._on_cut = on_cut
        self.replicas: list[Replica] = []
        self.url = ""

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as exchanges:

            def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                exchanges.create_task(self._exchange(reader, writer), name="exchange")

            async with await asyncio.start_server(accept, "127.0.0.1", 0) as server:
                self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/mcp"
                yield

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request for each connection, so that the client's next one goes elsewhere."""
        async with AsyncExitStack() as stack:
            stack.push_async_callback(_closed, writer)
            stack.enter_context(contextlib.suppress(asyncio.IncompleteReadError, ConnectionError))
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"(?im)^content-length: *(\d+)", head)
            body = await reader.readexactly(int(length[1]) if length else 0)
            line, _, headers = head.partition(b"\r\n")
            headers = re.sub(rb"(?im)^connection:.*\r\n", b"", headers)
            number = re.search(rb"(?im)^x-client: *(\d+)", head)
            assert number is not None
            replica, answers, requests = await self._connect()
            replica.clients.append(int(number[1]))
            try:
                requests.write(line + b"\r\nConnection: close\r\n" + headers + body)
                copying = asyncio.create_task(self._copy(answers, writer), name="copying")
                leaving = asyncio.create_task(reader.read(1), name="leaving")
                await asyncio.wait({copying, leaving}, return_when=asyncio.FIRST_COMPLETED)
                for task in (copying, leaving):
                    task.cancel()
                await asyncio.gather(copying, leaving, return_exceptions=True)
            finally:
                replica.clients.remove(int(number[1]))
                await _closed(requests)
                if replica.killed:
                    self._on_cut(int(number[1]))

    async def _connect(self) -> tuple[Replica, asyncio.StreamReader, asyncio.StreamWriter]:
        self.replicas.append(self.replicas.pop(0))
        for replica in list(self.replicas):
            replica.arriving += 1
            try:
                return replica, *(await asyncio.open_connection("127.0.0.1", replica.port))
            except ConnectionRefusedError:
                pass
            finally:
                replica.arriving -= 1
        raise AssertionError("no replica is left")

    @staticmethod
    async def _copy(answers: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await answers.read(65_536):
            writer.write(data)
            await writer.drain()


async def _closed(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
