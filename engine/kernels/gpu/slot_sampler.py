"""Draws for a runner whose steps are queued behind each other: parameters stay on the device, a row a slot."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from baton.sampling import MAX_STOP_TOKEN_IDS
from engine.kernels.gpu.sampling import sample_on_device
from engine.kernels.gpu.sampling_table import ROW, SamplingTensors, put_params, table_of
from engine.plan import NewSequence
from engine.sampler import Draw


class SlotSampler:
    """`draw` can be captured in a CUDA graph; what `fill` says holds for replays that are queued after it."""

    def __init__(self, eos_token_ids: Sequence[int], num_slots: int, device: torch.device | str) -> None:
        """`num_slots`: with those that are nobody's, whose rows are greedy."""
        self._eos_token_ids = tuple(eos_token_ids)
        max_banned = len(self._eos_token_ids) + MAX_STOP_TOKEN_IDS
        self._slots = SamplingTensors.neutral(num_slots, device, max_banned)

    def fill(self, slot: int, new: NewSequence) -> None:
        params = new.sampling
        row = np.zeros(1, dtype=ROW)
        put_params(row[0], params)
        banned = Draw(params, position=0, num_generated=0).banned(self._eos_token_ids)
        row["banned_until"], row["num_banned"] = new.num_prompt_tokens + params.min_tokens, len(banned)
        self._copy(table_of(row)[0], self._slots.table[slot])
        if banned:
            self._copy(torch.tensor(banned, dtype=torch.int32), self._slots.banned[slot, : len(banned)])

    def draw(self, logits: Tensor, slots: Tensor, positions: Tensor, out: Tensor) -> None:
        """Queues the draw of one token a row of `logits` `[num_rows, vocab_size]` into `out` `[num_rows]`, with the
        parameters of `slots` `[num_rows]`, at `positions` `[num_rows]`, those of the tokens to draw."""
        params = SamplingTensors(
            self._slots.table.index_select(0, slots), self._slots.banned.index_select(0, slots), self._slots.counts
        )
        params.position.copy_(positions)
        sample_on_device(logits, params, out)

    @staticmethod
    def _copy(values: Tensor, target: Tensor) -> None:
        if target.device.type == "cuda":
            values = values.pin_memory()
        target.copy_(values, non_blocking=True)
