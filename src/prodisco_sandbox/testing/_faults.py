"""Faults on the way to the API server and back, on demand."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, Self, get_args

from ._kinds import SANDBOX
from ._libraries import api_exceptions
from ._status import api_error

Verb = Literal[
    "create",
    "get",
    "list",
    "watch",
    "delete",
    "patch",
    "patch_status",
    "replace",
    "replace_status",
    "discovery",
]
VERBS: tuple[Verb, ...] = get_args(Verb)


class Request(NamedTuple):
    """One call of the API.

    Attributes:
        verb: Such as ``create``.
        name: The object's name; None where the request has none.
        namespace: Empty for discovery.
        version: The API version of its path.
        body: What it sent, as JSON values.
        options: Its keyword arguments.
        time: When it was made, on the loop's clock.
        plural: The kind of object, as in paths; empty for discovery.
    """

    verb: Verb
    name: str | None
    namespace: str
    version: str
    body: Any
    options: Mapping[str, Any]
    time: float
    plural: str = SANDBOX.plural


Error = int | BaseException | type[BaseException]
Latency = float | Callable[[Request], float]


class Fault:
    """One fault, from `Faults.add`. As a context manager it ends with the block.

    Attributes:
        hits: How many requests it has met.
        held: How many of them it holds at present.
    """

    def __init__(
        self,
        owner: Faults,
        verb: Verb | Literal["*"],
        error: Error | None,
        latency: Latency,
        hold: bool,
        after: bool,
        lands: bool,
        name: str | None,
        when: Callable[[Request], bool] | None,
        times: int | None,
    ) -> None:
        self.hits = 0
        self.held = 0
        self.verb = verb
        self._owner = owner
        self._error = error
        self._latency = latency
        self._hold = hold
        self._after = after
        self._lands = lands
        self._name = name
        self._when = when
        self._times = times
        self._applied = 0
        self._gate = asyncio.Event()
        self._landings: list[Callable[[], object]] = []
        self._arrivals: list[asyncio.Future[None]] = []

    def release(self) -> None:
        """Lets through what it holds, and holds nothing more."""
        self._gate.set()
        while self._landings:
            self._landings.pop(0)()

    def remove(self) -> None:
        """Ends the fault; what it holds goes through. Idempotent."""
        self._owner._discard(self)
        self.release()

    async def reached(self, count: int = 1, *, timeout: float = 60.0) -> None:
        """Waits until `count` requests in all have come to where it holds, delays or fails them.

        Raises:
            TimeoutError: Not within `timeout` seconds.
        """
        async with asyncio.timeout(timeout):
            while self._applied < count:
                arrival = asyncio.get_running_loop().create_future()
                self._arrivals.append(arrival)
                await arrival

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _meets(self, request: Request) -> bool:
        return (
            self.verb in ("*", request.verb)
            and (self._times is None or self.hits < self._times)
            and (self._name is None or self._name == request.name)
            and (self._when is None or self._when(request))
        )

    async def _apply(self, request: Request, operation: Callable[[], object]) -> None:
        """Delays the request or its answer, and fails it."""
        self._applied += 1
        while self._arrivals:
            arrival = self._arrivals.pop()
            if not arrival.done():
                arrival.set_result(None)
        loop = asyncio.get_running_loop()
        seconds = self._latency(request) if callable(self._latency) else self._latency
        until = loop.time() + seconds
        try:
            if math.isfinite(seconds) and seconds > 0:
                await asyncio.sleep(seconds)
            if self._hold or not math.isfinite(seconds):
                self.held += 1
                try:
                    await self._gate.wait()
                finally:
                    self.held -= 1
        except asyncio.CancelledError:
            if self._lands:
                self._land_later(loop, until, operation)
            raise
        if self._error is not None:
            raise self._made()

    def _land_later(
        self, loop: asyncio.AbstractEventLoop, until: float, operation: Callable[[], object]
    ) -> None:
        def land() -> None:
            # The caller is gone: nobody would see a refusal.
            with contextlib.suppress(*api_exceptions()):
                operation()

        if self._hold or not math.isfinite(until):
            self._landings.append(land)
        else:
            self._owner._call_later(until - loop.time(), land)

    def _made(self) -> BaseException:
        if isinstance(self._error, int):
            return api_error(self._error)  # type: ignore[no-any-return]
        if isinstance(self._error, type):
            return self._error()
        # An exception that is raised again and again gathers tracebacks.
        return copy.copy(self._error or _disconnected())


def _disconnected() -> BaseException:
    import aiohttp

    return aiohttp.ServerDisconnectedError()


class Faults:
    """The faults of one `FakeCustomObjectsApi`: ``api.faults``.

    A request meets the faults that match it in the order in which they were added, up to
    and including the first that fails it.
    """

    def __init__(self, call_later: Callable[[float, Callable[[], None]], object]) -> None:
        self._active: list[Fault] = []
        self._call_later = call_later

    def add(
        self,
        verb: Verb | Literal["*"],
        *,
        error: Error | None = None,
        latency: Latency = 0.0,
        hold: bool = False,
        after: bool = False,
        lost: bool = False,
        lands: bool = False,
        name: str | None = None,
        when: Callable[[Request], bool] | None = None,
        times: int | None = None,
    ) -> Fault:
        """Makes requests slow, hang or fail::

            api.faults.add("create", error=503, times=2)              # the first two
            api.faults.add("get", error=api_error(429, retry_after=3))
            api.faults.add("list", error=aiohttp.ClientConnectionError)
            api.faults.add("create", lost=True, times=1)              # made, but nobody hears
            api.faults.add("delete", latency=math.inf)                # never answers
            api.faults.add("create", latency=5.0, lands=True)         # made, even if given up
            with api.faults.add("patch", hold=True) as gate:
                task = asyncio.create_task(...)
                await gate.reached()                                  # it is on its way
                ...
                gate.release()

        Args:
            verb: Which requests; ``"*"`` for all.
            error: An HTTP status, or an exception or its class, that the caller gets;
                with ``_preload_content=False`` an `ApiException` becomes the response.
            latency: Seconds of delay, on the loop's clock, or a function of the request
                that says them; `math.inf` is for ever.
            hold: Whether to hold requests until `Fault.release`.
            after: Whether this hits the answer, with the operation carried out, and not
                the request before it.
            lost: Whether the answer gets lost: as `after`, and the caller gets `error`, or
                an `aiohttp.ServerDisconnectedError` if there is none.
            lands: Whether a request that is delayed or held is still carried out if its
                caller gives up: cancelled, or out of time.
            name: Only requests for the object of that name.
            when: Only requests for which this is true.
            times: Only so many requests; None: all.

        Raises:
            ValueError: There is no such verb, or the values do not go together.
        """
        if verb != "*" and verb not in VERBS:
            raise ValueError(f"verb is {verb!r}: it must be '*' or one of {', '.join(VERBS)}")
        if times is not None and times < 1:
            raise ValueError(f"times is {times!r}: it must be None or at least 1")
        if not callable(latency) and not latency >= 0:
            raise ValueError(f"latency is {latency!r}: it must be at least 0 seconds, or a function")
        if lands and (after or lost):
            raise ValueError("lands goes with faults of the request, not with after or lost")
        if lost and error is None:
            error = _disconnected()
        fault = Fault(self, verb, error, latency, hold, after or lost, lands, name, when, times)
        self._active.append(fault)
        return fault

    def clear(self) -> None:
        """Removes all; what they hold goes through."""
        for fault in list(self._active):
            fault.remove()

    def __iter__(self) -> Iterator[Fault]:
        return iter(list(self._active))

    def _plan(self, request: Request) -> list[Fault]:
        plan: list[Fault] = []
        for fault in self._active:
            if fault._meets(request):
                fault.hits += 1
                plan.append(fault)
                if fault._error is not None:
                    break
        return plan

    def _discard(self, fault: Fault) -> None:
        if fault in self._active:
            self._active.remove(fault)
