"""Real clients, real transports, real processes as sandboxes."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import sys
import termios
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Self

import anyio
import pytest
from mcp import Client
from mcp.client.stdio import StdioServerParameters

from prodisco_sandbox import SandboxManager
from prodisco_sandbox.local import LocalCluster
from tests.support.mcp_server import ERAS, INITIALIZE, call, connect, make_server, over_http, refused, run
from tests.support.patience import PATIENCE, until
from tests.support.ports import free_ports

WRITE = "open('diary.txt', 'w').write('the owl')"
READ = "print(open('diary.txt').read())"
LOOK = "import os; print(os.path.exists('diary.txt'))"


@asynccontextmanager
async def local_server(**settings: Any) -> AsyncIterator[tuple[str, SandboxManager]]:
    """A server on HTTP whose sandboxes are real processes; gives its URL and the manager."""
    async with LocalCluster() as cluster:
        manager = SandboxManager(cluster.config(**settings), custom_objects_api=cluster.custom_objects_api)
        async with over_http(make_server(manager)[0]) as url:
            yield url, manager


async def test_two_clients_of_each_era_have_state_of_their_own() -> None:
    async with local_server() as (url, manager), AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(connect(url, era)) for era in ERAS for _ in range(2)]
        begun = await asyncio.gather(
            *(run(client, WRITE if n % 2 == 0 else "print('hello')") for n, client in enumerate(clients))
        )
        known = [{"sandbox": result["sandbox"]} if "sandbox" in result else {} for result in begun]
        assert [bool(handle) for handle in known] == [False, False, True, True]
        seen = await asyncio.gather(
            *(run(client, READ if n % 2 == 0 else LOOK, **known[n]) for n, client in enumerate(clients))
        )
        assert [result["output"] for result in seen] == ["the owl\n", "False\n"] * 2
        assert manager.stats().created == 4


async def test_output_comes_while_the_script_runs_and_a_cancel_stops_it() -> None:
    code = """\
