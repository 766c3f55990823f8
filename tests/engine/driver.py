"""Drives a runner, that of the machine's device, as a scheduler would, but at random: chunks, block tables, order and
company are a seed's."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from baton.ids import BlockIndex
from baton.sampling import SamplingParams
from engine.attention import Attention, BlockTables
from engine.kernels.choice import choose_attention
from engine.kv_cache import KVCache
from engine.loader import LoadedModel
from engine.plan import NewSequence, ScheduledSequence, StepPlan, StepResult
from engine.runner import ModelRunner
from engine.runners import RunnerLimits, make_runner

MAX_NUM_SEQS = 16
MAX_MODEL_LEN = 320


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def attention_over(model: LoadedModel, cache: KVCache, block_tables: BlockTables) -> Attention:
    """By the kernels of the machine's device."""
    if cache.device.type != "cuda":
        return choose_attention(cache, block_tables, model.spec.windows)
    from engine.kernels.gpu.attention import TritonAttention

    return TritonAttention(cache, block_tables, model.spec.num_heads)


class _Runner(Protocol):
    def run(self, plan: StepPlan) -> StepResult: ...


class Waiting:
    """Waits for each step of a runner that is behind its host."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner

    def run(self, plan: StepPlan) -> StepResult:
        result: StepResult = self._runner.run(plan).wait()
        return result


class Driver:
    """A runner over a pool whose blocks are all NaN until somebody owns and writes them."""

    def __init__(self, model: LoadedModel, *, block_size: int = 4, num_blocks: int = 600, seed: int = 0) -> None:
        self.cache = KVCache(model.kv_layout(block_size), num_blocks, model.decoder.device)
        for index in range(num_blocks):
            self.cache.poison(index)
        limits = RunnerLimits(MAX_NUM_SEQS, MAX_NUM_SEQS * MAX_MODEL_LEN, MAX_MODEL_LEN, model.eos_token_ids)
        runner = make_runner(model.decoder, self.cache, limits)
        self.runner: _Runner = runner if isinstance(runner, ModelRunner) else Waiting(runner)
        self.cache.poison(0)  # warming up writes there
        self._rng = random.Random(seed)
        self._free = [BlockIndex(index) for index in range(num_blocks)]
        self._rng.shuffle(self._free)
        self._slots = list(range(MAX_NUM_SEQS))
        self._rng.shuffle(self._slots)

    def generate(
        self,
        prompts: Sequence[list[int]],
        num_tokens: int,
        sampling: Sequence[SamplingParams] | None = None,
        *,
        preempt: bool = False,
    ) -> list[list[int]]:
        """`num_tokens` tokens behind each prompt. With `preempt`, sequences lose their blocks at random and start over
        from the tokens that they have."""
        params = sampling or [SamplingParams()] * len(prompts)
        streams = [_Stream(prompt, p, self._slots.pop()) for prompt, p in zip(prompts, params, strict=True)]
        while pending := [stream for stream in streams if len(stream.generated) < num_tokens]:
            self._step(pending)
            if preempt and self._rng.random() < 0.2:
                self._evict(self._rng.choice(pending))
        for stream in streams:
            self._evict(stream)
            self._slots.append(stream.slot)
        return [stream.generated for stream in streams]

    def _step(self, pending: list[_Stream]) -> None:
        batch = self._rng.sample(pending, self._rng.randint(1, len(pending)))
        new: list[NewSequence] = []
        scheduled: list[ScheduledSequence] = []
        for stream in batch:
            known = len(stream.token_ids)
            count = min(known - stream.computed, self._rng.choice((1, 3, 17, 64, MAX_MODEL_LEN)))
            end = stream.computed + count
            missing = -(-end // self.cache.layout.block_size) - len(stream.blocks)
            blocks = tuple(self._free.pop() for _ in range(missing))
            if not stream.placed:
                new.append(
                    NewSequence(stream.slot, tuple(stream.token_ids), stream.num_prompt_tokens, blocks, stream.sampling)
                )
            appended = blocks if stream.placed else ()
            scheduled.append(ScheduledSequence(stream.slot, stream.computed, count, appended, end == known))
            stream.placed = True
            stream.blocks.extend(blocks)
            stream.computed = end
        result = self.runner.run(StepPlan(tuple(new), tuple(scheduled)))
        drawing = [stream for stream, s in zip(batch, scheduled, strict=True) if s.sample]
        for stream, token_id in zip(drawing, result.token_ids, strict=True):
            stream.token_ids.append(token_id)

    def _evict(self, stream: _Stream) -> None:
        for index in stream.blocks:
            self.cache.poison(index)
        self._free.extend(stream.blocks)
        self._rng.shuffle(self._free)
        stream.blocks, stream.computed, stream.placed = [], 0, False


class _Stream:
    def __init__(self, prompt: list[int], sampling: SamplingParams, slot: int) -> None:
        self.token_ids = list(prompt)
        self.num_prompt_tokens = len(prompt)
        self.sampling = sampling
        self.slot = slot
        self.blocks: list[BlockIndex] = []
        self.computed = 0
        self.placed = False

    @property
    def generated(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]
