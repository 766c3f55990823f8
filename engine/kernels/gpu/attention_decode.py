"""Attention of one query token a sequence to its blocks. The positions of a sequence are split among programs, each
of which keeps its own softmax, and a second kernel weighs these against each other (flash decoding, Dao et al. 2023).

A grid depends on how many sequences, heads and splits there are, never on lengths: each program finds its positions
from the length on the device. So a launch can be captured in a CUDA graph and replayed while the sequences grow.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.gpu.launch import ALL, LEAST_ROWS, Launch, paged, power_of_two, rows_of_heads, score_scale
from engine.kernels.gpu.overlap import take_turn
from engine.kernels.gpu.tile import LOWEST, average, load_tile, online_softmax
from engine.kernels.gpu.tuning import LaunchConfig


@dataclass(frozen=True, slots=True)
class DecodeScratch:
    """What the splits hand to the reduction."""

    averages: Tensor
    """`[batch, num_heads, num_splits, head_dim]` float32: of the values that a split saw."""
    log_sums: Tensor
    """`[batch, num_heads, num_splits]` float32: log2 of the sum of a split's 2^score."""

    @staticmethod
    def empty(batch: int, num_heads: int, num_splits: int, head_dim: int, device: torch.device | str) -> DecodeScratch:
        shape = (batch, num_heads, num_splits)
        return DecodeScratch(
            torch.empty((*shape, head_dim), dtype=torch.float32, device=device),
            torch.empty(shape, dtype=torch.float32, device=device),
        )

    @property
    def num_splits(self) -> int:
        return self.log_sums.shape[2]