import os, time
print("working", flush=True)
while not os.path.exists("go on"): time.sleep(0.01)
"""

    async def talk(url: str, era: str) -> None:
        async with connect(url, era) as client:
            known = {"sandbox": handle} if (handle := (await run(client, "")).get("sandbox")) else {}
            working = anyio.Event()

            async def on_progress(progress: float, total: float | None, message: str | None) -> None:
                if message == "working\n":
                    working.set()

            async def call_tool() -> None:
                arguments = {"code": code, **known}
                await client.call_tool("run_sandbox", arguments, progress_callback=on_progress)

            async def state() -> str:
                (last,) = (await run(client, mode="list", limit=1, **known))["executions"]
                return str(last["state"])

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(call_tool)
                with anyio.fail_after(PATIENCE):
                    await working.wait()
                tasks.cancel_scope.cancel()
            with anyio.fail_after(PATIENCE):
                while await state() == "RUNNING":
                    await asyncio.sleep(0.02)
            assert await state() == "CANCELLED"
            assert (await run(client, "import os; print(os.listdir())", **known))["output"] == "[]\n"

    async with local_server() as (url, _manager):
        await asyncio.gather(*(talk(url, era) for era in ERAS))


async def test_modes_work_together_on_the_reference_server() -> None:
    async with local_server() as (url, _manager), connect(url, "legacy") as client:
        started = await run(
            client, "import time\nprint('a' * 40_000)\ntime.sleep(1000)", mode="async", timeout_ms=120_000
        )
        known = {"execution_id": started["execution_id"]}
        with anyio.fail_after(PATIENCE):
            while len((first := await run(client, mode="status", **known))["output"]) < 30_000:
                await asyncio.sleep(0.02)
        rest = await run(client, mode="status", output_offset=first["output_offset"], **known)
        assert len(first["output"] + rest["output"]) == 40_001
        assert [e["state"] for e in (await run(client, mode="list", states=["RUNNING"]))["executions"]]
        assert (await run(client, mode="cancel", **known))["state"] == "CANCELLED"
        ended = await run(client, mode="status", wait=True, **known)
        assert (ended["state"], ended["success"]) == ("CANCELLED", False)
        output = ""
        for _ in range(20):  # A second may be over before the script has got as far as to print.
            error = await call(client, "print('begun', flush=True)\nwhile True: pass", timeout_ms=1)
            assert error.is_error
            assert error.structured_content is not None
            assert error.structured_content["state"] == "TIMEOUT"
            if output := error.structured_content["output"]:
                break
        assert output == "begun\n"
        assert "needs" in await refused(client, mode="status")


@pytest.mark.parametrize("era", [pytest.param(ERAS[0], marks=pytest.mark.slow), ERAS[1]])
async def test_files_are_there_after_a_suspension_and_the_model_is_told(era: str) -> None:
    settings = {"on_idle": "suspend", "session_idle_timeout": 0.3, "idle_check_interval": 0.05}
    async with local_server(**settings) as (url, manager), connect(url, era) as client:
        begun = await run(client, WRITE)
        known = {"sandbox": begun["sandbox"]} if "sandbox" in begun else {}
        await until(lambda: manager.stats().suspended == 1)
        read = await run(client, READ, **known)
        assert read["output"] == "the owl\n"
        assert "Files in the working directory were kept" in read["note"]
        assert manager.stats().created == 1


# The server as a program


def program(*arguments: str, **environment: str) -> StdioServerParameters:
    # The SDK's client passes on little.
    coverage = {name: value for name, value in os.environ.items() if name.startswith("COVERAGE")}
    return StdioServerParameters(
        command=sys.executable,
        args=["-m", "prodisco_sandbox.mcp", *arguments],
        env={**coverage, **environment},
    )


@pytest.mark.slow
@pytest.mark.parametrize("era", ERAS)
@pytest.mark.usefixtures("measured_children")
async def test_the_program_serves_both_eras_on_stdio(era: str) -> None:
    async with Client(program("--local", "--log-level", "debug"), mode=era) as client:
        first = await run(client, WRITE + "; print('x' * 100_000)")
        assert "sandbox" not in first, "the process has one client, and it a sandbox"
        known = {"sandbox": (await run(client, WRITE, sandbox="new"))["sandbox"]}
        assert (
            (await run(client, READ))["output"] == (await run(client, READ, **known))["output"] == "the owl\n"
        )

        async def is_running() -> bool:
            return bool((await run(client, mode="list", states=["RUNNING"], **known))["executions"])

        async with anyio.create_task_group() as tasks:
            code = "import time; time.sleep(1000)"
            tasks.start_soon(lambda: run(client, code, timeout_ms=120_000, **known))
            await until(is_running)
            tasks.cancel_scope.cancel()
        assert (await run(client, READ, **known))["output"] == "the owl\n"
        with anyio.fail_after(PATIENCE):
            while await is_running():
                await asyncio.sleep(0.01)
        executions = (await run(client, mode="list", limit=2, **known))["executions"]
        assert executions[1]["state"] == "CANCELLED", "though it never printed anything"


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.2, 20])
async def test_sixteen_calls_at_once_all_get_their_results(seconds: float) -> None:
    # Half of them wait until others have ended: the slow ones end later than their own timeout
    # after the call.
    async with Client(program("--local"), mode="legacy") as client:
        codes = (f"import time; time.sleep({seconds}); print({n})" for n in range(16))
        results = await asyncio.gather(*(run(client, code) for code in codes))
    assert [result["output"] for result in results] == [f"{n}\n" for n in range(16)]


@pytest.mark.slow
async def test_the_programs_sandboxes_are_configured_by_options_and_variables(tmp_path: Path) -> None:
    options = ("--server-option=--pass-env=GREETING", "--server-option=--max-output=8")
    environment = {"GREETING": "hello", "SANDBOX_MAX_OUTPUT": "1000", "SANDBOX_WRITABLE": str(tmp_path)}
    async with Client(program("--local", *options, **environment), mode="legacy") as client:
        told = await run(client, "import os; print(os.environ['GREETING'])")
        assert told["output"] == "hello\n"
        await run(client, f"open({str(tmp_path / 'file')!r}, 'w').write('x')")
        assert (tmp_path / "file").read_text() == "x"
        assert "output cut" in (await run(client, "print('x' * 100)"))["output"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_the_program_on_stdio_ends_at_a_signal_though_its_input_is_open(number: int) -> None:
    process = await asyncio.create_subprocess_exec(
        # As a job in the background, under nohup.
        *("/bin/sh", "-c", 'trap "" INT HUP; exec "$@"', "sh"),
        *(sys.executable, "-m", "prodisco_sandbox.mcp", "--local"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None

    async def initialize() -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        message = {"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": INITIALIZE}
        process.stdin.write(json.dumps(message).encode() + b"\n")
        assert b"prodisco-sandbox" in await process.stdout.readline()

    async with asyncio.timeout(PATIENCE):
        await initialize()
        process.send_signal(signal.SIGHUP)
        await initialize()
        process.send_signal(number)
        assert await process.stdout.read() == b""
        assert await process.wait() == 0


@pytest.mark.slow
async def test_the_program_on_stdio_answers_what_clients_ask_about_the_last_result(tmp_path: Path) -> None:
    go_on = tmp_path / "go_on"
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        "from prodisco_sandbox.mcp import __main__ as program, _serve\n"
        "_serve.SETTLE_TIME = 60.0\n"
        "raise SystemExit(program.main(['--local', '--drain-timeout', '60']))",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def send(method: str, params: dict[str, Any], **number: int) -> None:
        assert process.stdin is not None
        message = {"jsonrpc": "2.0", "method": method, "params": params, **number}
        process.stdin.write(json.dumps(message).encode() + b"\n")

    async def receive(key: str, value: object) -> Any:
        assert process.stdout is not None
        while (message := json.loads(await process.stdout.readline())).get(key) != value:
            pass
        return message

    async def ask(method: str, params: dict[str, Any], number: int) -> Any:
        send(method, params, id=number)
        return (await receive("id", number))["result"]

    code = f"""
