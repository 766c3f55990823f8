"""Chooses tokens from logits. What a row draws depends on its logits, its parameters, its seed and its position only:
not on the batch, on this worker, or on what was drawn before.

A token is drawn by a race: token i arrives after E_i / p_i, with E_i exponentially distributed, and the first to arrive
is drawn; it is token i with probability p_i / sum(p). E_i comes from a counter-based generator keyed by seed, position
and token. So rounding, which differs from batch to batch, changes a draw only where two tokens arrive together, or
where a token on the edge of top-k or top-p is itself the first. Inverting the distribution function would be cheaper,
but there a token on the edge moves all others: in a test of 12,800 draws one fell the other way in another batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from baton.sampling import SamplingParams

_LOW_32 = 0xFFFFFFFF
# Multipliers and Weyl increments of Philox-4x32: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as
# 1, 2, 3", SC 2011.
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORDS = 4
"""Random words of one counter: four neighbouring tokens share it."""
LEAST_TEMPERATURE = 1e-6  # below it float32 rounds the others' mass to nothing anyway


@dataclass(frozen=True, slots=True)
class Draw:
    """One row of the logits."""

    params: SamplingParams
    """With `seed` filled in, unless greedy."""
    position: int
    """Of the token to draw, from the prompt's first token on."""
    num_generated: int
    """Tokens drawn for this request before, here or elsewhere."""

    def banned(self, eos_token_ids: Sequence[int]) -> Sequence[int]:
        """Tokens that would end the answer before `min_tokens`."""
        if self.num_generated >= self.params.min_tokens:
            return ()
        return (*(() if self.params.ignore_eos else eos_token_ids), *self.params.stop_token_ids)


class Sampler(Protocol):
    def sample(self, logits: Tensor, draws: Sequence[Draw]) -> list[int]:
        """One token a row of `logits` `[len(draws), vocab_size]`, of the head's dtype, which it may overwrite.

        Greedy rows get the first of the largest, or of NaN if there is one; others 0 if the largest is not finite.
        """


class ReferenceSampler:
    """By torch's operations, on any device: what the others are held to."""

    def __init__(self, eos_token_ids: Sequence[int]) -> None:
        self._eos_token_ids = tuple(eos_token_ids)

    def sample(self, logits: Tensor, draws: Sequence[Draw]) -> list[int]:
        for row, draw in enumerate(draws):
            if banned := draw.banned(self._eos_token_ids):
                logits[row, list(banned)] = -torch.inf
        token_ids: list[int] = logits.argmax(dim=-1).tolist()
        random_rows = [row for row, draw in enumerate(draws) if not draw.params.greedy]
        if random_rows:
            drawn = _draw(logits[random_rows].float(), [draws[row] for row in random_rows])
            for row, token_id in zip(random_rows, drawn, strict=True):
                token_ids[row] = token_id
        return token_ids


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> Tensor:
    """Philox-4x32-10: four counter words and two key words, each int64 `[n]` holding 32 bits, to words `[n, 4]`."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # wrap around, which keeps all 64 bits
        c0, c1, c2, c3 = (
            (product1 >> 32 & _LOW_32) ^ c1 ^ k0,
            product1 & _LOW_32,
            (product0 >> 32 & _LOW_32) ^ c3 ^ k1,
            product0 & _LOW_32,
        )
        k0, k1 = k0 + _WEYL[0] & _LOW_32, k1 + _WEYL[1] & _LOW_32
    return torch.stack((c0, c1, c2, c3), dim=-1)


def uniforms(seeds: Tensor, positions: Tensor, quads: Tensor) -> Tensor:
    """Numbers in (0, 1), float64 `[n, 4]`: for seed, position and quad of tokens, each int64 `[n]`. Tokens 4 q to
    4 q + 3 are quad q. A seed's 64 bits are those of its two's complement."""
    counter = (positions & _LOW_32, positions >> 32 & _LOW_32, quads, torch.zeros_like(quads))
    words = philox(counter, (seeds & _LOW_32, seeds >> 32 & _LOW_32))
    return (words.to(torch.float64) + 0.5) * 2.0**-32


def probabilities(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """What tokens are drawn from: `[num_rows, vocab_size]` float32, unnormalised, of logits of that dtype. Temperature,
    then top-k, then top-p.

    Tokens that tie with the last one kept are kept too, so that no order of equals has to be chosen.
    """

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32).to(logits.device)[:, None]

    logits = logits - logits.amax(dim=-1, keepdim=True)  # the best at 0, so that no temperature makes it infinite
    logits = logits / column([max(p.temperature, LEAST_TEMPERATURE) for p in params])
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
    """The winners of the races; only tokens of some probability take part."""
    probs = probabilities(logits, [draw.params for draw in draws])
    num_rows, vocab_size = probs.shape
    quads = torch.nn.functional.pad(probs, (0, -vocab_size % _WORDS)).view(num_rows, -1, _WORDS)
    rows, racing = (quads > 0).any(dim=-1).nonzero(as_tuple=True)
    seeds = torch.tensor([_signed(draw) for draw in draws], device=probs.device)
    positions = torch.tensor([draw.position for draw in draws], device=probs.device)
    times = -uniforms(seeds[rows], positions[rows], racing).log()
    speeds = torch.zeros(quads.shape, dtype=torch.float64, device=probs.device)
    speeds[rows, racing] = quads[rows, racing].to(torch.float64) / times
    winners: list[int] = speeds.view(num_rows, -1).argmax(dim=-1).tolist()
    return winners


def _signed(draw: Draw) -> int:
    """The seed's 64 bits as torch's int64 holds them."""
    seed = draw.params.seed
    assert seed is not None, f"no seed for temperature {draw.params.temperature}"
    return seed - 2**64 if seed >= 2**63 else seed
