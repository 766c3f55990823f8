"""Tokens by the GPU's sampler: a Sampler, and the form of it that leaves tokens on the device and can be captured in a
CUDA graph. sampling_kernels.py says how they are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from baton.sampling import SamplingParams
from engine.kernels.gpu.launch import Launch
from engine.kernels.gpu.sampling_choice import choose, gather
from engine.kernels.gpu.sampling_kernels import settle, survey
from engine.kernels.gpu.sampling_table import IN_PROMPT, SamplingTensors
from engine.sampler import LEAST_TEMPERATURE, Draw, ReferenceSampler

MAX_VOCAB_SIZE = 262_144
"""`settle` holds what is known of a row's blocks in registers."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Launch parameters. Of CHUNK and BLOCK the bits of a draw depend, of the others only the speed.
CHUNK, CHUNK_WARPS = 4096, 8
BLOCK, SETTLE_WARPS = 128, 4
CAPACITY, CHOOSE_WARPS = 4096, 16


class TritonSampler:
    def __init__(self, eos_token_ids: Sequence[int]) -> None:
        self._eos_token_ids = tuple(eos_token_ids)

    @staticmethod
    def supports(dtype: torch.dtype, vocab_size: int) -> bool:
        return dtype in _DTYPES and vocab_size <= MAX_VOCAB_SIZE

    def sample(self, logits: Tensor, draws: Sequence[Draw]) -> list[int]:
        assert logits.shape[0] == len(draws), f"{logits.shape[0]} rows for {len(draws)} draws"
        params = SamplingTensors.of(draws, self._eos_token_ids, logits.device)
        out = torch.empty(len(draws), dtype=torch.int64, device=logits.device)
        limited = any(_is_limited(draw.params, logits.shape[1]) for draw in draws)
        sample_on_device(logits, params, out, limited=limited)
        token_ids: list[int] = out.tolist()
        return token_ids


def sample_on_device(logits: Tensor, params: SamplingTensors, out: Tensor, *, limited: bool = True) -> None:
    """One token a row of `logits` `[num_rows, vocab_size]` into `out` `[num_rows]`, int32 or int64; as Sampler says.

    Waits for nothing, and what it launches depends on shapes alone: the values in `params` may change between replays
    of a graph. (Triton compiles at the first call: capture a later one.) `limited`: whether any row may have top-k,
    top-p or min-p; two of four passes are for those. What changes a row, in this order: penalties, banned tokens,
    temperature, min-p, top-k, top-p.
    """
    assert logits.dtype in _DTYPES, f"logits of {logits.dtype}"
    assert logits.stride(1) == 1, "logits of a row lie apart"
    assert logits.shape[1] <= MAX_VOCAB_SIZE, f"a vocabulary of {logits.shape[1]} tokens"
    assert len(logits) == params.num_rows == len(out), f"{len(logits)} rows, {params.num_rows} params, {len(out)} out"
    for step in passes(logits, params, out, limited=limited):
        step.run()


def passes(logits: Tensor, params: SamplingTensors, out: Tensor, *, limited: bool) -> list[Launch]:
    """The passes of a draw, in their order; allocates what they hand on to each other."""
    num_rows, vocab_size = logits.shape
    num_chunks = triton.cdiv(vocab_size, CHUNK)
    num_blocks = num_chunks * (CHUNK // BLOCK)

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty((num_rows, *shape), dtype=dtype, device=logits.device)

    row: dict[str, Any] = {
        "logits": logits,
        "table": params.table,
        "banned": params.banned,
        "counts": params.table if params.counts is None else params.counts,
        "vocab_size": vocab_size,
        "logits_stride": logits.stride(0),
        "max_banned": params.banned.shape[1],
        "counts_stride": 0 if params.counts is None else params.counts.stride(0),
        "HAS_COUNTS": params.counts is not None,
    }
    surveyed = {
        "leaders": empty(torch.int64, num_chunks),
        "winners": empty(torch.int32, num_chunks),
        "winner_logits": empty(torch.float32, num_chunks),
        "block_largest": empty(torch.float32, num_blocks),
        "block_masses": empty(torch.float32, num_blocks),
    }
    settled = {
        "largest_logits": empty(torch.float32),
        "bounds": empty(torch.float32),
        "listed": empty(torch.int32),
        "row_masses": empty(torch.int64),
    }
    sizes = {
        "num_chunks": num_chunks,
        "num_blocks": num_blocks,
        "CHUNKS": triton.next_power_of_2(num_chunks),
        "BLOCKS": triton.next_power_of_2(num_blocks),
        "BLOCK": BLOCK,
    }
    by_chunk, by_row = (num_rows, num_chunks), (num_rows,)
    table = {"table": params.table, "vocab_size": vocab_size}
    first = [
        Launch(survey, by_chunk, {**row, **surveyed, "CHUNK": CHUNK, "BLOCK": BLOCK}, CHUNK_WARPS),
        Launch(settle, by_row, {**table, **surveyed, **settled, **sizes, "out": out}, SETTLE_WARPS),
    ]
    if not limited:
        return first
    lists = {"listed_tokens": empty(torch.int32, CAPACITY), "listed_x": empty(torch.float32, CAPACITY)}
    row = {**row, **settled, **lists, "CAPACITY": CAPACITY}
    return [
        *first,
        Launch(gather, by_chunk, {**row, "CHUNK": CHUNK}, CHUNK_WARPS),
        Launch(choose, by_row, {**row, "out": out}, CHOOSE_WARPS),
    ]


def reference_sample(logits: Tensor, params: SamplingTensors) -> list[int]:
    """What `sample_on_device` is held to, out of torch operations: penalties, banned tokens and min-p here, the rest in
    ReferenceSampler."""
    logits = reference_logits(logits, params)
    draws = []
    for row in range(params.num_rows):
        sampling = SamplingParams(
            temperature=float(params.temperature[row]),
            top_k=int(params.top_k[row]),
            top_p=float(params.top_p[row]),
            seed=int(params.seed[row]) % 2**64,
        )
        draws.append(Draw(sampling, int(params.position[row]), num_generated=0))
    return ReferenceSampler(()).sample(logits, draws)


def reference_logits(logits: Tensor, params: SamplingTensors) -> Tensor:
    """A float32 copy with penalties (repetition: Keskar et al., "CTRL", 2019, over prompt and answer; presence and
    frequency: OpenAI's, over the answer), and -inf for tokens that are banned, or below min-p."""
    logits = logits.float()
    if params.counts is not None:
        counts = params.counts[params.slot.long()]
        generated = counts % IN_PROMPT
        repetition = params.repetition[:, None]
        repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits = torch.where(counts > 0, repeated, logits)
        logits = logits - params.frequency[:, None] * generated
        logits = logits - params.presence[:, None] * (generated > 0)
    logits = logits.clone()
    num_banned = torch.where(params.position < params.banned_until, params.num_banned, 0)
    for row, number in enumerate(num_banned.tolist()):
        logits[row, params.banned[row, :number].long()] = -torch.inf
    temperature = params.temperature.clamp(min=LEAST_TEMPERATURE)[:, None]
    x = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    is_random = params.temperature[:, None] > 0
    return logits.masked_fill_(is_random & (x < params.min_p.log()[:, None]), -torch.inf)


def _is_limited(params: SamplingParams, vocab_size: int) -> bool:
    return not params.greedy and (0 < params.top_k < vocab_size or params.top_p < 1)
