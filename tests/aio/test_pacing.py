"""Pace: how many of many tasks go on in one pass of the event loop."""

from __future__ import annotations

import asyncio

from prodisco_sandbox._aio.pacing import Pace
from tests.support.patience import PATIENCE


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