def choose_num_splits(config: LaunchConfig, batch: int, num_kv_heads: int, max_length: int) -> int:
    """Enough to keep the device busy, but none that would never get a position."""
    wanted = -(-config.programs // max(1, batch * num_kv_heads))
    return max(1, min(wanted, config.max_splits, -(-max_length // config.split_positions)))


def attention_decode(
    query: Tensor,
    pool: Tensor,
    layer: int,
    *,
    slots: Tensor,
    lengths: Tensor,
    block_tables: Tensor,
    window: int | None,
    scratch: DecodeScratch,
    output: Tensor,
    split: LaunchConfig,
    reduce: LaunchConfig,
) -> tuple[Launch, ...]:
    """What, run in this order, attends `query` `[batch, num_heads, head_dim]` into `output`, which is
    `[batch, num_heads * head_dim]`.

    `slots` `[batch]` int32: rows of `block_tables`. `lengths` `[batch]` int32: positions that are seen, the query's own
    included; a row of length 0 reads nothing and gets zeros. `window`: only so many last positions. Where there is one
    split, there is one launch.
    """
    query = rows_of_heads(query)
    batch, num_heads, head_dim = query.shape
    num_kv_heads, num_splits = pool.shape[3], scratch.num_splits
    assert output.is_contiguous(), "rows of the output lie apart"
    ranges = {
        "lengths": lengths,
        "log_sums": scratch.log_sums,
        "averages": scratch.averages,
        "output": output,
        "window": ALL if window is None else window,
        "num_splits": num_splits,
        "BLOCK_N": split.block_n,
        "SPLIT_TILES": -(-split.split_positions // split.block_n),
        "BLOCK_D": power_of_two(head_dim, LEAST_ROWS),
    }
    attend = {
        **paged(pool, layer, block_tables),
        **ranges,
        "query": query,
        "slots": slots,
        "scale": score_scale(head_dim),
        "query_stride": query.stride(0),
        "GROUP": num_heads // num_kv_heads,
        "BLOCK_H": power_of_two(num_heads // num_kv_heads, LEAST_ROWS),
        "ONE_SPLIT": num_splits == 1,
    }
    first = Launch(attend_split, (batch, num_kv_heads, num_splits), attend, split.num_warps, split.num_stages)
    if num_splits == 1:
        return (first,)
    combine = {**ranges, "HEAD_DIM": head_dim, "SPLITS": power_of_two(num_splits)}
    return first, Launch(reduce_splits, (batch, num_heads), combine, reduce.num_warps, reduce.num_stages)


@triton.jit
def _share(
    length: tl.tensor,
    window: tl.tensor,
    num_splits: tl.tensor,
    BLOCK_N: tl.constexpr,
    SPLIT_TILES: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The first position that is seen, the first tile, and how many tiles a split has: short sequences leave some of
    the splits without any."""
    seen_from = tl.maximum(length - window, 0)
    first_tile = seen_from // BLOCK_N
    num_tiles = tl.cdiv(length, BLOCK_N) - first_tile
    return seen_from, first_tile, tl.maximum(tl.cdiv(num_tiles, num_splits), SPLIT_TILES)


@triton.jit(do_not_specialize=["layer", "window", "num_splits", "table_stride"])
def attend_split(
    query: tl.tensor,
    pool: tl.tensor,
    tables: tl.tensor,
    slots: tl.tensor,
    lengths: tl.tensor,
    averages: tl.tensor,
    log_sums: tl.tensor,
    output: tl.tensor,
    scale: tl.tensor,
    layer: tl.tensor,
    window: tl.tensor,
    num_splits: tl.tensor,
    query_stride: tl.tensor,
    table_stride: tl.tensor,
    block_stride: tl.tensor,
    layer_stride: tl.tensor,
    value_stride: tl.tensor,
    head_stride: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ONE_SPLIT: tl.constexpr,
    SPLIT_TILES: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAPS: tl.constexpr,
) -> None:
    """A program: one split of one sequence, for the query heads that share a key head."""
    take_turn(OVERLAPS)
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row)
    seen_from, first_tile, split_tiles = _share(length, window, num_splits, BLOCK_N, SPLIT_TILES)
    begin = (first_tile + split * split_tiles) * BLOCK_N
    end = tl.minimum(begin + split_tiles * BLOCK_N, length)
    if ONE_SPLIT or begin < end:
        members, dims = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
        heads = kv_head * GROUP + members
        is_value = (members < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
        within_row = heads[:, None] * HEAD_DIM + dims[None, :]
        attending = tl.load(query + row.to(tl.int64) * query_stride + within_row, mask=is_value, other=0.0)
        keys = pool + layer.to(tl.int64) * layer_stride + kv_head.to(tl.int64) * head_stride
        slot = tl.load(slots + row)
        table = tables + slot.to(tl.int64) * table_stride
        peak = tl.full([BLOCK_H], LOWEST, tl.float32)
        total = tl.zeros([BLOCK_H], tl.float32)
        sums = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
        for start in range(begin, end, BLOCK_N):
            positions = start + tl.arange(0, BLOCK_N)
            seen = (positions >= seen_from) & (positions < length)
            key, value = load_tile(
                keys, value_stride, table, block_stride, positions, seen, HEAD_DIM, BLOCK_SIZE, BLOCK_D, False
            )
            peak, total, sums = online_softmax(attending, key, value, seen[None, :], scale, peak, total, sums, False)
        averaged = average(sums, total)
        if ONE_SPLIT:
            row_of_output = row.to(tl.int64) * tl.num_programs(1) * GROUP * HEAD_DIM
            tl.store(output + row_of_output + within_row, averaged.to(output.dtype.element_ty), mask=is_value)
        else:
            vectors = (row.to(tl.int64) * tl.num_programs(1) * GROUP + heads) * num_splits + split
            tl.store(averages + vectors[:, None] * HEAD_DIM + dims[None, :], averaged, mask=is_value)
            tl.store(log_sums + vectors, peak + tl.log2(total), mask=members < GROUP)


@triton.jit(do_not_specialize=["window", "num_splits"])
def reduce_splits(
    lengths: tl.tensor,
    averages: tl.tensor,
    log_sums: tl.tensor,
    output: tl.tensor,
    window: tl.tensor,
    num_splits: tl.tensor,
    HEAD_DIM: tl.constexpr,
    SPLIT_TILES: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAPS: tl.constexpr,
) -> None:
    """A program: one head of one sequence. A split that had no positions is not read: another step's is left there."""
    take_turn(OVERLAPS)
    row, head = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths + row)
    _, first_tile, split_tiles = _share(length, window, num_splits, BLOCK_N, SPLIT_TILES)
    splits, dims = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    filled = (first_tile + splits * split_tiles) * BLOCK_N < length
    this = row.to(tl.int64) * tl.num_programs(1) + head
    vectors = this * num_splits + splits
    logs = tl.load(log_sums + vectors, mask=filled, other=float("-inf"))
    weights = tl.exp2(logs - tl.maximum(tl.max(logs, 0), LOWEST))
    total = tl.sum(weights, 0)
    split_averages = tl.load(
        averages + vectors[:, None] * HEAD_DIM + dims[None, :],
        mask=filled[:, None] & (dims < HEAD_DIM)[None, :],
        other=0.0,
    )
    averaged = tl.sum(weights[:, None] * split_averages, 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(output + this * HEAD_DIM + dims, averaged.to(output.dtype.element_ty), mask=dims < HEAD_DIM)
