"""Attention over block tables, out of torch operations: right on every device, and the oracle of the other kernels.

A batch mixes prefill chunks and decodes of any lengths. One gather a layer copies the batch's blocks out of the pool,
head by head, so that each sequence's keys and values become plain contiguous matrices; then each sequence attends
to exactly the positions that it has. Positions of a block that nobody has written are never multiplied, not even by
zero: they may hold NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.attention import BlockTables, HeadNorms, Rotary, Span
from engine.kv_cache import KVCache

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _View:
    """What a sequence sees of one layer, among the gathered rows."""

    span: Span
    rows: int
    """Gathered rows, keys and values of all heads."""
    first: int
    """Within the gathered positions: the first that is seen."""
    last: int
    """One behind the last."""
    mask: Tensor | None
    """`[count, last - first]`, True where a query sees a position; None where all do or is_causal says it."""
    is_causal: bool


@dataclass(frozen=True, slots=True)
class _Gather:
    rows: Tensor
    """Of layer 0, in the pool seen as rows of one head's tile; a sequence's keys head by head, then its values."""
    views: tuple[_View, ...]


class ReferenceAttention:
    def __init__(self, cache: KVCache, block_tables: BlockTables, windows: Sequence[int | None]) -> None:
        """`windows`: those that occur among the model's layers."""
        self._cache, self._block_tables, self._windows = cache, block_tables, set(windows)

    def batch(self, spans: Sequence[Span]) -> ReferenceBatch:
        return ReferenceBatch(self._cache, self._block_tables, self._windows, spans)


class ReferenceBatch:
    def __init__(
        self, cache: KVCache, block_tables: BlockTables, windows: set[int | None], spans: Sequence[Span]
    ) -> None:
        layout = cache.layout
        self._num_kv_heads, self._head_dim = layout.num_kv_heads, layout.head_dim
        self._block_size = layout.block_size
        # A tile is one head's keys, or values, of one block: [block_size, head_dim], contiguous.
        self._tiles_per_layer = 2 * layout.num_kv_heads
        self._tiles_per_block = layout.num_layers * self._tiles_per_layer
        self._device = cache.device
        self._tiles = cache.tensor.view(-1, layout.block_size * layout.head_dim)
        self._vectors = cache.tensor.view(-1, layout.head_dim)
        self._block_tables = block_tables
        self._slots = self._vector_slots(spans)
        self._gathers = {window: self._gather(spans, window) for window in windows}

    def rotate_and_write(self, layer: int, qkv: Tensor, rotary: Rotary, norms: HeadNorms | None) -> Tensor:
        heads = qkv.view(len(qkv), -1, self._head_dim)
        num_heads, num_kv_heads = heads.shape[1] - 2 * self._num_kv_heads, self._num_kv_heads
        query_key, value = torch.split(heads, [num_heads + num_kv_heads, num_kv_heads], dim=1)
        if norms is not None:
            query, key = torch.split(query_key, [num_heads, num_kv_heads], dim=1)
            normed = (_norm(query, norms.query, norms.eps), _norm(key, norms.key, norms.eps))
            query_key = torch.cat(normed, dim=1)
        query, key = torch.split(_rotate(query_key, rotary), [num_heads, num_kv_heads], dim=1)
        self.write(layer, key, value)
        return query

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        slots = self._slots + layer * self._tiles_per_layer * self._block_size
        self._vectors.index_copy_(0, slots, torch.cat((key, value), dim=1).view(-1, self._head_dim))

    def attend(self, layer: int, query: Tensor, window: int | None) -> Tensor:
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        gather = self._gathers[window]
        tiles = self._tiles.index_select(0, gather.rows + layer * self._tiles_per_layer)
        by_kv_head = (len(query), self._num_kv_heads, query.shape[1] // self._num_kv_heads, self._head_dim)
        query, rows_of_heads = query.view(by_kv_head), output.view(by_kv_head)
        for view, own in zip(gather.views, torch.split(tiles, [view.rows for view in gather.views]), strict=True):
            key, value = own.view(2, self._num_kv_heads, -1, self._head_dim)[:, :, view.first : view.last]
            rows = slice(view.span.row, view.span.row + view.span.count)
            rows_of_heads[rows] = _attend_one(query[rows], key, value, view)
        return output.view(len(query), -1)

    def _vector_slots(self, spans: Sequence[Span]) -> Tensor:
        """`[num_tokens * 2 * num_kv_heads]`: where layer 0's key and value vectors go, token by token."""
        block_of, offset_of = [], []
        for span in spans:
            positions = np.arange(span.start, span.end)
            block_of.append(self._block_tables[span.slot, positions // self._block_size].astype(np.int64))
            offset_of.append(positions % self._block_size)
        tile = np.arange(self._tiles_per_layer)
        tiles = np.concatenate(block_of)[:, None] * self._tiles_per_block + tile[None, :]
        return self._to_device((tiles * self._block_size + np.concatenate(offset_of)[:, None]).ravel())

    def _gather(self, spans: Sequence[Span], window: int | None) -> _Gather:
        tile = np.arange(self._tiles_per_layer)[:, None]
        rows: list[IntArray] = []
        views: list[_View] = []
        for span in spans:
            seen_from = 0 if window is None else max(0, span.start - window + 1)
            first_block = seen_from // self._block_size
            blocks = self._block_tables[span.slot, first_block : -(-span.end // self._block_size)].astype(np.int64)
            rows.append((blocks[None, :] * self._tiles_per_block + tile).ravel())
            gathered_from = first_block * self._block_size
            mask, is_causal = self._mask(span, seen_from, window)
            views.append(
                _View(span, rows[-1].size, seen_from - gathered_from, span.end - gathered_from, mask, is_causal)
            )
        return _Gather(self._to_device(np.concatenate(rows)), tuple(views))

    def _mask(self, span: Span, seen_from: int, window: int | None) -> tuple[Tensor | None, bool]:
        """A single query sees all that is gathered for it; a whole prompt is plainly causal."""
        if span.count == 1:
            return None, False
        if span.start == 0 and (window is None or span.count <= window):
            return None, True
        query = torch.arange(span.start, span.end, device=self._device)[:, None]
        position = torch.arange(seen_from, span.end, device=self._device)[None, :]
        mask = position <= query
        if window is not None:
            mask &= position > query - window
        return mask, False

    def _to_device(self, values: IntArray) -> Tensor:
        return torch.from_numpy(values).to(self._device, non_blocking=True)


def _attend_one(query: Tensor, key: Tensor, value: Tensor, view: _View) -> Tensor:
    """One sequence: `query` and the result `[count, num_kv_heads, group, head_dim]`, `key` and `value`
    `[num_kv_heads, seen, head_dim]`."""
    if view.span.count == 1:
        # The heads of a group share their keys: they are so many queries to one head, with nothing copied.
        return F.scaled_dot_product_attention(query, key[None], value[None])
    group = query.shape[2]
    attended = F.scaled_dot_product_attention(
        query.permute(1, 2, 0, 3),
        key[:, None].expand(-1, group, -1, -1),
        value[:, None].expand(-1, group, -1, -1),
        attn_mask=view.mask,
        is_causal=view.is_causal,
    )
    return attended.permute(2, 0, 1, 3)


def _norm(heads: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(heads, weight.shape, weight, eps)


def _rotate(heads: Tensor, rotary: Rotary) -> Tensor:
    """`heads` `[num_tokens, num_heads, head_dim]`, each pair (i, i + head_dim / 2) turned by its angle, in float32."""
    cos, sin = rotary.cos[:, None], rotary.sin[:, None]
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(heads.dtype)
