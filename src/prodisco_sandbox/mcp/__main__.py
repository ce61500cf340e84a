"""``python -m prodisco_sandbox.mcp``: an MCP server that runs code in sandboxes."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import socket
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from .._checks import env_int, env_seconds, integer, seconds, wrong
from ..config import SandboxManagerConfig
from ..errors import SandboxError
from ..local import LocalCluster
from ..manager import SandboxManager
from ._auth import add_auth_options, read_auth_options, server_auth
from ._identity import one_client, session_key
from ._local import server_settings
from ._serve import make_server, serve_http, serve_stdio

CAPACITY_TIMEOUT = 10.0
"""How long a call waits for a sandbox's place unless told otherwise, in seconds: clients wait for 60."""
WARM = 1
"""How many servers are started ahead unless told otherwise."""
HANDLE_SECRET = "SANDBOX_HANDLE_SECRET"  # noqa: S105 - the variable's name

EPILOG = f"""\
Settings come from the environment: SANDBOX_NAMESPACE, SANDBOX_IMAGE, SANDBOX_MAX_SESSIONS,
SANDBOX_TCP_PORT, SANDBOX_INSTANCE_ID, SANDBOX_SHARED with SANDBOX_CLOCK_SKEW, SANDBOX_MANAGED_BY,
SANDBOX_WARM_POOL, SANDBOX_WHEN_FULL (evict, unless it is refuse), SANDBOX_EVICT_AFTER and
SANDBOX_CAPACITY_TIMEOUT (seconds), SANDBOX_ON_IDLE and SANDBOX_SUSPENDED_FOR (for --on-idle and
--suspended-for) with SANDBOX_WORKSPACE_STORAGE and SANDBOX_WORKSPACE_STORAGE_CLASS, and
SANDBOX_TRANSPORT_MODE with the SANDBOX_TLS_* variables;
KUBECONFIG and K8S_CONTEXT outside a cluster; {HANDLE_SECRET} (at least 16 random characters) for
handles that outlive the process.

With --local, SANDBOX_MAX_SESSIONS, SANDBOX_WHEN_FULL, SANDBOX_EVICT_AFTER,
SANDBOX_CAPACITY_TIMEOUT, SANDBOX_ON_IDLE, SANDBOX_SUSPENDED_FOR, SANDBOX_WARM (for --warm)
and {HANDLE_SECRET} count, and the variables of the sandbox server, such as
SANDBOX_MEMORY_LIMIT_MB; an option beats its variable.
`python -m prodisco_sandbox.server --help` lists both. Where servers listen and keep their files
is the program's to decide: such options are refused, and such variables ignored.

Over HTTP, callers are authenticated with --auth-token-file (variable: SANDBOX_AUTH_TOKEN_FILE) or
with --oidc-issuer, --oidc-audience and --public-url (SANDBOX_OIDC_ISSUER, SANDBOX_OIDC_AUDIENCE,
SANDBOX_PUBLIC_URL), or with both. Without, it listens on loopback addresses only, unless
--unauthenticated is given.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the server; returns the exit status."""
    gc.freeze()  # What has been imported stays: collections need not look at it again.
    parser = _parser()
    args = parser.parse_args(_joined(sys.argv[1:] if argv is None else argv))
    if args.kubernetes and args.warm is not None:
        parser.error("--warm is for --local: on Kubernetes SANDBOX_WARM_POOL names a SandboxWarmPool")
    if args.kubernetes and (args.server_option or args.python):
        option = "--server-option" if args.server_option else "--python"
        parser.error(
            f"{option} is for --local: on Kubernetes the servers take their options from the variables in"
            " the sandbox pods' template, and packages from the image"
        )
    try:
        server_settings(args.server_option, {})
        read_auth_options(args, os.environ)
    except ValueError as error:
        parser.error(str(error))
    # To standard error; standard output belongs to the protocol.
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("prodisco_sandbox").setLevel(args.log_level.upper())
    # It logs session ids, which are as good as credentials.
    logging.getLogger("mcp.server.streamable_http_manager").setLevel(logging.ERROR)
    try:
        asyncio.run(_run(args))
    except KeyboardInterrupt:
        return 130
    except (SandboxError, ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prodisco-sandbox-mcp",
        description="An MCP server whose sessions each have a sandbox to run code in.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--local",
        action="store_true",
        help="sandboxes are processes on this machine: for code that you would run yourself",
    )
    where.add_argument("--kubernetes", action="store_true", help="sandboxes are pods of agent-sandbox")
    parser.add_argument(
        "--server-option",
        action="append",
        default=[],
        metavar="OPTION",
        help="local: an option of the sandbox servers, such as --server-option=--memory-limit-mb=4096;"
        " may be repeated",
    )
    parser.add_argument(
        "--python",
        metavar="PROGRAM",
        help="local: the interpreter that runs the sandbox servers, and whose packages code can import;"
        " it must have prodisco-sandbox; default: the one that runs this",
    )
    parser.add_argument(
        "--warm",
        type=_count,
        metavar="N",
        help=f"local: how many sandbox servers are started ahead, for sessions to come; default: {WARM},"
        " and 0 with --on-idle suspend, which needs that",
    )
    parser.add_argument(
        "--on-idle",
        choices=("delete", "suspend"),
        help="what becomes of a sandbox that nobody uses; suspend: its server ends, and its files are there"
        " when its session comes back; default: delete",
    )
    parser.add_argument(
        "--suspended-for",
        type=float,
        metavar="SECONDS",
        help="how long a suspended sandbox is kept; default: 86400",
    )
    parser.add_argument("--transport", choices=("stdio", "http"), default="stdio", help="default: stdio")
    parser.add_argument("--host", default="127.0.0.1", help="http: where to listen; default: %(default)s")
    parser.add_argument("--port", type=_port, default=8000, help="http: 0 picks one; default: %(default)s")
    parser.add_argument("--path", type=_path, default="/mcp", help="http: default: %(default)s")
    parser.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="HOST",
        help="http: refuse requests whose Host header is another one, such as mcp.example.com or"
        " localhost:*; may be repeated; default: local names where --host is loopback, else any",
    )
    parser.add_argument(
        "--sandbox-header",
        action="store_true",
        help="http: clients send a sandbox's handle in the header Mcp-Param-Sandbox too, for gateways that"
        " route by it; whoever has a handle may use the sandbox, so it must not be logged",
    )
    parser.add_argument(
        "--language",
        help="language of the sandboxes, for the model; default: Python, on Kubernetes TypeScript",
    )
    parser.add_argument(
        "--drain-timeout",
        type=_seconds,
        default=10.0,
        metavar="SECONDS",
        help="how long calls may go on after SIGTERM; default: %(default)g",
    )
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    add_auth_options(parser)
    return parser


