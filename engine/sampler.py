"""Chooses tokens from logits. What a row draws depends on its logits, its parameters, its seed and its position only:
not on the batch, on this worker, or on what was drawn before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from baton.sampling import SamplingParams

Words = npt.NDArray[np.uint64]

_LOW_32 = np.uint64(0xFFFFFFFF)
_SHIFT_32 = np.uint64(32)
# Multipliers and Weyl increments of Philox-4x32: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as
# 1, 2, 3", SC 2011.
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_ROUNDS = 10
_LEAST_TEMPERATURE = 1e-6  # below it float32 rounds the others' mass to nothing anyway


@dataclass(frozen=True, slots=True)
class Draw:
    """One row of the logits."""

    params: SamplingParams
    """With `seed` filled in, unless greedy."""
    position: int
    """Of the token to draw, from the prompt's first token on."""
    num_generated: int
    """Tokens drawn for this request before, here or elsewhere."""


class Sampler:
    def __init__(self, eos_token_ids: Sequence[int]) -> None:
        self._eos_token_ids = tuple(eos_token_ids)

    def sample(self, logits: Tensor, draws: Sequence[Draw]) -> list[int]:
        """One token a row of `logits` `[len(draws), vocab_size]` float32, which it may overwrite."""
        for row, draw in enumerate(draws):
            if draw.num_generated < draw.params.min_tokens:
                logits[row, self._ending_ids(draw.params)] = -torch.inf
        token_ids: list[int] = logits.argmax(dim=-1).tolist()
        random_rows = [row for row, draw in enumerate(draws) if not draw.params.greedy]
        if random_rows:
            drawn = _draw(logits[random_rows], [draws[row] for row in random_rows])
            for row, token_id in zip(random_rows, drawn, strict=True):
                token_ids[row] = token_id
        return token_ids

    def _ending_ids(self, params: SamplingParams) -> list[int]:
        eos = () if params.ignore_eos else self._eos_token_ids
        return [*eos, *params.stop_token_ids]


def philox(counter: Words, key: Words) -> Words:
    """Philox-4x32-10: counters `[4, n]` and keys `[2, n]`, 32-bit words in uint64, to random words `[4, n]`."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> _SHIFT_32) ^ c1 ^ k0,
            product1 & _LOW_32,
            (product0 >> _SHIFT_32) ^ c3 ^ k1,
            product0 & _LOW_32,
        )
        k0, k1 = (k0 + _WEYL[0]) & _LOW_32, (k1 + _WEYL[1]) & _LOW_32
    return np.stack((c0, c1, c2, c3))


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> npt.NDArray[np.float64]:
    """One number in [0, 1), 53 random bits, for each pair of a 64-bit seed (the key) and a position (the counter)."""
    seed, position = np.array(seeds, dtype=np.uint64), np.array(positions, dtype=np.uint64)
    zero = np.zeros_like(position)
    counter = np.stack((position & _LOW_32, position >> _SHIFT_32, zero, zero))
    words = philox(counter, np.stack((seed & _LOW_32, seed >> _SHIFT_32)))
    bits = (words[0] << _SHIFT_32) | words[1]
    uniform: npt.NDArray[np.float64] = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return uniform


def probabilities(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """What tokens are drawn from: `[num_rows, vocab_size]` float32, unnormalised. Temperature, then top-k, then top-p.

    Tokens that tie with the last one kept are kept too, so that no order of equals has to be chosen.
    """

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32).to(logits.device)[:, None]

    logits = logits - logits.amax(dim=-1, keepdim=True)  # the best at 0, so that no temperature makes it infinite
    logits = logits / column([max(p.temperature, _LEAST_TEMPERATURE) for p in params])
    vocab_size = logits.shape[-1]
    limited = [row for row, p in enumerate(params) if 0 < p.top_k < vocab_size]
    if limited:
        ks = [params[row].top_k for row in limited]
        best = logits[limited].topk(max(ks), dim=-1).values
        least = best[torch.arange(len(ks)), torch.tensor(ks) - 1][:, None]
        logits[limited] = logits[limited].masked_fill(logits[limited] < least, -torch.inf)
    probs = logits.softmax(dim=-1)
    nucleus = [row for row, p in enumerate(params) if p.top_p < 1]
    if nucleus:
        ranked = probs[nucleus].sort(dim=-1, descending=True).values
        mass_before = ranked.cumsum(dim=-1) - ranked
        kept = (mass_before < column([params[row].top_p for row in nucleus])).sum(dim=-1, keepdim=True).clamp_(min=1)
        least = ranked.gather(-1, kept - 1)
        probs[nucleus] = probs[nucleus].masked_fill(probs[nucleus] < least, 0.0)
    return probs


def _draw(logits: Tensor, draws: Sequence[Draw]) -> list[int]:
    """By the inverse of the distribution function over the vocabulary in its order."""
    seeds = []
    for draw in draws:
        assert draw.params.seed is not None, f"no seed for temperature {draw.params.temperature}"
        seeds.append(draw.params.seed)
    uniform = torch.from_numpy(uniforms(seeds, [draw.position for draw in draws])).to(logits.device)
    cumulative = probabilities(logits, [draw.params for draw in draws]).to(torch.float64).cumsum(dim=-1)
    total = cumulative[:, -1:].contiguous()
    # The first token whose cumulative mass exceeds the target has mass of its own. Rounding could put the target
    # at the very total; then it is the first token that reaches the total.
    token_ids = torch.searchsorted(cumulative, uniform[:, None] * total, right=True)
    last = torch.searchsorted(cumulative, total)
    drawn: list[int] = torch.minimum(token_ids, last)[:, 0].tolist()
    return drawn
