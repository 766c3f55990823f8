from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tests.checkpoints import VOCAB_SIZE, build_checkpoint, build_model, greedy


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's tiny float32 checkpoint, made once a session: not to be changed."""

    @cache
    def build(family: str) -> Path:
        return build_checkpoint(family, tmp_path_factory.mktemp("checkpoints") / family)

    return build


@pytest.fixture(scope="session")
def oracle() -> Callable[[str, tuple[int, ...], int], list[int]]:
    """(family, prompt, number of tokens) → what transformers generates."""
    torch.set_num_threads(2)

    @cache
    def model(family: str) -> PreTrainedModel:
        return build_model(family)

    @cache
    def generate(family: str, prompt: tuple[int, ...], num_tokens: int) -> list[int]:
        return greedy(model(family), list(prompt), num_tokens)

    return generate


def tokens(rng: random.Random, count: int) -> tuple[int, ...]:
    """Token ids above the special ones."""
    return tuple(rng.randrange(3, VOCAB_SIZE) for _ in range(count))
