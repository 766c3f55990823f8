"""Many seeds on several cores, by the command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest

from sim.__main__ import main
from sim.planted import PLANTS
from sim.run import run_seed
from sim.seeds import outcomes

ROOT = Path(__file__).resolve().parents[2]


def test_several_processes_give_the_same_outcomes_in_order() -> None:
    with outcomes(range(200), 2) as found:
        told = [(outcome.seed, outcome.digest) for outcome in islice(found, 20)]
    assert told == [(seed, run_seed(seed).digest) for seed in range(20)]


def test_a_plant_is_planted_in_every_process() -> None:
    with outcomes(range(200), 2, PLANTS["stale-reference"]) as found:
        assert any(outcome.broken for outcome in found)


def test_the_command_counts_what_it_ran(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "3", "--jobs", "1"]) == 0
    assert capsys.readouterr().out.startswith("3 seeds, ")


def test_an_interrupt_ends_all_processes_and_says_how_far_it_came() -> None:
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "sim", "--planted=stale-reference", "--seeds=9999999", "--most-broken=9999999"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert "breaks an invariant" in process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted: " in out.splitlines()[-1]
    assert "Traceback" not in err
    assert _is_gone(process.pid)


def _is_gone(group: int) -> bool:
    until = time.monotonic() + 20.0
    while time.monotonic() < until:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    return False
