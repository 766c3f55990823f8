"""What a client sees of an error: one table from Baton's errors to OpenAI's shape, one middleware that applies it."""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from baton.errors import (
    BatonError,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    MessageTooLarge,
    ModelNotFound,
    Overloaded,
    PromptTooLong,
    RequestCancelled,
    Unavailable,
)

log = logging.getLogger(__name__)

_CODES: tuple[tuple[type[BatonError], str], ...] = (
    (ModelNotFound, "model_not_found"),
    (MessageTooLarge, "message_too_large"),
    (PromptTooLong, "context_length_exceeded"),
    (Overloaded, "overloaded"),
    (DeadlineExceeded, "deadline_exceeded"),
    (RequestCancelled, "cancelled"),
    (Unavailable, "unavailable"),
    (InternalError, "internal_error"),
)
"""OpenAI's `code`, for programs; the first class that fits. An error without one is told by its type and param."""

_RETRY_SOON = (Overloaded, Unavailable)

MAX_BODY_BYTES = web.AppKey("max_body_bytes", int)
REQUEST_ID = web.RequestKey("request_id", str)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class ClientGone(ConnectionError):
    """The client has left, or takes nothing any more. There is nobody to tell; aiohttp closes the connection."""


def error_body(error: BatonError) -> dict[str, Any]:
    code = next((code for kind, code in _CODES if isinstance(error, kind)), None)
    return {"error": {"message": error.message, "type": error.kind, "param": error.param, "code": code}}


def error_response(error: BatonError, headers: dict[str, str] | None = None) -> web.Response:
    headers = dict(headers or {})
    if isinstance(error, _RETRY_SOON):
        headers["Retry-After"] = "1"
    body = json.dumps(error_body(error))  # in ASCII: a message may quote half a surrogate pair
    return web.Response(status=error.http_status, text=body, content_type="application/json", headers=headers)


def as_baton_error(error: Exception, request_id: str) -> BatonError:
    """`error` as a client may see it. What is no BatonError is a defect: logged, and told without its insides."""
    if isinstance(error, BatonError):
        return error
    log.error("request %s failed", request_id, exc_info=error)
    return InternalError(f"internal error; the router's log says more under request {request_id}")


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPRequestEntityTooLarge as error:
        limit = request.app[MAX_BODY_BYTES]
        response = error_response(
            MessageTooLarge(f"body is larger than {limit} bytes, which is the most that is read ({error.reason})")
        )
        response.force_close()  # the rest of the body is not wanted
        return response
    except web.HTTPException as error:
        return _http_exception(request, error)
    except ClientGone:
        raise
    except Exception as error:
        return error_response(as_baton_error(error, request[REQUEST_ID]))


def _http_exception(request: web.Request, error: web.HTTPException) -> web.Response:
    """aiohttp's own refusals: unknown paths, wrong methods, broken bodies."""
    headers: dict[str, str] = {}
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        message = f"{request.method} is not for {request.path}; use {allowed}"
        headers["Allow"] = allowed
    elif isinstance(error, web.HTTPNotFound):
        message = f"there is no {request.path[:200]}; see /v1/models, /v1/completions, /v1/chat/completions"
    else:
        message = error.reason
    response = error_response(InvalidRequest(message), headers)
    response.set_status(error.status)
    return response
