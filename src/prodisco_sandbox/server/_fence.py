"""Fences: a call that is meant for another machine is refused before anything runs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc

from prodisco_sandbox.proto import metadata as names

from ._undecodable import Continuation, method_of, refusal, streamed

_USES = "/prodisco.sandbox.v1."
"""How methods begin whose calls leave something behind, or look for it; all but `_HEALTH` do."""
_HEALTH = "/HealthCheck"
_EXPECTATIONS = {names.EXPECT_POD: "pod", names.EXPECT_BOOT: "boot"}


class Fence(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Says in every answer which machine this is, and refuses calls that expect another one.

    Args:
        boot_id: Drawn at each start of the server.
        pod: The pod's name; None: not known, and every expected name is accepted.
        features: Names of optional behaviour, sent with every answer.
    """

    def __init__(self, boot_id: str, pod: str | None, features: Iterable[str] = ()) -> None:
        self._own = {"pod": pod, "boot": boot_id}
        answer = {names.BOOT_ID: boot_id, names.FEATURES: ",".join(("fence", names.FIRST, *features))}
        if pod is not None:
            answer[names.POD_NAME] = pod
        self._answer = tuple(answer.items())
        self._used = False

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        unmet = self._unmet(handler_call_details.invocation_metadata or ())
        if unmet is not None:
            text = f"the call is meant for another machine: this one has {unmet} {self._own[unmet]}"
            return self._refusal(grpc.StatusCode.FAILED_PRECONDITION, text, ((names.FENCE, unmet),))
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return self._refusal(
                grpc.StatusCode.UNIMPLEMENTED, f"there is no method {handler_call_details.method}"
            )
        return self._announced(handler, self._answer_to(handler_call_details.method))

    def _answer_to(self, method: str) -> tuple[tuple[str, str], ...]:
        """The metadata of the answer to a call that is taken."""
        if self._used or not method.startswith(_USES) or method.endswith(_HEALTH):
            return self._answer
        self._used = True
        return (*self._answer, (names.FIRST_CALL, "true"))

    def _unmet(self, metadata: Iterable[tuple[str, str | bytes]]) -> str | None:
        """The first expectation of the call that this machine does not meet: pod, then boot id."""
        expected = [(_EXPECTATIONS[key], value) for key, value in metadata if key in _EXPECTATIONS]
        unmet = [kind for kind, value in expected if self._own[kind] not in (None, value)]
        return max(unmet, default=None)

    def _refusal(self, code: grpc.StatusCode, text: str, trailing: Any = ()) -> Any:
        return refusal(lambda context: _Announcer(context, self._answer).abort(code, text, trailing))

    def _announced(self, handler: Any, machine: tuple[tuple[str, str], ...]) -> Any:
        kind, run = method_of(handler)

        async def unary(request: Any, context: Any) -> Any:
            announcer = _Announcer(context, machine)
            try:
                answer = await run(request, announcer)
            except Exception:
                await announcer.announce()
                raise
            await announcer.announce()
            return answer

        async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
            announcer = _Announcer(context, machine)
            try:
                async for answer in streamed(run(request, announcer)):
                    await announcer.announce()
                    yield answer
            except Exception:
                await announcer.announce()
                raise
            await announcer.announce()

        return handler._replace(**{kind: stream if handler.response_streaming else unary})


class _Announcer:
    """A call's context that adds this machine's names to the metadata, however that is sent.

    Into the trailing metadata too: grpc.aio's clients lose the initial metadata of a stream
    that ends before they have read it.
    """

    def __init__(self, context: Any, machine: tuple[tuple[str, str], ...]) -> None:
        self._context = context
        self._machine = machine
        self._announced = False
        context.set_trailing_metadata(machine)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def announce(self) -> None:
        if not self._announced:
            await self.send_initial_metadata(())

    async def send_initial_metadata(self, metadata: Any) -> None:
        self._announced = True
        await self._context.send_initial_metadata((*self._machine, *metadata))

    async def write(self, message: Any) -> None:
        await self.announce()
        await self._context.write(message)

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> None:
        await self.announce()
        await self._context.abort(code, details, (*self._machine, *trailing_metadata))
