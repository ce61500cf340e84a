"""Which machine the calls of a client are meant for."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from ..proto import metadata as names

Metadata = Iterable[Any]
"""Pairs. `dict` of a grpc.aio.Metadata fails with grpcio 1.74, `dict` of its iterator does not."""


class Fence:
    """One machine, as a client's calls name it: the pod, and once known the boot id.

    gRPC reconnects inside a channel without telling. The names travel with each call, so
    that another machine at the same address refuses it before anything runs.

    Args:
        pod: The pod's name. A server that was not told its own accepts any.
        on_other: Called, synchronously, with the reason when another machine answers.
        look: Finds out whether the machine is still where it was, for a server without
            fences whose connection has broken; raises `SandboxError` if it is not.

    Attributes:
        pinned: Whether a machine has answered; from then on every other one is wrong.
        boot_id: Of the first answer, for good; None: none yet, or a server without fences.
        broken: How another machine was noticed; None: none was.
    """

    def __init__(
        self, pod: str, on_other: Callable[[str], None], look: Callable[[], Awaitable[None]]
    ) -> None:
        self._pod = pod
        self._on_other = on_other
        self.look = look
        self.pinned = False
        self.boot_id: str | None = None
        self.broken: str | None = None

    def expectations(self) -> tuple[tuple[str, str], ...]:
        """Metadata of a call."""
        pod = (names.EXPECT_POD, self._pod)
        return (pod,) if self.boot_id is None else (pod, (names.EXPECT_BOOT, self.boot_id))

    def refusal(self, trailing: Metadata) -> str | None:
        """How the machine that refused a call differs; None: it is another failure."""
        refusals = {"pod": "another pod", "boot": "a server that started anew"}
        return refusals.get(dict(iter(trailing)).get(names.FENCE, ""))

    def is_met(self, metadata: Metadata, *, ok: bool) -> bool:
        """Whether an answer comes from the machine that is meant; the first one pins it.

        Args:
            metadata: The answer's.
            ok: Whether the call succeeded: otherwise something on the way may have answered.
        """
        boot_id = dict(iter(metadata)).get(names.BOOT_ID)
        if not self.pinned:
            self.pinned = ok or boot_id is not None
            self.boot_id = boot_id
            return True
        return boot_id == self.boot_id

    def give_up(self, reason: str) -> None:
        """Another machine answers: no further call is sent."""
        if self.broken is None:
            self.broken = reason
            self._on_other(reason)
