"""Decode steps of our own engine by batch and context, one by one, and how much of their time is not the model's."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence

from bench.figures import Figure
from bench.own import OwnEngine
from bench.progress import Progress
from bench.roofline import Peaks, Work, decode_seconds

_STEPS = 24
_FIRST_SALT = 1 << 40  # beyond those of other measurements


def step_figures(
    engine: OwnEngine,
    peaks: Peaks,
    work: Work,
    batches: Sequence[int],
    contexts: Sequence[int],
    rounds: int,
    progress: Progress,
) -> list[Figure]:
    """Medians of milliseconds a step, and the step gap in percent. What does not fit the engine is left out."""
    milliseconds: dict[tuple[int, int], list[float]] = {}
    gaps: dict[tuple[int, int], list[float]] = {}
    cases = [(batch, context) for batch in batches for context in contexts]
    for turn in range(rounds):
        for index, (batch, context) in enumerate(cases):
            steps = engine.decode_steps(batch, _start(engine, context), _STEPS, _FIRST_SALT + turn * len(cases) + index)
            progress.advance(f"{engine.name}: steps at batch {batch}, context {context}")
            if steps is None and turn == 0:
                print(
                    f"{_case(batch, context)}: left out, for it does not fit the engine's pool, batch or model length",
                    file=sys.stderr,
                )
            if steps is not None:
                milliseconds.setdefault((batch, context), []).append(1e3 * statistics.median(steps.wall))
                gaps.setdefault((batch, context), []).append(100 * steps.gap)
    return [
        *(
            Figure("decode step by context", _case(batch, context), engine.name, "ms", tuple(runs), bound=bound)
            for (batch, context), runs in milliseconds.items()
            for bound in [1e3 * decode_seconds(peaks, work, [_start(engine, context) + _STEPS // 2] * batch)]
        ),
        *(
            Figure("step gap, share of the time outside the forward", _case(*key), engine.name, "%", tuple(runs))
            for key, runs in gaps.items()
        ),
    ]


def _start(engine: OwnEngine, context: int) -> int:
    """A context as long as the model's length leaves room for the steps behind it."""
    return min(context, engine.max_model_len - _STEPS - 4)


def _case(batch: int, context: int) -> str:
    return f"batch {batch}, context {context}"
