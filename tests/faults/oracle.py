"""What the model in the box must say: transformers' greedy decoding in float32, computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from baton import model_in_the_box
from tests.system.recall import Recall, recall_questions

LONGEST = 48
"""Tokens of an answer at most."""
_NEAR = 1e-3
"""Logits so close to each other may come out in another order where another kernel sums them."""
_DISTANCES = (100, 400, 900, 1500)


@dataclass(frozen=True)
class Known:
    prompt: tuple[int, ...]
    greedy: tuple[int, ...]
    """Past all ends, as far as no two tokens are equally likely."""
    end: int
    """How many of them are the answer, its end token included."""

    def expected(self, max_tokens: int, ignore_eos: bool) -> tuple[int, ...]:
        return self.greedy[: max_tokens if ignore_eos else min(max_tokens, self.end)]


def known_answers(each: int, seed: int) -> list[Known]:
    """Recall questions, `each` of every distance, that the model answers right by itself."""
    asked = recall_questions(each, seed, *_DISTANCES)
    return [known for one in asked if (known := _known(one)) is not None]


@cache
def _model() -> PreTrainedModel:
    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(model_in_the_box.DIRECTORY, dtype=torch.float32)
    assert isinstance(model, PreTrainedModel)
    return model.eval()


def _known(asked: Recall) -> Known | None:
    greedy = _greedy(asked.token_ids)
    eos = _model().config.eos_token_id
    if eos not in greedy:
        return None
    return Known(asked.token_ids, greedy, greedy.index(eos) + 1)


@torch.inference_mode()
def _greedy(prompt: Sequence[int]) -> tuple[int, ...]:
    said: list[int] = []
    past, ids = None, torch.tensor([prompt])
    while len(said) < LONGEST:
        out = _model()(ids, past_key_values=past, use_cache=True, logits_to_keep=1)
        best, second = out.logits[0, -1].topk(2)[0].tolist()
        if best - second < _NEAR:
            break
        said.append(int(out.logits[0, -1].argmax()))
        past, ids = out.past_key_values, torch.tensor([said[-1:]])
    return tuple(said)
