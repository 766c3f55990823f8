"""How training starts, and how its rate goes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from demo_model.history import History
from demo_model.tokenizer import train_tokenizer
from demo_model.train import PLANS, build, main, rate


def test_the_rate_warms_up_stays_a_while_and_falls_to_nothing() -> None:
    rates = [rate(step, 1000) for step in range(1000)]
    assert rates[0] < 0.05
    assert rates[50] == rates[150] == 1.0
    assert 0 < rates[-1] < 0.01
    assert rates[150:] == sorted(rates[150:], reverse=True)


def test_the_draft_is_at_most_a_quarter_of_the_model(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(tmp_path, seed=0, samples=500)
    model, draft = (sum(p.numel() for p in build(plan, tokenizer).parameters()) for plan in PLANS.values())
    assert draft * 4 <= model


def test_the_draft_needs_the_models_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["draft", "--out", str(tmp_path)]) == 1
    assert "train `checkpoint` first" in capsys.readouterr().err


def test_a_later_stage_needs_what_the_one_before_it_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "--out", str(tmp_path), "--stage", "2"]) == 1
    assert "begin with --stage 1" in capsys.readouterr().err


def test_a_history_goes_on_from_a_step(tmp_path: Path) -> None:
    history = History(seed=3)
    for step in (50, 100, 150):
        history.add(step, step / 10, 64, 1.0, 0.5)
    history.write(tmp_path / "run")
    again = History.read(tmp_path / "run", 100)
    assert (again.seed, [line.step for line in again.lines], again.seconds) == (3, [50, 100], 10.0)


def test_a_history_is_written_as_json_and_as_a_plot(tmp_path: Path) -> None:
    history = History(seed=3)
    for step in range(1, 5):
        history.add(step, step * 10.0, 64 if step < 3 else 128, 1 / step, 0.1 * step)
    history.write(tmp_path / "run")
    first = (tmp_path / "run.svg").read_bytes()
    assert b"<svg" in first
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["seed"] == 3
    assert [line["length"] for line in run["lines"]] == [64, 64, 128, 128]
    history.write(tmp_path / "run")
    assert (tmp_path / "run.svg").read_bytes() == first
