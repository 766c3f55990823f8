"""`baton bench transfer` once, small: what it prints and leaves behind. How fast anything is, no test says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.transfer import SHARE, Turns, figures
from tests.system.harness import run_cli

SIDES = [
    "memcpy",
    "memcpy, two threads",
    "bare socket",
    "shm pull",
    "shm pull without checksums",
    "tcp pull",
    "tcp pull without checksums",
]


@pytest.mark.slow
async def test_pulls_are_measured_beside_the_plain_ways(tmp_path: Path) -> None:
    status, said, errors = await run_cli(
        "bench", "transfer", "--rounds=2", "--blocks=6", "--block-kib=64", "--pool-blocks=32", f"--out={tmp_path}",
        seconds=120,
    )  # fmt: skip
    assert status == 0, errors
    assert "| moving blocks between two processes (GB/s, more is better) | baton |" in said
    assert "| shm pull : memcpy | " in said
    result = json.loads((tmp_path / "transfer.json").read_text())
    rates = {figure["case"]: figure for figure in result["figures"] if figure["unit"] == "GB/s"}
    assert list(rates) == SIDES
    assert all(len(figure["runs"]) == 2 and min(figure["runs"]) > 0 for figure in rates.values())
    assert result["config"]["blocks"] == 6
    assert str(tmp_path) not in json.dumps(result["config"])


async def test_a_pool_that_is_smaller_than_a_pull_is_an_error_in_one_line() -> None:
    status, _, errors = await run_cli("bench", "transfer", "--blocks=64", "--pool-blocks=32")
    assert status == 1
    assert errors.strip() == "baton bench transfer: --pool-blocks is 32; a pull of --blocks=64 needs as many at least"


def test_a_share_is_the_median_of_the_rounds_own() -> None:
    rates = {side: [1.0, 2.0, 4.0] for side in SIDES} | {"shm pull": [0.5, 2.0, 1.0]}
    shares = {figure.case: figure.median for figure in figures(rates) if figure.measure == SHARE}
    assert shares["shm pull : memcpy"] == 50.0
    assert shares["tcp pull : bare socket"] == 100.0


def test_turns_take_blocks_that_have_rested_and_every_place_once() -> None:
    turns = Turns(blocks=4, pool_blocks=10)
    seen = [turns.next() for _ in range(4)]
    assert [sorted(sources) for sources, _ in seen] == [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3], [4, 5, 6, 7]]
    assert all(sorted(sources) == sorted(destinations) for sources, destinations in seen)
