"""Attention by the Triton kernels, for pools in device memory.

A step's spans come as they are, and travel to the device with the block tables that they need in one copy; or they are
on the device already, in buffers that keep their places, so that a CUDA graph of a decode step can be replayed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from baton.layout import KVLayout
from engine.attention import AttentionBatch, BlockTables, HeadNorms, Rotary, Span
from engine.kernels.gpu import tuning
from engine.kernels.gpu.attention_decode import DecodeScratch, attention_decode, choose_num_splits
from engine.kernels.gpu.attention_prefill import SpanTensors, attention_prefill, tile_map, tokens_per_tile
from engine.kernels.gpu.attention_prefill_hopper import attention_prefill_hopper, item_map, suits
from engine.kernels.gpu.rotary_write import rotary_write, write
from engine.kernels.gpu.tuning import Configure, LaunchConfig
from engine.kv_cache import KVCache

IntArray = npt.NDArray[np.int32]

_DTYPES = ("float32", "bfloat16", "float16")
_LEAST_HEAD_DIM, _MOST_HEAD_DIM = 16, 256
_ALIGNMENT = 4
"""In int32: at 16 bytes. Pieces that begin elsewhere would have kernels compiled of their own."""


@dataclass(frozen=True, slots=True)
class DecodeBuffers:
    """A decode step of up to `batch` sequences, one token each; on the device, at places that stay."""

    slots: Tensor
    """`[batch]` int32: rows of `block_tables`."""
    lengths: Tensor
    """`[batch]` int32: each token's position + 1. 0 where there is no sequence: nothing is read or written for it, and
    what it attends to is 0."""
    block_tables: Tensor
    """`[num_slots, max_blocks]` int32, filled as far as `lengths` say. Buffers of several batch sizes can share it."""
    scratch: DecodeScratch
    output: Tensor
    """`[batch, num_heads * head_dim]`."""


class TritonAttention:
    def __init__(
        self,
        cache: KVCache,
        block_tables: BlockTables,
        num_heads: int,
        configure: Configure = tuning.config,
    ) -> None:
        """`block_tables` are the host's. `num_heads`: of the query."""
        layout = cache.layout
        assert self.supports(layout), f"{layout} is not for these kernels"
        assert block_tables.dtype == np.int32, f"block tables of {block_tables.dtype}"
        self.cache, self.num_heads = cache, num_heads
        self.group = num_heads // layout.num_kv_heads
        assert self.group * layout.num_kv_heads == num_heads, f"{num_heads} heads share {layout.num_kv_heads}"
        self.configs = _Configs.of(configure, cache)
        self._block_tables = block_tables

    @staticmethod
    def supports(layout: KVLayout) -> bool:
        return (
            layout.dtype in _DTYPES
            and layout.head_dim % 8 == 0
            and _LEAST_HEAD_DIM <= layout.head_dim <= _MOST_HEAD_DIM
        )

    def batch(self, spans: Sequence[Span]) -> AttentionBatch:
        packed = self._pack(spans)
        if all(span.count == 1 for span in spans):
            longest = max((span.end for span in spans), default=0)
            scratch = self.scratch(len(spans), longest)
            return _DecodeBatch(
                self, DecodeBuffers(packed.slots, packed.lengths, packed.tables, scratch, self._output(len(spans)))
            )
        return _PrefillBatch(self, packed)

    def static_batch(self, buffers: DecodeBuffers) -> AttentionBatch:
        """Reads all that it needs from `buffers`, on the device, whenever it is called or replayed."""
        return _DecodeBatch(self, buffers)

    def decode_buffers(self, batch: int, block_tables: Tensor) -> DecodeBuffers:
        """Of `batch` rows that hold no sequence yet, over the device's `block_tables`."""
        longest = block_tables.shape[1] * self.cache.layout.block_size
        return DecodeBuffers(
            slots=torch.zeros(batch, dtype=torch.int32, device=self.cache.device),
            lengths=torch.zeros(batch, dtype=torch.int32, device=self.cache.device),
            block_tables=block_tables,
            scratch=self.scratch(batch, longest),
            output=self._output(batch),
        )

    def scratch(self, batch: int, max_length: int) -> DecodeScratch:
        layout = self.cache.layout
        num_splits = choose_num_splits(self.configs.split, batch, layout.num_kv_heads, max_length)
        return DecodeScratch.empty(batch, self.num_heads, num_splits, layout.head_dim, self.cache.device)

    def _output(self, num_tokens: int) -> Tensor:
        pool = self.cache.tensor
        return torch.empty(
            (num_tokens, self.num_heads * self.cache.layout.head_dim), dtype=pool.dtype, device=pool.device
        )

    def _pack(self, spans: Sequence[Span]) -> _Packed:
        rows = np.array([(s.row, s.start, s.count, s.slot) for s in spans], dtype=np.int32).reshape(-1, 4)
        row, start, count, slot = np.ascontiguousarray(rows.T)
        index = np.arange(len(spans), dtype=np.int32)
        first_rows = np.cumsum(count, dtype=np.int32) - count
        positions = np.arange(count.sum(), dtype=np.int32) - np.repeat(first_rows - start, count)
        width = -(-int((start + count).max(initial=0)) // self.cache.layout.block_size)
        tokens = tokens_per_tile(self.configs.prefill, self.group)
        if suits(self.cache.tensor):
            heads, programs = self.cache.layout.num_kv_heads, self.configs.prefill.programs
            tile_spans, tile_tokens = item_map(start, count, tokens, heads, programs)
        else:
            tile_spans, tile_tokens = tile_map(start, count, tokens)
        pieces = (
            row,
            start,
            count,
            index,
            tile_spans,
            tile_tokens,
            np.repeat(index, count),
            positions + 1,
            self._block_tables[slot, :width].ravel(),
        )
        row_, start_, count_, index_, spans_, tokens_, slots, lengths, tables = _to_device(pieces, self.cache.device)
        return _Packed(
            SpanTensors(row_, start_, count_, index_, spans_, tokens_),
            slots,
            lengths,
            tables.view(len(spans), width),
            self._output(len(positions)),
        )


@dataclass(frozen=True, slots=True)
class _Configs:
    split: LaunchConfig
    reduce: LaunchConfig
    prefill: LaunchConfig
    rotary: LaunchConfig

    @staticmethod
    def of(configure: Configure, cache: KVCache) -> _Configs:
        on_gpu = cache.device.type == "cuda"
        device_name = torch.cuda.get_device_name(cache.device) if on_gpu else cache.device.type
        prefill = "attention_prefill_hopper" if suits(cache.tensor) else "attention_prefill"
        names = ("attention_decode", "attention_reduce", prefill, "rotary_write")
        element = cache.tensor.element_size()
        return _Configs(*(configure(n, device_name, cache.layout.head_dim).for_element(element) for n in names))


@dataclass(frozen=True, slots=True)
class _Packed:
    """A step's spans on the device, over block tables that hold only theirs."""

    spans: SpanTensors
    slots: Tensor
    """`[num_tokens]`, as DecodeBuffers has them."""
    lengths: Tensor
    tables: Tensor
    output: Tensor


class _Batch:
    """What both kinds have in common: they know each token's place."""

    def __init__(self, attention: TritonAttention, slots: Tensor, lengths: Tensor, block_tables: Tensor) -> None:
        self._pool = attention.cache.tensor
        self._configs, self._num_heads = attention.configs, attention.num_heads
        self._slots, self._lengths, self._block_tables = slots, lengths, block_tables

    def rotate_and_write(self, layer: int, qkv: Tensor, rotary: Rotary, norms: HeadNorms | None) -> Tensor:
        """In place: the query is a view of `qkv`."""
        heads = qkv.view(len(qkv), -1, self._pool.shape[-1])
        query = heads[:, : self._num_heads]
        rotary_write(
            qkv,
            self._pool,
            layer,
            rotary=rotary,
            norms=norms,
            slots=self._slots,
            lengths=self._lengths,
            block_tables=self._block_tables,
            query=query,
            config=self._configs.rotary,
        ).run()
        return query

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        write(
            key,
            value,
            self._pool,
            layer,
            slots=self._slots,
            lengths=self._lengths,
            block_tables=self._block_tables,
            config=self._configs.rotary,
        ).run()


class _DecodeBatch(_Batch):
    def __init__(self, attention: TritonAttention, buffers: DecodeBuffers) -> None:
        super().__init__(attention, buffers.slots, buffers.lengths, buffers.block_tables)
        self._scratch, self._output = buffers.scratch, buffers.output

    def attend(self, layer: int, query: Tensor, window: int | None) -> Tensor:
        for launch in attention_decode(
            query,
            self._pool,
            layer,
            slots=self._slots,
            lengths=self._lengths,
            block_tables=self._block_tables,
            window=window,
            scratch=self._scratch,
            output=self._output,
            split=self._configs.split,
            reduce=self._configs.reduce,
        ):
            launch.run()
        return self._output


class _PrefillBatch(_Batch):
    def __init__(self, attention: TritonAttention, packed: _Packed) -> None:
        super().__init__(attention, packed.slots, packed.lengths, packed.tables)
        self._spans, self._output = packed.spans, packed.output

    def attend(self, layer: int, query: Tensor, window: int | None) -> Tensor:
        attend = attention_prefill_hopper if suits(self._pool) else attention_prefill
        attend(
            query,
            self._pool,
            layer,
            spans=self._spans,
            block_tables=self._block_tables,
            window=window,
            output=self._output,
            config=self._configs.prefill,
        ).run()
        return self._output


def _to_device(pieces: Sequence[IntArray], device: torch.device) -> list[Tensor]:
    """In one copy, which the host does not wait for."""
    sizes = [piece.size for piece in pieces]
    padded = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
    # Pinned memory comes from torch's cache, which gives none out again while a copy still reads it.
    host = torch.empty(sum(padded), dtype=torch.int32, pin_memory=device.type == "cuda")
    begins = np.cumsum(padded) - padded
    values = host.numpy()
    for begin, piece in zip(begins, pieces, strict=True):
        values[begin : begin + piece.size] = piece
    on_device = host.to(device, non_blocking=True)
    return [on_device[begin : begin + size] for begin, size in zip(begins, sizes, strict=True)]
