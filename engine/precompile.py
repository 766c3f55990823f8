"""Compiles what a model's steps, and transfers of its blocks, launch on a GPU, on a machine that need not have one: for
the image that workers start from.

The steps themselves are taken, on tensors that have a shape and no values, and in the place of each launch its kernel
is compiled. So what is compiled is what will be asked for, and Triton finds it in its cache.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from baton.layout import KVLayout
from engine.device_runner import DeviceRunner
from engine.kernels.gpu import launch, tuning
from engine.kernels.gpu.attention import TritonAttention
from engine.kernels.gpu.blocks import launch_all
from engine.kernels.gpu.elementwise import TritonElementWise
from engine.kernels.gpu.launch import Launch
from engine.kernels.gpu.slot_sampler import SlotSampler
from engine.kv_cache import KVCache
from engine.models.decoder import Decoder
from engine.models.spec import ModelSpec
from engine.models.tensors import expected_tensors
from engine.progress import Progress
from engine.runners import RunnerLimits
from engine.slots import Slots

_META = torch.device("meta")
_WARP = 32
_TOKENS = 16


def precompile(
    spec: ModelSpec, layout: KVLayout, limits: RunnerLimits, gpu: str, compute_capability: int, show: Progress
) -> int:
    """For the GPU that CUDA calls `gpu`, of a `compute_capability` such as 90. Returns how many kernels there are. For
    a process of its own: Triton compiles for that GPU from then on."""
    triton.runtime.driver.set_active(AbsentGPU(compute_capability))
    compiled: set[Any] = set()

    def compile_launch(each: Launch) -> None:
        compiled.add(each.compile().hash)

    with launch.instead_of_running(compile_launch), torch.inference_mode():
        runner = _runner(spec, layout, limits, gpu)
        runner.warm_up(_TOKENS)
        for done, total in runner.record():
            show(done, total)
        launch_all(KVCache(layout, 1, _META).blocks)
    return len(compiled)


def _runner(spec: ModelSpec, layout: KVLayout, limits: RunnerLimits, gpu: str) -> DeviceRunner[Any]:
    shapes, dtype = expected_tensors(spec), getattr(torch, layout.dtype)

    def take(name: str) -> Tensor:
        return torch.empty(shapes[name], dtype=dtype, device=_META)

    decoder = Decoder(spec, take, TritonElementWise(spec.norm_eps))
    slots = Slots(limits.max_num_seqs, limits.max_model_len, layout.block_size)
    cache = KVCache(layout, 1, _META)
    return DeviceRunner(
        decoder,
        cache,
        slots,
        device=_Nothing(),
        attention=TritonAttention(cache, slots.block_tables, spec.num_heads, partial(_configure, gpu)),
        sampler=SlotSampler(limits.eos_token_ids, limits.max_num_seqs + 1, _META),
    )


def _configure(gpu: str, kernel: str, _: str, head_dim: int) -> tuning.LaunchConfig:
    return tuning.config(kernel, gpu, head_dim)


class _Nothing:
    """A Device that has nothing to do."""

    def mark(self) -> _Nothing:
        return self

    def wait(self) -> None:
        pass

    def seconds_since(self, earlier: object) -> float:
        return 0.0

    def pinned(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64)

    def capture(self, body: Callable[[], None]) -> _Nothing:
        body()
        return self

    def replay(self) -> None:
        pass


class AbsentGPU:
    """In the place of Triton's driver: what it asks a driver for before it compiles."""

    def __init__(self, compute_capability: int) -> None:
        self._target = GPUTarget("cuda", compute_capability, _WARP)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0
