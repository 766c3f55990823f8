"""The load generator, a process of its own: `python -m bench.load` sends requests at their times, whatever became of
the earlier ones, and says how late it was itself.

In: one JSON object on stdin. Out: a line `progress N` as each stream ends, and one JSON object at the end.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import aiohttp

from bench.stream import Outcome, Piece, Stream, read_stream

_LAG_SECONDS = 0.005
_SHOWN_BYTES = 300


@dataclass(frozen=True)
class Asked:
    """One request to come."""

    at: float
    """Seconds from the start."""
    body: dict[str, Any]


@dataclass(frozen=True)
class Load:
    url: str
    asked: list[Asked]
    timeout_seconds: float

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Load:
        values = json.loads(text)
        return cls(values["url"], [Asked(**asked) for asked in values["asked"]], values["timeout_seconds"])


async def generate(load: Load) -> Outcome:
    lags: list[float] = []
    timeout = aiohttp.ClientTimeout(total=load.timeout_seconds)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        probe = asyncio.create_task(_measure_lag(lags))
        start = time.perf_counter()
        sending = [asyncio.create_task(_send(session, load.url, asked, start)) for asked in load.asked]
        try:
            streams = await asyncio.gather(*sending)
        finally:
            probe.cancel()
    return Outcome(list(streams), lags)


async def _send(session: aiohttp.ClientSession, url: str, asked: Asked, start: float) -> Stream:
    """Times of the result are seconds from the start."""
    body = json.dumps(asked.body).encode()
    headers = {"Content-Type": "application/json"}
    await asyncio.sleep(start + asked.at - time.perf_counter())
    pieces: list[Piece] = []
    error = ""
    sent = time.perf_counter() - start
    try:
        async with session.post(url, data=body, headers=headers) as response:
            if response.status == 200:
                async for data in response.content.iter_any():
                    pieces.append((time.perf_counter() - start, data))  # noqa: PERF401 - kept where it breaks off
            else:
                error = f"status {response.status}: {(await response.text())[:_SHOWN_BYTES]}"
    except (aiohttp.ClientError, TimeoutError) as failure:
        error = f"{type(failure).__name__}: {failure}".rstrip(": ")
    ended = time.perf_counter() - start
    print("progress 1", flush=True)
    if error:
        return Stream(asked.at, sent, ended, (), asked.body["max_tokens"], error=error)
    return read_stream(pieces, scheduled=asked.at, sent=sent, ended=ended, asked=asked.body["max_tokens"])


async def _measure_lag(lags: list[float]) -> None:
    while True:
        before = time.perf_counter()
        await asyncio.sleep(_LAG_SECONDS)
        lags.append(time.perf_counter() - before - _LAG_SECONDS)


def main() -> int:
    load = Load.from_json(sys.stdin.read())
    gc.freeze()
    gc.disable()  # a collection in mid-stream would be taken for the server's stutter
    outcome = asyncio.run(generate(load))
    print(outcome.to_json(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
