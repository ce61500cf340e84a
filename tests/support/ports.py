"""Ports for servers that are told which one to take, or that come back to it."""

from __future__ import annotations

import contextlib
import random
import socket
from pathlib import Path


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody has, and that the kernel gives to nobody who asks for any.

    One that the kernel picks, it may give to somebody else as soon as it is let go.
    """
    try:
        least = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except OSError:
        least = 32_768
    candidates = random.SystemRandom().sample(range(10_000, max(least, 12_000)), 1_000)
    found: list[int] = []
    with contextlib.ExitStack() as stack:
        for port in candidates:
            sock = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                sock.bind(("127.0.0.1", port))
                found.append(port)
            if len(found) == count:
                return found
    raise AssertionError("nearly all ports are taken")
