"""When requests come."""

from __future__ import annotations

import itertools

import pytest

from baton.errors import ConfigError
from bench.arrivals import SATURATED, arrivals, name, parse_rate


def test_arrivals_keep_their_rate_and_look_like_a_poisson_process() -> None:
    times = arrivals(4.0, 20_000, seed=0)
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(0.25, rel=0.03)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert variance == pytest.approx(0.25**2, rel=0.1)
    assert times == sorted(times)
    assert times[0] == 0


def test_a_seed_gives_the_same_arrivals_again() -> None:
    assert arrivals(1.0, 50, seed=3) == arrivals(1.0, 50, seed=3)
    assert arrivals(1.0, 50, seed=3) != arrivals(1.0, 50, seed=4)


def test_saturated_means_all_at_once() -> None:
    assert arrivals(parse_rate("inf"), 3, seed=0) == [0.0, 0.0, 0.0]
    assert name(SATURATED) == "saturated"
    assert name(0.5) == "0.5 req/s"


@pytest.mark.parametrize("word", ["0", "-1", "fast", "nan", ""])
def test_what_is_no_rate_is_refused(word: str) -> None:
    with pytest.raises(ConfigError, match=r"--rate is .*; it must be requests a second"):
        parse_rate(word)
