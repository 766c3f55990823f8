"""The runner for a model's device, ready to serve: whatever is compiled, recorded or set up at first use has been, so
that no request pays for it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from baton.errors import ConfigError
from baton.layout import KVLayout
from baton.model_files import in_one_line
from engine.device import Cuda
from engine.device_runner import DeviceRunner
from engine.kernels.choice import device_kernels
from engine.kernels.fallback import warn_of_torch
from engine.kv_cache import KVCache
from engine.models.decoder import Decoder
from engine.progress import CountProgress, Progress
from engine.runner import ModelRunner
from engine.slots import Slots

log = logging.getLogger(__name__)

_CPU_WARM_UP_TOKENS = 32
_LEAST_WARM_UP_TOKENS = 16


@dataclass(frozen=True, slots=True)
class RunnerLimits:
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    eos_token_ids: tuple[int, ...] = ()


def make_runner(
    model: Decoder, cache: KVCache, limits: RunnerLimits, progress: Progress | None = None
) -> ModelRunner | DeviceRunner[Any]:
    """Overwrites the pool's first block: before the pool holds anything. Where the kernels for the model's device can't
    be compiled, torch's operations serve, and a warning says so. Raises ConfigError where the device's memory does not
    suffice."""
    if model.device.type == "cuda":
        runner = _device_runner(model, cache, limits)
        if runner is not None:
            _make_ready(runner, limits, progress or CountProgress("recording decode steps"))
            return runner
    plain = ModelRunner(
        model,
        cache,
        max_num_seqs=limits.max_num_seqs,
        max_model_len=limits.max_model_len,
        eos_token_ids=limits.eos_token_ids,
    )
    plain.warm_up(_CPU_WARM_UP_TOKENS)
    return plain


def activation_bytes(model: Decoder, layout: KVLayout, limits: RunnerLimits) -> int:
    """What the largest steps take of a GPU's memory besides weights and pool: measured, by running them over a pool of
    one block. That of a decode step counts twice, for graphs keep theirs. Raises ConfigError where there is not as
    much."""
    if model.device.type != "cuda":
        return 0
    runner = _device_runner(model, KVCache(layout, 1, model.device), limits)
    if runner is None:
        return 0
    decode = _peak(runner.warm_up_decode, limits)
    return max(_peak(lambda: runner.warm_up(limits.max_num_batched_tokens), limits), decode) + decode


def _peak(work: Callable[[], None], limits: RunnerLimits) -> int:
    """Bytes, above those that are held anyway."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    with _memory_errors(limits):
        work()
        torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - held


def _device_runner(model: Decoder, cache: KVCache, limits: RunnerLimits) -> DeviceRunner[Any] | None:
    """None, with a warning, where its kernels can't be had: they are compiled here."""
    slots = Slots(limits.max_num_seqs, limits.max_model_len, cache.layout.block_size)
    kernels = device_kernels(cache, slots, model.spec, limits.eos_token_ids)
    if kernels is None:
        return None
    runner = DeviceRunner(model, cache, slots, device=Cuda(), attention=kernels.attention, sampler=kernels.sampler)
    try:
        with _memory_errors(limits):
            runner.warm_up(_LEAST_WARM_UP_TOKENS)
            runner.warm_up_decode()
            torch.cuda.synchronize()
    except ConfigError:
        raise
    except Exception as error:  # of Triton, its compiler or the driver: each has a tree of its own
        warn_of_torch(cache.device, error)
        return None
    return runner


def _make_ready(runner: DeviceRunner[Any], limits: RunnerLimits, show: Progress) -> None:
    with _memory_errors(limits):
        for done, total in runner.record():
            show(done, total)
        # Libraries choose and load other kernels for other numbers of rows.
        for num_tokens in _halves(limits.max_num_batched_tokens):
            runner.warm_up(num_tokens)
        torch.cuda.synchronize()


def _halves(most: int) -> Iterator[int]:
    while most > _LEAST_WARM_UP_TOKENS:
        yield most
        most //= 2
    yield most


@contextmanager
def _memory_errors(limits: RunnerLimits) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"the GPU's memory does not suffice for steps of {limits.max_num_batched_tokens} tokens of "
            f"{limits.max_num_seqs} requests: give a smaller --max-num-batched-tokens or --max-num-seqs, or a lower "
            f"--gpu-memory-utilization ({in_one_line(error)})"
        ) from None
