"""attention_prefill for GPUs of compute capability 9 (Hopper), where copies and products go on by themselves: some
warps fetch tiles of keys and values (hopper_fetch), and two warpgroups attend to them (hopper_attend), after
FlashAttention-3 (Shah et al. 2024). A program stays and takes one tile of queries after the other, so that the next
one's keys are there when it begins.

Spans, pools and tiles of queries are as in attention_prefill. Scores may be up to 2^30: beyond, a weight overflows.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from engine.kernels.gpu.attention_prefill import SpanTensors, tile_map
from engine.kernels.gpu.hopper_attend import attend
from engine.kernels.gpu.hopper_fetch import fetch
from engine.kernels.gpu.launch import ALL, Launch, current_arch, paged, rows_of_heads, score_scale
from engine.kernels.gpu.tuning import LaunchConfig

IntArray = npt.NDArray[np.int32]

_HOPPER = 9
"""Major compute capability."""
_BEGINNING = 192
"""What an item takes before and after its tiles of positions, as so many positions more."""


def suits(pool: Tensor) -> bool:
    """Whether this is for such a `pool`, on the device that Triton compiles for."""
    if current_arch() // 10 != _HOPPER:
        return False
    block_size, head_dim = pool.shape[-2:]
    return pool.element_size() == 2 and head_dim in (64, 128) and block_size % 16 == 0


def item_map(
    starts: IntArray, counts: IntArray, tokens: int, num_kv_heads: int, programs: int
) -> tuple[IntArray, IntArray]:
    """What each program does, one turn after the other, of `tile_map`'s tiles times key heads, in place of the tiles of
    SpanTensors: span * num_kv_heads + key head, below 0 for nothing, and the first token.

    One head comes after the other, so that the keys and values that programs read at a time are in the GPU's cache; and
    in each turn the program that had the least to do has the longest item, so that all end together.
    """
    spans, first_tokens = tile_map(starts, counts, tokens)
    ends = starts[spans] + np.minimum(first_tokens + tokens, counts[spans])
    costs = np.tile(ends + _BEGINNING, num_kv_heads)
    heads = (spans * num_kv_heads + np.arange(num_kv_heads, dtype=np.int32)[:, None]).ravel()
    first_tokens = np.tile(first_tokens, num_kv_heads)
    programs = min(programs, len(heads))
    turns = -(-len(heads) // max(programs, 1))
    item_heads = np.full((turns, programs), -1, np.int32)
    item_tokens = np.zeros((turns, programs), np.int32)
    done = np.zeros(programs, np.int64)
    for turn in range(turns):
        begin = turn * programs
        longest = begin + np.argsort(-costs[begin : begin + programs], kind="stable")
        idlest = np.argsort(done, kind="stable")[: len(longest)]
        item_heads[turn, idlest], item_tokens[turn, idlest] = heads[longest], first_tokens[longest]
        done[idlest] += costs[longest]
    return item_heads.ravel(), item_tokens.ravel()


def attention_prefill_hopper(
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
    """As attention_prefill, over a contiguous pool, and with spans whose tiles are items of `item_map`."""
    query = rows_of_heads(query)
    _, num_heads, head_dim = query.shape
    num_kv_heads, block_size = pool.shape[3:5]
    assert output.is_contiguous(), "rows of the output lie apart"
    of_pool = paged(pool, layer, block_tables)
    vectors = pool.view(-1, head_dim)
    box = min(block_size & -block_size, config.block_n)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    arguments = {
        "pool": TensorDescriptor(vectors, list(vectors.shape), list(vectors.stride()), [box, head_dim], layout),
        "tables": block_tables,
        "query": query,
        "rows": spans.rows,
        "starts": spans.starts,
        "counts": spans.counts,
        "slots": spans.slots,
        "item_heads": spans.tile_spans,
        "item_tokens": spans.tile_tokens,
        "output": output,
        "scale": score_scale(head_dim),
        "window": ALL if window is None else window,
        "num_items": len(spans.tile_spans),
        "query_stride": query.stride(0),
        "table_stride": block_tables.stride(0),
        "num_vectors": len(vectors),
        "first_key": layer * of_pool["layer_stride"] // head_dim,
        "first_value": (layer * of_pool["layer_stride"] + of_pool["value_stride"]) // head_dim,
        "block_stride": of_pool["block_stride"] // head_dim,
        "KV_HEADS": num_kv_heads,
        "GROUP": num_heads // num_kv_heads,
        "BLOCK_SIZE": block_size,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "STAGES": config.num_stages,
    }
    grid = (min(config.programs, len(spans.tile_spans)),)
    return Launch(attend_tiles, grid, arguments, config.num_warps)


@gluon.jit(
    do_not_specialize=[
        "window",
        "num_items",
        "table_stride",
        "num_vectors",
        "first_key",
        "first_value",
    ]
)
def attend_tiles(
    pool: tma.tensor_descriptor,
    tables: gl.tensor,
    query: gl.tensor,
    rows: gl.tensor,
    starts: gl.tensor,
    counts: gl.tensor,
    slots: gl.tensor,
    item_heads: gl.tensor,
    item_tokens: gl.tensor,
    output: gl.tensor,
    scale: gl.tensor,
    window: gl.tensor,
    num_items: gl.tensor,
    query_stride: gl.tensor,
    table_stride: gl.tensor,
    num_vectors: gl.tensor,
    first_key: gl.tensor,
    first_value: gl.tensor,
    block_stride: gl.tensor,
    KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    """A program: so manyth items of tiles times key heads."""
    BOX: gl.constexpr = pool.block_type.shape[0]
    HEAD_DIM: gl.constexpr = pool.block_type.shape[1]
    attending = gl.allocate_shared_memory(pool.dtype, [2, BLOCK_M // 2, HEAD_DIM], pool.layout)
    keys = _stages(pool, STAGES, BLOCK_N)
    values = _stages(pool, STAGES + 1, BLOCK_N)  # weighted a turn later than keys give their scores
    order = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for half in gl.static_range(2):
        mbarrier.init(order.index(half), count=1)
    work = (starts, counts, item_heads, item_tokens, num_items, window)
    gl.warp_specialize(
        [
            (
                attend,
                (
                    0,
                    query,
                    query_stride,
                    rows,
                    output,
                    scale,
                    work,
                    attending,
                    keys,
                    values,
                    order,
                    KV_HEADS,
                    GROUP,
                    BOX,
                ),
            ),
            (
                attend,
                (
                    1,
                    query,
                    query_stride,
                    rows,
                    output,
                    scale,
                    work,
                    attending,
                    keys,
                    values,
                    order,
                    KV_HEADS,
                    GROUP,
                    BOX,
                ),
            ),
            (
                fetch,
                (
                    pool,
                    first_key,
                    num_vectors,
                    block_stride,
                    tables,
                    table_stride,
                    slots,
                    work,
                    keys,
                    KV_HEADS,
                    BLOCK_M // GROUP,
                    BLOCK_SIZE,
                ),
            ),
            (
                fetch,
                (
                    pool,
                    first_value,
                    num_vectors,
                    block_stride,
                    tables,
                    table_stride,
                    slots,
                    work,
                    values,
                    KV_HEADS,
                    BLOCK_M // GROUP,
                    BLOCK_SIZE,
                ),
            ),
        ],
        [4, 2, 2],
        [232, 40, 40],
    )


@gluon.jit
def _stages(pool: tma.tensor_descriptor, STAGES: gl.constexpr, BLOCK_N: gl.constexpr) -> gl.tuple:
    """Places for tiles, and for each a barrier that says that it is there, and one that both warpgroups are through."""
    layout: gl.constexpr = mbarrier.MBarrierLayout()
    tiles = gl.allocate_shared_memory(pool.dtype, [STAGES, BLOCK_N, pool.block_type.shape[1]], pool.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    return tiles, ready, free
