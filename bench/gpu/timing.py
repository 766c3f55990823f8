"""Times by the device's own clock: calls are recorded in a graph, so that nothing of the host is in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

_RUNS = 7


def milliseconds(calls: Sequence[Callable[[], object]], runs: int = _RUNS) -> tuple[float, ...]:
    """Of one call, a value a run. `calls` are alike but work on data of their own, more than the caches hold."""
    for call in calls:  # compiles, sets up
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return tuple(each / len(calls) for each in _timed(graph.replay, runs))


def queued(call: Callable[[], object], runs: int = _RUNS) -> tuple[float, ...]:
    """Of one call that can't be recorded."""
    call()
    return _timed(call, runs)


def _timed(call: Callable[[], object], runs: int) -> tuple[float, ...]:
    call()
    marks = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(runs)]
    for begun, done in marks:
        begun.record()
        call()
        done.record()
    torch.cuda.synchronize()
    return tuple(float(begun.elapsed_time(done)) for begun, done in marks)
