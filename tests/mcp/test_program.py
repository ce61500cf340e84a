"""The program's options, its probes and its end, in this process."""

from __future__ import annotations

import asyncio
import os
import runpy
import signal
import socket
import subprocess
import sys
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import httpx2
import pytest
from mcp import Client
from mcp.server import MCPServer

from prodisco_sandbox import SandboxManager, SandboxManagerConfig
from prodisco_sandbox.local import PASSED, LocalCluster
from prodisco_sandbox.mcp import __main__ as program
from prodisco_sandbox.mcp import _serve
from prodisco_sandbox.mcp._auth import server_auth
from prodisco_sandbox.mcp._local import server_settings
from prodisco_sandbox.mcp._options import make_parser, read_settings, with_file
from prodisco_sandbox.mcp._serve import add_probes, serve_http
from prodisco_sandbox.results import ExecutionChunk, ExecutionOutcome, ExecutionState
from prodisco_sandbox.server._options import parse
from prodisco_sandbox.testing import NEVER
from tests.support import ROOT
from tests.support.mcp_server import INITIALIZE, call, connect, over_http, rig, served, text_of
from tests.support.patience import PATIENCE, until


def managed(arguments: list[str]) -> AbstractAsyncContextManager[SandboxManager]:
    args = make_parser().parse_args(arguments)
    return program._manager(args, read_settings(args, os.environ))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "one of the arguments --local --kubernetes is required"),
        (["--local", "--kubernetes"], "not allowed with"),
        (["--local", "--port", "70000"], "70000 is no port"),
        (["--local", "--path", "mcp"], "must begin with '/'"),
        (["--local", "--drain-timeout", "-1"], "no number of seconds"),
        (["--local", "--drain-timeout", "nan"], "no number of seconds"),
        (["--kubernetes", "--server-option=--max-output=5"], "--server-option is for --local"),
        (["--kubernetes", "--python", sys.executable], "--python is for --local"),
        (["--kubernetes", "--isolation", "bwrap"], "--isolation is for --local"),
        (["--local", "--config", "/no/such/file"], "No such file or directory: '/no/such/file'"),
        (["--local", "--config"], "--config: expected one argument"),
        (["--kubernetes", "--warm", "1"], "--warm is for --local"),
        (["--local", "--warm", "-1"], "--warm: -1 is no number of at least 0"),
        (["--local", "--warm", "many"], "--warm: invalid"),
        (["--local", "--on-idle", "sleep"], "--on-idle: invalid choice: 'sleep'"),
        (["--kubernetes", "--suspended-for", "long"], "--suspended-for: invalid float value: 'long'"),
        (
            ["--local", "--server-option=--frob=1"],
            "--server-option=--frob=1: the sandbox server has no option",
        ),
        (["--local", "--server-option=frob=1"], "has no option --frob; it has --isolation, --writable,"),
        (["--local", "--server-option=-x"], "has no option -x"),
        (["--local", "--server-option", "--frob=1"], "--server-option=--frob=1: the sandbox server has no"),
        (["--server-option", "--local"], "one of the arguments --local --kubernetes is required"),
        (["--local", "--server-option"], "--server-option: expected one argument"),
        (["--local", "--server-option="], "has no option --;"),
        (["--local", "--server-option=--memory-limit=1"], "has no option --memory-limit;"),
        (
            ["--local", "--server-option=--memory-limit-mb=lots"],
            "--server-option: --memory-limit-mb is 'lots': it must be an integer",
        ),
        (["--local", "--server-option=--max-output"], "--max-output: expected one argument"),
        *(
            (
                ["--local", f"--server-option={option}"],
                f"the program itself sets {option.partition('=')[0]}",
            )
            for option in ("--socket=/tmp/s", "--port=1", "--workspace=/tmp", "--tls-cert=/c", "--pod-name=p")
        ),
        (["--local", "--server-option=--check"], "the program itself sets --check"),
        (["--local", "--server-option=--help"], "the program itself sets --help"),
    ],
)
def test_wrong_arguments_are_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], text: str
) -> None:
    with pytest.raises(SystemExit) as end:
        program.main(arguments)
    assert end.value.code == 2
    printed = capsys.readouterr()
    assert text in printed.err
    assert printed.out == ""


