"""The exponential race of engine/sampler.py in Triton: the same Philox words for a seed, a position and a token."""

from __future__ import annotations

import triton
import triton.language as tl

from engine.kernels.gpu.sampling_table import POSITION, SEED

# As in engine/sampler.py.
_MULTIPLIER_0, _MULTIPLIER_1 = tl.constexpr(0xD2511F53), tl.constexpr(0xCD9E8D57)
_WEYL_0, _WEYL_1 = tl.constexpr(0x9E3779B9), tl.constexpr(0xBB67AE85)
_ROUNDS = tl.constexpr(10)
_SEED, _POSITION = tl.constexpr(SEED), tl.constexpr(POSITION)
_TO_UNIT = tl.constexpr(2.0**-32)


@triton.jit
def _half(params: tl.tensor, word: tl.constexpr) -> tl.tensor:
    return tl.load(params + word).to(tl.uint32, bitcast=True)


@triton.jit
def quad_words(params: tl.tensor, quads: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Four random words, uint32, for each quad of neighbouring tokens. `params`: a row of the table."""
    key_0, key_1 = _half(params, _SEED).to(tl.uint64), _half(params, _SEED + 1).to(tl.uint64)
    word_2 = quads.to(tl.uint32)
    word_3 = word_2 & 0
    word_0, word_1 = word_3 | _half(params, _POSITION), word_3 | _half(params, _POSITION + 1)
    for _ in tl.static_range(_ROUNDS):
        product_0, product_1 = word_0.to(tl.uint64) * _MULTIPLIER_0, word_2.to(tl.uint64) * _MULTIPLIER_1
        word_0 = (product_1 >> 32).to(tl.uint32) ^ word_1 ^ key_0.to(tl.uint32)
        word_1 = product_1.to(tl.uint32)
        word_2 = (product_0 >> 32).to(tl.uint32) ^ word_3 ^ key_1.to(tl.uint32)
        word_3 = product_0.to(tl.uint32)
        key_0, key_1 = key_0 + _WEYL_0, key_1 + _WEYL_1
    return word_0, word_1, word_2, word_3


@triton.jit
def neighbours_words(params: tl.tensor, first: tl.tensor, COUNT: tl.constexpr) -> tl.tensor:
    """The words of COUNT tokens from `first` on, both multiples of 4."""
    word_0, word_1, word_2, word_3 = quad_words(params, first // 4 + tl.arange(0, COUNT // 4))
    # The last axis is joined last: [quad, word // 2, word % 2].
    return tl.reshape(tl.join(tl.join(word_0, word_2), tl.join(word_1, word_3)), [COUNT])


@triton.jit
def tokens_words(params: tl.tensor, tokens: tl.tensor) -> tl.tensor:
    """The words of any tokens, at four times the work."""
    word_0, word_1, word_2, word_3 = quad_words(params, tokens // 4)
    low, high = tl.where(tokens % 2 == 0, word_0, word_1), tl.where(tokens % 2 == 0, word_2, word_3)
    return tl.where(tokens % 4 < 2, low, high)


@triton.jit
def waits(words: tl.tensor) -> tl.tensor:
    """-log((word + 1/2) / 2^32), float32, to a few units in the last place.

    The first to arrive have mostly waited little, and there float32 has no good logarithm of a number near 1. So the
    upper half of the words goes by what is missing to 1, and by log(1 - v) = -2 (z + z^3/3 + z^5/5 + ...),
    z = v / (2 - v).
    """
    is_upper = words > 0x7FFFFFFF
    from_end = (tl.where(is_upper, words ^ 0xFFFFFFFF, words).to(tl.int32).to(tl.float32) + 0.5) * _TO_UNIT
    z = from_end / (2.0 - from_end)
    square = z * z
    series = 1 / 9 + square * (1 / 11 + square * (1 / 13))
    series = 1.0 + square * (1 / 3 + square * (1 / 5 + square * (1 / 7 + square * series)))
    return tl.where(is_upper, 2.0 * z * series, -tl.log(from_end))


@triton.jit
def exact_waits(words: tl.tensor) -> tl.tensor:
    """The same in float64, as the reference has them."""
    return -tl.log((words.to(tl.float64) + 0.5) * _TO_UNIT)
