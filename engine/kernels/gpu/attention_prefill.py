"""Attention of spans of any lengths, prefill chunks and decodes alike, to their sequences' blocks, in which the spans'
own keys and values are already. Tiles of queries, each with the heads that share a key head, walk over tiles of
positions (FlashAttention-2, Dao 2023), and no further than what the last of their queries sees.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.gpu.launch import ALL, LEAST_ROWS, Launch, paged, power_of_two, rows_of_heads, score_scale
from engine.kernels.gpu.tile import LOWEST, average, load_tile, online_softmax
from engine.kernels.gpu.tuning import LaunchConfig

IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class SpanTensors:
    """On the device, int32: what `Span` says, `[num_spans]` each, and which tile of which span each program has."""

    rows: Tensor
    starts: Tensor
    counts: Tensor
    slots: Tensor
    tile_spans: Tensor
    """`[num_tiles]`. A tile of no span, below 0, does nothing."""
    tile_tokens: Tensor
    """`[num_tiles]`: the tile's first token within its span."""


def tokens_per_tile(config: LaunchConfig, group: int) -> int:
    """`group`: how many query heads share a key head."""
    return _block_m(config, group) // group


def tile_map(starts: IntArray, counts: IntArray, tokens: int) -> tuple[IntArray, IntArray]:
    """Spans cut into tiles of `tokens`: each tile's span, and its first token within it. Those that see the most come
    first, so that none of them is what the device still does when all others are done."""
    tiles = -(-counts // tokens)
    spans = np.repeat(np.arange(len(counts)), tiles)
    first_tiles = np.repeat(np.cumsum(tiles) - tiles, tiles)
    tile_tokens = (np.arange(len(spans)) - first_tiles) * tokens
    order = np.argsort(-(starts[spans] + tile_tokens), kind="stable")
    return spans[order].astype(np.int32), tile_tokens[order].astype(np.int32)


def attention_prefill(
    query: Tensor,
    pool: Tensor,
    layer: int,
    *,
    spans: SpanTensors,
    block_tables: Tensor,
    window: int | None,
    output: Tensor,
    config: LaunchConfig,
) -> Launch:
    """What attends `query` `[num_tokens, num_heads, head_dim]` into `output` `[num_tokens, num_heads * head_dim]`: each
    token to those of its sequence up to itself, with a `window` only to so many last ones. Tiles are of
    `tokens_per_tile`."""
    query = rows_of_heads(query)
    _, num_heads, head_dim = query.shape
    num_kv_heads = pool.shape[3]
    group = num_heads // num_kv_heads
    assert output.is_contiguous(), "rows of the output lie apart"
    arguments = {
        **paged(pool, layer, block_tables),
        "query": query,
        "rows": spans.rows,
        "starts": spans.starts,
        "counts": spans.counts,
        "slots": spans.slots,
        "tile_spans": spans.tile_spans,
        "tile_tokens": spans.tile_tokens,
        "output": output,
        "window": ALL if window is None else window,
        "scale": score_scale(head_dim),
        "query_stride": query.stride(0),
        "GROUP": group,
        "BLOCK_M": _block_m(config, group),
        "BLOCK_N": config.block_n,
        "BLOCK_D": power_of_two(head_dim, LEAST_ROWS),
    }
    return Launch(attend_tile, (len(spans.tile_spans), num_kv_heads), arguments, config.num_warps, config.num_stages)


def _block_m(config: LaunchConfig, group: int) -> int:
    return power_of_two(group, max(config.block_m, LEAST_ROWS))


@triton.jit(do_not_specialize=["layer", "window", "table_stride"])
def attend_tile(
    query: tl.tensor,
    pool: tl.tensor,
    tables: tl.tensor,
    rows: tl.tensor,
    starts: tl.tensor,
    counts: tl.tensor,
    slots: tl.tensor,
    tile_spans: tl.tensor,
    tile_tokens: tl.tensor,
    output: tl.tensor,
    scale: tl.tensor,
    layer: tl.tensor,
    window: tl.tensor,
    query_stride: tl.tensor,
    table_stride: tl.tensor,
    block_stride: tl.tensor,
    layer_stride: tl.tensor,
    value_stride: tl.tensor,
    head_stride: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """A program: some tokens of one span, for the query heads that share a key head. Its rows are a token's heads, then
    the next token's."""
    span, kv_head = tl.load(tile_spans + tl.program_id(0)), tl.program_id(1)
    if span >= 0:
        first_token, count = tl.load(tile_tokens + tl.program_id(0)), tl.load(counts + span)
        first_query = tl.load(starts + span) + first_token
        num_tokens = tl.minimum(count - first_token, BLOCK_M // GROUP)
        last_query = first_query + num_tokens - 1

        tile_rows, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
        tokens = tile_rows // GROUP
        heads = kv_head * GROUP + tile_rows % GROUP
        batch_rows = (tl.load(rows + span) + first_token + tokens).to(tl.int64)
        within_row = heads[:, None] * HEAD_DIM + dims[None, :]
        is_value = (tokens < num_tokens)[:, None] & (dims < HEAD_DIM)[None, :]
        attending = tl.load(query + batch_rows[:, None] * query_stride + within_row, mask=is_value, other=0.0)

        keys = pool + layer.to(tl.int64) * layer_stride + kv_head.to(tl.int64) * head_stride
        table = tables + tl.load(slots + span).to(tl.int64) * table_stride
        queries = first_query + tokens
        peak = tl.full([BLOCK_M], LOWEST, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

        # Tiles of positions, from the first that anyone sees: those that not everyone's window reaches back to, those
        # that all see whole, and those in which the queries themselves are.
        seen_from = tl.maximum(first_query - window + 1, 0)
        begin = seen_from // BLOCK_N * BLOCK_N
        whole_until = (first_query + 1) // BLOCK_N * BLOCK_N
        whole_from = tl.cdiv(tl.maximum(last_query - window + 1, 0), BLOCK_N) * BLOCK_N
        whole_from = tl.minimum(whole_from, whole_until)
        for part in tl.static_range(3):
            if part == 0:
                start_at, end_at = begin, whole_from
            elif part == 1:
                start_at, end_at = whole_from, whole_until
            else:
                start_at, end_at = whole_until, last_query + 1
            for start in range(start_at, end_at, BLOCK_N):
                positions = start + tl.arange(0, BLOCK_N)
                readable = (positions >= seen_from) & (positions <= last_query)
                key, value = load_tile(
                    keys,
                    value_stride,
                    table,
                    block_stride,
                    positions,
                    readable,
                    HEAD_DIM,
                    BLOCK_SIZE,
                    BLOCK_D,
                    part == 1,
                )
                ahead = queries[:, None] - positions[None, :]
                visible = readable[None, :] & (ahead >= 0) & (ahead < window)
                peak, total, sums = online_softmax(attending, key, value, visible, scale, peak, total, sums, part == 1)
        store = average(sums, total).to(output.dtype.element_ty)
        output_stride = tl.num_programs(1).to(tl.int64) * GROUP * HEAD_DIM
        tl.store(output + batch_rows[:, None] * output_stride + within_row, store, mask=is_value)