@pytest.mark.parametrize(
    ("variable", "value", "arguments"),
    [
        ("SANDBOX_MAX_SESSIONS", "many", ["--kubernetes"]),
        ("SANDBOX_MAX_SESSIONS", "many", ["--local"]),
        ("SANDBOX_WARM", "many", ["--local"]),
        ("SANDBOX_WARM", "-1", ["--local"]),
        ("SANDBOX_WARM", "1", ["--local", "--on-idle", "suspend"]),
        ("SANDBOX_ON_IDLE", "sleep", ["--local"]),
        ("SANDBOX_ON_IDLE", "sleep", ["--kubernetes"]),
        ("SANDBOX_SUSPENDED_FOR", "long", ["--local"]),
        ("SANDBOX_SUSPENDED_FOR", "-1", ["--kubernetes"]),
        ("SANDBOX_WORKSPACE_STORAGE", "", ["--kubernetes", "--on-idle", "suspend"]),
        ("SANDBOX_MEMORY_LIMIT_MB", "lots", ["--local"]),
        ("SANDBOX_HANDLE_SECRET", "short", ["--local"]),
        ("SANDBOX_IDLE_TIMEOUT", "0", ["--local"]),
        ("SANDBOX_MAX_PER_PRINCIPAL", "0", ["--kubernetes"]),
        ("SANDBOX_MCP_MAX_OUTPUT", "much", ["--local"]),
        ("SANDBOX_PYTHON", "no-such-python", ["--local"]),
        ("SANDBOX_ISOLATION", "wall", ["--local"]),
    ],
)
def test_a_wrong_variable_is_named_without_a_traceback(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    value: str,
    arguments: list[str],
) -> None:
    monkeypatch.setenv(variable, value)
    assert program.main(arguments) == 1
    error = capsys.readouterr().err
    assert variable.lower().removeprefix("sandbox_") in error.lower()
    assert "Traceback" not in error


def test_a_port_that_is_taken_is_known_before_anything_is_started(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert program.main(["--local", "--transport", "http", "--port", str(port)]) == 1
    assert "in use" in capsys.readouterr().err


async def test_on_kubernetes_the_environment_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "NAMESPACE": "lab",
        "IMAGE": "me/mine:1",
        "MAX_SESSIONS": "7",
        "MODE": "single",
    }.items():
        monkeypatch.setenv(f"SANDBOX_{name}", value)
    async with managed(["--kubernetes"]) as manager:
        config = manager.config
        assert (config.mode, config.namespace, config.sandbox_image, config.max_sessions) == (
            "multi",
            "lab",
            "me/mine:1",
            7,
        )


async def test_locally_it_reads_how_many_there_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SANDBOX_MAX_SESSIONS", "7")
    async with managed(["--local"]) as manager:
        assert (manager.config.mode, manager.config.max_sessions) == ("multi", 7)


@pytest.mark.parametrize("where", ["--local", "--kubernetes"])
async def test_idle_sandboxes_make_room_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    async def settings(**environment: str) -> tuple[str, float, float]:
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(f"SANDBOX_{name}", value)
            async with managed([where]) as manager:
                config = manager.config
                return config.when_full, config.evict_after, config.capacity_timeout

    assert await settings() == ("evict", 30.0, 10.0)
    assert await settings(WHEN_FULL="refuse", EVICT_AFTER="5", CAPACITY_TIMEOUT="0") == ("refuse", 5.0, 0.0)
    for name, value, right in [
        ("WHEN_FULL", "wait", '"refuse" or "evict"'),
        ("EVICT_AFTER", "0", "a finite number of seconds above 0"),
        ("CAPACITY_TIMEOUT", "soon", "a number of seconds"),
    ]:
        with pytest.raises(ValueError, match=f"^SANDBOX_{name} is .*{value}.*: it must be {right}$"):
            await settings(**{name: value})


@pytest.mark.parametrize(
    ("arguments", "variable", "pool"),
    [
        ([], "", "local"),
        ([], "2", "local"),
        ([], "0", None),
        (["--warm", "0"], "2", None),
        (["--warm", "1"], "0", "local"),
    ],
)
async def test_servers_are_started_ahead(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], variable: str, pool: str | None
) -> None:
    monkeypatch.setenv("SANDBOX_WARM", variable)
    async with managed(["--local", *arguments]) as manager:
        assert manager.config.warm_pool == pool


