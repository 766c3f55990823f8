"""What a machine allows at best: the time that the bytes and the arithmetic of a step take, whichever is longer. Pure.

A bound, not a forecast: nothing but matrix products, attention and the reading of weights and KV is counted, and all
of it at the machine's measured peaks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.workloads import Job
from engine.models.spec import ModelSpec


@dataclass(frozen=True)
class Peaks:
    """Of one machine, measured (bench/machine.py)."""

    read_bytes_per_second: float
    flops_per_second: float
    """Of matrix products in the model's dtype."""


@dataclass(frozen=True)
class Work:
    """What one model costs."""

    spec: ModelSpec
    itemsize: int
    """Bytes of one weight, or of one number in the KV cache."""

    @property
    def layer_weights(self) -> int:
        """Of all layers' matrices."""
        spec = self.spec
        attention = spec.hidden_size * (2 * spec.query_size + 2 * spec.kv_size)
        return spec.num_layers * (attention + 3 * spec.hidden_size * spec.intermediate_size)

    @property
    def head_weights(self) -> int:
        return self.spec.hidden_size * self.spec.vocab_size

    @property
    def weight_bytes(self) -> int:
        """That a step reads."""
        return (self.layer_weights + self.head_weights) * self.itemsize

    def seen(self, context: int) -> int:
        """Positions that a token behind `context` others attends to, summed over the layers."""
        return sum(context if window is None else min(context, window) for window in self.spec.windows)

    def kv_bytes(self, context: int) -> int:
        return self.seen(context) * 2 * self.spec.kv_size * self.itemsize

    def flops(self, context: int, *, drawn: bool) -> float:
        """Of one token behind `context` others."""
        head = self.head_weights if drawn else 0
        return 2 * (self.layer_weights + head) + 4 * self.seen(context) * self.spec.query_size


def decode_seconds(peaks: Peaks, work: Work, contexts: Sequence[int]) -> float:
    """Of one step that draws a token behind each of `contexts`."""
    read = work.weight_bytes + sum(map(work.kv_bytes, contexts))
    flops = sum(work.flops(context, drawn=True) for context in contexts)
    return max(read / peaks.read_bytes_per_second, flops / peaks.flops_per_second)


def prefill_seconds(peaks: Peaks, work: Work, num_tokens: int) -> float:
    """Of one whole prompt."""
    flops = num_tokens * work.flops(num_tokens // 2, drawn=False) + 2 * work.head_weights
    return max(work.weight_bytes / peaks.read_bytes_per_second, flops / peaks.flops_per_second)


def closed_batch_seconds(peaks: Peaks, work: Work, jobs: Sequence[Job]) -> float:
    """Of jobs that all come at once: prompts at the peak of arithmetic, then decode steps of all that are not done."""
    prefill_flops = sum(
        len(job.prompt) * work.flops(len(job.prompt) // 2, drawn=False) + 2 * work.head_weights for job in jobs
    )
    steps = max(job.max_tokens for job in jobs) - 1
    decoding = sum(
        decode_seconds(peaks, work, [len(job.prompt) + step for job in jobs if job.max_tokens - 1 > step])
        for step in range(steps)
    )
    return prefill_flops / peaks.flops_per_second + decoding
