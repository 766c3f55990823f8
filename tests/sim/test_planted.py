"""The simulator has teeth: each bug that others had is found, and taken away again."""

from __future__ import annotations

import pytest

from sim.__main__ import main
from sim.planted import PLANTS
from sim.run import run_seed

FIRST_FOUND = {
    "freed-under-writer": 25,
    "sibling-frees": 25,
    "notice-never-comes": 3,
    "hold-and-wait": 9,
    "completed-twice": 0,
    "lease-only-logged": 303,
    "reaped-when-scheduled": 15,
    "evicted-before-sent": 9,
    "drained-under-transfer": 153,
    "stale-reference": 0,
    "preempted-under-step": 1,
    "evictions-untold": 0,
    "salt-ignored": 18,
    "abort-storm": 77,
    "stale-peer": 0,
    "no-timeout-on-two": 3,
    "resumed-as-prompt": 3,
}
"""By which seed, of those from 0 on. `baton sim --planted BUG --seeds 5000` tells, where a change has moved it."""
NEARBY = 20
"""Seeds behind it that may find it as well."""
MOST = 5000


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_bug_is_found(name: str) -> None:
    first = FIRST_FOUND[name]
    assert first < MOST
    assert any(run_seed(seed, plant=PLANTS[name]).broken for seed in range(first, first + NEARBY))


def test_what_finds_a_planted_bug_is_whole_without_it() -> None:
    for seed in FIRST_FOUND.values():
        assert not run_seed(seed).broken


def test_a_plant_is_gone_after_its_run() -> None:
    plant = PLANTS["stale-reference"]
    before = [getattr(owner, name) for owner, name, _ in plant.changes]
    assert run_seed(FIRST_FOUND[plant.name], plant=plant).broken
    assert [getattr(owner, name) for owner, name, _ in plant.changes] == before


def test_a_find_replays_exactly() -> None:
    plant = PLANTS["evicted-before-sent"]
    first, again = (run_seed(FIRST_FOUND[plant.name], plant=plant) for _ in range(2))
    assert first.broken
    assert (first.digest, first.broken) == (again.digest, again.broken)


def test_the_command_tells_of_a_find_and_how_to_see_it_again(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["--seeds", "20", "--first-seed", str(FIRST_FOUND["stale-reference"]), "--planted=stale-reference"]) == 1
    )
    assert "--planted stale-reference --story" in capsys.readouterr().out


def test_bugs_are_listed_and_an_unknown_one_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list-planted"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(PLANTS) >= 16
    assert main(["--planted", "nothing"]) == 2
    assert "--list-planted" in capsys.readouterr().err
