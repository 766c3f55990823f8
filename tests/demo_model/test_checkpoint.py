"""What is in the box: standard files that transformers reads with nothing of ours, and answers that are right."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from baton import model_in_the_box
from demo_model.evaluate import BARS, DISTANCES, Question, prompt_ids, questions

MODEL = model_in_the_box.DIRECTORY
DRAFT = MODEL.parent / "draft"
COUNT = 50
LEEWAY = 0.04
"""Of so few questions one or two may be wrong. The whole evaluation's result is in the model card."""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@torch.inference_mode()
def right(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, question: Question) -> bool:
    """Whether greedy decoding gives the answer and ends: each token is the most likely one behind those before it."""
    prompt = prompt_ids(question, tokenizer)
    answer = [*tokenizer(question.answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    logits = model(torch.tensor([prompt + answer[:-1]]), logits_to_keep=len(answer)).logits[0]
    return bool(logits.argmax(-1).tolist() == answer)


def test_transformers_loads_it_and_it_is_a_llama_in_16_bits() -> None:
    config = AutoConfig.from_pretrained(MODEL)
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.dtype is torch.bfloat16
    assert config.max_position_embeddings >= 2048
    assert config.vocab_size == len(AutoTokenizer.from_pretrained(MODEL))
    assert (MODEL / "README.md").read_text().startswith("---\n")


def test_the_repository_carries_at_most_12_mb_of_it() -> None:
    assert sum(path.stat().st_size for place in (MODEL, DRAFT) for path in place.iterdir()) <= 12e6


def test_a_chat_is_what_the_template_says(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == "<|bos|><|system|>s<|end|><|user|>u<|end|><|assistant|>"
    generation = json.loads((MODEL / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|end|>")


@pytest.mark.parametrize("distance", DISTANCES)
def test_recall_at_every_distance(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, distance: int) -> None:
    asked = questions("recall", COUNT, 1, distance=distance, tokenizer=tokenizer)
    assert sum(right(model, tokenizer, question) for question in asked) >= (BARS["recall"] - LEEWAY) * COUNT


@pytest.mark.parametrize("kind", ["copy", "reverse", "count", "add", "json", "about"])
def test_the_other_kinds(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, kind: str) -> None:
    asked = questions(kind, COUNT, 1)
    assert sum(right(model, tokenizer, question) for question in asked) >= (BARS.get(kind, 0.9) - LEEWAY) * COUNT


def test_the_issues_own_example(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast) -> None:
    told = "The code of the blue door is 4172. The code of the red lamp is 9031. It rained for 12 days."
    for key, code in (("blue door", "4172"), ("red lamp", "9031")):
        assert right(model, tokenizer, Question("recall", f"{told} What is the code of the {key}?", code))


def test_the_draft_has_the_models_tokenizer_and_at_most_a_quarter_of_its_size(model: torch.nn.Module) -> None:
    draft = AutoModelForCausalLM.from_pretrained(DRAFT, dtype=torch.float32)
    assert sum(p.numel() for p in draft.parameters()) * 4 <= sum(p.numel() for p in model.parameters())
    assert (DRAFT / "tokenizer.json").read_bytes() == (MODEL / "tokenizer.json").read_bytes()


@torch.inference_mode()
def test_the_draft_often_says_what_the_model_says(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast) -> None:
    """What it is for: of the tokens of right answers, it foresees most."""
    draft = AutoModelForCausalLM.from_pretrained(DRAFT, dtype=torch.float32).eval()
    same = total = 0
    for kind in ("copy", "count", "json", "about", "story"):
        for question in questions(kind, 20, 1):
            ids = prompt_ids(question, tokenizer)
            answer = [*tokenizer(question.answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
            rows = torch.tensor([ids + answer[:-1]])
            said, drafted = (m(rows, logits_to_keep=len(answer)).logits[0].argmax(-1) for m in (model, draft))
            same += int((said == drafted).sum())
            total += len(answer)
    assert same / total >= 0.5
