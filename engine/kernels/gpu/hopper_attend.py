"""attention_prefill_hopper's two warpgroups: each attends for half of a tile's queries to the keys and values that
hopper_fetch brings, tile by tile. Their products run by themselves, so that a warpgroup takes the softmax of one tile
while the tile before has its values weighted, and while the other warpgroup multiplies.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from engine.kernels.gpu.hopper_fetch import item, num_turns, queries_of, zero_unseen
from engine.kernels.gpu.tile import LOWEST

_LOWEST = gl.constexpr(LOWEST.value)
_UNSEEN = gl.constexpr(float("-inf"))


@gluon.jit
def attend(
    HALF: gl.constexpr,
    query: gl.tensor,
    query_stride: gl.tensor,
    rows: gl.tensor,
    output: gl.tensor,
    scale: gl.tensor,
    work: gl.tuple,
    attending: gl.shared_memory_descriptor,
    keys: gl.tuple,
    values: gl.tuple,
    order: gl.shared_memory_descriptor,
    KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    BOX: gl.constexpr,
) -> None:
    """The `HALF`th half of each item's rows, which are a token's heads, then the next token's."""
    key_tiles, key_ready, key_free = keys
    value_tiles, value_ready, _ = values
    _, _, _, _, _, window = work
    BLOCK_M: gl.constexpr = attending.shape[1]
    TOKENS: gl.constexpr = 2 * BLOCK_M // GROUP
    BLOCK_N: gl.constexpr = key_tiles.shape[1]
    HEAD_DIM: gl.constexpr = key_tiles.shape[2]
    KEY_STAGES: gl.constexpr = key_tiles.shape[0]
    VALUE_STAGES: gl.constexpr = value_tiles.shape[0]
    dtype: gl.constexpr = key_tiles.dtype
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    sum_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, score_layout)
    copy_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])

    attending = attending.index(HALF)
    columns = gl.arange(0, BLOCK_N, gl.SliceLayout(0, score_layout))
    tokens = (HALF * BLOCK_M + gl.arange(0, BLOCK_M, row_layout)) // GROUP
    count = 0
    _send_query(0, HALF, query, query_stride, rows, work, attending, KV_HEADS, GROUP, TOKENS, copy_layout)
    for turn in range(num_turns(work)):
        index, span, kv_head = item(turn, work, KV_HEADS)
        if span >= 0:
            first_token, num_tokens, first_query, last_query, seen_from = queries_of(index, span, work, TOKENS)
            queries = first_query + tokens
            # Tiles of positions, from the last that anyone sees to the first: those in which the queries themselves
            # are, those that all see whole, and those that not everyone's window reaches back to.
            first, last = seen_from // BLOCK_N, last_query // BLOCK_N
            whole_until = gl.minimum((first_query + 1) // BLOCK_N, last)
            whole_from = (gl.maximum(last_query - window + 1, 0) + BLOCK_N - 1) // BLOCK_N
            whole_from = gl.maximum(gl.minimum(whole_from, whole_until), first)

            async_copy.wait_group(0)
            fence_async_shared()
            stage = count % KEY_STAGES
            mbarrier.wait(key_ready.index(stage), count // KEY_STAGES % 2)
            mbarrier.wait(order.index(HALF), count % 2 ^ (1 - HALF))
            scores = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, score_layout)
            scores = warpgroup_mma(
                attending, key_tiles.index(stage).permute((1, 0)), scores, use_acc=False, is_async=True
            )
            mbarrier.arrive(order.index(1 - HALF), count=1)
            scores = warpgroup_mma_wait(0, [scores])
            mbarrier.arrive(key_free.index(stage), count=1)
            peak = gl.full([BLOCK_M], _LOWEST, gl.float32, row_layout)
            total = gl.zeros([BLOCK_M], gl.float32, row_layout)
            weights, decay, peak, total = _softmax(
                scores, queries, last * BLOCK_N + columns, window, scale, peak, total, True
            )
            stage = count % VALUE_STAGES
            mbarrier.wait(value_ready.index(stage), count // VALUE_STAGES % 2)
            zero_unseen(value_tiles, stage, last * BLOCK_N, seen_from, last_query, BOX)
            fence_async_shared()
            packed = _pack(weights, dtype)
            sums = gl.zeros([BLOCK_M, HEAD_DIM], gl.float32, sum_layout)
            count += 1
            for part in gl.static_range(3):
                if part == 0:
                    until, begin = last, whole_until
                elif part == 1:
                    until, begin = whole_until, whole_from
                else:
                    until, begin = whole_from, first
                for back in range(until - begin):
                    start = (until - 1 - back) * BLOCK_N
                    packed, decay, peak, total, sums = _step(
                        HALF,
                        count,
                        start,
                        attending,
                        keys,
                        values,
                        order,
                        queries,
                        columns,
                        window,
                        scale,
                        seen_from,
                        last_query,
                        packed,
                        decay,
                        peak,
                        total,
                        sums,
                        part == 1,
                        BOX,
                    )
                    count += 1
            sums = _weighted(packed, decay, sums, value_tiles.index((count - 1) % VALUE_STAGES))
            # All scores are there, so the next queries can take the place of these.
            _send_query(
                turn + 1, HALF, query, query_stride, rows, work, attending, KV_HEADS, GROUP, TOKENS, copy_layout
            )
            sums = warpgroup_mma_wait(0, [sums])
            mbarrier.arrive(values[2].index((count - 1) % VALUE_STAGES), count=1)
            inverse = gl.convert_layout(1.0 / total, gl.SliceLayout(1, sum_layout), assert_trivial=True)
            averages = gl.convert_layout((sums * inverse[:, None]).to(dtype), copy_layout)
            first_row = gl.load(rows + span) + first_token
            batch_rows, within_row, is_token = _rows(
                HALF, first_row, num_tokens, kv_head, GROUP, attending, copy_layout
            )
            gl.store(output + batch_rows * (KV_HEADS * GROUP * HEAD_DIM) + within_row, averages, mask=is_token)
        else:
            _send_query(
                turn + 1, HALF, query, query_stride, rows, work, attending, KV_HEADS, GROUP, TOKENS, copy_layout
            )


@gluon.jit
def _step(
    HALF: gl.constexpr,
    count: gl.tensor,
    start: gl.tensor,
    attending: gl.shared_memory_descriptor,
    keys: gl.tuple,
    values: gl.tuple,
    order: gl.shared_memory_descriptor,
    queries: gl.tensor,
    columns: gl.tensor,
    window: gl.tensor,
    scale: gl.tensor,
    seen_from: gl.tensor,
    last_query: gl.tensor,
    packed: gl.tensor,
    decay: gl.tensor,
    peak: gl.tensor,
    total: gl.tensor,
    sums: gl.tensor,
    WHOLE: gl.constexpr,
    BOX: gl.constexpr,
) -> tuple[gl.tensor, gl.tensor, gl.tensor, gl.tensor, gl.tensor]:
    """Scores and softmax of the tile at `start`, the `count`th, while the values of the tile before are weighted. The
    warpgroups' products take turns, or both would take their softmaxes at the same time, and multiply nothing."""
    key_tiles, key_ready, key_free = keys
    value_tiles, value_ready, value_free = values
    BLOCK_M: gl.constexpr = attending.shape[0]
    BLOCK_N: gl.constexpr = key_tiles.shape[1]
    KEY_STAGES: gl.constexpr = key_tiles.shape[0]
    VALUE_STAGES: gl.constexpr = value_tiles.shape[0]
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    stage, value_stage, before = count % KEY_STAGES, count % VALUE_STAGES, (count - 1) % VALUE_STAGES

    mbarrier.wait(key_ready.index(stage), count // KEY_STAGES % 2)
    mbarrier.wait(order.index(HALF), count % 2 ^ (1 - HALF))
    scores = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, score_layout)
    scores = warpgroup_mma(attending, key_tiles.index(stage).permute((1, 0)), scores, use_acc=False, is_async=True)
    sums = _weighted(packed, decay, sums, value_tiles.index(before))
    mbarrier.arrive(order.index(1 - HALF), count=1)
    scores = warpgroup_mma_wait(1, [scores])
    mbarrier.arrive(key_free.index(stage), count=1)
    weights, decay, peak, total = _softmax(scores, queries, start + columns, window, scale, peak, total, not WHOLE)
    # Here, though it is the next step that multiplies them: a wait that may jump is what the compiler does not move
    # the softmax across, to behind the end of the product below.
    mbarrier.wait(value_ready.index(value_stage), count // VALUE_STAGES % 2)
    if not WHOLE:
        zero_unseen(value_tiles, value_stage, start, seen_from, last_query, BOX)
        fence_async_shared()
    sums = warpgroup_mma_wait(0, [sums])
    mbarrier.arrive(value_free.index(before), count=1)
    return _pack(weights, key_tiles.dtype), decay, peak, total, sums


@gluon.jit
def _softmax(
    scores: gl.tensor,
    queries: gl.tensor,
    positions: gl.tensor,
    window: gl.tensor,
    scale: gl.tensor,
    peak: gl.tensor,
    total: gl.tensor,
    MASKED: gl.constexpr,
) -> tuple[gl.tensor, gl.tensor, gl.tensor, gl.tensor]:
    """As tile.online_softmax has it, but that `peak` is scaled: a weight is one multiplication and addition and one
    power. Between two unscaled peaks that would be what rounding leaves of the larger."""
    if MASKED:
        ahead = (queries[:, None] - positions[None, :]).to(gl.uint32)  # large where the position is behind the query
        scores = gl.where(ahead < window.to(gl.uint32), scores, _UNSEEN)
    higher = gl.maximum(peak, gl.max(scores, 1) * scale)
    weights = _exp2(scores * scale - higher[:, None])
    decay = _exp2(peak - higher)
    return weights, decay, higher, total * decay + gl.sum(weights, 1)


@gluon.jit
def _weighted(packed: gl.tensor, decay: gl.tensor, sums: gl.tensor, values: gl.shared_memory_descriptor) -> gl.tensor:
    """Adds the weighted values to the sums so far. It goes on by itself."""
    layout: gl.constexpr = sums.type.layout
    weights = _unpack(packed, values.dtype, gl.DotOperandLayout(0, layout, 2))
    sums = sums * gl.convert_layout(decay, gl.SliceLayout(1, layout), assert_trivial=True)[:, None]
    return warpgroup_mma(weights, values, sums, is_async=True)


@gluon.jit
def _exp2(x: gl.tensor) -> gl.tensor:
    """To 0 instead of to a subnormal number, which would cost three more instructions."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], gl.float32, True, 1)


@gluon.jit
def _pack(x: gl.tensor, dtype: gl.constexpr) -> gl.tensor:
    """Rounded to 16 bits, two columns to an int32: 16-bit values that a loop carries would be taken apart and put
    together in each turn."""
    ROWS: gl.constexpr = x.shape[0]
    PAIRS: gl.constexpr = x.shape[1] // 2
    low, high = gl.split(gl.reshape(x, [ROWS, PAIRS, 2]))
    name: gl.constexpr = "bf16x2" if dtype == gl.bfloat16 else "f16x2"
    asm: gl.constexpr = "cvt.rn." + name + ".f32 $0, $2, $1;"
    return gl.inline_asm_elementwise(asm, "=r,f,f", [low, high], gl.int32, True, 1)


@gluon.jit
def _unpack(packed: gl.tensor, dtype: gl.constexpr, layout: gl.constexpr) -> gl.tensor:
    ROWS: gl.constexpr = packed.shape[0]
    COLUMNS: gl.constexpr = packed.shape[1] * 2
    low = packed.to(gl.int16).to(dtype, bitcast=True)
    high = (packed >> 16).to(gl.int16).to(dtype, bitcast=True)
    return gl.convert_layout(gl.reshape(gl.join(low, high), [ROWS, COLUMNS]), layout, assert_trivial=True)


@gluon.jit
def _send_query(
    turn: gl.tensor,
    HALF: gl.constexpr,
    query: gl.tensor,
    query_stride: gl.tensor,
    rows: gl.tensor,
    work: gl.tuple,
    attending: gl.shared_memory_descriptor,
    KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    TOKENS: gl.constexpr,
    layout: gl.constexpr,
) -> None:
    """The half's queries of the `turn`th item, if there is one, on their way to `attending`."""
    index, span, kv_head = item(turn, work, KV_HEADS)
    if span >= 0:
        first_token, num_tokens, _, _, _ = queries_of(index, span, work, TOKENS)
        first_row = gl.load(rows + span) + first_token
        batch_rows, within_row, _ = _rows(HALF, first_row, num_tokens, kv_head, GROUP, attending, layout)
        async_copy.async_copy_global_to_shared(attending, query + batch_rows * query_stride + within_row)
    async_copy.commit_group()


@gluon.jit
def _rows(
    HALF: gl.constexpr,
    first_row: gl.tensor,
    num_tokens: gl.tensor,
    kv_head: gl.tensor,
    GROUP: gl.constexpr,
    attending: gl.shared_memory_descriptor,
    layout: gl.constexpr,
) -> tuple[gl.tensor, gl.tensor, gl.tensor]:
    """The rows of the batch that the half's rows are in, where in them, and whether they are a token's. Those behind
    the last token repeat it."""
    BLOCK_M: gl.constexpr = attending.shape[0]
    HEAD_DIM: gl.constexpr = attending.shape[1]
    tile_rows = HALF * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(1, layout))
    dims = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, layout))
    tokens = gl.minimum(tile_rows // GROUP, num_tokens - 1)
    within_row = (kv_head * GROUP + tile_rows % GROUP)[:, None] * HEAD_DIM + dims[None, :]
    return (first_row + tokens).to(gl.int64)[:, None], within_row, (tile_rows // GROUP < num_tokens)[:, None]
