"""The program's options: the command line, the environment, and a file."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .._checks import env_int, env_seconds, integer, seconds, wrong
from ..config import SandboxManagerConfig
from ._auth import AUTH_OPTIONS, add_auth_options

CAPACITY_TIMEOUT = 10.0
"""How long a call waits for a sandbox's place unless told otherwise, in seconds: clients wait for 60."""
WARM = 1
"""How many servers are started ahead unless told otherwise."""
HANDLE_SECRET = "SANDBOX_HANDLE_SECRET"  # noqa: S105 - the variable's name
CONFIG = "SANDBOX_CONFIG"

EPILOG = f"""\
An option beats its variable, and that beats the file of --config: TOML whose keys are the options' names,
such as `local = true`, `max-sessions = 20` or `server-option = ["--memory-limit-mb=4096"]`.

On Kubernetes further settings come from the environment: SANDBOX_NAMESPACE, SANDBOX_IMAGE,
SANDBOX_TCP_PORT, SANDBOX_INSTANCE_ID, SANDBOX_MANAGED_BY, SANDBOX_WARM_POOL, SANDBOX_SHARED,
SANDBOX_CLOCK_SKEW, SANDBOX_WORKSPACE_STORAGE and SANDBOX_WORKSPACE_STORAGE_CLASS, and
SANDBOX_TRANSPORT_MODE with the SANDBOX_TLS_* variables; KUBECONFIG and K8S_CONTEXT outside a cluster.
With --local, the variables of the sandbox server count, such as SANDBOX_MEMORY_LIMIT_MB;
`python -m prodisco_sandbox.server --help` lists them. Where servers listen and keep their files
is the program's to decide: such options are refused, and such variables ignored.
{HANDLE_SECRET} (at least 16 random characters) is for handles that outlive the process.
"""


class Setting(NamedTuple):
    """A setting of the manager, the tool or the cluster: an option and a variable."""

    read: Callable[[str, str], Any]
    """Reads a text; a `ValueError` has the name that it is given."""
    help: str
    metavar: str | None = None
    field: str | None = None
    """Of `SandboxManagerConfig`."""
    variable: str | None = None
    type: Callable[[str], Any] | None = None


def _count(least: int) -> Callable[[str, str], int]:
    return lambda name, text: integer(name, env_int({name: text}, name), least=least, most=None)


def _seconds(*, zero: bool = False) -> Callable[[str, str], float]:
    return lambda name, text: seconds(name, env_seconds({name: text}, name), zero=zero)


def _one_of(*choices: str) -> Callable[[str, str], str]:
    def read(name: str, text: str) -> str:
        if text not in choices:
            raise wrong(name, text, " or ".join(f'"{choice}"' for choice in choices))
        return text

    return read


def _warm(text: str) -> int:
    count = int(text)
    if count < 0:
        raise argparse.ArgumentTypeError(f"{count} is no number of at least 0")
    return count


_DEFAULTS = SandboxManagerConfig
GROUPS: dict[str, dict[str, Setting]] = {
    "sandboxes": {
        "max-sessions": Setting(
            _count(1),
            f"how many sandboxes there may be; default: {_DEFAULTS.max_sessions}",
            "N",
            "max_sessions",
        ),
        "idle-timeout": Setting(
            _seconds(),
            f"what nobody has used for this long is ended; default: {_DEFAULTS.session_idle_timeout:g}",
            "SECONDS",
            "session_idle_timeout",
        ),
        "capacity-timeout": Setting(
            _seconds(zero=True),
            f"how long a call waits where all sandboxes are taken; default: {CAPACITY_TIMEOUT:g}",
            "SECONDS",
            "capacity_timeout",
        ),
        "when-full": Setting(
            _one_of("refuse", "evict"),
            "evict: an idle sandbox ends where another is needed; default: evict",
            "{refuse,evict}",
            "when_full",
        ),
        "evict-after": Setting(
            _seconds(),
            f"how long it must have been idle for that; default: {_DEFAULTS.evict_after:g}",
            "SECONDS",
            "evict_after",
        ),
        "on-idle": Setting(
            _one_of("delete", "suspend"),
            "what becomes of a sandbox that nobody uses; suspend: its server ends, and its files are there"
            " when its session comes back; default: delete",
            None,
            "on_idle",
        ),
        "suspended-for": Setting(
            _seconds(),
            f"how long a suspended sandbox is kept; default: {_DEFAULTS.suspended_for:g}",
            "SECONDS",
            "suspended_for",
            type=float,
        ),
    },
    "local sandboxes": {
        "python": Setting(
            lambda _, text: text,
            "the interpreter that runs the sandbox servers, and whose packages code can import; it must have"
            " prodisco-sandbox; default: the one that runs this",
            "PROGRAM",
        ),
        "warm": Setting(
            _count(0),
            f"how many sandbox servers are started ahead, for sessions to come; default: {WARM}, and 0 with"
            " --on-idle suspend, which needs that",
            "N",
            type=_warm,
        ),
    },
    "the tool": {
        "max-output": Setting(
            _count(1),
            "characters of an output that one result holds; default: 30000",
            "N",
            # SANDBOX_MAX_OUTPUT is the sandbox servers'.
            variable="SANDBOX_MCP_MAX_OUTPUT",
        ),
        "max-per-principal": Setting(
            _count(1),
            "how many sandboxes an authenticated caller may have; default: half of --max-sessions",
            "N",
        ),
    },
}
_SETTINGS = {name: setting for group in GROUPS.values() for name, setting in group.items()}


