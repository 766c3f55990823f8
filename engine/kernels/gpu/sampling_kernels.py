"""The passes of a draw on a device, in their order; none of them sorts, and none waits for the host.

1. `survey` reads the logits, a chunk of a row a program: what leads it, and what wins its race.
2. `settle` has the chunks' leaders and winners meet: rows that are greedy, or have no limits, are done. For the others
   it finds, from what the survey saw of their blocks, a bound that no token which may be drawn is below.
3. `gather` reads the logits of those again, and lists the tokens that are not below the bound: mostly a few.
4. `choose` finds the edge of top-k among these, and holds races until a winner is in the nucleus of top-p. Where the
   bound did not leave few, it goes through the whole row instead.

Top-p: all race first. The winner stays if the tokens above it have less than their share of the mass; else it and all
that are not above it leave, and the others race again. That gives the winner among those that top-p keeps, without a
look at where its edge is.

Chunks and blocks depend on the vocabulary alone, and sums whose order is open are whole numbers: what a row draws does
not depend on its company.
"""

from __future__ import annotations

import triton
import triton.language as tl

from engine.kernels.gpu import sampling_table as table_words
from engine.kernels.gpu.race import exact_waits, neighbours_words, tokens_words, waits
from engine.kernels.gpu.sampling_rows import (
    floor_of,
    is_limited,
    key_of,
    leader,
    masses,
    order_of,
    ordered,
    ranked,
    read_logits,
    row_of,
    scaled,
    temperature_of,
    token_of,
    top_k_of,
    top_p_of,
    value_of,
    x_of,
)

_WORDS = tl.constexpr(table_words.WORDS)
_KEY_BITS = tl.constexpr(31)
_COARSE_BITS = tl.constexpr(15)
"""Of a key, for a bound that need not be exact: the exponent and seven bits more."""
_LAST = tl.constexpr(0x7FFFFFFF)
_SETTLED = tl.constexpr(float("inf"))
"""In place of a bound, which is never above 0."""
_ROUNDING = tl.constexpr(1 + 1e-5)
"""By how much a mass that is added up in float32 has to be above what is asked for."""


