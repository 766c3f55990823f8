"""The last two passes of a draw, for rows with limits: those tokens that may be drawn, and the one that is. What comes
before, and why, is in sampling_kernels.py."""

from __future__ import annotations

import triton
import triton.language as tl

from engine.kernels.gpu.race import neighbours_words, tokens_words, waits
from engine.kernels.gpu.sampling_rows import (
    KEY_BITS,
    LAST,
    SETTLED,
    floor_of,
    key_of,
    masses,
    ranked,
    read_logits,
    row_of,
    scaled,
    temperature_of,
    token_of,
    top_k_of,
    top_p_of,
    x_of,
)


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
    if bound != SETTLED:
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
    if tl.load(bounds + index) != SETTLED:
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
    for bit in range(KEY_BITS):
        trial = key | (LAST >> (bit + 1))
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
