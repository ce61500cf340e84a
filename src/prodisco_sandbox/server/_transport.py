"""Where the server listens: a Unix socket or TCP, plain or with TLS."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import grpc

from ._options import Options, OptionsError

_LOCK_TIMEOUT = 5.0
_SUN_PATH = 107
"""Bytes that the kernel takes as a Unix socket's path."""


def credentials(options: Options) -> grpc.ServerCredentials | None:
    """The server's TLS credentials, or None for plaintext.

    Raises:
        OptionsError: A file cannot be read or has the wrong content. The server never
            falls back to plaintext.
    """
    if options.transport_mode == "insecure":
        return None
    assert options.tls_cert is not None  # noqa: S101
    assert options.tls_key is not None  # noqa: S101
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # A bad key or certificate is reported now, with a reason; gRPC would fail every handshake instead.
        context.load_cert_chain(options.tls_cert, options.tls_key)
    except (ssl.SSLError, OSError) as error:
        raise OptionsError(
            f"certificate {options.tls_cert} and key {options.tls_key} cannot be used: {error}"
        ) from error
    authorities = None
    if options.transport_mode == "mtls":
        assert options.tls_ca is not None  # noqa: S101
        try:
            context.load_verify_locations(options.tls_ca)
            authorities = options.tls_ca.read_bytes()
        except (ssl.SSLError, OSError) as error:
            raise OptionsError(f"authorities {options.tls_ca} cannot be used: {error}") from error
    return grpc.ssl_server_credentials(
        [(options.tls_key.read_bytes(), options.tls_cert.read_bytes())],
        root_certificates=authorities,
        require_client_auth=authorities is not None,
    )


def bind(server: grpc.aio.Server, options: Options) -> str:
    """Binds the server and returns its target, ``host:port`` or ``unix:PATH``.

    Raises:
        OptionsError: The address is taken or cannot be used.
    """
    secure = credentials(options)

    def add(address: str) -> int:
        try:
            if secure is None:
                return server.add_insecure_port(address)
            return server.add_secure_port(address, secure)
        except RuntimeError as error:
            raise OptionsError(f"cannot listen on {address}: {error}") from error

    if options.host is None:
        with _socket_to_itself(options.socket):
            # The mode is set before the socket listens, so that no other user can connect in between.
            umask = os.umask(0o177)
            try:
                add(options.socket_target)
            finally:
                os.umask(umask)
        return f"unix:{options.socket}"
    host = f"[{options.host}]" if ":" in options.host else options.host
    return f"{host}:{add(f'{host}:{options.port}')}"


@contextlib.contextmanager
def _socket_to_itself(path: Path) -> Iterator[None]:
    """Holds the directory's lock, so that two servers cannot both take a stale socket."""
    if len(os.fsencode(path)) > _SUN_PATH:
        raise OptionsError(f"socket {path} is too long a path: the kernel takes {_SUN_PATH} bytes")
    directory = path.parent
    mode = directory.stat().st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        raise OptionsError(f"socket directory {directory} lets anyone replace the socket: make it private")
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _lock(descriptor, directory)
        _refuse_live(path)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, directory: Path) -> None:
    deadline = time.monotonic() + _LOCK_TIMEOUT
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise OptionsError(f"socket directory {directory} is locked by another process") from None
            time.sleep(0.02)


def _refuse_live(path: Path) -> None:
    """Refuses a path that is served or is no socket; gRPC replaces a stale socket."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise OptionsError(f"socket {path} exists and is not a socket: remove it, or use another path")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return
        except OSError as error:
            raise OptionsError(f"socket {path} exists and cannot be probed: {error}") from error
    raise OptionsError(f"socket {path} is in use by a live server")
