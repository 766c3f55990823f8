"""From streams to figures: percentiles, throughput, goodput. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.figures import percentile
from bench.stream import Outcome, Stream

PERCENTILES = (50, 90, 99)
LATE_SECONDS = 0.05
"""A client later than this is part of what it measures."""


@dataclass(frozen=True)
class Objectives:
    """Seconds. None: that one is not asked for."""

    ttft: float | None
    itl: float | None

    def met_by(self, stream: Stream) -> bool:
        """A stream is good if it is whole, its first token came in time, and 99 % of its gaps are short enough."""
        if not stream.whole or (self.ttft is not None and stream.ttft > self.ttft):
            return False
        return self.itl is None or not stream.gaps or percentile(stream.gaps, 99) <= self.itl


@dataclass(frozen=True)
class Quantity:
    measure: str
    part: str
    """Such as p50; empty where there is but one."""
    unit: str
    value: float
    more_is_better: bool = False


def quantities(outcome: Outcome, objectives: Objectives) -> list[Quantity]:
    """Of the streams that are whole; `failed` counts the others. Of nothing, percentiles are NaN."""
    streams = [stream for stream in outcome.streams if stream.whole]
    tpots = [stream.tpot for stream in streams if stream.tpot is not None]
    found = [
        *_percentiles("TTFT", [stream.ttft for stream in streams]),
        *_percentiles("ITL", [gap for stream in streams for gap in stream.gaps]),
        *_percentiles("TPOT", tpots),
        *_percentiles("end to end", [stream.e2e for stream in streams]),
    ]
    tokens = sum(stream.completion_tokens for stream in streams)
    chunks = sum(len(stream.arrivals) for stream in streams)
    seconds = max((stream.ended for stream in outcome.streams), default=0.0)
    good = sum(map(objectives.met_by, outcome.streams))
    found += [
        Quantity("output", "", "tok/s", tokens / seconds if seconds else 0.0, True),
        Quantity("goodput", "", "req/s", good / seconds if seconds else 0.0, True),
        Quantity("good requests", "", "%", 100 * good / len(outcome.streams), True),
        Quantity("tokens a chunk", "", "tokens", tokens / chunks if chunks else 0.0),
        Quantity("cached prompt tokens", "", "%", 100 * _share_cached(streams)),
        Quantity("failed", "", "requests", len(outcome.streams) - len(streams)),
        Quantity("client", "lateness p99", "ms", 1e3 * lateness(outcome.streams)),
        Quantity("client", "lag p99", "ms", 1e3 * percentile(outcome.lags or [0.0], 99)),
    ]
    return found


def lateness(streams: Sequence[Stream]) -> float:
    """The client's own, in seconds: the 99th percentile of how late requests went out."""
    return percentile([stream.lateness for stream in streams], 99)


def _share_cached(streams: Sequence[Stream]) -> float:
    """Random prompts have nothing in common: above 0, the server has seen this load before, and TTFT is too good."""
    prompts = sum(stream.prompt_tokens for stream in streams)
    return sum(stream.cached_tokens for stream in streams) / prompts if prompts else 0.0


def _percentiles(name: str, seconds: Sequence[float]) -> list[Quantity]:
    return [Quantity(name, f"p{percent}", "ms", 1e3 * percentile(seconds, percent)) for percent in PERCENTILES]