import os, time
print("begun", flush=True)
while not os.path.exists({str(go_on)!r}):
    time.sleep(0.01)
"""
    try:
        async with asyncio.timeout(2 * PATIENCE):
            await ask("initialize", INITIALIZE, 1)
            send("notifications/initialized", {})
            tool = {"name": "run_sandbox", "_meta": {"progressToken": "t"}}
            send("tools/call", {**tool, "arguments": {"code": code}}, id=2)
            await receive("method", "notifications/progress")
            process.terminate()
            number = 3
            refused = {**tool, "arguments": {"code": ""}}
            while "shutting down" not in str(await ask("tools/call", refused, number)):
                number += 1
            go_on.touch()
            await receive("id", 2)
            assert (await ask("tools/list", {}, number + 1))["tools"]
            process.terminate()
            assert await process.stdout.read() == b""
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("input_is_open", [True, False])
async def test_the_program_on_stdio_ends_quietly_when_its_client_does_not_read_any_more(
    tmp_path: Path, input_is_open: bool
) -> None:
    ours, theirs = os.pipe()
    with (tmp_path / "log").open("w") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "prodisco_sandbox.mcp", "--local"),
            stdin=asyncio.subprocess.PIPE,
            stdout=theirs,
            stderr=log,
        )
    os.close(theirs)
    assert process.stdin is not None
    for number, method, with_params in (
        (1, "initialize", INITIALIZE),
        (None, "notifications/initialized", {}),
    ):
        message: dict[str, Any] = {"jsonrpc": "2.0", "method": method, "params": with_params}
        if number is not None:
            message["id"] = number
        process.stdin.write(json.dumps(message).encode() + b"\n")
    try:
        async with asyncio.timeout(PATIENCE):
            assert b"prodisco-sandbox" in await asyncio.to_thread(os.read, ours, 65536)
            arguments = {"code": "import time; time.sleep(60)"}
            call = {"name": "run_sandbox", "arguments": arguments}
            message = {"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": call}
            process.stdin.write(json.dumps(message).encode() + b"\n")
            await until(lambda: "sandbox_ready" in (tmp_path / "log").read_text())
            os.close(ours)
            if not input_is_open:
                process.stdin.close()
            assert await process.wait() == 0
        assert "Traceback" not in (tmp_path / "log").read_text()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_the_program_on_stdio_can_be_killed_though_its_client_does_not_read(number: int) -> None:
    ours, theirs = os.pipe()
    size = fcntl.fcntl(theirs, fcntl.F_GETPIPE_SZ)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "prodisco_sandbox.mcp", "--local", "--drain-timeout", "0"),
        stdin=asyncio.subprocess.PIPE,
        stdout=theirs,
    )
    os.close(theirs)

    def waiting() -> int:
        return int.from_bytes(fcntl.ioctl(ours, termios.FIONREAD, bytes(4)), sys.byteorder)

    try:
        assert process.stdin is not None
        messages: list[dict[str, Any]] = [
            {"id": 1, "method": "initialize", "params": INITIALIZE},
            {"method": "notifications/initialized", "params": {}},
            # Some 5 KiB of answer to each.
            *({"id": number, "method": "tools/list", "params": {}} for number in range(2, 60)),
        ]
        for message in messages:
            process.stdin.write(json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n")
        await until(lambda: waiting() > size // 2)
        async with asyncio.timeout(PATIENCE):
            while process.returncode is None:
                process.send_signal(number)
                await asyncio.sleep(0.1)
        assert process.returncode == -number
    finally:
        os.close(ours)
        if process.returncode is None:
            process.kill()
            await process.wait()


UNHURRIED = """
import sys
from prodisco_sandbox.mcp import __main__ as program, _serve
_serve.SETTLE_TIME = 60.0
sys.exit(program.main(sys.argv[1:]))
"""


class Program:
    """The program on HTTP, in a process of its own; it waits long for what clients may still ask."""

    def __init__(self, log: Path, *arguments: str, **environment: str) -> None:
        self._log, self._arguments = log, arguments
        self._environment = {**os.environ, **environment}
        self.url = ""

    async def __aenter__(self) -> Self:
        with self._log.open("w") as log:
            self.process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", UNHURRIED),
                *("--local", "--transport", "http", "--drain-timeout", "60", *self._arguments),
                stderr=log,
                env=self._environment,
            )
        await until(lambda: "listening on " in self._log.read_text())
        self.url = self._log.read_text().partition("listening on ")[2].split()[0]
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()


@pytest.mark.slow
async def test_the_program_on_http_finishes_what_it_has_begun(tmp_path: Path) -> None:
    async with (
        Program(tmp_path / "log", "--port", "0") as program,
        connect(program.url, "legacy") as one,
        connect(program.url, "2026-07-28") as two,
    ):
        began = [anyio.Event(), anyio.Event()]
        go_on = tmp_path / "go_on"
        code = f"""
