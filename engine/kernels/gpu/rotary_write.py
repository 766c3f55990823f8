"""Norms a batch's query and key heads, where the model does, turns them by their positions, and writes keys and values
to their places in the blocks: one pass over what the projection made."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from engine.attention import HeadNorms, Rotary
from engine.kernels.gpu.launch import Launch, paged, power_of_two, rows_of_heads
from engine.kernels.gpu.overlap import take_turn
from engine.kernels.gpu.tuning import LaunchConfig


def rotary_write(
    qkv: Tensor,
    pool: Tensor,
    layer: int,
    *,
    rotary: Rotary,
    norms: HeadNorms | None,
    slots: Tensor,
    lengths: Tensor,
    block_tables: Tensor,
    query: Tensor,
    config: LaunchConfig,
) -> Launch:
    """`qkv` `[num_tokens, (num_heads + 2 num_kv_heads) * head_dim]`, of the pool's dtype; `query`
    `[num_tokens, num_heads, head_dim]` gets the turned query heads, and may be a view of where they are in `qkv`.

    `slots` `[num_tokens]` int32: each token's row of `block_tables`. `lengths` `[num_tokens]` int32: its position + 1.
    Nothing is written, neither query nor key nor value, for a token of a slot below 0 or a length of 0.
    """
    num_tokens, num_heads, head_dim = query.shape
    assert qkv.dtype is pool.dtype, f"{qkv.dtype} for a pool of {pool.dtype}"
    assert qkv.stride(1) == 1, "a token's heads lie apart"
    assert query.stride()[1:] == (head_dim, 1), f"query heads of strides {query.stride()}"
    assert rotary.cos.is_contiguous(), "angles lie apart"
    assert rotary.sin.is_contiguous(), "angles lie apart"
    num_kv_heads = pool.shape[3]
    arguments = {
        **paged(pool, layer, block_tables),
        "qkv": qkv,
        "query": query,
        "slots": slots,
        "lengths": lengths,
        "cos": rotary.cos,
        "sin": rotary.sin,
        "query_norm": None if norms is None else norms.query,
        "key_norm": None if norms is None else norms.key,
        "eps": 0.0 if norms is None else norms.eps,
        "qkv_stride": qkv.stride(0),
        "query_stride": query.stride(0),
        "NUM_HEADS": num_heads,
        "NUM_KV_HEADS": num_kv_heads,
        "HAS_NORMS": norms is not None,
        "BLOCK_H": config.block_m,
        "BLOCK_HALF": power_of_two(head_dim // 2),
    }
    chunks = -(-(num_heads + 2 * num_kv_heads) // config.block_m)
    return Launch(rotate_and_write, (num_tokens, chunks), arguments, config.num_warps, config.num_stages)


def write(
    key: Tensor,
    value: Tensor,
    pool: Tensor,
    layer: int,
    *,
    slots: Tensor,
    lengths: Tensor,
    block_tables: Tensor,
    config: LaunchConfig,
) -> Launch:
    """Puts keys and values, each `[num_tokens, num_kv_heads, head_dim]`, to their places as they are."""
    key, value = rows_of_heads(key), rows_of_heads(value)
    assert key.dtype is pool.dtype, f"{key.dtype} for a pool of {pool.dtype}"
    arguments = {
        **paged(pool, layer, block_tables),
        "key": key,
        "value": value,
        "slots": slots,
        "lengths": lengths,
        "key_stride": key.stride(0),
        "from_value_stride": value.stride(0),
        "NUM_KV_HEADS": key.shape[1],
        "BLOCK_H": config.block_m,
        "BLOCK_D": power_of_two(key.shape[2]),
    }
    grid = (len(key), -(-key.shape[1] // config.block_m))
    return Launch(write_as_is, grid, arguments, config.num_warps, config.num_stages)


@triton.jit
def _place(
    tables: tl.tensor,
    slot: tl.tensor,
    position: tl.tensor,
    layer: tl.tensor,
    table_stride: tl.tensor,
    block_stride: tl.tensor,
    layer_stride: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
) -> tl.tensor:
    """Of the first head's key vector at `position`, in elements of the pool."""
    block = tl.load(tables + slot.to(tl.int64) * table_stride + position // BLOCK_SIZE).to(tl.int64)
    return block * block_stride + layer.to(tl.int64) * layer_stride + position % BLOCK_SIZE * HEAD_DIM


@triton.jit
def _norm_scale(first: tl.tensor, second: tl.tensor, eps: tl.tensor, HEAD_DIM: tl.constexpr) -> tl.tensor:
    """1 / root mean square of each head."""
    return tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / HEAD_DIM + eps)


@triton.jit
def _norm_weight(
    query_norm: tl.tensor, key_norm: tl.tensor, is_query: tl.tensor, dims: tl.tensor, is_dim: tl.tensor
) -> tl.tensor:
    """A head's, by its kind: `[heads, dims]`."""
    of_query = tl.load(query_norm + dims, mask=is_dim, other=0.0).to(tl.float32)
    of_key = tl.load(key_norm + dims, mask=is_dim, other=0.0).to(tl.float32)
    return tl.where(is_query[:, None], of_query[None, :], of_key[None, :])


