"""What `baton bench engine` measures of every side, and the turns in which it does: so that what else the machine does
falls on all, each round measures every side, and each round another one first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from bench.figures import Figure, number
from bench.progress import Progress
from bench.roofline import Peaks, Work, closed_batch_seconds, decode_seconds, prefill_seconds
from bench.workloads import Job, fixed, totals, w1, w3

_DECODE_PROMPT = 128
_FEW, _MANY = 16, 80
_SALTS = 4
"""Token ids that one measurement may need in a round, each of its own, so that no prefix cache knows them."""
SHARED_PREFIX = "W3, shared prefix"


class Side(Protocol):
    """Our engine, or a peer."""

    @property
    def name(self) -> str: ...

    @property
    def limit(self) -> int | None:
        """Requests of W1 that it is given; None: all."""

    def run(self, jobs: Sequence[Job]) -> float:
        """Seconds until the last token of all `jobs`."""


@dataclass(frozen=True)
class Measurement:
    measure: str
    case: str
    unit: str
    take: Callable[[Side, int], float]
    """Of a side, with a salt."""
    longest: int
    """Tokens of its longest request."""
    more_is_better: bool = False
    bound: float | None = None
    only: str = ""
    """The one side that it is about; empty: all."""


@dataclass(frozen=True)
class Model:
    """What bounds and prompts depend on."""

    vocab_size: int
    peaks: Peaks
    work: Work

    def w1(self) -> list[Measurement]:
        """Output tokens a second."""
        jobs = w1(self.vocab_size)
        bound = totals(jobs)[1] / closed_batch_seconds(self.peaks, self.work, jobs)

        def take(side: Side, salt: int) -> float:
            jobs = w1(self.vocab_size, salt)[: side.limit]
            return totals(jobs)[1] / side.run(jobs)

        longest = max(len(job.prompt) + job.max_tokens for job in jobs)
        return [Measurement("W1, 32 mixed requests at once", "output", "tok/s", take, longest, True, bound)]

    def decode(self, batches: Sequence[int]) -> list[Measurement]:
        """Milliseconds a step: what 64 tokens more take, so that prefill is not in it. The same for every side."""
        return [self._decode(batch) for batch in batches]

    def _decode(self, batch: int) -> Measurement:
        context = _DECODE_PROMPT + (_FEW + _MANY) // 2

        def take(side: Side, salt: int) -> float:
            seconds = [
                side.run(fixed(self.vocab_size, salt + more, num_requests=batch, prompt=_DECODE_PROMPT, max_tokens=out))
                for more, out in enumerate((_FEW, _MANY))
            ]
            return 1e3 * (seconds[1] - seconds[0]) / (_MANY - _FEW)

        bound = 1e3 * decode_seconds(self.peaks, self.work, [context] * batch)
        return Measurement("decode step", f"batch {batch}", "ms", take, _DECODE_PROMPT + _MANY, bound=bound)

    def prefill(self, lengths: Sequence[int]) -> list[Measurement]:
        """Prompt tokens a second, one prompt at a time."""
        return [self._prefill(length) for length in lengths]

    def _prefill(self, length: int) -> Measurement:
        def take(side: Side, salt: int) -> float:
            return length / side.run(fixed(self.vocab_size, salt + 2, num_requests=1, prompt=length, max_tokens=1))

        bound = length / prefill_seconds(self.peaks, self.work, length)
        return Measurement("prefill", f"{length} tokens", "tok/s", take, length + 1, True, bound)

    def w3(self, own: str, without_cache: Callable[[], Side]) -> list[Measurement]:
        """Seconds with the prefix cache, of every side as it is set up, and without, of our own."""
        longest = max(len(job.prompt) + job.max_tokens for job in w3(self.vocab_size))

        def take(side: Side, salt: int) -> float:
            return side.run(w3(self.vocab_size, salt))

        def take_without(_: Side, salt: int) -> float:
            return without_cache().run(w3(self.vocab_size, salt))

        return [
            Measurement(SHARED_PREFIX, "with cache", "s", take, longest),
            Measurement(SHARED_PREFIX, "without", "s", take_without, longest, only=own),
        ]


def alternating(
    measurements: Sequence[Measurement],
    sides: Sequence[Side],
    rounds: int,
    progress: Progress,
    settle: Callable[[], None],
) -> list[Figure]:
    """A round that does not count, for what is set up on first use, and then `rounds` that do. `settle` comes before
    each turn."""
    runs: dict[tuple[int, str], list[float]] = {}
    for turn in range(rounds + 1):
        for index, measurement in enumerate(measurements):
            first = turn % len(sides)
            for side in (*sides[first:], *sides[:first]):
                if measurement.only in ("", side.name):
                    salt = _SALTS * (turn * len(measurements) + index)
                    settle()
                    value = measurement.take(side, salt)
                    if turn > 0:
                        runs.setdefault((index, side.name), []).append(value)
                    progress.advance(
                        f"{side.name}: {measurement.measure}, {measurement.case}: {number(value)} {measurement.unit}"
                    )
    return [
        Figure(m.measure, m.case, side.name, m.unit, tuple(runs[index, side.name]), m.more_is_better, m.bound)
        for index, m in enumerate(measurements)
        for side in sides
        if (index, side.name) in runs
    ]


def num_runs(measurements: Sequence[Measurement], num_sides: int, rounds: int) -> int:
    """That `alternating` reports to its progress."""
    return (rounds + 1) * sum(1 if m.only else num_sides for m in measurements)


def cache_ratio(figures: Sequence[Figure]) -> list[Figure]:
    """W3's time with the cache over that without, round by round."""
    with_cache, without = (
        [f for f in figures if f.measure == SHARED_PREFIX and f.case == case] for case in ("with cache", "without")
    )
    return [
        Figure(f"{SHARED_PREFIX}: with cache / without", "W3", plain.side, "ratio",
               tuple(fast / slow for fast, slow in zip(cached.runs, plain.runs, strict=True)))
        for plain in without
        for cached in with_cache
        if cached.side == plain.side
    ]  # fmt: skip
