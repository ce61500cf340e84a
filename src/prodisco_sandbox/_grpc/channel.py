"""The gRPC channel to one sandbox: its settings, its credentials, and when it is made."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import grpc
import grpc.aio

from .._aio.single_flight import SingleFlight
from .._targets import GuardedTarget, grpc_address
from ..config import TlsConfig
from ..errors import SandboxError, SandboxTimeoutError
from ..proto import metadata as names
from .codec import MAX_MESSAGE_BYTES

_T = TypeVar("_T")

_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # A pod has just appeared, so what failed a moment ago is worth another try: gRPC
    # would wait up to 30 s between lookups and 120 s between connections. 100 ms is the
    # least that it accepts; "min_reconnect" is how long one attempt to connect may take.
    ("grpc.dns_min_time_between_resolutions_ms", 250),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 250),
    # Else a new channel inherits the backoff of an old one to the same address.
    ("grpc.use_local_subchannel_pool", 1),
    # By default servers allow one ping in five minutes, and cut connections that send more. Death
    # is noticed by health checks and, during calls, by data that the peer's kernel has not
    # acknowledged for as long as the timeout.
    ("grpc.keepalive_time_ms", 330_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # An http_proxy of the environment must not divert in-cluster targets.
    ("grpc.enable_http_proxy", 0),
)


def read_credentials(tls: TlsConfig) -> grpc.ChannelCredentials:
    """Reads the PEM files. Blocks.

    Raises:
        SandboxError: A file cannot be read or is no PEM file; the message names it.
    """
    return grpc.ssl_channel_credentials(_read_pem(tls, "ca"), _read_pem(tls, "key"), _read_pem(tls, "cert"))


def _read_pem(tls: TlsConfig, name: str) -> bytes | None:
    path = getattr(tls, name)
    if path is None:
        return None
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise SandboxError(f"TlsConfig.{name}: cannot read {path}: {error.strerror or error}") from error
    if b"-----BEGIN " not in data:
        raise SandboxError(f"TlsConfig.{name}: {path} is no PEM file: it has no BEGIN line")
    return data


async def within(timeout: float, work: Awaitable[_T], text: str) -> _T:
    """Awaits `work` for so many seconds.

    Raises:
        SandboxTimeoutError: It takes longer; `text` says what did.
    """
    try:
        async with asyncio.timeout(timeout):
            return await work
    except SandboxError:  # One of them is a TimeoutError.
        raise
    except TimeoutError:
        raise SandboxTimeoutError(f"{text} within {timeout:.3g} s", status="DEADLINE_EXCEEDED") from None


class Channel:
    """A gRPC channel that is made on first use, and belongs to that event loop and process.

    Attributes:
        grpc_channel: gRPC's own, once it is made.
        features: What the server can beyond the protocol; None: it has not answered yet.
        metadata: What every call carries for the server to answer it.
        has_own_health_only: Whether the server lacks the standard health service.
    """

    def __init__(self, target: str, tls: TlsConfig | None) -> None:
        self.target = target
        self.tls = tls
        self.closed = False
        self.grpc_channel: grpc.aio.Channel | None = None
        self.features: frozenset[str] | None = None
        self.has_own_health_only = False
        self._address = grpc_address(target)
        self.metadata = ((names.TOKEN, target.token),) if isinstance(target, GuardedTarget) else ()
        self._credentials: SingleFlight[grpc.ChannelCredentials] | None = None
        if tls is not None:
            self._credentials = SingleFlight(
                f"reading the TLS files for {target}", lambda: asyncio.to_thread(read_credentials, tls)
            )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = 0
        self._methods: dict[Callable[[Any], Any], Any] = {}

    def now(self) -> float:
        """The loop's time; 0.0 before the first use."""
        return 0.0 if self._loop is None else self._loop.time()

    def check_usable(self) -> None:
        """Checks that it is open, and used in one loop and process only.

        Raises:
            SandboxError: It is not.
        """
        if self.closed:
            raise SandboxError(f"the client of {self.target} is closed")
        self._check_place()

    def _check_place(self) -> None:
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop, self._pid = loop, os.getpid()
        elif self._pid != os.getpid():
            raise SandboxError(
                f"the client of {self.target} was first used in process {self._pid}, before a fork:"
                " make one in each process"
            )
        elif self._loop is not loop:
            raise SandboxError(
                f"the client of {self.target} was first used in another event loop: make one in each loop"
            )

    async def method(self, make: Callable[[Any], Any], timeout: float) -> Any:
        """The method that `make` makes of the channel; makes the channel on first use."""
        self.check_usable()
        method = self._methods.get(make)
        if method is None:
            if self.grpc_channel is None:
                credentials = None
                if self._credentials is not None:
                    text = f"the TLS files for {self.target} could not be read"
                    credentials = await within(timeout, self._credentials(), text)
                    self.check_usable()
                if self.grpc_channel is None:  # else another call has made it meanwhile
                    self._connect(credentials)
            method = self._methods[make] = make(self.grpc_channel)
        return method

    def _connect(self, credentials: grpc.ChannelCredentials | None) -> None:
        options: list[tuple[str, Any]] = list(_OPTIONS)
        if self._address.startswith("unix:"):
            # Else it is the path, which some servers refuse and no certificate names.
            options.append(("grpc.default_authority", "localhost"))
        if credentials is None:
            self.grpc_channel = grpc.aio.insecure_channel(self._address, options=options)
        else:
            if self.tls is not None and self.tls.server_name is not None:
                options.append(("grpc.ssl_target_name_override", self.tls.server_name))
            self.grpc_channel = grpc.aio.secure_channel(self._address, credentials, options=options)
        self.features, self.has_own_health_only = None, False

    @property
    def is_connected(self) -> bool:
        channel = self.grpc_channel
        return channel is not None and channel.get_state() is grpc.ChannelConnectivity.READY

    async def renew(self) -> None:
        """Lets the next call make a channel anew, if this one is unconnected.

        No option shortens gRPC's wait between failed lookups of a name, which grows to
        two minutes; a new channel looks it up, and connects, at once.
        """
        if self.grpc_channel is not None and not self.is_connected:
            await self._drop()

    def mark_closed(self) -> bool:
        """Refuses calls from now on; returns whether there is a channel to close here.

        Raises:
            SandboxError: It belongs to another event loop, which still runs.
        """
        # After a fork it is the parent's, and with its loop it has ended anyway.
        here = self._loop is not None and not self._loop.is_closed() and self._pid == os.getpid()
        if here:
            self._check_place()
        self.closed = True
        return here

    async def close(self) -> None:
        if self.grpc_channel is not None:
            await self._drop()
        if self._credentials is not None:
            await self._credentials.aclose()

    async def _drop(self) -> None:
        channel, self.grpc_channel, self._methods = self.grpc_channel, None, {}
        await channel.close(None)  # type: ignore[union-attr]
