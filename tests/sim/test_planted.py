"""The simulator has teeth: each bug that others had is found, and taken away again."""

from __future__ import annotations

import pytest

from sim.__main__ import main
from sim.planted import PLANTS
from sim.run import run_seed

WITHIN_SEEDS = 1000


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_bug_is_found(name: str) -> None:
    assert any(run_seed(seed, plant=PLANTS[name]).broken for seed in range(WITHIN_SEEDS))


def test_a_plant_is_gone_after_its_run() -> None:
    plant = PLANTS["stale-reference"]
    before = [getattr(owner, name) for owner, name, _ in plant.changes]
    assert run_seed(2, plant=plant).broken
    assert [getattr(owner, name) for owner, name, _ in plant.changes] == before
    assert not run_seed(2).broken


def test_a_find_replays_exactly() -> None:
    plant = PLANTS["evicted-before-sent"]
    seed = next(seed for seed in range(WITHIN_SEEDS) if run_seed(seed, plant=plant).broken)
    first, again = run_seed(seed, plant=plant), run_seed(seed, plant=plant)
    assert (first.digest, first.broken) == (again.digest, again.broken)


def test_the_command_tells_of_a_find_and_how_to_see_it_again(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "20", "--planted", "stale-reference"]) == 1
    assert "--planted stale-reference --story" in capsys.readouterr().out


def test_bugs_are_listed_and_an_unknown_one_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list-planted"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(PLANTS) >= 16
    assert main(["--planted", "nothing"]) == 2
    assert "--list-planted" in capsys.readouterr().err
