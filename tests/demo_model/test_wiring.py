"""How attention starts: looking back, and finding where the same words stand."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from demo_model.tokenizer import ASSISTANT, BOS, END, USER, train_tokenizer
from demo_model.train import PLANS, build

TEXT = (
    f"{BOS}{USER}The code of the blue door is 4172. It was warm. The code of the red door is 5031. The code of the "
    f"blue lamp is 7733. The sun was warm. What is the code of the blue door?{END}{ASSISTANT}4172{END}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"), seed=0, samples=500)


def wired(which: str, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = build(PLANS[which], tokenizer)
    model.set_attn_implementation("eager")
    return model


@torch.inference_mode()
def attention(model: LlamaForCausalLM, ids: list[int], first: int = 0) -> list[torch.Tensor]:
    """Of each layer, `[heads, length, length]`; positions begin at `first` and jump by a thousand behind the second
    sentence."""
    positions = torch.arange(first, first + len(ids))[None]
    positions[:, 20:] += 1000
    mask = torch.ones(1, len(ids), dtype=torch.int64)
    out = model(torch.tensor([ids]), attention_mask=mask, position_ids=positions, output_attentions=True)
    return [each[0] for each in out.attentions]


@pytest.mark.parametrize("which", PLANS)
def test_first_layer_heads_look_one_to_four_tokens_back(which: str, tokenizer: PreTrainedTokenizerFast) -> None:
    for head, weights in enumerate(attention(wired(which, tokenizer), tokenizer(TEXT).input_ids)[0]):
        back = torch.diagonal(weights[24:, 24:], -(head + 1))
        assert back.mean() > 0.75, f"head {head} looks elsewhere: {back}"


@pytest.mark.parametrize("which", PLANS)
@pytest.mark.parametrize("first", [0, 500])
def test_the_second_layer_finds_the_number_behind_the_same_words(
    which: str, first: int, tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = tokenizer(TEXT).input_ids
    tokens = tokenizer.convert_ids_to_tokens(ids)
    told, asked = tokens.index("41"), tokens.index(ASSISTANT)
    seen = attention(wired(which, tokenizer), ids, first)[1]
    assert seen[0, asked].argmax() == told, "the first half is that of the same colour and thing"
    if which == "checkpoint":
        assert seen[2, asked + 1].argmax() == told + 1, "the second half is that behind the first"