@triton.jit
def survey(
    logits: tl.tensor,
    table: tl.tensor,
    banned: tl.tensor,
    counts: tl.tensor,
    vocab_size: tl.tensor,
    logits_stride: tl.tensor,
    max_banned: tl.tensor,
    counts_stride: tl.tensor,
    leaders: tl.tensor,
    winners: tl.tensor,
    winner_logits: tl.tensor,
    block_largest: tl.tensor,
    block_masses: tl.tensor,
    HAS_COUNTS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Of each chunk: the rank of its leader; then, of a row that is not greedy, the winner of its race, or, if the row
    has limits, each block's largest logit and its mass, where the largest has 1."""
    index, chunk = tl.program_id(0), tl.program_id(1)
    row = row_of(index, logits, table, banned, counts, vocab_size, logits_stride, max_banned, counts_stride)
    params = row[1]
    tokens = chunk * CHUNK + tl.arange(0, CHUNK)
    values = read_logits(row, tokens, HAS_COUNTS)
    at = index * tl.num_programs(1) + chunk
    first = leader(ordered(values), tokens)
    tl.store(leaders + at, first)
    temperature = temperature_of(params)
    if temperature > 0:
        if is_limited(params, vocab_size):
            blocks = tl.reshape(values, [CHUNK // BLOCK, BLOCK])
            of_blocks = tl.max(blocks, 1)
            spread = blocks - tl.where(of_blocks == float("-inf"), 0.0, of_blocks)[:, None]
            at_blocks = at * (CHUNK // BLOCK) + tl.arange(0, CHUNK // BLOCK)
            tl.store(block_largest + at_blocks, of_blocks)
            tl.store(block_masses + at_blocks, tl.sum(tl.exp(spread / temperature), 1))
        else:
            largest = value_of(order_of(first))
            x = (values - tl.where(largest == float("-inf"), 0.0, largest)) / temperature
            speeds = tl.exp(x) / waits(neighbours_words(params, chunk * CHUNK, CHUNK))
            winner = token_of(leader(speeds.to(tl.int32, bitcast=True), tokens))
            tl.store(winners + at, winner)
            tl.store(winner_logits + at, tl.max(tl.where(tokens == winner, values, float("-inf")), 0))


@triton.jit
def settle(
    table: tl.tensor,
    vocab_size: tl.tensor,
    leaders: tl.tensor,
    winners: tl.tensor,
    winner_logits: tl.tensor,
    block_largest: tl.tensor,
    block_masses: tl.tensor,
    largest_logits: tl.tensor,
    bounds: tl.tensor,
    listed: tl.tensor,
    row_masses: tl.tensor,
    out: tl.tensor,
    num_chunks: tl.tensor,
    num_blocks: tl.tensor,
    CHUNKS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A program: one row. CHUNKS, BLOCKS: powers of two that are not below the numbers."""
    index = tl.program_id(0)
    params = table + index.to(tl.int64) * _WORDS
    chunks = tl.arange(0, CHUNKS)
    is_chunk = chunks < num_chunks
    ranks = tl.load(leaders + index * num_chunks + chunks, mask=is_chunk, other=-(2**63))
    first = tl.max(ranks, 0)
    largest, temperature = value_of(order_of(first)), temperature_of(params)
    bound = tl.full([], _SETTLED, tl.float32)
    if temperature == 0:
        tl.store(out + index, token_of(first))
    elif (largest != largest) | (tl.abs(largest) == float("inf")):
        tl.store(out + index, 0)
    elif is_limited(params, vocab_size):
        bound = _bound(params, vocab_size, index, largest, block_largest, block_masses, num_blocks, BLOCKS, BLOCK)
    else:
        racers = index * num_chunks + chunks
        tokens = tl.load(winners + racers, mask=is_chunk, other=0)
        values = tl.load(winner_logits + racers, mask=is_chunk, other=float("-inf"))
        x = scaled(values, largest, temperature).to(tl.float64)
        speeds = tl.exp(x) / exact_waits(tokens_words(params, tokens))
        fastest = tl.max(speeds, 0)
        tl.store(out + index, tl.min(tl.where((speeds == fastest) & is_chunk, tokens, _LAST), 0))
    tl.store(largest_logits + index, largest)
    tl.store(bounds + index, bound)
    tl.store(listed + index, 0)
    tl.store(row_masses + index, 0)


@triton.jit
def _bound(
    params: tl.tensor,
    vocab_size: tl.tensor,
    index: tl.tensor,
    largest: tl.tensor,
    block_largest: tl.tensor,
    block_masses: tl.tensor,
    num_blocks: tl.tensor,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """An x that every token which may be drawn reaches.

    Top-k: the k-th of the blocks' largest, which at least k tokens reach. Top-p, without top-k: the last that tokens
    with their share of the mass surely reach. Of a block, that is at least its largest, if it reaches; and at least all
    its mass but what BLOCK tokens just below have.
    """
    blocks = tl.arange(0, BLOCKS)
    is_block = blocks < num_blocks
    at = index * num_blocks + blocks
    values = tl.load(block_largest + at, mask=is_block, other=float("-inf"))
    x = scaled(values, largest, temperature_of(params))
    top_k, top_p = top_k_of(params, vocab_size), top_p_of(params)
    key = tl.full([], 0, tl.int32)
    if top_k > 0:
        keys = key_of(x)
        for bit in range(_KEY_BITS):
            trial = key | (_LAST >> (bit + 1))
            if tl.sum((keys <= trial).to(tl.int32), 0) < top_k:
                key = trial + 1
    elif top_p < 1:
        own = tl.exp(x)
        whole = tl.load(block_masses + at, mask=is_block, other=0.0) * own
        share = top_p * tl.sum(whole, 0) * _ROUNDING
        for bit in range(_COARSE_BITS):
            trial = key | (_LAST >> (bit + 1))
            least = x_of(trial)
            reach = tl.maximum(tl.where(x >= least, own, 0.0), whole - BLOCK * tl.exp(least))
            if tl.sum(reach, 0) < share:
                key = trial + 1
        key |= _LAST >> _COARSE_BITS
    else:
        key = tl.full([], _LAST, tl.int32)
    return tl.maximum(x_of(key), floor_of(params))


@triton.jit
def gather(
    logits: tl.tensor,
    table: tl.tensor,
    banned: tl.tensor,
    counts: tl.tensor,
    vocab_size: tl.tensor,
    logits_stride: tl.tensor,
    max_banned: tl.tensor,
    counts_stride: tl.tensor,
    largest_logits: tl.tensor,
    bounds: tl.tensor,
    listed: tl.tensor,
    row_masses: tl.tensor,
    listed_tokens: tl.tensor,
    listed_x: tl.tensor,
    HAS_COUNTS: tl.constexpr,
    CHUNK: tl.constexpr,
    CAPACITY: tl.constexpr,
) -> None:
    """A program: one chunk of a row. Those for which the list has no room are counted all the same."""
    index, chunk = tl.program_id(0), tl.program_id(1)
    bound = tl.load(bounds + index)
    if bound != _SETTLED:
        row = row_of(index, logits, table, banned, counts, vocab_size, logits_stride, max_banned, counts_stride)
        params = row[1]
        tokens = chunk * CHUNK + tl.arange(0, CHUNK)
        values = read_logits(row, tokens, HAS_COUNTS)
        x = scaled(values, tl.load(largest_logits + index), temperature_of(params))
        if top_p_of(params) < 1:
            tl.atomic_add(row_masses + index, tl.sum(masses(x, floor_of(params)), 0), sem="relaxed")
        is_listed = (x >= bound) & (tokens < vocab_size)
        number = tl.sum(is_listed.to(tl.int32), 0)
        if number > 0:
            before = tl.atomic_add(listed + index, number, sem="relaxed")
            place = before + tl.cumsum(is_listed.to(tl.int32), 0) - 1
            at = index.to(tl.int64) * CAPACITY + place
            has_room = is_listed & (place < CAPACITY)
            tl.store(listed_tokens + at, tokens, mask=has_room)
            tl.store(listed_x + at, x, mask=has_room)


@triton.jit
def choose(
    logits: tl.tensor,
    table: tl.tensor,
    banned: tl.tensor,
    counts: tl.tensor,
    vocab_size: tl.tensor,
    logits_stride: tl.tensor,
    max_banned: tl.tensor,
    counts_stride: tl.tensor,
    largest_logits: tl.tensor,
    bounds: tl.tensor,
    listed: tl.tensor,
    row_masses: tl.tensor,
    listed_tokens: tl.tensor,
    listed_x: tl.tensor,
    out: tl.tensor,
    HAS_COUNTS: tl.constexpr,
    CAPACITY: tl.constexpr,
) -> None:
    """A program: one row."""
    index = tl.program_id(0)
    if tl.load(bounds + index) != _SETTLED:
        row = row_of(index, logits, table, banned, counts, vocab_size, logits_stride, max_banned, counts_stride)
        number, mass = tl.load(listed + index), tl.load(row_masses + index)
        largest = tl.load(largest_logits + index)
        places = tl.arange(0, CAPACITY)
        at, is_listed = index.to(tl.int64) * CAPACITY + places, places < number
        x = tl.load(listed_x + at, mask=is_listed, other=float("-inf"))
        tokens = tl.load(listed_tokens + at, mask=is_listed, other=0)
        if number <= CAPACITY:
            tl.store(out + index, _choose(row, largest, tokens, x, mass, HAS_COUNTS, False, CAPACITY))
        else:
            tl.store(out + index, _choose(row, largest, tokens, x, mass, HAS_COUNTS, True, CAPACITY))


@triton.jit
def _choose(
    row: tl.tuple,
    largest: tl.tensor,
    tokens: tl.tensor,
    x: tl.tensor,
    mass: tl.tensor,
    HAS_COUNTS: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """The token that is drawn: of those listed, with their x; or, whatever these are, of the whole row. `mass`: of all
    that min-p leaves."""
    params, vocab_size = row[1], row[4]
    least = floor_of(params)
    top_k, top_p = top_k_of(params, vocab_size), top_p_of(params)
    if top_k > 0:
        least = tl.maximum(least, _edge(row, largest, x, top_k, HAS_COUNTS, WHOLE_ROW, TILE))
        if top_p < 1:
            mass = _mass(row, largest, x, least, HAS_COUNTS, WHOLE_ROW, TILE)
    share = mass.to(tl.float64) * top_p.to(tl.float64)
    token = tl.full([], 0, tl.int32)
    is_open = mass >= 0
    while is_open:
        token, its_x = _race(row, largest, tokens, x, least, HAS_COUNTS, WHOLE_ROW, TILE)
        is_open = (top_p < 1) & (its_x < 0)
        if is_open:
            least = x_of(key_of(its_x) - 1)  # the next above
            above = _mass(row, largest, x, least, HAS_COUNTS, WHOLE_ROW, TILE)
            is_open = above.to(tl.float64) >= share
    return token


@triton.jit
def _read(
    row: tl.tuple, largest: tl.tensor, start: tl.tensor, HAS_COUNTS: tl.constexpr, TILE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Tokens of a row and their x, which is -inf beyond the vocabulary."""
    tokens = start + tl.arange(0, TILE)
    return tokens, scaled(read_logits(row, tokens, HAS_COUNTS), largest, temperature_of(row[1]))


@triton.jit
def _edge(
    row: tl.tuple,
    largest: tl.tensor,
    x: tl.tensor,
    top_k: tl.tensor,
    HAS_COUNTS: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """The k-th largest x; -inf where there are fewer."""
    keys = key_of(x)
    key = tl.full([], 0, tl.int32)
    for bit in range(_KEY_BITS):
        trial = key | (_LAST >> (bit + 1))
        if WHOLE_ROW:
            reaching = tl.zeros([TILE], tl.int32)
            for start in range(0, row[4], TILE):
                _, of_tile = _read(row, largest, start, HAS_COUNTS, TILE)
                reaching += (key_of(of_tile) <= trial).to(tl.int32)
        else:
            reaching = (keys <= trial).to(tl.int32)
        if tl.sum(reaching, 0) < top_k:
            key = trial + 1
    return x_of(key)


@triton.jit
def _mass(
    row: tl.tuple,
    largest: tl.tensor,
    x: tl.tensor,
    least: tl.tensor,
    HAS_COUNTS: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """Of the tokens not below `least`."""
    if WHOLE_ROW:
        added = tl.zeros([TILE], tl.int64)
        for start in range(0, row[4], TILE):
            _, of_tile = _read(row, largest, start, HAS_COUNTS, TILE)
            added += masses(of_tile, least)
    else:
        added = masses(x, least)
    return tl.sum(added, 0)


@triton.jit
def _race(
    row: tl.tuple,
    largest: tl.tensor,
    tokens: tl.tensor,
    x: tl.tensor,
    least: tl.tensor,
    HAS_COUNTS: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
    TILE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Of the tokens not below `least`: the winner and its x."""
    params = row[1]
    if WHOLE_ROW:
        best, best_x = tl.full([TILE], -1, tl.int64), tl.full([TILE], 0.0, tl.float32)
        for start in range(0, row[4], TILE):
            of_tile, their_x = _read(row, largest, start, HAS_COUNTS, TILE)
            ranks = _arrivals(of_tile, their_x, least, neighbours_words(params, start, TILE))
            best_x = tl.where(ranks > best, their_x, best_x)
            best = tl.maximum(best, ranks)
    else:
        best, best_x = _arrivals(tokens, x, least, tokens_words(params, tokens)), x
    winner = tl.max(best, 0)
    return token_of(winner), tl.max(tl.where(best == winner, best_x, float("-inf")), 0)


@triton.jit
def _arrivals(tokens: tl.tensor, x: tl.tensor, least: tl.tensor, words: tl.tensor) -> tl.tensor:
    """Ranks: the first to arrive has the largest."""
    speeds = tl.where(x >= least, tl.exp(x) / waits(words), 0.0)
    return ranked(speeds.to(tl.int32, bitcast=True), tokens)
