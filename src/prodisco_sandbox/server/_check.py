"""``--check``: asks the server with the same settings whether it is well."""

from __future__ import annotations

import socket
import ssl

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from prodisco_sandbox.proto import metadata as names

from ._options import Options
from ._token import read_token

_TIMEOUT = 3.0
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104


def check(options: Options) -> str | None:
    """The reason why the server is not healthy; None if it is.

    With TLS only the handshake is checked: there is no client certificate to show and no
    server name to verify.
    """
    if options.transport_mode != "insecure":
        return _handshake(options)
    metadata = ((names.TOKEN, read_token().decode()),) if options.require_token else ()
    target = options.socket_target
    if options.host is not None:
        host = _LOOPBACK.get(options.host, options.host)
        target = f"[{host}]:{options.port}" if ":" in host else f"{host}:{options.port}"
    with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=_TIMEOUT, metadata=metadata
            )
        except grpc.RpcError as error:
            return f"{target}: {error.code().name}: {error.details()}"
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        return f"{target}: {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}"
    return None


def _handshake(options: Options) -> str | None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        if options.host is None:
            plain = socket.socket(socket.AF_UNIX)
            plain.settimeout(_TIMEOUT)
            plain.connect(str(options.socket))
        else:
            host = _LOOPBACK.get(options.host, options.host)
            plain = socket.create_connection((host, options.port), _TIMEOUT)
        with plain, context.wrap_socket(plain):
            return None
    except OSError as error:
        return str(error)
