"""Which machine the calls of a client are meant for."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from ..errors import SandboxReplacedError
from ..proto import metadata as names

Metadata = Iterable[Any]
"""Pairs. `dict` of a grpc.aio.Metadata fails with grpcio 1.74, `dict` of its iterator does not."""

_OTHERS = {"pod": "another pod", "boot": "a server that started anew"}
_CODES = "ABORTED ALREADY_EXISTS DATA_LOSS FAILED_PRECONDITION INVALID_ARGUMENT NOT_FOUND OK OUT_OF_RANGE"
_FROM_HANDLERS = frozenset(_CODES.split())
"""Statuses that only the code of a server gives. gRPC itself, or a proxy (its 401, 403 and 404 become
UNAUTHENTICATED, PERMISSION_DENIED and UNIMPLEMENTED), may give each of the others."""


@functools.lru_cache(maxsize=16)
def _features(text: str) -> frozenset[str]:
    return frozenset(text.split(","))


def features(said: Mapping[str, str]) -> frozenset[str]:
    """What a server can, by its metadata. Every answer says it: clients share one set for each text."""
    return _features(said.get(names.FEATURES, ""))


class Fence:
    """One machine, as a client's calls name it: the pod, and once known the boot id.

    gRPC reconnects inside a channel without telling. The names travel with each call, so
    that another machine at the same address refuses it before anything runs.

    Args:
        pod: The pod's name. A server that was not told its own accepts any.
        on_other: Called, synchronously, with the reason when another machine answers.
        look: Finds out whether the machine is still where it was, for a server without
            fences whose connection has broken; raises `SandboxError` if it is not.
        admit: Sees to it that the machine lives on for a call of so many seconds, and raises
            `SandboxError` if it may not; None: nothing has to be done.

    Attributes:
        pinned: Whether a machine has answered; from then on every other one is wrong.
        boot_id: Of the first answer, for good; None: none yet, or a server without fences.
        broken: How another machine was noticed; None: none was.
        first: Whether the first call that the machine has taken was one of these; None: it does not say.
    """

    def __init__(
        self,
        pod: str,
        on_other: Callable[[str], None],
        look: Callable[[], Awaitable[None]],
        admit: Callable[[float], Awaitable[None] | None] | None = None,
    ) -> None:
        self._pod = pod
        self._on_other = on_other
        self.look = look
        self.admit = admit
        self.pinned = False
        self.boot_id: str | None = None
        self.broken: str | None = None
        self.first: bool | None = None

    def expectations(self) -> tuple[tuple[str, str], ...]:
        """Metadata of a call."""
        pod = (names.EXPECT_POD, self._pod)
        return (pod,) if self.boot_id is None else (pod, (names.EXPECT_BOOT, self.boot_id))

    def judge(self, call: str, status: str, *metadata: Metadata) -> SandboxReplacedError | None:
        """The error of an answer from another machine, None for the right one's; the first pins it.

        Args:
            call: The call, as ``RPC on TARGET``.
            status: The name of the answer's status.
            metadata: The answer's, initial and trailing.
        """
        said = dict(pair for each in metadata for pair in each)
        if other := _OTHERS.get(said.get(names.FENCE, "")):
            self._give_up(other)
            return self.refusal(call, status)
        boot_id = said.get(names.BOOT_ID)
        if boot_id is None and status not in _FROM_HANDLERS:
            return None
        if not self.pinned:
            self.pinned, self.boot_id = status == "OK" or boot_id is not None, boot_id
        if not self.pinned or boot_id == self.boot_id:
            if names.FIRST in features(said):
                self.first = self.first or names.FIRST_CALL in said
            return None
        self._give_up("a server without fences")
        return SandboxReplacedError(
            f"{call}: the machine was replaced ({self.broken}): the call ran there", ran=True
        )

    def refusal(self, call: str, status: str | None = None) -> SandboxReplacedError:
        """The error of a call that another machine has refused, or that was not sent to it."""
        text = f"{call}: the machine was replaced ({self.broken}): nothing was run"
        return SandboxReplacedError(text, status=status)

    def _give_up(self, other: str) -> None:
        """Notes that another machine answers: no further call is sent."""
        if self.broken is None:
            self.broken = f"{other} answers in its place"
            self._on_other(self.broken)