import os, time
print("begun", flush=True)
while not os.path.exists({str(go_on)!r}):
    time.sleep(0.01)
print("done")
"""

        async def work(client: Client, event: anyio.Event) -> Any:
            async def on_progress(progress: float, total: float | None, message: str | None) -> None:
                event.set()

            return await client.call_tool("run_sandbox", {"code": code}, progress_callback=on_progress)

        calls = [asyncio.create_task(work(*pair)) for pair in zip((one, two), began, strict=True)]
        with anyio.fail_after(PATIENCE):
            for event in began:
                await event.wait()
        program.process.terminate()
        while "shutting down" not in (await call(one, "")).content[0].text:  # type: ignore[union-attr]
            await asyncio.sleep(0.01)
        go_on.touch()
        for result in await asyncio.gather(*calls):
            assert result.structured_content["output"] == "begun\ndone\n"
        program.process.terminate()
        async with asyncio.timeout(PATIENCE):
            assert await program.process.wait() == 0


@pytest.mark.slow
async def test_a_restarted_server_knows_the_handles_and_not_the_sessions(tmp_path: Path) -> None:
    secret = "kept over the restart"
    port = str(free_ports(1)[0])
    async with (
        Program(tmp_path / "1", "--port", port, SANDBOX_HANDLE_SECRET=secret) as program,
        connect(program.url, "2026-07-28") as client,
        connect(program.url, "legacy") as session,
    ):
        handle = (await run(client, WRITE))["sandbox"]
        await run(session, WRITE)
        program.process.kill()
        await program.process.wait()
        again = Program(tmp_path / "2", "--port", port, SANDBOX_HANDLE_SECRET=secret)
        async with again:
            result = await run(client, LOOK, sandbox=handle)
            assert result["output"] == "False\n"
            assert "may be a new, empty sandbox" in result["note"]
            with pytest.raises(Exception, match=r"[Ss]ession"):
                await run(session, LOOK)
            async with connect(again.url, "legacy") as client_again:
                assert (await run(client_again, LOOK))["output"] == "False\n"
        without = Program(tmp_path / "3", "--port", port)
        async with without:
            text = await refused(client, LOOK, sandbox=handle)
            assert "call again with sandbox 'new'" in text


@pytest.mark.slow
async def test_fifty_clients_at_once() -> None:
    async with local_server(max_sessions=50, ready_timeout=110.0) as (url, manager):
        begun = time.monotonic()

        async def talk(number: int) -> str:
            async with connect(url, ERAS[number % 2]) as client:
                result = await run(client, f"open('n', 'w').write('{number}')", timeout_ms=60_000)
                known = {"sandbox": result["sandbox"]} if "sandbox" in result else {}
                read = await run(client, "print(open('n').read())", timeout_ms=60_000, **known)
                return str(read["output"])

        outputs = await asyncio.gather(*(talk(number) for number in range(50)))
        assert outputs == [f"{number}\n" for number in range(50)]
        stats = manager.stats()
        assert (stats.created, stats.failed) == (50, 0)
        print(f"50 clients: {time.monotonic() - begun:.1f} s")
