"""What the sampling kernels do with a row of logits: read it, order it, scale it, and search among it.

A scaled logit x = (logit - largest) / temperature is never above 0, so the bits of |x| are in its order, the best
first: such a key is what thresholds are found on, bit by bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from engine.kernels.gpu import sampling_table as table_words

_WORDS = tl.constexpr(table_words.WORDS)
_TEMPERATURE, _TOP_K = tl.constexpr(table_words.TEMPERATURE), tl.constexpr(table_words.TOP_K)
_TOP_P, _MIN_P = tl.constexpr(table_words.TOP_P), tl.constexpr(table_words.MIN_P)
_REPETITION, _PRESENCE = tl.constexpr(table_words.REPETITION), tl.constexpr(table_words.PRESENCE)
_FREQUENCY, _SLOT = tl.constexpr(table_words.FREQUENCY), tl.constexpr(table_words.SLOT)
_POSITION, _BANNED_UNTIL = tl.constexpr(table_words.POSITION), tl.constexpr(table_words.BANNED_UNTIL)
_NUM_BANNED, _IN_PROMPT = tl.constexpr(table_words.NUM_BANNED), tl.constexpr(table_words.IN_PROMPT)
LAST = tl.constexpr(0x7FFFFFFF)
KEY_BITS = tl.constexpr(31)
SETTLED = tl.constexpr(float("inf"))
"""Of a row that is drawn already, in place of a bound, which is never above 0."""
_INFINITE_KEY = tl.constexpr(0x7F800000)
_MASS_UNIT = tl.constexpr(2.0**40)
"""Whole numbers of mass for exp(0). Their sum is the same in every order, and fits for 2^22 tokens."""


@triton.jit
def _float(params: tl.tensor, word: tl.constexpr) -> tl.tensor:
    return tl.load(params + word).to(tl.float32, bitcast=True)


@triton.jit
def _whole(params: tl.tensor, word: tl.constexpr) -> tl.tensor:
    """Of two words."""
    low, high = tl.load(params + word).to(tl.uint32, bitcast=True), tl.load(params + word + 1)
    return (high.to(tl.int64) << 32) | low.to(tl.int64)


@triton.jit
def temperature_of(params: tl.tensor) -> tl.tensor:
    return _float(params, _TEMPERATURE)


@triton.jit
def top_p_of(params: tl.tensor) -> tl.tensor:
    return _float(params, _TOP_P)


@triton.jit
def top_k_of(params: tl.tensor, vocab_size: tl.tensor) -> tl.tensor:
    """0 where it leaves all."""
    top_k = tl.load(params + _TOP_K)
    return tl.where(top_k < vocab_size, top_k, 0)


@triton.jit
def floor_of(params: tl.tensor) -> tl.tensor:
    """The x that min-p leaves at least; log(0) is -inf."""
    return tl.log(_float(params, _MIN_P).to(tl.float64)).to(tl.float32)


@triton.jit
def is_limited(params: tl.tensor, vocab_size: tl.tensor) -> tl.tensor:
    return (top_k_of(params, vocab_size) > 0) | (top_p_of(params) < 1) | (_float(params, _MIN_P) > 0)


@triton.jit
def has_penalty(params: tl.tensor) -> tl.tensor:
    return (_float(params, _REPETITION) != 1) | (_float(params, _PRESENCE) != 0) | (_float(params, _FREQUENCY) != 0)


@triton.jit
def slot_of(params: tl.tensor) -> tl.tensor:
    return tl.load(params + _SLOT).to(tl.int64)


@triton.jit
def row_of(
    row: tl.tensor,
    logits: tl.tensor,
    table: tl.tensor,
    banned: tl.tensor,
    counts: tl.tensor,
    vocab_size: tl.tensor,
    logits_stride: tl.tensor,
    max_banned: tl.tensor,
    counts_stride: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Where a row's logits, parameters, banned tokens and counts begin, and the size of the vocabulary."""
    row = row.to(tl.int64)
    params = table + row * _WORDS
    counts += slot_of(params) * counts_stride
    return logits + row * logits_stride, params, banned + row * max_banned, counts, vocab_size


