"""Whole steps and whole loads by our engine, in its own threads, as a worker runs it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from bench.figures import Figure
from bench.own import OwnEngine
from bench.roofline import Peaks, Work, closed_batch_seconds, decode_seconds
from bench.workloads import fixed, totals, w1

DECODES = ((1, 512), (1, 4096), (8, 1024), (64, 1024), (256, 1024))
_STEPS = 48
_PREFILL = (8, 4096)
REQUESTS = 512
_FIRST_SALT = 1 << 41


def decode_figures(engine: OwnEngine, peaks: Peaks, work: Work, rounds: int) -> Iterator[Figure]:
    for batch, context in DECODES:
        wall, gaps = [], []
        for turn in range(rounds):
            steps = engine.decode_steps(batch, context, _STEPS, _FIRST_SALT + 1000 * batch + turn)
            if steps is None:
                break
            wall.append(1e3 * statistics.mean(steps.wall))
            gaps.append(100 * steps.gap)
        if not wall:
            continue
        case = f"batch {batch}, context {context:,}"
        bound = 1e3 * decode_seconds(peaks, work, [context + _STEPS // 2] * batch)
        yield Figure("decode step", case, engine.name, "ms", tuple(wall), bound=bound)
        yield Figure("step gap, share of a step's time in which the GPU waits", case, engine.name, "%", tuple(gaps))


def prefill_figure(engine: OwnEngine, peaks: Peaks, work: Work, rounds: int) -> Figure:
    """Of prompts that come together, from the first to the last one's first token."""
    count, length = _PREFILL
    seconds = [
        engine.run(fixed(engine.vocab_size, _FIRST_SALT + turn, num_requests=count, prompt=length, max_tokens=1))
        for turn in range(rounds + 1)
    ][1:]
    flops = count * (length * work.flops(length // 2, drawn=False) + 2 * work.head_weights)
    bound = flops / peaks.flops_per_second
    return Figure("prefill", f"{count} × {length:,} tokens", engine.name, "s", tuple(seconds), bound=bound)


def requests_figure(engine: OwnEngine, peaks: Peaks, work: Work, rounds: int) -> Figure:
    """Output tokens a second of mixed requests that all come at once."""
    rates = []
    for turn in range(rounds):
        jobs = w1(engine.vocab_size, _FIRST_SALT + turn, num_requests=REQUESTS)
        rates.append(totals(jobs)[1] / engine.run(jobs))
    bound = totals(jobs)[1] / closed_batch_seconds(peaks, work, jobs)
    return Figure(requests_measure(), "all", engine.name, "tok/s", tuple(rates), more_is_better=True, bound=bound)


def requests_measure() -> str:
    return f"{REQUESTS} mixed requests, output"
