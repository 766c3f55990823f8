"""The one place of the gRPC door where errors become statuses. The table itself is the error tree of baton.errors.

A BatonError keeps its message, and its `param` goes along as trailing metadata: a status without it is none of Baton's
but gRPC's own. Anything else is a defect: it is logged in full under a reference that the client is given in place of
internals. A request that cannot be read (strings that are not UTF-8, say) is an invalid argument.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc

from baton.errors import BatonError, InvalidRequest
from baton.rpc import PARAM_METADATA, tolerant

_log = logging.getLogger(__name__)

_PREFIX = "/baton.v1."
_MAX_DETAILS = 2000
"""Characters of a status message: it travels in a header, and headers have a bound."""

Context = grpc.aio.ServicerContext[Any, Any]
Behaviour = Callable[[Any, Context], Awaitable[Any]]
Handler = Any  # grpc.RpcMethodHandler, which takes no parameters at run time


@dataclass(frozen=True, slots=True)
class _Unreadable:
    reason: str


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """For methods whose behaviour is a coroutine: streams are written by `context.write`."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(_PREFIX):
            return handler
        read = tolerant(handler.request_deserializer, lambda error: _Unreadable(str(error)))
        write = handler.response_serializer
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(_guarded(handler.unary_unary), read, write)
        assert handler.unary_stream is not None, f"{handler_call_details.method} takes a stream"
        return grpc.unary_stream_rpc_method_handler(_guarded(handler.unary_stream), read, write)


def _guarded(behaviour: Any) -> Any:
    async def guarded(request: Any, context: Context) -> Any:
        try:
            if isinstance(request, _Unreadable):
                raise InvalidRequest(
                    f"the request cannot be read ({request.reason}); it must be a message of baton.v1, "
                    "with all strings in UTF-8"
                )
            return await behaviour(request, context)
        except BatonError as error:
            status, message, param = error.grpc_status, error.message, error.param or ""
        except grpc.aio.AbortError:
            raise
        except Exception:
            reference = secrets.token_hex(6)
            _log.exception("internal error %s", reference)
            status, message = grpc.StatusCode.INTERNAL, f"internal error; the router's log has it as {reference}"
            param = ""
        return await context.abort(status, message[:_MAX_DETAILS], ((PARAM_METADATA, param),))

    return guarded
