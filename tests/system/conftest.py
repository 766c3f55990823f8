from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from transformers import PreTrainedModel

from tests.checkpoints import VOCAB_SIZE, build_model


class Oracle:
    """Knows what transformers' greedy decoding says, from one forward pass: an answer is the greedy one exactly if
    each of its tokens is the most likely one behind the prompt and the tokens before it."""

    def __init__(self) -> None:
        self._models: dict[str, PreTrainedModel] = {}

    @torch.inference_mode()
    def check(self, family: str, prompt: Sequence[int], answer: Sequence[int]) -> None:
        if family not in self._models:
            self._models[family] = build_model(family)
        known = torch.tensor([[*prompt, *answer[:-1]]])
        logits = self._models[family](known, logits_to_keep=len(answer)).logits[0]
        assert list(answer) == logits.argmax(-1).tolist(), f"not what transformers says behind {len(prompt)} tokens"


@pytest.fixture(scope="session")
def oracle() -> Oracle:
    torch.set_num_threads(2)
    return Oracle()


def tokens(rng: random.Random, count: int) -> tuple[int, ...]:
    """Token ids above the special ones."""
    return tuple(rng.randrange(3, VOCAB_SIZE) for _ in range(count))
