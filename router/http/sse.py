"""A response as server-sent events. Owns its writing: one event a chunk, and an end that says whether it is whole.

A stream that is complete ends with `data: [DONE]`. One that fails ends with `data: {"error": …}` and without [DONE]:
the openai client raises APIError on it, and another client sees that the end is missing.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Mapping
from typing import Any

from aiohttp import web

from baton.errors import BatonError
from router.http.errors import ClientGone, error_body

_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # proxies such as nginx would collect the events
}


class EventStream:
    """Writing waits while the client reads slowly, and raises ClientGone once it reads nothing at all."""

    def __init__(self, request: web.Request, write_timeout_seconds: float) -> None:
        self._request = request
        self._response = web.StreamResponse(headers=_HEADERS)
        self._timeout = write_timeout_seconds

    async def send(self, *events: Mapping[str, Any]) -> None:
        """The first one sends the headers: until then the answer may still be an error of its own status."""
        if not events:
            return
        if not self._response.prepared:
            await self._response.prepare(self._request)
        await self._write("".join([_event(event) for event in events]))

    async def done(self) -> web.StreamResponse:
        await self._write("data: [DONE]\n\n")
        return await self._end()

    async def fail(self, error: BatonError) -> web.StreamResponse:
        await self._write(_event(error_body(error), ensure_ascii=True))
        return await self._end()

    @property
    def begun(self) -> bool:
        return self._response.prepared

    async def _write(self, text: str) -> None:
        await self._taken(self._response.write(text.encode()))

    async def _end(self) -> web.StreamResponse:
        await self._taken(self._response.write_eof())
        return self._response

    async def _taken(self, writing: Awaitable[None]) -> None:
        try:
            async with asyncio.timeout(self._timeout):
                await writing
        except TimeoutError:
            if self._request.transport is not None:
                self._request.transport.abort()
            raise ClientGone(f"the client took nothing for {self._timeout:g} s") from None
        except ConnectionError as error:
            raise ClientGone(str(error)) from None


def _event(value: Mapping[str, Any], *, ensure_ascii: bool = False) -> str:
    return f"data: {json.dumps(value, ensure_ascii=ensure_ascii, separators=(',', ':'))}\n\n"
