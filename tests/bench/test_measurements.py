"""Turns, salts and what becomes of them, with sides that take as long as they are told."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from bench.figures import Figure
from bench.measurements import Measurement, Model, alternating, cache_ratio, num_runs
from bench.progress import bar
from bench.roofline import Peaks, Work
from bench.workloads import Job
from tests.bench.test_roofline import M_HALF


class Side:
    limit: int | None = None

    def __init__(self, name: str, seconds_a_token: float, log: list[tuple[str, Sequence[Job]]]) -> None:
        self.name, self._speed, self._log = name, seconds_a_token, log

    def run(self, jobs: Sequence[Job]) -> float:
        self._log.append((self.name, jobs))
        return 1.0 + self._speed * sum(job.max_tokens for job in jobs)


MODEL = Model(32000, Peaks(50e9, 1000e9), Work(M_HALF, 2))


def measure(measurements: list[Measurement], rounds: int) -> tuple[list[Figure], list[tuple[str, Sequence[Job]]]]:
    log: list[tuple[str, Sequence[Job]]] = []
    sides = [Side("baton", 0.01, log), Side("peer", 0.02, log)]
    with bar(num_runs(measurements, 2, rounds), "runs") as progress:
        return alternating(measurements, sides, rounds, progress, settle=lambda: None), log


def test_sides_take_turns_and_the_first_round_does_not_count() -> None:
    figures, log = measure(MODEL.w1(), rounds=2)
    assert [name for name, _ in log] == ["baton", "peer", "peer", "baton", "baton", "peer"]
    assert [(f.side, len(f.runs)) for f in figures] == [("baton", 2), ("peer", 2)]


def test_both_sides_get_the_same_jobs_and_each_round_others() -> None:
    _, log = measure([*MODEL.w1(), *MODEL.decode((1, 8)), *MODEL.prefill((128, 512))], rounds=2)
    by_side = {side: [jobs for name, jobs in log if name == side] for side in ("baton", "peer")}
    assert by_side["baton"] == by_side["peer"]
    firsts = [tuple(jobs[0].prompt[:16]) for jobs in by_side["baton"]]
    assert len(set(firsts)) == len(firsts), "a prefix cache would know this one"


def test_a_decode_step_is_what_more_tokens_take() -> None:
    figures, _ = measure(MODEL.decode((8,)), rounds=1)
    assert [f.median for f in figures] == [pytest.approx(80.0), pytest.approx(160.0)]  # 8 tokens, without the second
    assert figures[0].case == "batch 8"


def test_rates_are_of_the_tokens_that_were_asked_for() -> None:
    (w1, _), _ = measure(MODEL.w1(), rounds=1)
    assert w1.median == pytest.approx(2584 / (1 + 25.84))
    assert w1.more_is_better
    (prefill, _), _ = measure(MODEL.prefill((512,)), rounds=1)
    assert prefill.median == pytest.approx(512 / 1.01)


def test_the_caches_worth_is_told_round_by_round_and_of_our_own_alone() -> None:
    slow = Side("baton", 1.0, [])
    figures, _ = measure(MODEL.w3("baton", lambda: slow), rounds=2)
    assert [(f.case, f.side) for f in figures] == [
        ("with cache", "baton"),
        ("with cache", "peer"),
        ("without", "baton"),
    ]
    (ratio,) = cache_ratio(figures)
    assert ratio.runs == (pytest.approx(3.56 / 257), pytest.approx(3.56 / 257))
    assert cache_ratio([]) == []
