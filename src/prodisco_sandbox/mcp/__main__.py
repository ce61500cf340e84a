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

from ..config import SandboxManagerConfig
from ..errors import SandboxError
from ..local import LocalCluster
from ..manager import SandboxManager
from ._auth import read_auth_options, server_auth
from ._connections import BACKLOG, Escaped, raise_descriptors
from ._identity import one_client, session_key
from ._local import server_settings
from ._options import HANDLE_SECRET, make_parser, manager_settings, read_settings, with_file
from ._serve import make_server, serve_http, serve_stdio


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the server; returns the exit status."""
    gc.freeze()  # What has been imported stays: collections need not look at it again.
    parser = make_parser()
    given = _joined(sys.argv[1:] if argv is None else argv)
    try:
        args = parser.parse_args(with_file(given, os.environ, parser))
    except (ValueError, OSError, argparse.ArgumentError) as error:
        parser.error(str(error))
    if args.kubernetes and args.warm is not None:
        parser.error("--warm is for --local: on Kubernetes SANDBOX_WARM_POOL names a SandboxWarmPool")
    if args.kubernetes and (args.server_option or args.python or args.isolation):
        option = "--server-option" if args.server_option else "--python" if args.python else "--isolation"
        parser.error(
            f"{option} is for --local: on Kubernetes the servers take their options from the variables in"
            " the sandbox pods' template, and packages from the image"
        )
    try:
        if args.isolation is not None:
            args.server_option.append(f"--isolation={args.isolation}")
        server_settings(args.server_option, {})
        read_auth_options(args, os.environ)
    except ValueError as error:
        parser.error(str(error))
    # To standard error; standard output belongs to the protocol.
    handler = logging.StreamHandler()
    handler.setFormatter(Escaped("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("prodisco_sandbox").setLevel(args.log_level.upper())
    for name in ("streamable_http", "streamable_http_manager"):
        # They log session ids, which are as good as credentials.
        logging.getLogger(f"mcp.server.{name}").setLevel(logging.ERROR)
    try:
        asyncio.run(_run(args))
    except KeyboardInterrupt:
        return 130
    except (SandboxError, ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


async def _run(args: argparse.Namespace) -> None:
    found = read_settings(args, os.environ)
    # Bound first, so that a port in use is reported before sandboxes are started.
    with _listener(args) as listener:
        auth = {} if listener is None else server_auth(args, *listener.getsockname()[:2])
        async with contextlib.AsyncExitStack() as stack:
            if auth:
                stack.push_async_callback(auth["token_verifier"].aclose)
            manager = await stack.enter_async_context(_manager(args, found))
            language = args.language or ("Python" if args.local else "TypeScript")
            server, tools = make_server(
                manager,
                auth=auth,
                session_key=one_client() if listener is None else session_key,
                **{
                    name.replace("-", "_"): found[name]
                    for name in ("max-output", "max-per-principal")
                    if name in found
                },
                language=language,
                learn_environment=language.lower().startswith("python"),
                sandbox_header=args.sandbox_header,
                resource_links=args.resource_links,
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
    raise_descriptors()
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    with socket.create_server((args.host, args.port), family=family, backlog=BACKLOG) as listener:
        yield listener


@contextlib.asynccontextmanager
async def _manager(args: argparse.Namespace, found: dict[str, Any]) -> AsyncIterator[SandboxManager]:
    """The manager; the server's lifespan starts it."""
    if args.kubernetes:
        yield SandboxManager(SandboxManagerConfig.from_env(mode="multi", **manager_settings(found)))
        return
    server_args, pass_env = server_settings(args.server_option, os.environ)
    if args.transport == "http":
        logging.getLogger("prodisco_sandbox.mcp").warning(
            "local sandboxes are processes of one user: code in one can read what this user can, but for the"
            " files of other sandboxes; serve only clients that may"
        )
    settings = manager_settings(found)
    cluster = LocalCluster(
        server_args=server_args, pass_env=pass_env, python=found.get("python"), warm=found["warm"]
    )
    config = cluster.config(**settings)  # Wrong settings are reported before anything is started.
    async with cluster:
        yield SandboxManager(config, custom_objects_api=cluster.custom_objects_api)


def _joined(argv: Sequence[str]) -> list[str]:
    """Joins ``--server-option --max-output=5`` to one argument; argparse would read two options."""
    joined: list[str] = []
    for text in argv:
        if joined and joined[-1] == "--server-option":
            joined[-1] += f"={text}"
        else:
            joined.append(text)
    return joined


if __name__ == "__main__":
    sys.exit(main())
