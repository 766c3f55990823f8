"""What decode and prefill have in common: a tile of keys and values out of the pool, and one step of online softmax
over it (Milakov and Gimelshein 2018; tiled as in FlashAttention, Dao et al. 2022)."""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.0e38)
"""Where the largest score so far begins: finite, so that a row that has seen nothing yet has no inf - inf."""


@triton.jit
def load_tile(
    keys: tl.tensor,
    value_stride: tl.tensor,
    table: tl.tensor,
    block_stride: tl.tensor,
    positions: tl.tensor,
    readable: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALL_READABLE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Keys and values `[len(positions), BLOCK_D]` of one head of one sequence, 0 where they are not `readable`: what
    nobody has written may be NaN. `keys` is the pool from the layer's and head's first key on."""
    dims = tl.arange(0, BLOCK_D)
    if ALL_READABLE:
        blocks = tl.load(table + positions // BLOCK_SIZE)
    else:
        blocks = tl.load(table + positions // BLOCK_SIZE, mask=readable, other=0)
    vectors = keys + blocks.to(tl.int64) * block_stride + (positions % BLOCK_SIZE) * HEAD_DIM
    pointers = vectors[:, None] + dims[None, :]
    if ALL_READABLE and HEAD_DIM == BLOCK_D:
        key = tl.load(pointers)
        value = tl.load(pointers + value_stride)
    else:
        if ALL_READABLE:
            mask = (dims < HEAD_DIM)[None, :]
        elif HEAD_DIM == BLOCK_D:
            mask = readable[:, None]
        else:
            mask = readable[:, None] & (dims < HEAD_DIM)[None, :]
        key = tl.load(pointers, mask=mask, other=0.0)
        value = tl.load(pointers + value_stride, mask=mask, other=0.0)
    return key, value


@triton.jit
def online_softmax(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    visible: tl.tensor,
    scale: tl.tensor,
    peak: tl.tensor,
    total: tl.tensor,
    sums: tl.tensor,
    ALL_VISIBLE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Takes a tile in: `peak` `[rows]` is the largest score so far, `total` `[rows]` the weights' sum and `sums`
    `[rows, BLOCK_D]` that of the weighted values, both in units of 2^peak. `scale` contains log2(e)."""
    # Not rounded to tf32, in which a float32 model would not give its own tokens; 16-bit products are exact anyway.
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
    if not ALL_VISIBLE:
        scores = tl.where(visible, scores, float("-inf"))
    higher = tl.maximum(peak, tl.max(scores, 1))
    weights = tl.exp2(scores - higher[:, None])
    decay = tl.exp2(peak - higher)
    total = total * decay + tl.sum(weights, 1)
    sums = tl.dot(weights.to(value.dtype), value, sums * decay[:, None], input_precision="ieee")
    return higher, total, sums


@triton.jit
def average(sums: tl.tensor, total: tl.tensor) -> tl.tensor:
    """0 in rows that have seen nothing."""
    return sums / tl.where(total == 0.0, 1.0, total)[:, None]
