"""From settings to an engine: what the flags of a worker become."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from baton.config import CacheConfig, ModelConfig, SchedulerConfig, WorkerConfig
from baton.metrics import EngineMetrics, Metrics
from worker.build import Built, build, load
from worker.server import served_name


def built(model: Path, scheduler: SchedulerConfig) -> Built:
    config = WorkerConfig(
        model=ModelConfig(model=str(model), device="cpu", threads=1, max_model_len=64),
        cache=CacheConfig(kv_blocks=16),
        scheduler=scheduler,
    )
    loaded, device = load(config)
    return build(config, loaded, device, EngineMetrics(Metrics(), "m"))


@pytest.mark.parametrize(("flag", "seconds"), [(40.0, 0.04), (0.0, math.inf)])
def test_the_objective_is_given_in_milliseconds_and_zero_is_none(
    checkpoint: Callable[[str], Path], flag: float, seconds: float
) -> None:
    pacer = built(checkpoint("llama"), SchedulerConfig(itl_objective_ms=flag)).engine.pacer
    assert pacer is not None
    assert pacer.objective_seconds == seconds


def test_a_model_in_a_home_is_served_by_its_directorys_name_and_found_by_the_router(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    home, name = checkpoint("llama").parent, checkpoint("llama").name
    monkeypatch.setenv("HOME", str(home))
    model = Path("~") / name
    assert served_name(WorkerConfig(model=ModelConfig(model=str(model)))) == name
    assert built(model, SchedulerConfig()).source == str((home / name).resolve())


def test_a_model_is_served_by_the_name_it_is_given_else_by_its_own(tmp_path: Path) -> None:
    for model, name in (
        (ModelConfig(model="Qwen/Qwen3-0.6B"), "Qwen/Qwen3-0.6B"),
        (ModelConfig(model=f"{tmp_path}/"), tmp_path.name),
        (ModelConfig(model=str(tmp_path), served_model_name="mine"), "mine"),
    ):
        assert served_name(WorkerConfig(model=model)) == name


def test_more_threads_than_cores_are_not_used_and_said_so(
    checkpoint: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    before, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    try:
        load(WorkerConfig(model=ModelConfig(model=str(checkpoint("llama")), threads=cores + 3)))
        assert torch.get_num_threads() == cores
        assert f"--threads is {cores + 3} and this process has {cores} cores" in caplog.text
    finally:
        torch.set_num_threads(before)
