"""From settings to an engine: what the flags of a worker become."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from baton.config import CacheConfig, ModelConfig, SchedulerConfig, WorkerConfig
from baton.metrics import EngineMetrics, Metrics
from engine.pacing import Pacer
from worker.build import Built, build, load


def built(model: Path, scheduler: SchedulerConfig) -> Built:
    config = WorkerConfig(
        model=ModelConfig(model=str(model), device="cpu", threads=1, max_model_len=64),
        cache=CacheConfig(kv_blocks=16),
        scheduler=scheduler,
    )
    loaded, device = load(config)
    return build(config, loaded, device, EngineMetrics(Metrics(), "m"))


@pytest.mark.parametrize(("flag", "seconds"), [(40.0, 0.04), (0.0, None)])
def test_the_objective_is_given_in_milliseconds_and_zero_is_none(
    checkpoint: Callable[[str], Path], flag: float, seconds: float | None
) -> None:
    pacer = built(checkpoint("llama"), SchedulerConfig(itl_objective_ms=flag)).engine.pacer
    assert (pacer.objective_seconds if isinstance(pacer, Pacer) else None) == seconds
