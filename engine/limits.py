"""What a worker's engine may take on, and what it counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SchedulerLimits:
    block_size: int
    max_num_seqs: int
    """Slots: requests that run or receive at once."""
    max_num_batched_tokens: int
    """Tokens of one step."""
    max_model_len: int
    """Prompt and answer together; the pool holds at least so many."""
    eos_token_ids: frozenset[int]
    model_fingerprint: bytes


@dataclass
class SchedulerCounters:
    """Ever growing."""

    preemptions: int = 0
    prefix_queries: int = 0
    """Tokens looked up in the prefix cache."""
    prefix_hits: int = 0
    stale_commands: int = 0
    """About requests that are over or never were: harmless."""
