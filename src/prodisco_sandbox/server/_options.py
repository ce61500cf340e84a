"""The server's command line and environment."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from urllib.parse import quote

MIN_TIMEOUT_MS = 1_000
MAX_TIMEOUT_MS = 120_000
DEFAULT_TIMEOUT_MS = 30_000
"""The protocol's bounds on an execution's timeout."""

_MIB = 1 << 20


class OptionsError(ValueError):
    """A setting is wrong; the message names it, its value and what would be right."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """All settings of a server. Sizes are in bytes, durations in seconds."""

    host: str | None
    """None where the Unix socket is served."""
    port: int
    socket: Path
    transport_mode: str
    tls_cert: Path | None
    tls_key: Path | None
    tls_ca: Path | None
    workspace: Path | None
    """None: a private temporary directory."""
    cache_dir: Path
    exit_with_parent: bool
    require_token: bool
    """The first line of standard input is what every call must carry."""
    check: bool
    """Only ask a running server with these settings whether it is well."""
    isolation: str
    pod_name: str | None
    """None: the server runs in no pod, or was not given its name."""
    writable: tuple[Path, ...]
    hide: Path | None
    pass_env: tuple[str, ...]
    grace_period: float
    max_concurrent: int
    max_queued: int
    max_processes: int
    max_output: int
    cpu_limit: int
    memory_limit: int | None
    """None: what the container leaves."""
    file_size_limit: int
    workspace_limit: int
    cache_limit: int
    retain_for: float
    retain_limit: int
    spare_interpreters: int
    preload: tuple[str, ...] | None
    """None: common modules of the standard library, and large ones that are installed."""
    zygote: bool

    @property
    def socket_target(self) -> str:
        """The socket as a gRPC target; gRPC decodes percent-encoding in paths."""
        return "unix:" + quote(os.fsencode(self.socket))


class _Setting(NamedTuple):
    """One setting: ``--name-with-dashes``, and a variable of the environment."""

    name: str
    variable: str
    read: Callable[[str], Any]
    default: str | None
    help: str


def _text(text: str) -> str:
    if not text:
        raise ValueError("it must not be empty")
    return text


def _path(text: str) -> Path:
    return Path(_text(text)).absolute()


def _paths(text: str) -> tuple[Path, ...]:
    return tuple(_path(part) for part in text.split(os.pathsep) if part)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _modules(text: str) -> tuple[str, ...]:
    names = _names(text)
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")):
            raise ValueError(f"{name!r} is not the name of a module")
    return names


def _pod_name(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?", text):
        raise ValueError("it must be the name of a pod, as the downward API gives it (metadata.name)")
    return text


def _one_of(*choices: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in choices:
            raise ValueError(f"use one of {', '.join(choices)}")
        return text

    return read


def _integer(low: int, high: int, unit: int = 1) -> Callable[[str], int]:
    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise ValueError(f"it must be an integer from {low} to {high}")
        return value * unit

    return read


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= 86_400:
        raise ValueError("it must be a number of seconds from 0 to 86400")
    return value


_BIG = 1 << 20

# fmt: off
# ruff: noqa: E501
SETTINGS = (
    _Setting("host", "SANDBOX_TCP_HOST", _text, "0.0.0.0", "address to listen on; selects TCP"),  # noqa: S104
    _Setting("port", "SANDBOX_TCP_PORT", _integer(0, 65535), "50051", "port to listen on, 0 for any free one; selects TCP"),
    _Setting("socket", "SANDBOX_SOCKET_PATH", _path, "/tmp/prodisco-sandbox.sock", "Unix socket, served unless TCP is selected"),
    _Setting("transport-mode", "SANDBOX_TRANSPORT_MODE", _one_of("insecure", "tls", "mtls"), "insecure", "insecure, tls or mtls"),
    _Setting("tls-cert", "SANDBOX_TLS_CERT_PATH", _path, None, "PEM file with the server's certificate chain"),
    _Setting("tls-key", "SANDBOX_TLS_KEY_PATH", _path, None, "PEM file with its private key"),
    _Setting("tls-ca", "SANDBOX_TLS_CA_PATH", _path, None, "PEM file with the authorities of client certificates (mtls)"),
    _Setting("workspace", "SANDBOX_WORKSPACE", _path, None, "working directory of all executions; default: a private temporary one, removed at the end"),
    _Setting("cache-dir", "SCRIPTS_CACHE_DIR", _path, "/tmp/prodisco-scripts", "where scripts that succeeded are kept"),
    _Setting("isolation", "SANDBOX_ISOLATION", _one_of("process", "bwrap"), "process", "process, or bwrap: namespaces by bubblewrap"),
    _Setting("pod-name", "SANDBOX_POD_NAME", _pod_name, None, "name of the pod that this server runs in; calls meant for another one are refused"),
    _Setting("writable", "SANDBOX_WRITABLE", _paths, "", "further directories, separated by colons, that executions may write to"),
    _Setting("hide", "SANDBOX_HIDE", _path, None, "directory of which executions see only what they may write to and what Python needs; takes Landlock, or bwrap"),
    _Setting("pass-env", "SANDBOX_PASS_ENV", _names, "", "variables, separated by commas, that executions inherit; by default none"),
    _Setting("grace-period", "SANDBOX_GRACE_PERIOD", _seconds, "3", "seconds that running executions get at shutdown"),
    _Setting("max-concurrent", "SANDBOX_MAX_CONCURRENT", _integer(1, 1000), "8", "executions that run at once"),
    _Setting("max-queued", "SANDBOX_MAX_QUEUED", _integer(0, 100_000), "64", "executions that may wait for their turn"),
    _Setting("max-processes", "SANDBOX_MAX_PROCESSES", _integer(1, 32_768), "64", "processes and threads of an execution"),
    _Setting("max-output", "SANDBOX_MAX_OUTPUT", _integer(1, 4 * _MIB), "1000000", "characters kept of an execution's output, and of its error output"),
    _Setting("cpu-limit", "SANDBOX_CPU_LIMIT", _integer(1, 86_400), "120", "CPU seconds of each process"),
    _Setting("memory-limit-mb", "SANDBOX_MEMORY_LIMIT_MB", _integer(32, _BIG, _MIB), None, "MiB of memory that an execution may use; default: what the container's limit leaves, and 2048 without one"),
    _Setting("file-size-limit-mb", "SANDBOX_FILE_SIZE_LIMIT_MB", _integer(1, _BIG, _MIB), "256", "MiB of a file"),
    _Setting("workspace-limit-mb", "SANDBOX_WORKSPACE_LIMIT_MB", _integer(1, _BIG, _MIB), "1024", "MiB in the workspace"),
    _Setting("cache-limit-mb", "SANDBOX_CACHE_LIMIT_MB", _integer(0, _BIG, _MIB), "64", "MiB of cached scripts; the oldest go"),
    _Setting("retain-for", "SANDBOX_RETAIN_FOR", _seconds, "600", "seconds that a finished execution can be asked about"),
    _Setting("retain-limit-mb", "SANDBOX_RETAIN_LIMIT_MB", _integer(0, _BIG, _MIB), "64", "MiB of finished executions; the oldest go"),
    _Setting("spare-interpreters", "SANDBOX_SPARE_INTERPRETERS", _integer(0, 64), "2", "interpreters started in advance"),
    _Setting("preload", "SANDBOX_PRELOAD", _modules, None, "modules, separated by commas, that executions import in no time; default: common ones of the standard library, and numpy, pandas, matplotlib.pyplot and pytest where they are installed"),
)
# fmt: on


def parse(argv: Sequence[str] | None = None, environ: Mapping[str, str] | None = None) -> Options:
    """Reads the command line, and the environment for settings that it does not give.

    Raises:
        OptionsError: A setting is wrong, does not exist, or contradicts another.
        SystemExit: ``--help``.
    """
    env = os.environ if environ is None else environ
    given = vars(_parser().parse_args(argv))
    values: dict[str, Any] = {
        name: given.pop(name) for name in ("exit_with_parent", "require_token", "check", "zygote")
    }
    explicit = {name for name, text in given.items() if text is not None}
    for setting in SETTINGS:
        field = setting.name.replace("-", "_")
        source, text = f"--{setting.name}", given[field]
        if text is None and env.get(setting.variable):
            source, text = setting.variable, env[setting.variable]
        elif text is None:
            text = setting.default
        try:
            value = None if text is None else setting.read(text)
        except ValueError as error:
            raise OptionsError(f"{source} is {text!r}: {error}") from None
        values[field.removesuffix("_mb")] = value
    if not _wants_tcp(explicit, env):
        values["host"] = None
    _check_tls(values)
    return Options(**values)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise OptionsError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m prodisco_sandbox.server",
        description="Runs Python code sent over gRPC, each piece in a fresh process of its own.",
        allow_abbrev=False,
    )
    for setting in SETTINGS:
        default = "" if not setting.default else f"; default {setting.default}"
        text = f"{setting.help}{default} [{setting.variable}]".replace("%", "%%")
        parser.add_argument(f"--{setting.name}", metavar=setting.name.rpartition("-")[2].upper(), help=text)
    parser.add_argument(
        "--exit-with-parent",
        action="store_true",
        help="end at once, leaving nothing behind, when standard input ends: the parent is gone",
    )
    parser.add_argument(
        "--require-token",
        action="store_true",
        help="take a token from the first line of standard input, and refuse calls that do not carry it as"
        " prodisco-token in their metadata",
    )
    parser.add_argument(
        "--zygote",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="fork executions from a warm interpreter; --no-zygote starts each from scratch",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="serve nothing: check the running server that has these settings; exit with 0 or 1",
    )
    return parser


def _wants_tcp(explicit: set[str], env: Mapping[str, str]) -> bool:
    tcp = explicit & {"host", "port"}
    if tcp and "socket" in explicit:
        raise OptionsError(f"--socket and --{min(tcp)} exclude each other: give one of them")
    if tcp or "socket" in explicit:
        return bool(tcp)
    use_tcp = env.get("SANDBOX_USE_TCP", "").lower()
    if use_tcp not in ("", "true", "1", "false", "0"):
        raise OptionsError(f"SANDBOX_USE_TCP is {env['SANDBOX_USE_TCP']!r}: use true or false")
    return use_tcp in ("true", "1") or bool(env.get("SANDBOX_TCP_HOST") or env.get("SANDBOX_TCP_PORT"))


def _check_tls(values: Mapping[str, Any]) -> None:
    needed = {"insecure": (), "tls": ("cert", "key"), "mtls": ("cert", "key", "ca")}
    mode = values["transport_mode"]
    for part in needed[mode]:
        path = values[f"tls_{part}"]
        name = f"--tls-{part} (SANDBOX_TLS_{part.upper()}_PATH)"
        if path is None:
            raise OptionsError(f"{name} is not set: transport mode {mode} needs it")
        if not path.is_file():
            raise OptionsError(f"{name} is {str(path)!r}: there is no such file")
