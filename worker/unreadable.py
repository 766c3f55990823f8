"""What cannot be read as a message is taken for an empty one, which every method refuses by its own rules.

gRPC itself would end the call with UNKNOWN and log a traceback a message, counted nowhere: whoever can reach the port
could fill the log.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from baton.rpc import tolerant

_PREFIX = "/baton.v1."

Handler = Any  # grpc.RpcMethodHandler, which takes no parameters at run time


class UnreadableAsEmpty(grpc.aio.ServerInterceptor):
    """For the two kinds of methods that workers have: one message each way, or a stream each way."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(_PREFIX):
            return handler
        read = tolerant(handler.request_deserializer, lambda error: handler.request_deserializer(b""))
        write = handler.response_serializer
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(handler.unary_unary, read, write)
        assert handler.stream_stream is not None, f"{handler_call_details.method} has a stream one way only"
        return grpc.stream_stream_rpc_method_handler(handler.stream_stream, read, write)
