"""How much is measured: all of it, a quick look, or just enough to see that it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .clusters import Cluster


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Counts of the scenarios; the defaults are the full measure."""

    rounds: int = 15
    lookups: int = 20_000
    """Look-ups in a round."""
    ready: int = 200
    """Sandboxes that become ready one after another."""
    at_once: Sequence[int] = (50, 200, 1_000)
    at_once_rounds: int = 5
    patience: float = 30.0
    """How long contenders that are only shown beside the others may take."""
    held: int = 400
    """Sessions whose memory is taken."""
    finished: int = 10_000
    """Sessions that come and go."""
    before: int = 2_200
    """Sessions that came and went before: what is kept of the latest few is all there."""
    calls: int = 300
    chunks: int = 100_000
    stream_rounds: int = 5
    idle: int = 1_000
    """Sessions that the reaper looks at."""
    starts: int = 11
    """Processes that import the library."""
    warm: int = 40
    """Sessions on a warm pool, one after another."""
    warm_at_once: int = 20
    known: int = 5_000
    """Sessions of a group, none in use here."""
    hours: int = 12
    """Virtual ones, in which a session is used."""
    mebibytes: int = 1_024
    """Of the file that is written and read."""
    file_rounds: int = 5
    executions: int = 40
    """Calls of the reference server by each caller."""


FULL = Scale()
QUICK = Scale(
    rounds=5,
    lookups=4_000,
    ready=20,
    at_once=(50, 200),
    at_once_rounds=1,
    patience=5.0,
    held=100,
    finished=500,
    calls=100,
    chunks=5_000,
    stream_rounds=2,
    starts=3,
    warm=10,
    hours=4,
    mebibytes=128,
    file_rounds=3,
    executions=10,
)
SMOKE = Scale(
    rounds=1,
    lookups=10,
    ready=2,
    at_once=(5,),
    at_once_rounds=1,
    patience=2.0,
    held=4,
    finished=8,
    before=8,
    calls=3,
    chunks=10,
    stream_rounds=1,
    idle=5,
    starts=1,
    warm=1,
    warm_at_once=2,
    known=20,
    hours=1,
    mebibytes=2,
    file_rounds=1,
    executions=1,
)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What scenarios run in.

    Attributes:
        clusters: The APIs, the one in memory first.
        sandbox_port: Where sandboxes answer, on every address of the loopback network.
    """

    scale: Scale
    clusters: Sequence[Cluster]
    sandbox_port: int
