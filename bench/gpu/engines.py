"""An engine as a worker on a GPU has it."""

from __future__ import annotations

import torch

from baton.config import CacheConfig, ModelConfig, SchedulerConfig, WorkerConfig
from bench.own import OwnEngine
from engine.loader import LoadedModel

MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS = 256, 8192
_UTILIZATION = 0.6  # others measure beside it


def engine(model: LoadedModel, device: torch.device) -> OwnEngine:
    config = WorkerConfig(
        model=ModelConfig(model=str(model.directory)),
        cache=CacheConfig(gpu_memory_utilization=_UTILIZATION),
        scheduler=SchedulerConfig(max_num_seqs=MAX_NUM_SEQS, max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS),
    )
    return OwnEngine(config, model, device)
