"""The workloads that figures are quoted for. Token ids are random; sizes and ids are a seed's, so that every run and
every peer does the same work. Pure.

W1  a closed batch: all requests at once, prompts of 64 to 512 tokens, answers of 32 to 128
W2  the online load: prompts of 128 to 384 tokens, answers of 32 to 96; bench/arrivals.py says when they come
W3  a shared prefix of 1,024 tokens, 32 of each request's own, answers of 16

`salt` changes the token ids and nothing else: a new one a run, and no prefix cache knows anything of the last.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

FIRST_TOKEN_ID = 300
"""Above special tokens and a byte-level alphabet."""


@dataclass(frozen=True)
class Job:
    prompt: list[int]
    max_tokens: int
    """Generated to the last, greedily: end-of-sequence is ignored."""


def w1(vocab_size: int, salt: int = 0, *, num_requests: int = 32, seed: int = 1) -> list[Job]:
    sizes, ids = random.Random(seed), random.Random(f"w1 {seed} {salt}")
    return [
        Job(_token_ids(ids, sizes.randint(64, 512), vocab_size), sizes.randint(32, 128)) for _ in range(num_requests)
    ]


def w2(
    vocab_size: int, salt: int, *, num_requests: int, input_len: int = 256, output_len: int = 64, spread: float = 0.5
) -> list[Job]:
    """Lengths are drawn evenly from `spread` below to `spread` above the given ones."""
    sizes, ids = random.Random(f"w2 sizes {salt}"), random.Random(f"w2 {salt}")
    return [
        Job(_token_ids(ids, _around(sizes, input_len, spread), vocab_size), _around(sizes, output_len, spread))
        for _ in range(num_requests)
    ]


def w3(
    vocab_size: int,
    salt: int = 0,
    *,
    num_requests: int = 16,
    prefix: int = 1024,
    own: int = 32,
    max_tokens: int = 16,
    seed: int = 3,
) -> list[Job]:
    ids = random.Random(f"w3 {seed} {salt}")
    head = _token_ids(ids, prefix, vocab_size)
    return [Job(head + _token_ids(ids, own, vocab_size), max_tokens) for _ in range(num_requests)]


def fixed(vocab_size: int, salt: int = 0, *, num_requests: int, prompt: int = 128, max_tokens: int = 16) -> list[Job]:
    """All alike: for decode steps and prefill rates."""
    ids = random.Random(f"fixed {salt}")
    return [Job(_token_ids(ids, prompt, vocab_size), max_tokens) for _ in range(num_requests)]


def totals(jobs: list[Job]) -> tuple[int, int]:
    """Prompt tokens, output tokens."""
    return sum(len(job.prompt) for job in jobs), sum(job.max_tokens for job in jobs)


def _token_ids(ids: random.Random, count: int, vocab_size: int) -> list[int]:
    return [ids.randrange(FIRST_TOKEN_ID, vocab_size) for _ in range(count)]


def _around(sizes: random.Random, length: int, spread: float) -> int:
    return max(1, sizes.randint(math.floor(length * (1 - spread)), math.ceil(length * (1 + spread))))
