"""When requests come. Pure. The load is open: no arrival waits for an answer, so a slow server gets as many."""

from __future__ import annotations

import math
import random

from baton.errors import ConfigError

SATURATED = math.inf


def arrivals(rate: float, count: int, seed: int) -> list[float]:
    """Seconds from the start, the first at 0: a Poisson process of `rate` requests a second, or all at once."""
    if rate == SATURATED:
        return [0.0] * count
    gaps, at, times = random.Random(f"arrivals {seed}"), 0.0, []
    for _ in range(count):
        times.append(at)
        at += gaps.expovariate(rate)
    return times


def parse_rate(word: str) -> float:
    """Requests a second, or `inf`. Raises ConfigError."""
    try:
        rate = float(word)
    except ValueError:
        rate = math.nan
    if not rate > 0:
        raise ConfigError(f"--rate is {word!r}; it must be requests a second, above 0, or inf for all at once")
    return rate


def name(rate: float) -> str:
    return "saturated" if rate == SATURATED else f"{rate:g} req/s"
