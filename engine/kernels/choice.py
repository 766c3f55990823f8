"""Which kernels serve a pool, a model and a device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.attention import Attention, BlockTables
from engine.elementwise import ElementWise
from engine.kernels.cpu.attention import CompiledAttention
from engine.kernels.cpu.elementwise import CompiledElementWise
from engine.kernels.cpu.library import load_kernel
from engine.kernels.cpu.sampling import CompiledSampler
from engine.kernels.fallback import warn_of_torch
from engine.kernels.reference import ReferenceAttention
from engine.kernels.torch_elementwise import TorchElementWise
from engine.kv_cache import KVCache
from engine.models.spec import ModelSpec
from engine.sampler import ReferenceSampler, Sampler
from engine.slots import Slots


@dataclass(frozen=True, slots=True)
class DeviceKernels:
    """What engine/device_runner.py needs. Triton's types are not imported where there may be no Triton."""

    attention: Any
    sampler: Any


@dataclass(frozen=True, slots=True)
class BlockKernels:
    """What moves a pool's blocks within a device, with their checksums: see engine/kernels/gpu/blocks.py."""

    copy: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
    sum: Callable[[Tensor, Tensor, Tensor], None]


def choose_attention(cache: KVCache, block_tables: BlockTables, windows: Sequence[int | None]) -> Attention:
    """The compiled kernel for a pool on a CPU, where it can be had; the torch reference otherwise.

    `windows`: those that occur among the model's layers.
    """
    if cache.device.type == "cpu" and CompiledAttention.supports(cache.layout):
        kernel = load_kernel()
        if kernel is not None:
            return CompiledAttention(kernel, cache, block_tables)
    return ReferenceAttention(cache, block_tables, windows)


def choose_sampler(device: torch.device, eos_token_ids: Sequence[int]) -> Sampler:
    """The compiled sampler for logits on a CPU, where it can be had; the torch reference otherwise."""
    kernel = load_kernel() if device.type == "cpu" else None
    return ReferenceSampler(eos_token_ids) if kernel is None else CompiledSampler(kernel, eos_token_ids)


def choose_elementwise(
    device: torch.device, dtype: torch.dtype, row_sizes: Iterable[int], norm_eps: float
) -> ElementWise:
    """Triton's kernels on a GPU, the compiled one on a CPU, where it can be had; torch's operations otherwise.
    `row_sizes`: how many values the rows of hidden states and of activations have."""
    if device.type == "cuda":
        triton_elementwise = _on_gpu(device, dtype, tuple(row_sizes), norm_eps)
        return TorchElementWise(norm_eps) if triton_elementwise is None else triton_elementwise
    if device.type == "cpu" and CompiledElementWise.supports(dtype, row_sizes):
        kernel = load_kernel()
        if kernel is not None:
            return CompiledElementWise(kernel, norm_eps)
    return TorchElementWise(norm_eps)


def device_kernels(cache: KVCache, slots: Slots, spec: ModelSpec, eos_token_ids: Sequence[int]) -> DeviceKernels | None:
    """Triton's kernels for a pool on a GPU; None, with a warning, where they can't serve it."""
    try:
        from engine.kernels.gpu.attention import TritonAttention
        from engine.kernels.gpu.sampling import TritonSampler
        from engine.kernels.gpu.slot_sampler import SlotSampler
    except ImportError as error:
        warn_of_torch(cache.device, error)
        return None
    dtype = cache.tensor.dtype
    if not TritonAttention.supports(cache.layout) or not TritonSampler.supports(dtype, spec.vocab_size):
        warn_of_torch(cache.device, f"no kernels for {cache.layout} and a vocabulary of {spec.vocab_size}")
        return None
    return DeviceKernels(
        TritonAttention(cache, slots.block_tables, spec.num_heads),
        SlotSampler(eos_token_ids, len(slots.block_tables) + 1, cache.device),
    )


def block_kernels(cache: KVCache) -> BlockKernels | None:
    """Triton's, for a pool on a GPU, compiled; None, with a warning, where they can't serve it."""
    try:
        from engine.kernels.gpu.blocks import copy_blocks, launch_all, sum_blocks

        launch_all(cache.blocks)
        torch.cuda.synchronize(cache.device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of Triton, its compiler or the driver: each has a tree of its own
        warn_of_torch(cache.device, error)
        return None
    return BlockKernels(copy_blocks, sum_blocks)


def _on_gpu(
    device: torch.device, dtype: torch.dtype, row_sizes: tuple[int, ...], norm_eps: float
) -> ElementWise | None:
    """Tried out, for a kernel that a device can't have is known when it is compiled."""
    try:
        from engine.kernels.gpu.elementwise import TritonElementWise

        hidden, inner = row_sizes
        if not TritonElementWise.supports(dtype, hidden):
            return None
        triton_elementwise = TritonElementWise(norm_eps)
        step = triton_elementwise.step(torch.zeros((1, hidden), dtype=dtype, device=device))
        step.add_norm(torch.zeros((1, hidden), dtype=dtype, device=device), torch.zeros(hidden, device=device))
        step.gate(torch.zeros((1, 2 * inner), dtype=dtype, device=device))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of Triton, its compiler or the driver: each has a tree of its own
        warn_of_torch(device, error)
        return None
    return triton_elementwise
