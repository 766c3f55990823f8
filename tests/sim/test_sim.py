"""The simulator itself: seeds hold their invariants, replay exactly, reach what matters, and damage is found."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter

import pytest

from baton.layout import KVLayout
from sim import model
from sim.__main__ import INTERRUPTED, main
from sim.memory import SimMemory
from sim.run import run_seed
from sim.scenario import FaultKind
from sim.seed import make_scenario

SEEDS, PART = 2000, 100
SOAK_SEEDS = 100_000


@pytest.mark.parametrize("first", range(0, SEEDS, PART))
def test_no_seed_breaks_an_invariant(first: int) -> None:
    for seed in range(first, first + PART):
        assert not run_seed(seed).broken, f"baton sim --seeds 1 --first-seed {seed} --story"


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_no_seed_of_many_breaks_an_invariant(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        status = main(["--seeds", str(SOAK_SEEDS), "--first-seed", str(SEEDS)])
    if status == INTERRUPTED:
        pytest.exit("interrupted")
    assert status == 0


def test_a_seed_replays_exactly() -> None:
    first = [run_seed(seed) for seed in range(10)]
    again = [run_seed(seed) for seed in reversed(range(10))]
    assert [outcome.digest for outcome in first] == [outcome.digest for outcome in reversed(again)]
    assert len({outcome.digest for outcome in first}) == 10


def test_a_seed_replays_exactly_in_another_process() -> None:
    """Whatever the order of sets and the addresses in memory are there."""
    script = "from sim.run import run_seed; print(*[run_seed(seed).digest for seed in range(20, 30)])"
    told = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": str(number)},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        ).stdout
        for number in (1, 2)
    }
    assert told == {" ".join(run_seed(seed).digest for seed in range(20, 30)) + "\n"}


def test_a_story_changes_nothing_and_tells_who_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "1", "--first-seed", "3", "--story"]) == 0
    told = capsys.readouterr().out
    assert "r2 asks router-0" in told
    assert "submit r2#1" in told
    assert run_seed(3, story=True).digest == run_seed(3).digest


def test_seeds_reach_the_states_that_matter() -> None:
    """A simulator in which nothing happens finds nothing."""
    reached: Counter[str] = Counter()
    answered = requests = 0
    for seed in range(300):
        outcome = run_seed(seed)
        reached.update(state for state, count in outcome.reached.states().items() if count)
        answered, requests = answered + outcome.answered, requests + outcome.requests
        if seed >= 40 and all(reached[state] >= 3 for state in outcome.reached.states()):
            break
    else:
        pytest.fail(f"seeds that were in each state: {reached}")
    assert answered > 0.4 * requests


def test_seeds_have_every_kind_of_fault_and_calm_ones_none() -> None:
    scenarios = [make_scenario(seed) for seed in range(200)]
    assert {fault.kind for scenario in scenarios for fault in scenario.faults} == set(FaultKind)
    assert {len(scenario.routers) for scenario in scenarios} == {1, 2}
    assert any(scenario.is_calm and not scenario.clocks_agree for scenario in scenarios)


def test_a_token_depends_on_every_entry_before_it() -> None:
    prompt = list(range(20, 40))
    right = model.answer(prompt, 4)
    for at in range(len(prompt)):
        assert model.answer([*prompt[:at], prompt[at] + 1, *prompt[at + 1 :]], 4) != right


def test_a_block_that_is_taken_holds_nothing_of_its_last_use() -> None:
    memory = SimMemory(2, KVLayout(1, 1, 4, 2, "float32", b"m"))
    memory.write(1, memoryview(b"\1" * memory.block_bytes))
    memory.generations[1] += 1
    memory.on_take(1)  # type: ignore[arg-type]
    assert all(memory[1, at] != 0x0101010101010101 for at in range(4))