@triton.jit(do_not_specialize=["layer", "table_stride"])
def rotate_and_write(
    qkv: tl.tensor,
    query: tl.tensor,
    pool: tl.tensor,
    tables: tl.tensor,
    slots: tl.tensor,
    lengths: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    query_norm: tl.tensor,
    key_norm: tl.tensor,
    eps: tl.tensor,
    layer: tl.tensor,
    qkv_stride: tl.tensor,
    query_stride: tl.tensor,
    table_stride: tl.tensor,
    block_stride: tl.tensor,
    layer_stride: tl.tensor,
    value_stride: tl.tensor,
    head_stride: tl.tensor,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    OVERLAPS: tl.constexpr,
) -> None:
    """A program: some heads of one token. Pairs are (i, i + head_dim / 2), as in the reference."""
    take_turn(OVERLAPS)
    HALF: tl.constexpr = HEAD_DIM // 2
    token = tl.program_id(0).to(tl.int64)
    slot, length = tl.load(slots + token), tl.load(lengths + token)
    if (slot >= 0) & (length > 0):
        heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        dims = tl.arange(0, BLOCK_HALF)
        is_dim = dims < HALF
        present = (heads < NUM_HEADS + 2 * NUM_KV_HEADS)[:, None] & is_dim[None, :]
        pairs = qkv + token * qkv_stride + heads[:, None] * HEAD_DIM + dims[None, :]
        first = tl.load(pairs, mask=present, other=0.0)
        second = tl.load(pairs + HALF, mask=present, other=0.0)
        x, y = first.to(tl.float32), second.to(tl.float32)
        is_query = heads < NUM_HEADS
        if HAS_NORMS:
            scale = _norm_scale(x, y, eps, HEAD_DIM)[:, None]
            x *= scale * _norm_weight(query_norm, key_norm, is_query, dims, is_dim)
            y *= scale * _norm_weight(query_norm + HALF, key_norm + HALF, is_query, dims, is_dim)
        cosine = tl.load(cos + token * HALF + dims, mask=is_dim, other=1.0)[None, :]
        sine = tl.load(sin + token * HALF + dims, mask=is_dim, other=0.0)[None, :]
        is_value = heads >= NUM_HEADS + NUM_KV_HEADS
        turned_first = tl.where(is_value[:, None], first, (x * cosine - y * sine).to(first.dtype))
        turned_second = tl.where(is_value[:, None], second, (y * cosine + x * sine).to(first.dtype))

        to_query = query + token * query_stride + heads[:, None] * HEAD_DIM + dims[None, :]
        query_mask = present & is_query[:, None]
        tl.store(to_query, turned_first, mask=query_mask)
        tl.store(to_query + HALF, turned_second, mask=query_mask)
        place = _place(tables, slot, length - 1, layer, table_stride, block_stride, layer_stride, HEAD_DIM, BLOCK_SIZE)
        kv_heads = heads - tl.where(is_value, NUM_HEADS + NUM_KV_HEADS, NUM_HEADS)
        place += kv_heads.to(tl.int64) * head_stride + is_value.to(tl.int64) * value_stride
        to_pool = pool + place[:, None] + dims[None, :]
        pool_mask = present & (heads >= NUM_HEADS)[:, None]
        tl.store(to_pool, turned_first, mask=pool_mask)
        tl.store(to_pool + HALF, turned_second, mask=pool_mask)


@triton.jit(do_not_specialize=["layer", "table_stride"])
def write_as_is(
    key: tl.tensor,
    value: tl.tensor,
    pool: tl.tensor,
    tables: tl.tensor,
    slots: tl.tensor,
    lengths: tl.tensor,
    layer: tl.tensor,
    key_stride: tl.tensor,
    from_value_stride: tl.tensor,
    table_stride: tl.tensor,
    block_stride: tl.tensor,
    layer_stride: tl.tensor,
    value_stride: tl.tensor,
    head_stride: tl.tensor,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """A program: some key heads of one token."""
    token = tl.program_id(0).to(tl.int64)
    slot, length = tl.load(slots + token), tl.load(lengths + token)
    if (slot >= 0) & (length > 0):
        heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        dims = tl.arange(0, BLOCK_D)
        present = (heads < NUM_KV_HEADS)[:, None] & (dims < HEAD_DIM)[None, :]
        within_row = heads[:, None] * HEAD_DIM + dims[None, :]
        place = _place(tables, slot, length - 1, layer, table_stride, block_stride, layer_stride, HEAD_DIM, BLOCK_SIZE)
        to_pool = pool + place + heads.to(tl.int64)[:, None] * head_stride + dims[None, :]
        tl.store(to_pool, tl.load(key + token * key_stride + within_row, mask=present), mask=present)
        from_value = value + token * from_value_stride + within_row
        tl.store(to_pool + value_stride, tl.load(from_value, mask=present), mask=present)
