"""Which attention serves a pool, and which sampler a device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.attention import Attention, BlockTables
from engine.kernels.cpu.attention import CompiledAttention
from engine.kernels.cpu.library import load_kernel
from engine.kernels.cpu.sampling import CompiledSampler
from engine.kernels.reference import ReferenceAttention
from engine.kv_cache import KVCache
from engine.sampler import ReferenceSampler, Sampler


def choose_attention(cache: KVCache, block_tables: BlockTables, windows: Sequence[int | None]) -> Attention:
    """The compiled kernel for a pool on a CPU, where it can be had; the torch reference otherwise.

    `windows`: those that occur among the model's layers.
    """
    if cache.device.type == "cpu" and CompiledAttention.supports(cache.layout):
        kernel = load_kernel()
        if kernel is not None:
            return CompiledAttention(kernel, cache, block_tables, windows)
    return ReferenceAttention(cache, block_tables, windows)


def choose_sampler(device: torch.device, eos_token_ids: Sequence[int]) -> Sampler:
    """The compiled sampler for logits on a CPU, where it can be had; the torch reference otherwise."""
    kernel = load_kernel() if device.type == "cpu" else None
    return ReferenceSampler(eos_token_ids) if kernel is None else CompiledSampler(kernel, eos_token_ids)
