"""How much many tasks may do at a time: Pace in a pass of the event loop, RequestTurns with connections."""

from __future__ import annotations

import asyncio

import pytest
from _patience import PATIENCE

from prodisco_sandbox._aio.pacing import Pace, RequestTurns


class Passes:
    """Counts the passes of the loop, and in which of them tasks were let through."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self.now = 0
        self.let_through: list[tuple[str, int]] = []

    async def count(self) -> None:
        while True:
            await asyncio.sleep(0)
            self.now += 1

    async def go(self, name: str) -> None:
        await self._pace()
        self.let_through.append((name, self.now))


async def run(pace: Pace, names: str, *, cancelled: str = "") -> list[tuple[str, int]]:
    passes = Passes(pace)
    counting = asyncio.create_task(passes.count())
    tasks = {name: asyncio.create_task(passes.go(name)) for name in names}
    await asyncio.sleep(0)
    for name in cancelled:
        tasks[name].cancel()
    async with asyncio.timeout(PATIENCE):
        await asyncio.wait(tasks.values())
    counting.cancel()
    return passes.let_through


async def test_what_fits_into_one_pass_does_not_wait() -> None:
    pace = Pace(3)
    for _ in range(3):
        assert await run(pace, "abc") == [("a", 0), ("b", 0), ("c", 0)]
        await asyncio.sleep(0)


async def test_no_more_than_that_go_on_in_one_pass_and_in_the_order_of_arrival() -> None:
    found = await run(Pace(2), "abcdefg")
    assert [name for name, _ in found] == list("abcdefg")
    per_pass = [sum(at == number for _, at in found) for number in range(found[-1][1] + 1)]
    assert max(per_pass) == 2
    # And none of them is idle for long.
    assert found[-1][1] <= 5


async def test_who_is_cancelled_takes_nobodys_turn() -> None:
    found = await run(Pace(1), "abcdef", cancelled="bcd")
    assert [name for name, _ in found] == ["a", "e", "f"]
    assert found[-1][1] <= 4


async def test_who_comes_again_comes_last() -> None:
    pace, order = Pace(1), []

    async def go(name: str) -> None:
        for _ in range(2):
            await pace()
            order.append(name)
            await asyncio.sleep(0)

    await asyncio.gather(*map(go, "abcd"))
    assert order == list("abcdabcd")


# Requests


class Begun:
    """When each of some requests began, which take `lasts` seconds."""

    def __init__(self, requests: RequestTurns, lasts: float) -> None:
        self._requests, self._lasts = requests, lasts
        self.at: list[float] = []
        self.begin = asyncio.get_running_loop().time

    async def one(self) -> None:
        async with self._requests:
            self.at.append(round(self.begin(), 6))
            await asyncio.sleep(self._lasts)

    async def all(self, count: int) -> list[float]:
        start = self.begin()
        self.at.clear()
        await asyncio.gather(*(self.one() for _ in range(count)))
        return [at - start for at in self.at]


@pytest.mark.looptime
async def test_the_first_few_requests_begin_at_once_and_then_each_new_connection_by_itself() -> None:
    begun = Begun(RequestTurns(8, pause=0.25, kept=15.0), lasts=2.0)
    assert await begun.all(10) == [0, 0, 0, 0, 0.25, 0.5, 0.75, 1.0, 2.0, 2.0], "never more than eight"
    # There are connections for all of these now.
    assert await begun.all(8) == [0] * 8
    await asyncio.sleep(14)
    assert await begun.all(8) == [0] * 8
    await asyncio.sleep(16)
    assert await begun.all(8) == [0, 0, 0, 0, 0.25, 0.5, 0.75, 1.0], "they are closed by now"


@pytest.mark.looptime
async def test_one_request_after_the_other_never_waits() -> None:
    begun = Begun(RequestTurns(8, pause=60.0, kept=15.0), lasts=0.0)
    for _ in range(20):
        assert await begun.all(1) == [0]


@pytest.mark.looptime
async def test_a_request_that_is_cancelled_before_it_began_leaves_its_turn_to_the_next() -> None:
    requests = RequestTurns(5, pause=10.0, kept=60.0)
    begun = Begun(requests, lasts=1.0)
    tasks = [asyncio.create_task(begun.one()) for _ in range(6)]
    await asyncio.sleep(0.5)
    assert begun.at == [0] * 4
    tasks[4].cancel()  # It waits for its connection,
    tasks[5].cancel()  # and this one for its turn.
    await asyncio.wait(tasks)
    assert await begun.all(5) == [0] * 5, "five turns, and as many connections as were begun"
