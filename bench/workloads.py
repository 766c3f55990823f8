"""The workloads that figures are quoted for. Token ids are random; sizes and ids are a seed's, so that every run and
every peer does the same work.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

FIRST_TOKEN_ID = 300
"""Above special tokens and a byte-level alphabet."""


@dataclass(frozen=True)
class Job:
    prompt: list[int]
    max_tokens: int
    """Generated to the last, greedily: end-of-sequence is ignored."""


def w1(vocab_size: int, salt: int, *, num_requests: int = 32, seed: int = 1) -> list[Job]:
    """A closed batch: all requests at once, prompts of 64 to 512 tokens, answers of 32 to 128.

    Sizes depend on `seed`, token ids on `salt` too: a new salt a run, and no prefix cache knows anything of the last.
    """
    sizes, ids = random.Random(seed), random.Random(f"w1 {seed} {salt}")
    return [
        Job(
            [ids.randrange(FIRST_TOKEN_ID, vocab_size) for _ in range(sizes.randint(64, 512))],
            sizes.randint(32, 128),
        )
        for _ in range(num_requests)
    ]