def make_parser() -> argparse.ArgumentParser:
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
    parser.add_argument("--config", metavar="FILE", help=f"a TOML file with options; variable: {CONFIG}")
    parser.add_argument(
        "--drain-timeout",
        type=_at_least_0,
        default=10.0,
        metavar="SECONDS",
        help="how long calls may go on after SIGTERM; default: %(default)g",
    )
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    groups = {title: parser.add_argument_group(title) for title in GROUPS}
    for title, settings in GROUPS.items():
        for name, setting in settings.items():
            groups[title].add_argument(
                f"--{name}",
                type=setting.type or str,
                choices=("delete", "suspend") if name == "on-idle" else None,
                metavar=setting.metavar,
                help=f"{setting.help}; variable: {variable(name)}",
            )
    local = groups["local sandboxes"]
    local.add_argument(
        "--server-option",
        action="append",
        default=[],
        metavar="OPTION",
        help="an option of the sandbox servers, such as --server-option=--memory-limit-mb=4096; may be"
        " repeated",
    )
    local.add_argument(
        "--isolation",
        choices=("process", "bwrap"),
        help="bwrap: executions run in namespaces of their own; default: process; variable:"
        " SANDBOX_ISOLATION",
    )
    tool = groups["the tool"]
    tool.add_argument(
        "--language",
        help="language of the sandboxes, for the model; default: Python, on Kubernetes TypeScript",
    )
    tool.add_argument(
        "--resource-links",
        action="store_true",
        help="results of runs hold links to the files that they made, for clients that show such links",
    )
    http = parser.add_argument_group("connections")
    http.add_argument("--transport", choices=("stdio", "http"), default="stdio", help="default: stdio")
    http.add_argument("--host", default="127.0.0.1", help="http: where to listen; default: %(default)s")
    http.add_argument("--port", type=_port, default=8000, help="http: 0 picks one; default: %(default)s")
    http.add_argument("--path", type=_path, default="/mcp", help="http: default: %(default)s")
    http.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="HOST",
        help="http: refuse requests whose Host header is another one, such as mcp.example.com or"
        " localhost:*; may be repeated; default: local names where --host is loopback, else any",
    )
    http.add_argument(
        "--sandbox-header",
        action="store_true",
        help="http: clients send a sandbox's handle in the header Mcp-Param-Sandbox too, for gateways that"
        " route by it; whoever has a handle may use the sandbox, so it must not be logged",
    )
    add_auth_options(parser.add_argument_group("authentication"))
    return parser


def variable(name: str) -> str:
    """The variable of an option."""
    own = _SETTINGS[name].variable if name in _SETTINGS else None
    return own or "SANDBOX_" + name.replace("-", "_").upper()


def read_settings(args: argparse.Namespace, environ: Mapping[str, str]) -> dict[str, Any]:
    """The settings that options or variables give, by the option's name; an option beats its variable.

    Raises:
        ValueError: One is wrong; the message names the option or the variable.
    """
    found: dict[str, Any] = {}
    for name, setting in _SETTINGS.items():
        if args.kubernetes and name in GROUPS["local sandboxes"]:
            continue
        value = getattr(args, name.replace("-", "_"))
        if value is not None:
            found[name] = setting.read(f"--{name}", str(value))
        elif text := environ.get(variable(name)):
            found[name] = setting.read(variable(name), text)
    suspends = found.get("on-idle") == "suspend"
    if args.local and found.setdefault("warm", 0 if suspends else WARM) and suspends:
        name = "--warm" if args.warm is not None else variable("warm")
        right = "0 with --on-idle suspend: what was started ahead cannot be suspended"
        raise wrong(name, found["warm"], right)
    return found


def manager_settings(found: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `SandboxManagerConfig`."""
    fields = {"when_full": "evict", "capacity_timeout": CAPACITY_TIMEOUT}
    return fields | {
        setting.field: found[name] for name, setting in _SETTINGS.items() if setting.field and name in found
    }


def with_file(argv: Sequence[str], environ: Mapping[str, str], parser: argparse.ArgumentParser) -> list[str]:
    """The command line, with what the file of --config says before it.

    Raises:
        ValueError: The file is wrong; the message names it.
        OSError: It cannot be read.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--config", default=environ.get(CONFIG) or None)
    path = first.parse_known_args(list(argv))[0].config
    return [*([] if path is None else _from_file(path, environ, parser)), *argv]


def _from_file(path: str, environ: Mapping[str, str], parser: argparse.ArgumentParser) -> Iterator[str]:
    import tomllib  # Few need it, and it compiles patterns when it is imported.

    try:
        values = tomllib.loads(Path(path).read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no TOML: {error}") from None
    known = {option for action in parser._actions for option in action.option_strings} - {
        "--config",
        "--help",
    }
    for key, value in values.items():
        option = "--" + key.replace("_", "-")
        if option not in known:
            raise ValueError(f"{path}: there is no option {key!r}; --help lists them")
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, str | int | float) for item in items):
            raise ValueError(
                f"{path}: {key} is {value!r}: it must be a text, a number, true or false, or a list"
            )
        if (option[2:] in _SETTINGS or option in AUTH_OPTIONS) and environ.get(variable(option[2:])):
            continue  # The variable beats the file.
        yield from (option if item is True else f"{option}={item}" for item in items if item is not False)


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"{port} is no port: give 0 to 65535")
    return port


def _path(text: str) -> str:
    if not text.startswith("/"):
        raise argparse.ArgumentTypeError(f"{text!r} is no path: it must begin with '/'")
    return text


def _at_least_0(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds of at least 0")
    return seconds