async def _run(args: argparse.Namespace) -> None:
    # Bound first, so that a port in use is reported before sandboxes are started.
    with _listener(args) as listener:
        auth = {} if listener is None else server_auth(args, *listener.getsockname()[:2])
        async with contextlib.AsyncExitStack() as stack:
            if auth:
                stack.push_async_callback(auth["token_verifier"].aclose)
            manager = await stack.enter_async_context(_manager(args))
            server, tools = make_server(
                manager,
                auth=auth,
                session_key=one_client() if listener is None else session_key,
                language=args.language or ("Python" if args.local else "TypeScript"),
                sandbox_header=args.sandbox_header,
                handle_secret=os.environ.get(HANDLE_SECRET) or None,
            )
            if listener is None:
                await serve_stdio(server, tools, drain_timeout=args.drain_timeout)
            else:
                await serve_http(
                    server,
                    tools,
                    listener=listener,
                    path=args.path,
                    allowed_hosts=args.allowed_host,
                    drain_timeout=args.drain_timeout,
                    stateless=manager.config.shared,
                )


@contextlib.contextmanager
def _listener(args: argparse.Namespace) -> Iterator[socket.socket | None]:
    if args.transport == "stdio":
        yield None
        return
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    with socket.create_server((args.host, args.port), family=family, backlog=2048) as listener:
        yield listener


