"""What every endpoint reads of a request before its body's meaning: its id, its body, its model."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import Any

from aiohttp import web

from baton.errors import InvalidRequest, MessageTooLarge, ModelNotFound, Unavailable
from baton.ids import new_request_id
from router.http.body import parse_json
from router.http.errors import MAX_BODY_BYTES, REQUEST_ID, Handler
from router.prepare import MAX_REQUEST_ID
from router.request import Generates

REQUEST_ID_HEADER = "X-Request-Id"
_READ_SECONDS = 30.0
_REQUEST_ID = re.compile(rf"[\x21-\x7e]{{1,{MAX_REQUEST_ID - 8}}}")
"""Room is left for the number of a prompt among several."""


@web.middleware
async def identify(request: web.Request, handler: Handler) -> web.StreamResponse:
    """The client's X-Request-Id where it is a plain one, else a new id. It goes back in the response's header."""
    asked = request.headers.get(REQUEST_ID_HEADER, "")
    request[REQUEST_ID] = asked if _REQUEST_ID.fullmatch(asked) else new_request_id()
    return await handler(request)


async def return_request_id(request: web.Request, response: web.StreamResponse) -> None:
    """A signal handler, because a stream's headers are gone before its handler returns. What aiohttp refuses by itself
    never came to `identify`."""
    response.headers[REQUEST_ID_HEADER] = request.get(REQUEST_ID) or new_request_id()


async def read_json(request: web.Request) -> dict[str, Any]:
    limit = request.app[MAX_BODY_BYTES]
    if request.content_length is not None and request.content_length > limit:
        raise MessageTooLarge(f"body is {request.content_length} bytes; at most {limit} are read")
    try:
        async with asyncio.timeout(_READ_SECONDS):
            body = await request.read()
    except TimeoutError:
        raise web.HTTPRequestTimeout(reason=f"the body did not come within {_READ_SECONDS:g} s") from None
    except web.RequestPayloadError as error:
        raise InvalidRequest(f"body cannot be read: {error}") from error
    return parse_json(body)


def served_name(core: Generates, model: str) -> str:
    """The name that the answer carries. Raises ModelNotFound, or Unavailable while nothing is served yet."""
    names = [served.name for served in core.models()]
    if not names:
        raise Unavailable(f"no model can be served yet: {core.ready() or 'no worker is known'}")
    if model and model not in names:
        raise not_served(model, names)
    return model or names[0]


def not_served(model: str, names: Sequence[str]) -> ModelNotFound:
    served = ", ".join(names) or "none yet"
    return ModelNotFound(f"model {model[:200]!r} is not served here; served are: {served}", param="model")