@pytest.mark.parametrize("where", ["--local", "--kubernetes"])
async def test_sandboxes_are_suspended(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    async def settings(*arguments: str, **environment: str) -> tuple[str, float, str | None, str | None]:
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(f"SANDBOX_{name}", value)
            async with managed([where, *arguments]) as manager:
                config = manager.config
                return config.on_idle, config.suspended_for, config.workspace_storage, config.warm_pool

    warm = "local" if where == "--local" else None
    storage = {} if where == "--local" else {"WORKSPACE_STORAGE": "1Gi"}
    assert await settings() == ("delete", 86_400.0, None, warm)
    by_option = await settings("--on-idle", "suspend", "--suspended-for", "3600", **storage)
    assert by_option == ("suspend", 3600.0, "1Gi", None)
    by_variable = await settings(ON_IDLE="suspend", SUSPENDED_FOR="60.5", **storage)
    assert by_variable == ("suspend", 60.5, "1Gi", None)
    beaten = await settings(
        *("--on-idle", "delete", "--suspended-for", "5"), ON_IDLE="suspend", SUSPENDED_FOR="long"
    )
    assert beaten == ("delete", 5.0, None, warm)


async def test_an_option_beats_its_variable_and_that_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "mcp.toml"
    file.write_text(
        "local = true\nkubernetes = false\nmax_sessions = 5\nidle-timeout = 1.5\ncapacity-timeout = 2\n"
        'server-option = ["--max-output=5", "--isolation=process"]\nlog-level = "error"\nwarm = 0\n'
    )
    monkeypatch.setenv("SANDBOX_CONFIG", str(file))
    monkeypatch.setenv("SANDBOX_MAX_SESSIONS", "6")
    monkeypatch.setenv("SANDBOX_CAPACITY_TIMEOUT", "3")
    given = with_file(["--capacity-timeout=4"], os.environ, make_parser())
    assert with_file([f"--config={file}", "--capacity-timeout=4"], {}, make_parser())[-1] == given[-1]
    args = make_parser().parse_args(given)
    assert (args.server_option, args.log_level) == (["--max-output=5", "--isolation=process"], "error")
    async with managed(given) as manager:
        config = manager.config
        assert (config.max_sessions, config.session_idle_timeout, config.capacity_timeout) == (6, 1.5, 4)
        assert config.warm_pool is None


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("local = yes", "is no TOML: "),
        ("frob = 1", ": there is no option 'frob'; --help lists them"),
        ("config = 'other'", ": there is no option 'config'"),
        ("[local]\na = 1", ": local is {'a': 1}: it must be a text, a number"),
        ("max-sessions = true", "--max-sessions: expected one argument"),
        ("kubernetes = true", "not allowed with"),
    ],
)
def test_a_wrong_file_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, right: str
) -> None:
    file = tmp_path / "mcp.toml"
    file.write_text(text)
    with pytest.raises(SystemExit) as end:
        program.main(["--local", "--config", str(file)])
    assert end.value.code == 2
    assert right in capsys.readouterr().err


@pytest.mark.parametrize("transport", ["stdio", "http"])
async def test_what_local_sandboxes_can_do_to_one_another_is_said_where_clients_are_many(
    caplog: pytest.LogCaptureFixture, transport: str
) -> None:
    async with managed(["--local", "--warm", "0", "--transport", transport]):
        pass
    assert ("code in one can read what this user can" in caplog.text) == (transport == "http")


