"""The load generator, against a server that answers as it is told."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from aiohttp import web

from bench.load import Asked, Load, generate

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
CHUNK = {"choices": [{"index": 0, "text": "a", "finish_reason": None}]}
LAST = {"choices": [{"index": 0, "text": "b", "finish_reason": "length"}]}
USAGE = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_post("/v1/completions", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)  # one handler here never ends
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1/completions"
    finally:
        await runner.cleanup()


async def stream(request: web.Request, *data: object) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    for each in data:
        await response.write(f"data: {each if isinstance(each, str) else json.dumps(each)}\n\n".encode())
    await response.write_eof()
    return response


def load(url: str, *at: float, timeout: float = 20.0) -> Load:
    return Load(url, [Asked(each, {"max_tokens": 2}) for each in at], timeout)


async def test_no_request_waits_for_an_answer() -> None:
    arrived, all_there = [], asyncio.Event()

    async def answer_when_all_are_there(request: web.Request) -> web.StreamResponse:
        arrived.append(request)
        if len(arrived) == 3:
            all_there.set()
        await all_there.wait()
        return await stream(request, CHUNK, LAST, USAGE, "[DONE]")

    async with serving(answer_when_all_are_there) as url:
        outcome = await generate(load(url, 0.0, 0.01, 0.05))
    assert [each.error for each in outcome.streams] == ["", "", ""]
    assert [each.completion_tokens for each in outcome.streams] == [2, 2, 2]
    assert all(each.sent >= each.scheduled for each in outcome.streams)
    assert all(each.ended >= each.arrivals[0] >= outcome.streams[2].sent for each in outcome.streams)
    assert outcome.lags


async def test_what_fails_is_told_and_stops_no_other() -> None:
    calls = itertools.count()

    async def refuse_the_first(request: web.Request) -> web.StreamResponse:
        if next(calls) == 0:
            return web.json_response({"error": {"message": "no room"}}, status=503)
        return await stream(request, CHUNK, LAST, USAGE, "[DONE]")

    async with serving(refuse_the_first) as url:
        outcome = await generate(load(url, 0.0, 0.1))
    refused, served = outcome.streams
    assert refused.error.startswith("status 503: ")
    assert "no room" in refused.error
    assert served.whole


async def test_a_request_that_is_never_answered_is_given_up() -> None:
    async def never(request: web.Request) -> web.StreamResponse:
        await asyncio.Event().wait()
        raise AssertionError

    async with serving(never) as url:
        (given_up,) = (await generate(load(url, 0.0, timeout=0.2))).streams
    assert "Timeout" in given_up.error


async def test_nobody_at_the_address_is_a_failure_of_the_request() -> None:
    (refused,) = (await generate(load("http://127.0.0.1:1/v1/completions", 0.0))).streams
    assert "Cannot connect" in refused.error