@contextlib.asynccontextmanager
async def _manager(args: argparse.Namespace) -> AsyncIterator[SandboxManager]:
    """The manager; the server's lifespan starts it."""
    if args.kubernetes:
        settings = _idleness(args) | _when_full()
        yield SandboxManager(SandboxManagerConfig.from_env(mode="multi", **settings))
        return
    server_args, pass_env = server_settings(args.server_option, os.environ)
    settings = _idleness(args) | _when_full()
    on_idle = settings.setdefault("on_idle", os.environ.get("SANDBOX_ON_IDLE") or "delete")
    warm = _warm(args, suspends=on_idle == "suspend")
    if os.environ.get("SANDBOX_MAX_SESSIONS"):
        settings["max_sessions"] = env_int(os.environ, "SANDBOX_MAX_SESSIONS")
    cluster = LocalCluster(server_args=server_args, pass_env=pass_env, python=args.python, warm=warm)
    config = cluster.config(**settings)  # Wrong settings are reported before anything is started.
    async with cluster:
        yield SandboxManager(config, custom_objects_api=cluster.custom_objects_api)


def _idleness(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of --on-idle and --suspended-for; SANDBOX_ON_IDLE is read elsewhere."""
    settings: dict[str, Any] = {}
    if args.on_idle is not None:
        settings["on_idle"] = args.on_idle
    if args.suspended_for is not None:
        settings["suspended_for"] = args.suspended_for
    elif text := os.environ.get("SANDBOX_SUSPENDED_FOR"):
        try:
            settings["suspended_for"] = float(text)
        except ValueError:
            raise wrong("SANDBOX_SUSPENDED_FOR", text, "a number of seconds") from None
    return settings


def _when_full() -> dict[str, Any]:
    """What a call does that finds all places taken."""
    when_full = os.environ.get("SANDBOX_WHEN_FULL") or "evict"
    if when_full not in ("refuse", "evict"):
        raise wrong("SANDBOX_WHEN_FULL", when_full, '"refuse" or "evict"')
    settings = {"when_full": when_full, "capacity_timeout": CAPACITY_TIMEOUT}
    for name, zero in (("capacity_timeout", True), ("evict_after", False)):
        if os.environ.get(variable := f"SANDBOX_{name.upper()}"):
            settings[name] = seconds(variable, env_seconds(os.environ, variable), zero=zero)
    return settings


def _warm(args: argparse.Namespace, *, suspends: bool) -> int:
    """How many servers are started ahead."""
    name, count = "--warm", args.warm
    if count is None and os.environ.get("SANDBOX_WARM"):
        name = "SANDBOX_WARM"
        count = integer(name, env_int(os.environ, name), most=None)
    if count is None:
        return 0 if suspends else WARM
    if count and suspends:
        raise wrong(name, count, "0 with --on-idle suspend: what was started ahead cannot be suspended")
    return int(count)


def _joined(argv: Sequence[str]) -> list[str]:
    """Joins ``--server-option --max-output=5`` to one argument; argparse would read two options."""
    joined: list[str] = []
    for text in argv:
        if joined and joined[-1] == "--server-option":
            joined[-1] += f"={text}"
        else:
            joined.append(text)
    return joined


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"{port} is no port: give 0 to 65535")
    return port


def _count(text: str) -> int:
    count = int(text)
    if count < 0:
        raise argparse.ArgumentTypeError(f"{count} is no number of at least 0")
    return count


def _path(text: str) -> str:
    if not text.startswith("/"):
        raise argparse.ArgumentTypeError(f"{text!r} is no path: it must begin with '/'")
    return text


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds of at least 0")
    return seconds


if __name__ == "__main__":
    sys.exit(main())