def test_what_is_started_ahead_is_not_suspended(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--local", "--warm", "2", "--on-idle", "suspend"]) == 1
    assert "--warm is 2: it must be 0 with --on-idle suspend" in capsys.readouterr().err


def test_options_of_the_servers_beat_their_variables_and_reach_them_whole(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [
        "--max-output=5",
        "cpu-limit=7",
        "--isolation",
        "process",
        "--pass-env",
        "HOUSE",
        "--writable=a:/b",
    ]
    environ = {
        "SANDBOX_MAX_OUTPUT": "6",
        "SANDBOX_MAX_QUEUED": "3",
        "SANDBOX_WRITABLE": "c",
        "SANDBOX_TCP_PORT": "no number",
        "SANDBOX_TRANSPORT_MODE": "mtls",
        "SANDBOX_POD_NAME": "A POD",
        "SANDBOX_CPU_LIMIT": "",
    }
    arguments, inherited = server_settings(given, environ)
    assert {*PASSED, "SANDBOX_MAX_OUTPUT", "SANDBOX_MAX_QUEUED", "HOUSE"} <= set(inherited)
    assert not set(inherited) & {"SANDBOX_TCP_PORT", "SANDBOX_TRANSPORT_MODE", "SANDBOX_POD_NAME"}
    monkeypatch.chdir("/")  # Servers have working directories of their own.
    read = parse(arguments, {name: environ[name] for name in inherited if name in environ})
    assert (read.max_output, read.cpu_limit, read.max_queued) == (5, 7, 3)
    assert read.writable == (tmp_path / "a", Path("/b"))
    assert read.pass_env == ("HOUSE",)
    LocalCluster(server_args=arguments, pass_env=inherited)  # It does not refuse them.


def test_without_options_and_variables_servers_are_as_they_come() -> None:
    assert server_settings([], {}) == ([], list(PASSED))


@pytest.mark.parametrize(("host", "warns"), [("127.0.0.1", False), ("0.0.0.0", True)])
def test_it_listens_on_loopback_and_warns_of_anything_else(
    caplog: pytest.LogCaptureFixture, host: str, warns: bool
) -> None:
    parser = make_parser()
    assert parser.get_default("host") == "127.0.0.1"
    arguments = ["--local", "--transport", "http", "--port", "0", "--host", host, "--unauthenticated"]
    args = parser.parse_args(arguments)
    with program._listener(args) as listener:
        assert listener is not None
        assert listener.getsockname()[0] == host
        assert server_auth(args, *listener.getsockname()) == {}
    assert ("callers are not authenticated" in caplog.text) == warns


async def test_after_sigterm_it_is_not_ready_and_ends_when_the_calls_have_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_serve, "SETTLE_TIME", 60.0)
    done = ExecutionChunk("e1", "result", result=ExecutionOutcome(True, ExecutionState.COMPLETED))
    async with rig() as r:
        go_on = asyncio.Event()
        r.sandbox.script("ExecuteStream", [ExecutionChunk("e1", "output", "begun"), go_on, done])
        listener = socket.create_server(("127.0.0.1", 0))
        base = f"http://127.0.0.1:{listener.getsockname()[1]}"
        serving = asyncio.create_task(
            serve_http(
                r.server,
                r.tools,
                listener=listener,
                path="/mcp",
                allowed_hosts=["127.0.0.1:*"],
                drain_timeout=PATIENCE,
            )
        )
        async with (
            connect(f"{base}/mcp", "legacy") as client,
            httpx2.AsyncClient(timeout=PATIENCE, verify=False) as http,
        ):
            for probe in ("healthz", "readyz"):
                assert (await http.get(f"{base}/{probe}")).text == "ok\n"
            assert "\nprodisco_sandbox_slots " in (await http.get(f"{base}/metrics")).text
            refused = await http.post(f"{base}/mcp", headers={"Host": "evil.example", **JSON}, json={})
            assert refused.status_code == 421
            last = asyncio.create_task(call(client, ""))
            await r.sandbox.wait_for_call("ExecuteStream")
            assert callable(signal.getsignal(signal.SIGTERM)), "else it would end these tests"
            signal.raise_signal(signal.SIGTERM)
            await until(lambda: r.tools.draining)
            assert (await http.get(f"{base}/readyz")).status_code == 503
            assert (await http.get(f"{base}/healthz")).status_code == 200
            assert "shutting down" in text_of(await call(client, ""))
            go_on.set()
            assert (await last).structured_content == {
                "success": True,
                "state": "COMPLETED",
                "execution_id": "e1",
                "output": "begun",
                "execution_time_ms": 0,
            }
            # Only now has everything ended that a client may do with a result.
            assert (await client.list_tools(cache_mode="refresh")).tools
            signal.raise_signal(signal.SIGTERM)
        await served(serving)
        assert r.api.objects == []


async def test_a_call_that_outlasts_the_drain_does_not_cost_others_their_last_result(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_serve, "SETTLE_TIME", 60.0)
    done = ExecutionChunk("e1", "result", result=ExecutionOutcome(True, ExecutionState.COMPLETED))
    async with rig() as r:
        go_on = asyncio.Event()
        r.sandbox.script("ExecuteStream", [NEVER], [go_on, done])
        listener = socket.create_server(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/mcp"
        serving = asyncio.create_task(
            serve_http(r.server, r.tools, listener=listener, path="/mcp", allowed_hosts=[], drain_timeout=0.5)
        )
        async with connect(url, "2026-07-28") as one, connect(url, "2026-07-28") as other:
            endless = asyncio.create_task(call(one, ""))
            await r.sandbox.wait_for_call("ExecuteStream")
            last = asyncio.create_task(call(other, ""))
            await r.sandbox.wait_for_call("ExecuteStream", count=2)
            signal.raise_signal(signal.SIGTERM)
            await until(lambda: r.tools.draining)
            go_on.set()
            assert not (await last).is_error
            await until(lambda: "drain_incomplete" in caplog.text)
            await asyncio.sleep(0.3)  # uvicorn looks every 0.1 s whether it is to end.
            assert (await other.list_tools(cache_mode="refresh")).tools
            signal.raise_signal(signal.SIGTERM)
            await asyncio.wait({endless})
            assert endless.exception() is not None, "it was cut"
        await served(serving)
        assert r.api.objects == []


@pytest.mark.parametrize(
    ("address", "host", "status"),
    [
        ("127.0.0.1", "evil.example", 421),
        ("127.0.0.2", "evil.example:80", 421),
        ("127.0.0.2", "127.0.0.2", 200),
        ("127.0.0.2", "localhost:80", 200),
        ("127.0.0.1", "localhost", 200),
        ("0.0.0.0", "mcp.example", 200),
    ],
)
async def test_on_any_loopback_address_it_answers_to_local_names_only(
    address: str, host: str, status: int
) -> None:
    async with rig() as r:
        listener = socket.create_server((address, 0))
        to, port = address.replace("0.0.0.0", "127.0.0.1"), listener.getsockname()[1]
        serving = asyncio.create_task(
            serve_http(r.server, r.tools, listener=listener, path="/mcp", allowed_hosts=[], drain_timeout=0)
        )
        async with httpx2.AsyncClient(verify=False) as http:
            body = {"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": INITIALIZE}
            answer = await http.post(f"http://{to}:{port}/mcp", headers={"Host": host, **JSON}, json=body)
        assert answer.status_code == status
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
        await served(serving)


JSON = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}


async def test_probes_need_no_authentication() -> None:
    async with rig(auth=True) as r:
        add_probes(r.server, r.tools)
        async with over_http(r.server) as url, httpx2.AsyncClient(timeout=PATIENCE, verify=False) as http:
            assert (await http.post(url, headers=JSON, json={})).status_code == 401
            assert (await http.get(url.replace("/mcp", "/readyz"))).status_code == 200


async def test_the_example_is_a_server_with_the_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SANDBOX_MAX_SESSIONS", "3")
    example = runpy.run_path(str(ROOT / "examples/mcp_server.py"))
    async with Client(example["server"]) as client:
        names = [tool.name for tool in (await client.list_tools()).tools]
        assert names == ["run_sandbox", "read_file", "write_file", "list_files", "sandboxes"]
        result = await client.call_tool("sandboxes", {})
        assert result.structured_content == {"result": "0 are ready, 0 are being made"}


# Without the SDK


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)


