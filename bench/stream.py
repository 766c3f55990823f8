"""Reads what came over a completion's event stream: when tokens came, how many the server says they were, and whether
the stream is whole. Pure: pieces are stamped as they come and read when all is over, so that reading delays nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

Piece = tuple[float, bytes]
"""When it came, and what."""

_DONE = "[DONE]"


@dataclass(frozen=True)
class Stream:
    """One request from the client's side; times in seconds on one clock."""

    scheduled: float
    sent: float
    ended: float
    arrivals: tuple[float, ...]
    """Of the chunks that brought tokens. A chunk may bring several."""
    asked: int
    """Tokens."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    """As the server's usage has them. Chunks are never counted in their place."""
    cached_tokens: int = 0
    """Prompt tokens that the server says it had in its prefix cache; 0 where it says nothing."""
    error: str = ""
    """Why the stream is not whole; empty where it is."""

    @property
    def whole(self) -> bool:
        return not self.error

    @property
    def lateness(self) -> float:
        """The client's own: how long after its time the request went out."""
        return self.sent - self.scheduled

    @property
    def ttft(self) -> float:
        return self.arrivals[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Between one chunk and the next: the inter-token latency that a reader sees. A chunk of several tokens makes
        one gap and is not divided among them, for its tokens did come at once, after one wait."""
        return [later - earlier for earlier, later in zip(self.arrivals, self.arrivals[1:], strict=False)]

    @property
    def tpot(self) -> float | None:
        """Seconds a token behind the first; by usage, so chunks of several tokens do not touch it."""
        if self.completion_tokens < 2:
            return None
        return (self.arrivals[-1] - self.arrivals[0]) / (self.completion_tokens - 1)

    @property
    def e2e(self) -> float:
        return self.ended - self.sent

    def as_json(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Stream:
        return cls(**(values | {"arrivals": tuple(values["arrivals"])}))


@dataclass(frozen=True)
class Outcome:
    streams: list[Stream]
    lags: list[float]
    """How much longer than asked short sleeps took: what the client's own machine adds to every stamp."""

    def to_json(self) -> str:
        return json.dumps({"streams": [stream.as_json() for stream in self.streams], "lags": self.lags})

    @classmethod
    def from_json(cls, text: str) -> Outcome:
        values = json.loads(text)
        return cls([Stream.from_json(stream) for stream in values["streams"]], values["lags"])


def read_stream(pieces: Iterable[Piece], *, scheduled: float, sent: float, ended: float, asked: int) -> Stream:
    """`ended` is when the connection said so. A stream without end, usage or a token has an error."""
    arrivals: list[float] = []
    usage: dict[str, Any] = {}
    error, done, finished = "", False, False
    for at, data in events(pieces):
        if data == _DONE:
            done = True
            continue
        try:
            event = json.loads(data)
        except ValueError:
            error = error or f"an event is not JSON: {data[:80]!r}"
            continue
        if "error" in event:
            error = error or f"the server says: {_message(event['error'])}"
        usage = event.get("usage") or usage
        for choice in event.get("choices") or ():
            if choice.get("text") or choice.get("token_ids"):
                arrivals.append(at)
            finished = finished or bool(choice.get("finish_reason"))
    count = int(usage.get("completion_tokens", 0))
    if not error:
        error = _missing(done, finished, usage, arrivals, count, asked)
    return Stream(
        scheduled=scheduled,
        sent=sent,
        ended=ended,
        arrivals=tuple(arrivals),
        asked=asked,
        prompt_tokens=int(usage.get("prompt_tokens", 0)),
        completion_tokens=count,
        cached_tokens=int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0),
        error=error,
    )


def events(pieces: Iterable[Piece]) -> Iterator[tuple[float, str]]:
    """The data of each server-sent event, at the time of the piece that completed it."""
    rest = b""
    for at, data in pieces:
        rest += data.replace(b"\r\n", b"\n")
        *whole, rest = rest.split(b"\n\n")
        for block in whole:
            lines = [line[5:].strip() for line in block.decode(errors="replace").split("\n") if line[:5] == "data:"]
            if lines:
                yield at, "\n".join(lines)


def _missing(done: bool, finished: bool, usage: dict[str, Any], arrivals: list[float], count: int, asked: int) -> str:
    if not finished:
        return "the stream broke off: no finish_reason came"
    if not done:
        return "the stream broke off: data: [DONE] did not come"
    if "completion_tokens" not in usage:
        return "the server sent no usage, which stream_options.include_usage asks for"
    if not arrivals:
        return "no chunk brought a token"
    if count != asked:
        return f"{count} tokens came; {asked} were asked for, past any end of sequence"
    return ""


def _message(error: object) -> str:
    return str(error.get("message", error) if isinstance(error, dict) else error)
