"""From a configuration to an engine with its memory: the model is loaded, the pool sized and laid out. Blocking."""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass, replace

import torch

from baton.config import GPU_MEMORY_UTILIZATION, WorkerConfig
from baton.errors import ConfigError
from baton.layout import KVLayout
from baton.metrics import EngineMetrics
from baton.model_files import local_directory
from engine.block_pool import BlockPool, Generations
from engine.engine import Engine
from engine.kv_cache import KVCache, choose_num_blocks
from engine.limits import SchedulerLimits
from engine.loader import LoadedModel, load_model
from engine.memory import room as memory_room
from engine.pacing import Pacer
from engine.runners import RunnerLimits, activation_bytes, make_runner
from engine.scheduler import Scheduler
from engine.swap import SwapPool
from kvtransfer.memory import HostMemory, PoolMemory
from worker.device_memory import DeviceMemory, share_generations

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Built:
    engine: Engine
    layout: KVLayout
    memory: PoolMemory
    """The pool's bytes, for transfers."""
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    max_model_len: int
    source: str
    """Directory or hub id; the router finds the tokenizer there."""


def load(config: WorkerConfig) -> tuple[LoadedModel, torch.device]:
    """Raises CheckpointError, ConfigError."""
    device = _device(config.model.device)
    torch.set_num_threads(_threads(config.model.threads))
    return load_model(config.model.model, config.model.dtype, device), device


def build(config: WorkerConfig, model: LoadedModel, device: torch.device, metrics: EngineMetrics) -> Built:
    """Raises ConfigError where the pool cannot hold a request."""
    sizes = config.scheduler.on(device.type)
    tokens, seqs = sizes.max_num_batched_tokens, sizes.max_num_seqs
    if tokens < seqs:
        raise ConfigError(
            f"--max-num-batched-tokens is {tokens}; it must be at least --max-num-seqs ({seqs}), for a step computes a "
            "token of each running request"
        )
    layout = model.kv_layout(config.cache.block_size)
    wanted_len = model.max_model_len(config.model.max_model_len)
    limits = RunnerLimits(seqs, tokens, wanted_len, model.eos_token_ids)
    utilization = config.cache.gpu_memory_utilization or GPU_MEMORY_UTILIZATION
    room = memory_room(device, utilization, activation_bytes(model.decoder, layout, limits))
    num_blocks = choose_num_blocks(
        layout, config.cache.kv_blocks, max_num_seqs=seqs, max_model_len=wanted_len, room=room
    )
    max_model_len = min(wanted_len, num_blocks * layout.block_size)
    if max_model_len < wanted_len:
        log.warning(
            "%d blocks of %d tokens hold %d tokens, fewer than the model's %d: longer requests are refused",
            num_blocks, layout.block_size, max_model_len, wanted_len,
        )  # fmt: skip
    num_swap_slots = int(config.cache.swap_space * 2**30) // layout.block_bytes
    cache, memory, generations = _pool(layout, num_blocks, num_swap_slots, device)
    runner = make_runner(model.decoder, cache, replace(limits, max_model_len=max_model_len))
    pool = BlockPool(num_blocks, enable_prefix_caching=config.cache.enable_prefix_caching, generations=generations)
    scheduler = Scheduler(
        pool,
        SchedulerLimits(
            block_size=layout.block_size,
            max_num_seqs=seqs,
            max_num_batched_tokens=tokens,
            max_model_len=max_model_len,
            eos_token_ids=frozenset(model.eos_token_ids),
            model_fingerprint=model.fingerprint,
        ),
        SwapPool(num_swap_slots),
    )
    objective_ms = config.scheduler.itl_objective_ms
    log.info("KV pool: %d blocks of %d KiB (%s) on %s", num_blocks, layout.block_bytes // 1024, layout, device)
    return Built(
        engine=Engine(scheduler, runner, metrics, pacer=Pacer(objective_ms / 1000 or math.inf)),
        layout=layout,
        memory=memory,
        vocab_size=model.spec.vocab_size,
        eos_token_ids=model.eos_token_ids,
        max_model_len=max_model_len,
        source=str(local_directory(config.model.model) or config.model.model),
    )


def _threads(wanted: int) -> int:
    cores = len(os.sched_getaffinity(0))
    if wanted > cores:
        log.warning(
            "--threads is %d and this process has %d cores: it uses as many threads, for more would be slower",
            wanted, cores,
        )  # fmt: skip
    return min(wanted, cores) or torch.get_num_threads()


def _device(wanted: str) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device is cuda, and this machine has no CUDA device that torch can use; give cpu or auto")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def _pool(
    layout: KVLayout, num_blocks: int, num_swap_slots: int, device: torch.device
) -> tuple[KVCache, PoolMemory, Generations]:
    """On a CPU the pool lies in shared memory, where neighbours on the host can read it."""
    if device.type == "cpu":
        try:
            host = HostMemory.create(num_blocks, layout.block_bytes)
        except OSError as error:
            size = num_blocks * layout.block_bytes >> 20
            raise ConfigError(f"a KV pool of {size} MiB cannot be made ({error}); lower --kv-blocks") from None
        host.populate()
        return KVCache(layout, num_blocks, device, host.blocks, num_swap_slots), host, host.generations
    shared = share_generations(num_blocks)
    cache = KVCache(layout, num_blocks, device, num_swap_slots=num_swap_slots)
    return cache, DeviceMemory(cache, shared), shared.generations