def test_without_the_sdk_the_error_names_the_extra() -> None:
    result = python("import sys; sys.modules['mcp'] = None; import prodisco_sandbox.mcp")
    assert result.stderr.splitlines()[-1] == (
        "ImportError: prodisco_sandbox.mcp needs the official MCP SDK, version 2.3 or newer:"
        " pip install 'prodisco-sandbox[mcp]'"
    )


def test_an_old_sdk_is_as_none() -> None:
    old = "sys.modules['mcp'] = sys.modules['mcp.server'] = types.ModuleType('mcp')"
    code = f"import sys, types; {old}; import prodisco_sandbox.mcp"
    assert "version 2.3 or newer" in python(code).stderr


def test_what_the_sdk_lacks_is_not_blamed_on_it() -> None:
    result = python("import sys; sys.modules['anyio'] = None; import prodisco_sandbox.mcp")
    assert result.stderr.splitlines()[-1].startswith("ModuleNotFoundError: import of anyio")


def test_the_library_does_not_load_the_sdk() -> None:
    code = "import sys, prodisco_sandbox; prodisco_sandbox.SandboxManager; print('mcp' in sys.modules)"
    assert python(code).stdout == "False\n"


def test_what_is_public() -> None:
    import prodisco_sandbox.mcp as package

    assert set(package.__all__) <= set(dir(package))
    manager = SandboxManager(SandboxManagerConfig(mode="single"))
    tools = package.add_sandbox_tools(MCPServer("test"), manager)
    assert isinstance(tools, package.SandboxTools)
    assert not tools.draining
