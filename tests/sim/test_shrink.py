"""A failing seed is told as a short story, which breaks in the same way and replays exactly."""

from __future__ import annotations

import pytest

from sim.__main__ import main
from sim.planted import PLANTS
from sim.run import run_scenario, run_seed
from sim.seed import make_scenario
from sim.shrink import kind_of, shrink

PLANT = PLANTS["freed-under-writer"]


@pytest.fixture(scope="module")
def seed() -> int:
    return next(seed for seed in range(200) if run_seed(seed, plant=PLANT).broken)


def test_what_is_left_breaks_in_the_same_way_and_is_small(seed: int) -> None:
    scenario = make_scenario(seed)
    shrunk = shrink(scenario, PLANT)
    assert kind_of(shrunk.outcome) == kind_of(run_scenario(scenario, plant=PLANT))
    assert len(shrunk.scenario.requests) <= 3
    assert len(shrunk.scenario.faults) <= 1
    assert len(shrunk.outcome.lines) <= 80
    assert "BROKEN" in shrunk.outcome.lines[-1]


def test_it_shrinks_to_the_same_each_time_and_replays_exactly(seed: int) -> None:
    one, other = shrink(make_scenario(seed), PLANT), shrink(make_scenario(seed), PLANT)
    assert one == other
    assert run_scenario(one.scenario, plant=PLANT).digest == one.outcome.digest


def test_tries_are_bounded(seed: int) -> None:
    scenario = make_scenario(seed)
    shrunk = shrink(scenario, PLANT, most_runs=3)
    assert shrunk.runs == 3
    assert shrunk.outcome.broken


def test_the_command_tells_the_short_story_and_what_is_left(seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "1", "--first-seed", str(seed), "--planted", PLANT.name, "--story"]) == 1
    told = capsys.readouterr().out
    assert "what it takes: " in told
    assert f"of {len(make_scenario(seed).requests)} requests" in told
    assert len(told.splitlines()) <= 90
