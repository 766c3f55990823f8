"""attention_prefill_hopper's work, item by item, and the warps that have keys and values fetched for it: the GPU copies
blocks of the pool to shared memory while other warps multiply.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma


@gluon.jit
def num_turns(work: gl.tuple) -> gl.tensor:
    """How many items each program has."""
    _, _, _, _, num_items, _ = work
    return (num_items + gl.num_programs(0) - 1) // gl.num_programs(0)


@gluon.jit
def item(turn: gl.tensor, work: gl.tuple, KV_HEADS: gl.constexpr) -> tuple[gl.tensor, gl.tensor, gl.tensor]:
    """The program's `turn`th: which it is of all, its span, below 0 for no work, and its key head."""
    _, _, item_heads, _, num_items, _ = work
    index = turn * gl.num_programs(0) + gl.program_id(0)
    head = gl.load(item_heads + index, mask=index < num_items, other=-1)
    return index, gl.where(head >= 0, head // KV_HEADS, -1), head % KV_HEADS


@gluon.jit
def queries_of(
    index: gl.tensor, span: gl.tensor, work: gl.tuple, TOKENS: gl.constexpr
) -> tuple[gl.tensor, gl.tensor, gl.tensor, gl.tensor, gl.tensor]:
    """An item's first token within its span, how many it has, the positions of its first and its last one, and the
    first position that any of them sees."""
    starts, counts, _, item_tokens, _, window = work
    first_token = gl.load(item_tokens + index)
    num_tokens = gl.minimum(gl.load(counts + span) - first_token, TOKENS)
    first_query = gl.load(starts + span) + first_token
    seen_from = gl.maximum(first_query - window + 1, 0)
    return first_token, num_tokens, first_query, first_query + num_tokens - 1, seen_from


@gluon.jit
def fetch(
    pool: gl.nvidia.hopper.tma.tensor_descriptor,
    first_vector: gl.tensor,
    num_vectors: gl.tensor,
    block_stride: gl.tensor,
    tables: gl.tensor,
    table_stride: gl.tensor,
    slots: gl.tensor,
    work: gl.tuple,
    tiles: gl.tuple,
    KV_HEADS: gl.constexpr,
    TOKENS: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
) -> None:
    """Fills the stages of `tiles` with the keys or the values of one tile of positions after the other, the last ones
    first. Of a block that nobody sees, which may be none, come zeros: from behind the pool's last vector."""
    buffers, ready, free = tiles
    STAGES: gl.constexpr = buffers.shape[0]
    BLOCK_N: gl.constexpr = buffers.shape[1]
    BOX: gl.constexpr = pool.block_type.shape[0]
    count = 0
    for turn in range(num_turns(work)):
        index, span, kv_head = item(turn, work, KV_HEADS)
        if span >= 0:
            _, _, _, last_query, seen_from = queries_of(index, span, work, TOKENS)
            table = tables + gl.load(slots + span).to(gl.int64) * table_stride
            of_head = first_vector + kv_head * BLOCK_SIZE
            first, last = seen_from // BLOCK_N, last_query // BLOCK_N
            for back in range(last - first + 1):
                start = (last - back) * BLOCK_N
                vectors = ()
                for box in gl.static_range(BLOCK_N // BOX):
                    position = start + box * BOX
                    seen = (position + BOX > seen_from) & (position <= last_query)
                    block = gl.load(table + position // BLOCK_SIZE, mask=seen, other=0)
                    vector = of_head + block * block_stride + position % BLOCK_SIZE
                    vectors = vectors + (gl.where(seen, vector, num_vectors),)  # type: ignore[assignment]  # noqa: RUF005
                stage = count % STAGES
                mbarrier.wait(free.index(stage), count // STAGES % 2 ^ 1)
                mbarrier.expect(ready.index(stage), BLOCK_N * buffers.shape[2] * 2)
                for box in gl.static_range(BLOCK_N // BOX):
                    rows = buffers.index(stage).slice(box * BOX, BOX)
                    tma.async_copy_global_to_shared(pool, [vectors[box], 0], ready.index(stage), rows)
                count += 1


@gluon.jit
def zero_unseen(
    values: gl.shared_memory_descriptor,
    stage: gl.tensor,
    start: gl.tensor,
    seen_from: gl.tensor,
    last_query: gl.tensor,
    BOX: gl.constexpr,
) -> None:
    """What nobody sees of the blocks at both ends, in the tile of values that begins at `start`. It may be NaN, which
    a weight of 0 does not take away."""
    BLOCK_N: gl.constexpr = values.shape[1]
    COLUMNS: gl.constexpr = 64
    SLICES: gl.constexpr = values.shape[2] // COLUMNS
    BOXES: gl.constexpr = BLOCK_N // BOX
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    # In memory a tile is its first 128 bytes of all rows, then the next.
    boxes = values._reinterpret(values.dtype, [values.shape[0] * SLICES * BOXES, BOX, COLUMNS], values.layout)
    for end in gl.static_range(2):
        if end == 0:
            edge, cut = seen_from, seen_from % BOX != 0
        else:
            edge, cut = last_query, (last_query + 1) % BOX != 0
        if cut & (edge >= start) & (edge < start + BLOCK_N):
            box = (edge - start) // BOX
            positions = start + box * BOX + gl.arange(0, BOX, gl.SliceLayout(1, layout))
            seen = (positions >= seen_from) & (positions <= last_query)
            for part in gl.static_range(SLICES):
                rows = boxes.index((stage * SLICES + part) * BOXES + box)
                read = rows.load(layout)
                rows.store(gl.where(seen[:, None], read, gl.zeros_like(read)))
