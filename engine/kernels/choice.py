"""Which kernels serve a pool, a model and a device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from engine.attention import Attention, BlockTables
from engine.elementwise import ElementWise
from engine.kernels.cpu.attention import CompiledAttention
from engine.kernels.cpu.elementwise import CompiledElementWise
from engine.kernels.cpu.library import load_kernel
from engine.kernels.cpu.sampling import CompiledSampler
from engine.kernels.reference import ReferenceAttention
from engine.kernels.torch_elementwise import TorchElementWise
from engine.kv_cache import KVCache
from engine.sampler import ReferenceSampler, Sampler


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
    """As `choose_attention`. `row_sizes`: how many values the rows of hidden states and of activations have."""
    if device.type == "cpu" and CompiledElementWise.supports(dtype, row_sizes):
        kernel = load_kernel()
        if kernel is not None:
            return CompiledElementWise(kernel, norm_eps)
    return TorchElementWise(norm_eps)
