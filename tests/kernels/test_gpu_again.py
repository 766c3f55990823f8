"""Launches like one of the last skip Triton, and hand the driver what Triton would have handed it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIKE_ONE_OF_THE_LAST = {
    *("another layer", "more tokens", "and back", "the first constant", "the same"),
    *("the one with bias", "a descriptor"),
}
UNLIKE_THEM = {"heads elsewhere", "elsewhere again", "another constant", "another dtype", "a product without bias"}


def test_what_is_like_one_of_the_last_launches_goes_to_the_driver_as_it_is(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.launched_again"],
        cwd=ROOT,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    told = {line["case"]: line for line in map(json.loads, run.stdout.splitlines())}
    assert {case for case, line in told.items() if not line["triton_looked"]} == LIKE_ONE_OF_THE_LAST
    assert {case for case, line in told.items() if line["triton_looked"]} == UNLIKE_THEM
    assert all(line["same"] for line in told.values()), told


@pytest.mark.gpu
def test_runs_again_compute_what_the_first_ones_did() -> None:
    import torch

    from engine.kernels.gpu.elementwise import TritonElementWise

    rows = torch.randn((3, 4, 896), device="cuda")
    weight = torch.rand(896, device="cuda")
    for each in (*rows, rows.view(-1)[1 : 1 + 4 * 896].view(4, 896)):  # the last at an address that 16 does not divide
        step = TritonElementWise(1e-6).step(each)
        expected = torch.nn.functional.rms_norm(each, (896,), weight, eps=1e-6)
        torch.testing.assert_close(step.add_norm(None, weight), expected, atol=1e-5, rtol=1e-5)