@triton.jit
def read_logits(row: tl.tuple, tokens: tl.tensor, HAS_COUNTS: tl.constexpr) -> tl.tensor:
    """Logits with penalties, float32; -inf for banned tokens and beyond the vocabulary."""
    logits, params, banned, counts, vocab_size = row
    is_token = tokens < vocab_size
    values = tl.load(logits + tokens, mask=is_token, other=float("-inf")).to(tl.float32)
    if HAS_COUNTS:
        values = _penalised(values, params, counts + tokens, is_token)
    if _whole(params, _POSITION) < _whole(params, _BANNED_UNTIL):
        for index in range(tl.load(params + _NUM_BANNED)):
            values = tl.where(tokens == tl.load(banned + index), float("-inf"), values)
    return values


@triton.jit
def _penalised(values: tl.tensor, params: tl.tensor, counts: tl.tensor, is_token: tl.tensor) -> tl.tensor:
    """`counts`: where those of the values' tokens are."""
    if has_penalty(params):
        count = tl.load(counts, mask=is_token, other=0)
        generated = count & (_IN_PROMPT - 1)
        repetition = _float(params, _REPETITION)
        repeated = tl.where(values > 0, tl.div_rn(values, repetition), values * repetition)
        values = tl.where(count > 0, repeated, values)
        values -= _float(params, _FREQUENCY) * generated.to(tl.float32)
        values -= tl.where(generated > 0, _float(params, _PRESENCE), 0.0)
    return values


@triton.jit
def ordered(values: tl.tensor) -> tl.tensor:
    """int32 in the order of float32 numbers: -0 and 0 are equal, NaN is above all."""
    bits = (values + 0.0).to(tl.int32, bitcast=True)
    return tl.where(values == values, bits ^ ((bits >> 31) & LAST), LAST)


@triton.jit
def value_of(order: tl.tensor) -> tl.tensor:
    return (order ^ ((order >> 31) & LAST)).to(tl.float32, bitcast=True)


@triton.jit
def ranked(order: tl.tensor, tokens: tl.tensor) -> tl.tensor:
    """int64: by `order`; of equals the first token is largest."""
    return (order.to(tl.int64) << 32) | (tokens ^ LAST).to(tl.int64)


@triton.jit
def token_of(rank: tl.tensor) -> tl.tensor:
    return rank.to(tl.int32) ^ LAST


@triton.jit
def order_of(rank: tl.tensor) -> tl.tensor:
    return (rank >> 32).to(tl.int32)


@triton.jit
def leader(order: tl.tensor, tokens: tl.tensor) -> tl.tensor:
    """The rank of the first of the largest."""
    largest = tl.max(order, 0)
    return ranked(largest, tl.min(tl.where(order == largest, tokens, LAST), 0))


@triton.jit
def scaled(values: tl.tensor, largest: tl.tensor, temperature: tl.tensor) -> tl.tensor:
    """x, rounded as in the reference."""
    return tl.div_rn(values - largest, temperature)


@triton.jit
def key_of(x: tl.tensor) -> tl.tensor:
    return tl.abs(x).to(tl.int32, bitcast=True)


@triton.jit
def x_of(key: tl.tensor) -> tl.tensor:
    """Keys above that of infinity are taken for it."""
    return -tl.minimum(key, _INFINITE_KEY).to(tl.float32, bitcast=True)


@triton.jit
def masses(x: tl.tensor, least: tl.tensor) -> tl.tensor:
    """int64: exp(x) in whole numbers; 0 for x below `least`."""
    return tl.where(x >= least, (tl.exp(x) * _MASS_UNIT).to(tl.int64), 0)
