"""gRPC targets: their syntax, and the one that the environment names."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from typing import Self
from urllib.parse import quote

from ._checks import env_flag, env_int, integer, wrong


class GuardedTarget(str):
    """A gRPC target whose server demands a token, which clients of this target send with every call."""

    __slots__ = ("token",)
    token: str

    def __new__(cls, target: str, token: str) -> Self:
        made = super().__new__(cls, target)
        made.token = token
        return made


_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,252}[A-Za-z0-9_.])?")
_MAX_SOCKET_PATH = 107  # sun_path of unix(7), without its closing NUL.


def grpc_address(target: object, name: str = "target") -> str:
    """The address in gRPC's own syntax; `name` is the argument's, for the error.

    Raises:
        ValueError: The target is none of ``host:port``, ``[IPv6]:port``, ``unix:PATH``.
    """
    if isinstance(target, str) and target.startswith("unix:"):
        path = target.removeprefix("unix:")
        if path.startswith("///"):  # The same as a URI, which gRPC users may be used to.
            path = path[2:]
        length = len(os.fsencode(path))
        if not path or path.startswith("//") or "\0" in path or length > _MAX_SOCKET_PATH:
            raise ValueError(
                f"{name} is {target!r}: after 'unix:' comes the path of a socket,"
                f" of at most {_MAX_SOCKET_PATH} bytes"
            )
        return "unix:" + quote(os.fsencode(path))
    host, _, port = target.rpartition(":") if isinstance(target, str) else ("", "", "")
    if not (_is_host(host) and re.fullmatch(r"[0-9]{1,5}", port) and 1 <= int(port) <= 65535):
        raise wrong(name, target, "'host:port', '[IPv6 address]:port' or 'unix:PATH'")
    # With the scheme, so that a host called "dns" or "unix" is not taken for one.
    return f"dns:///{target}"


def _is_host(host: str) -> bool:
    if host.startswith("[") and host.endswith("]"):
        return _is_ipv6(host[1:-1])
    return _HOST.fullmatch(host) is not None


def _is_ipv6(host: str) -> bool:
    try:
        return not ipaddress.IPv6Address(host).scope_id
    except ValueError:
        return False


def target_from_env(
    environ: Mapping[str, str],
    tcp_host: str | None = None,
    tcp_port: int | None = None,
    socket_path: str | os.PathLike[str] | None = None,
) -> str:
    """The target that the SANDBOX_* variables name; an option beats its variable.

    Raises:
        ValueError: A variable or an option is wrong; the message names it.
    """
    tcp_given = tcp_host is not None or tcp_port is not None
    if tcp_given and socket_path is not None:
        raise ValueError("socket_path is given beside tcp_host or tcp_port: give one or the other")
    if not isinstance(socket_path, str | os.PathLike | None):
        raise wrong("socket_path", socket_path, "the path of a Unix socket")
    host, port = environ.get("SANDBOX_TCP_HOST"), environ.get("SANDBOX_TCP_PORT")
    if not tcp_given and (
        socket_path is not None or not (host or port or env_flag(environ, "SANDBOX_USE_TCP"))
    ):
        default = environ.get("SANDBOX_SOCKET_PATH") or "/tmp/prodisco-sandbox.sock"
        return f"unix:{default if socket_path is None else os.fspath(socket_path)}"
    if tcp_host is not None:
        host = _host("tcp_host", tcp_host)
    else:
        host = _host("SANDBOX_TCP_HOST", host or "localhost")
    if tcp_port is not None:
        number = integer("tcp_port", tcp_port, least=1, most=65535)
    else:
        number = env_int(environ, "SANDBOX_TCP_PORT") if port else 50051
        integer("SANDBOX_TCP_PORT", number, least=1, most=65535)
    return f"{host}:{number}"


def _host(name: str, host: object) -> str:
    if isinstance(host, str) and _is_ipv6(host):
        return f"[{host}]"
    if not isinstance(host, str) or not _is_host(host):
        raise wrong(name, host, "a host name or an IP address")
    return host
