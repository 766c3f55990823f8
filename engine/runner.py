"""Carries out step plans: keeps the slots' tokens and block tables, runs the model, draws tokens.

It decides nothing: what is computed, where its KV lies and who is in the batch is the scheduler's plan.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from engine.attention import Span
from engine.kernels.choice import choose_attention, choose_sampler
from engine.kv_cache import KVCache
from engine.models.decoder import Decoder
from engine.plan import Move, StepPlan, StepResult
from engine.slots import Slots


class ModelRunner:
    """Not thread-safe: one thread owns it, as it owns the engine's state."""

    def __init__(
        self,
        model: Decoder,
        cache: KVCache,
        *,
        max_num_seqs: int,
        max_model_len: int,
        eos_token_ids: tuple[int, ...] = (),
    ) -> None:
        self._model = model
        self._cache = cache
        self._slots = Slots(max_num_seqs, max_model_len, cache.layout.block_size)
        self._attention = choose_attention(cache, self._slots.block_tables, model.spec.windows)
        self._sampler = choose_sampler(model.device, eos_token_ids)

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """Makes the plan's moves, computes its tokens in one forward pass, and draws one token for each sequence that
        asks for one."""
        move_seconds = self._move(plan.moves)
        return StepResult(self._compute(plan), move_seconds)

    def _move(self, moves: tuple[Move, ...]) -> float:
        """Seconds that it took."""
        if not moves:
            return 0.0
        started = time.perf_counter()
        for move in moves:
            self._cache.move(move)
        return time.perf_counter() - started

    def _compute(self, plan: StepPlan) -> tuple[int, ...]:
        for new in plan.new:
            self._slots.fill(new)
        if not plan.scheduled:
            return ()
        spans, row = [], 0
        for scheduled in plan.scheduled:
            self._slots.append_blocks(scheduled.slot, scheduled.new_blocks)
            spans.append(self._slots.span(scheduled, row))
            row += scheduled.count
        hidden = self._forward(plan, spans)
        drawing = [(span.row + span.count - 1, s) for span, s in zip(spans, plan.scheduled, strict=True) if s.sample]
        if not drawing:
            return ()
        logits = self._model.logits(hidden[[last for last, _ in drawing]])
        token_ids = self._sampler.sample(logits, [self._slots.draw(s) for _, s in drawing])
        for (_, scheduled), token_id in zip(drawing, token_ids, strict=True):
            self._slots.append_token(scheduled.slot, token_id)
        return tuple(token_ids)

    @torch.inference_mode()
    def warm_up(self, num_tokens: int) -> None:
        """Runs one prompt of `num_tokens` and one decode, so that the first request does not pay for what the libraries
        set up on first use. Overwrites the pool's first blocks: call it before the pool holds anything."""
        block_size = self._cache.layout.block_size
        num_tokens = min(num_tokens, self._cache.num_blocks * block_size, self._slots.token_ids.shape[1] - 1)
        num_blocks = -(-num_tokens // block_size)
        self._slots.block_tables[0, :num_blocks] = np.arange(num_blocks)
        for span in (Span(0, 0, num_tokens, slot=0), Span(0, 0, 1, slot=0)):
            tokens = torch.zeros(span.count, dtype=torch.int64, device=self._model.device)
            positions = torch.arange(span.count, device=self._model.device)
            self._model.logits(self._model.forward(tokens, positions, self._attention.batch([span]))[-1:])

    def _forward(self, plan: StepPlan, spans: list[Span]) -> torch.Tensor:
        token_ids = np.concatenate([
            self._slots.token_ids[s.slot, s.start : s.start + s.count] for s in plan.scheduled
        ])  # fmt: skip
        positions = np.concatenate([np.arange(span.start, span.end) for span in spans])
        device = self._model.device
        return self._model.forward(
            torch.from_numpy(token_ids.astype(np.int64)).to(device),
            torch.from_numpy(positions).to(device),
            self._attention.batch(spans),
        )
