"""Kernels by themselves: attention and the moving of blocks, in Llama-3-8B's shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from baton.layout import KVLayout
from bench.figures import Figure
from bench.gpu.shapes import SHAPES
from bench.gpu.timing import milliseconds, queued
from bench.roofline import Peaks
from engine.attention import Span
from engine.kernels.gpu.attention import TritonAttention
from engine.kernels.gpu.blocks import copy_blocks, gather_blocks, scatter_blocks, sum_blocks
from engine.kv_cache import KVCache

_BLOCK_SIZE = 16
_SPEC = SHAPES["Llama-3-8B"]
_DECODES = ((64, 8192), (256, 1024), (8, 4096), (1, 8192))
_PREFILLS = ((8, 4096, 0), (1, 8192, 0), (4, 1024, 4096))
"""Sequences, new tokens of each, cached tokens of each."""
_MOVED_BLOCKS = 1024
_SDPA = {
    "torch SDPA, cuDNN": SDPBackend.CUDNN_ATTENTION,
    "torch SDPA, flash": SDPBackend.FLASH_ATTENTION,
}


@torch.inference_mode()
def decode_attention(peaks: Peaks) -> Iterator[Figure]:
    """One token a sequence. Several layers in turn, so that no cache knows the next one's keys."""
    for batch, context in _DECODES:
        layers = 2 if batch * context > 1 << 17 else 8
        attention, tables = _attention(batch, context, layers)
        buffers = attention.decode_buffers(batch, torch.from_numpy(tables).cuda())
        buffers.slots.copy_(torch.arange(batch))
        buffers.lengths.fill_(context)
        static = attention.static_batch(buffers)
        query = _random(batch, _SPEC.num_heads, _SPEC.head_dim)
        calls = [partial(static.attend, layer, query, None) for layer in range(layers)]
        read = batch * context * 2 * _SPEC.kv_size * 2
        yield _figure(
            "paged decode attention, a layer", f"batch {batch}, context {context:,}", "baton", milliseconds(calls),
            1e3 * read / peaks.read_bytes_per_second,
        )  # fmt: skip


@torch.inference_mode()
def prefill_attention(peaks: Peaks) -> Iterator[Figure]:
    """Ours over blocks; torch's over keys and values that lie contiguous, where nothing is cached."""
    for batch, count, cached in _PREFILLS:
        case = f"{batch} × {count:,} tokens" + (f" behind {cached:,}" if cached else "")
        seen = count * cached + count * (count + 1) / 2
        bound = 1e3 * batch * 4 * seen * _SPEC.query_size / peaks.flops_per_second

        def figure(side: str, ms: tuple[float, ...], case: str = case, bound: float = bound) -> Figure:
            return _figure("paged prefill attention, a layer", case, side, ms, bound)

        attention, _ = _attention(batch, cached + count, 1)
        spans = [Span(i * count, cached, count, i) for i in range(batch)]
        ours, query = attention.batch(spans), _random(batch * count, _SPEC.num_heads, _SPEC.head_dim)
        yield figure("baton", milliseconds([partial(ours.attend, 0, query, None)]))
        if not cached:
            q, k, v = (_random(batch, heads, count, _SPEC.head_dim) for heads in (_SPEC.num_heads, *[8] * 2))
            for side, backend in _SDPA.items():
                with sdpa_kernel(backend):
                    yield figure(side, milliseconds([_sdpa(q, k, v)]))


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@torch.inference_mode()
def moves(peaks: Peaks, copy_bytes_per_second: float) -> Iterator[Figure]:
    """Blocks of 2 MiB between the pool and a staging buffer, and within the pool, with checksums; bytes read and bytes
    written count. Then checksums alone."""
    layout = _layout(_SPEC.num_layers)
    cache = KVCache(layout, 2 * _MOVED_BLOCKS, "cuda")
    cache.tensor.normal_()
    blocks = cache.blocks
    indices, others = torch.randperm(len(blocks), device="cuda").split(_MOVED_BLOCKS)
    staged = torch.empty((_MOVED_BLOCKS, layout.block_bytes), dtype=torch.uint8, device="cuda")
    checksums = torch.zeros(_MOVED_BLOCKS, dtype=torch.int64, device="cuda")
    bound = 1e3 * 2 * staged.nbytes / copy_bytes_per_second
    case = f"{_MOVED_BLOCKS:,} blocks of {layout.block_bytes >> 20} MiB"
    gathered = milliseconds([lambda: gather_blocks(blocks, indices, staged, checksums)])
    yield _figure("block gather with checksum", case, "baton", gathered, bound)
    scattered = milliseconds([lambda: scatter_blocks(staged, indices, blocks, checksums)])
    yield _figure("block scatter with checksum", case, "baton", scattered, bound)
    copied = milliseconds([lambda: copy_blocks(blocks, indices, blocks, others, checksums)])
    yield _figure("block copy from pool to pool with checksum", case, "baton", copied, bound)
    summed = milliseconds([lambda: sum_blocks(blocks, indices, checksums)])
    yield _figure("block checksum", case, "baton", summed, 1e3 * staged.nbytes / peaks.read_bytes_per_second)


@torch.inference_mode()
def copy_bytes_per_second() -> float:
    """Read and written, of the fastest of torch's ways to copy within the device."""
    source = torch.empty(1 << 29, dtype=torch.int32, device="cuda").random_()
    target = torch.empty_like(source)
    ways = (lambda: target.copy_(source), lambda: torch.add(source, 1, out=target))
    best = min(min(queued(way)) for way in ways)
    return 2 * source.nbytes / best * 1e3


def _attention(
    batch: int, context: int, layers: int
) -> tuple[TritonAttention, np.ndarray[tuple[int, int], np.dtype[np.int32]]]:
    """Over a pool of noise, each sequence's blocks anywhere in it."""
    per_sequence = context // _BLOCK_SIZE
    cache = KVCache(_layout(layers), batch * per_sequence, "cuda")
    cache.tensor.normal_()
    order = np.random.default_rng(0).permutation(batch * per_sequence).astype(np.int32)
    tables = order.reshape(batch, per_sequence)
    return TritonAttention(cache, tables, _SPEC.num_heads), tables


def _layout(layers: int) -> KVLayout:
    return KVLayout(layers, _SPEC.num_kv_heads, _BLOCK_SIZE, _SPEC.head_dim, "bfloat16", b"bench")


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda")


def _figure(measure: str, case: str, side: str, ms: tuple[float, ...], bound: float) -> Figure:
    return Figure(measure, case, side, "ms", ms, bound=bound)
