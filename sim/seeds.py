"""Runs many seeds on several cores, and gives their outcomes in the order of the seeds."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context

from sim.planted import find
from sim.planted.plant import Plant
from sim.run import run_seed
from sim.world import Outcome

_CHUNK = 25
"""Seeds that a process is given at a time."""
_WORTH_A_PROCESS = 100
"""To begin takes one seconds."""


def most_jobs() -> int:
    return os.cpu_count() or 1


@contextmanager
def outcomes(seeds: range, jobs: int, plant: Plant | None = None) -> Iterator[Iterable[Outcome]]:
    """In order. Leaving ends the processes, whatever they are at."""
    jobs = min(jobs, len(seeds) // _WORTH_A_PROCESS)
    run = partial(_run, plant=plant.name if plant is not None else "")
    if jobs <= 1:
        yield map(run, seeds)
        return
    # Spawned, not forked: who calls may have threads.
    pool = get_context("spawn").Pool(jobs, _begin)
    try:
        yield pool.imap(run, seeds, _CHUNK)
    finally:
        pool.terminate()
        pool.join()


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all of them; one of them has something to say
    gc.freeze()  # what was imported is not looked at again behind every seed


def _run(seed: int, plant: str) -> Outcome:
    return run_seed(seed, plant=find(plant) if plant else None)
