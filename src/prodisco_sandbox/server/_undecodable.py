"""Answers to messages that cannot be decoded."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

Context = grpc.aio.ServicerContext[Any, Any]
Continuation = Callable[[grpc.HandlerCallDetails], Awaitable["grpc.RpcMethodHandler[Any, Any]"]]
"""Gives an interceptor the handler of a call."""


async def streamed(answers: Any) -> AsyncIterator[Any]:
    """The answers of a streaming method: those that it yields, or none if it writes them itself."""
    if hasattr(answers, "__aiter__"):
        async for answer in answers:
            yield answer
    else:
        await answers


def method_of(handler: Any) -> tuple[str, Any]:
    """A handler's method, behind the name of the field that holds it."""
    request = "stream" if handler.request_streaming else "unary"
    response = "stream" if handler.response_streaming else "unary"
    kind = f"{request}_{response}"
    return kind, getattr(handler, kind)


def refusal(abort: Callable[[Any], Awaitable[None]]) -> Any:
    """A handler that only aborts the call that it gets the context of."""

    async def refuse(_: Any, context: Any) -> None:
        await abort(context)

    # Stream-stream, so that it does not wait for the client's messages.
    return grpc.stream_stream_rpc_method_handler(refuse)


class Undecodable(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Answers INTERNAL, as the protocol says, to a message that cannot be decoded.

    By default gRPC answers UNKNOWN and logs a traceback for every such message.
    """

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        # The handler's functions are coroutines; their declared types are those of the synchronous API.
        handler: Any = await continuation(handler_call_details)
        if handler is None or handler.request_streaming:
            return handler
        decode = handler.request_deserializer

        async def decoded(data: bytes, context: Context) -> Any:
            try:
                return decode(data)
            except DecodeError as error:
                await context.abort(grpc.StatusCode.INTERNAL, f"the request cannot be decoded: {error}")

        if handler.response_streaming:
            stream = handler.unary_stream

            async def answer_stream(data: bytes, context: Context) -> AsyncIterator[Any]:
                async for answer in streamed(stream(await decoded(data, context), context)):
                    yield answer

            return grpc.unary_stream_rpc_method_handler(
                answer_stream, response_serializer=handler.response_serializer
            )
        unary = handler.unary_unary

        async def answer(data: bytes, context: Context) -> Any:
            return await unary(await decoded(data, context), context)

        return grpc.unary_unary_rpc_method_handler(answer, response_serializer=handler.response_serializer)
