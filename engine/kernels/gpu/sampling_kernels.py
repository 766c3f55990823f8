"""The passes of a draw on a device, in their order; none of them sorts, and none waits for the host.

1. `survey` reads the logits, a chunk of a row a program: what leads it, and what wins its race.
2. `settle` has the chunks' leaders and winners meet: rows that are greedy, or have no limits, are done. For the others
   it finds, from what the survey saw of their blocks, a bound that no token which may be drawn is below.
3. `gather` (sampling_choice.py, like `choose`) reads the logits of those again, and lists the tokens that are not below
   the bound: mostly a few.
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
    KEY_BITS,
    LAST,
    SETTLED,
    floor_of,
    is_limited,
    key_of,
    leader,
    order_of,
    ordered,
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
_COARSE_BITS = tl.constexpr(15)
"""Of a key, for a bound that need not be exact: the exponent and seven bits more."""
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
    bound = tl.full([], SETTLED, tl.float32)
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
        tl.store(out + index, tl.min(tl.where((speeds == fastest) & is_chunk, tokens, LAST), 0))
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
        for bit in range(KEY_BITS):
            trial = key | (LAST >> (bit + 1))
            if tl.sum((keys <= trial).to(tl.int32), 0) < top_k:
                key = trial + 1
    elif top_p < 1:
        own = tl.exp(x)
        whole = tl.load(block_masses + at, mask=is_block, other=0.0) * own
        share = top_p * tl.sum(whole, 0) * _ROUNDING
        for bit in range(_COARSE_BITS):
            trial = key | (LAST >> (bit + 1))
            least = x_of(trial)
            reach = tl.maximum(tl.where(x >= least, own, 0.0), whole - BLOCK * tl.exp(least))
            if tl.sum(reach, 0) < share:
                key = trial + 1
        key |= LAST >> _COARSE_BITS
    else:
        key = tl.full([], LAST, tl.int32)
    return tl.maximum(x_of(key), floor_of(params))
