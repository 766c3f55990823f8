"""Sequences in a pool for the Triton kernels, and the torch reference in float32, on the CPU, over the same values. The
pool is NaN wherever nobody has written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from baton.layout import KVLayout
from engine.attention import AttentionBatch, BlockTables, Span
from engine.kernels.gpu import tuning
from engine.kernels.gpu.attention import DecodeBuffers, TritonAttention
from engine.kernels.gpu.tuning import Configure, LaunchConfig
from engine.kernels.reference import ReferenceAttention, ReferenceBatch
from engine.kv_cache import KVCache

LAYERS, LAYER = 3, 1
# The interpreter computes nonsense in bfloat16.
DTYPES = ["float32", "float16"] + ["bfloat16"] * torch.cuda.is_available()
# Outputs are averages of values around 1. In 16 bits weights are rounded, and then the outputs.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1.6e-2, "float16": 2e-3}


@dataclass(frozen=True)
class Shape:
    head_dim: int = 64
    num_kv_heads: int = 1
    group: int = 7
    block_size: int = 16
    window: int | None = None
    dtype: str = "float32"

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.group


def small_tiles(kernel: str, device_name: str, head_dim: int) -> LaunchConfig:
    """So that short sequences, which the interpreter can do with, have several tiles and splits."""
    by_kernel = {
        "attention_decode": LaunchConfig(4, 2, block_n=32, programs=24, max_splits=8, split_positions=32),
        "attention_reduce": LaunchConfig(4, 1),
        "attention_prefill": LaunchConfig(4, 2, block_m=32, block_n=32),
        "attention_prefill_hopper": LaunchConfig(4, 2, block_m=128, block_n=128, programs=3),
        "rotary_write": LaunchConfig(4, 1, block_m=8),
    }
    return by_kernel[kernel]


class Pool:
    """Sequences of random keys and values over shuffled blocks, and a batch that extends each of them."""

    def __init__(self, shape: Shape, batch: Sequence[tuple[int, int]], device: torch.device, seed: int = 0) -> None:
        """`batch`: (start, count) of each sequence."""
        self.shape, self.device = shape, device
        generator = torch.Generator().manual_seed(seed)
        blocks = [-(-(start + count) // shape.block_size) for start, count in batch]
        order = torch.randperm(sum(blocks) + 2, generator=generator).to(torch.int32)
        # Slots in another order than rows, and tables that name no block behind the last.
        self.tables: BlockTables = np.full((len(batch) + 1, max(blocks) + 1), 2**30, dtype=np.int32)
        self.spans, row = [], 0
        for index, (start, count) in enumerate(batch):
            slot = len(batch) - index
            self.tables[slot, : blocks[index]] = order[sum(blocks[:index]) :][: blocks[index]].numpy()
            self.spans.append(Span(row, start, count, slot))
            row += count
        dtype: torch.dtype = getattr(torch, shape.dtype)

        def random(tokens: int, heads: int) -> Tensor:
            return torch.randn(tokens, heads, shape.head_dim, generator=generator).to(dtype)

        # What the pool holds, on the CPU and in float32.
        self.exact = self._empty("float32", len(order), torch.device("cpu"))
        for span in self.spans:
            if span.start:
                past = ReferenceAttention(self.exact, self.tables, (None,)).batch([Span(0, 0, span.start, span.slot)])
                past.write(LAYER, *(random(span.start, shape.num_kv_heads).float() for _ in "kv"))
        self.cache = self._empty(shape.dtype, len(order), device)
        self.cache.tensor.copy_(self.exact.tensor)
        self.qkv = random(row, shape.num_heads + 2 * shape.num_kv_heads).flatten(1).to(device)

    def heads(self) -> tuple[Tensor, ...]:
        """Query, key and value: views with other heads between the tokens, as the model's are."""
        kv_heads = self.shape.num_kv_heads
        of_token = self.qkv.view(len(self.qkv), -1, self.shape.head_dim)
        return torch.split(of_token, [self.shape.num_heads, kv_heads, kv_heads], dim=1)

    def triton(self, configure: Configure = small_tiles) -> TritonAttention:
        return TritonAttention(self.cache, self.tables, self.shape.num_heads, configure)

    def buffers(self, attention: TritonAttention, padding: int = 0) -> DecodeBuffers:
        """Of the batch, whose spans are single tokens, and so many rows of no sequence."""
        tables = torch.from_numpy(self.tables).to(self.device)
        buffers = attention.decode_buffers(len(self.spans) + padding, tables)
        buffers.slots.fill_(-1)
        buffers.output.fill_(float("nan"))
        for row, span in enumerate(self.spans):
            buffers.slots[row], buffers.lengths[row] = span.slot, span.end
        return buffers

    def attend(self, batch: AttentionBatch, padding: int = 0) -> Tensor:
        """In float32, on the CPU, without the rows of no sequence."""
        query, key, value = (torch.cat((x, x[:1].expand(padding, -1, -1))) for x in self.heads())
        batch.write(LAYER, key, value)
        attended = batch.attend(LAYER, query, self.shape.window)
        return attended.float().cpu()[: len(self.qkv)]

    def reference(self) -> ReferenceBatch:
        return ReferenceAttention(self.exact, self.tables, (self.shape.window,)).batch(self.spans)

    def expected(self) -> Tensor:
        query, key, value = (x.float().cpu() for x in self.heads())
        batch = self.reference()
        batch.write(LAYER, key, value)
        attended = batch.attend(LAYER, query, self.shape.window)
        assert not attended.isnan().any()
        return attended

    def forget(self, position: int, span: Span) -> None:
        """Makes NaN of what the sequence has there."""
        block, offset = divmod(position, self.shape.block_size)
        for cache in (self.cache, self.exact):
            cache.tensor[int(self.tables[span.slot, block]), :, :, :, offset] = float("nan")

    def check(self, attended: Tensor) -> None:
        bound = TOLERANCE[self.shape.dtype]
        torch.testing.assert_close(attended, self.expected(), atol=bound, rtol=bound)

    def _empty(self, dtype: str, num_blocks: int, device: torch.device) -> KVCache:
        shape = self.shape
        layout = KVLayout(LAYERS, shape.num_kv_heads, shape.block_size, shape.head_dim, dtype, b"test")
        cache = KVCache(layout, num_blocks, device)
        cache.tensor.fill_(float("nan"))
        return cache


default_tiles: Configure = tuning.config
