"""Tiny checkpoints with random weights, made by transformers on the spot: of every family, and whole, with a tokenizer
and a chat template. The same arguments give the same files. Used by engine tests and by whole-system tests.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
VOCAB_SIZE = 384
BOS, EOS, PAD = 0, 1, 2
_SPECIAL = ["<s>", "</s>", "<pad>"]

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# What each family has and the others lack is on: a checkpoint on which it made no difference would prove nothing.
_OWN: Mapping[str, dict[str, Any]] = {
    "llama": {"rope_parameters": _LLAMA3_ROPE},
    "qwen2": {
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 24,
        "max_window_layers": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "qwen3": {"head_dim": 32, "tie_word_embeddings": True},
    "mistral": {"sliding_window": 20, "head_dim": 24},
}
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<s>' + message['role'] + '\n' + message['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
# Enough to learn some merges from, with characters of two, three and four bytes.
_TEXT = [
    "A relay team passes the baton from runner to runner, and the runner who has it runs.",
    "The prefill worker reads the whole prompt; the decode worker writes one token at a time.",
    "Die Läuferin übergibt den Stab. Le témoin passe de main en main. バトンを渡す。接力棒 🏃‍♀️🏃",
]


def build_checkpoint(
    family: str,
    path: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tokenizer: bool = True,
    max_shard_size: str = "5GB",
    **overrides: Any,
) -> Path:
    """Writes a checkpoint of `family` to `path` and returns it. `overrides` are fields of the family's config."""
    model = build_model(family, seed=seed, **overrides).to(dtype)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    if tokenizer:
        _tokenizer(model.config.vocab_size).save_pretrained(path)
    return path


def build_model(family: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """The float32 model of `build_checkpoint`, in evaluation mode: the oracle."""
    config = CONFIG_MAPPING[family](**(_COMMON | _OWN[family] | overrides))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Wide enough that the answers vary with the prompt; biases and norms that are not one or zero.
                if "norm" in name:
                    parameter.uniform_(0.5, 1.5)
                else:
                    parameter.normal_(0, 0.15)
    return model


def greedy(model: PreTrainedModel, prompt: list[int], num_tokens: int) -> list[int]:
    """What transformers generates behind `prompt`, whatever the end-of-sequence token says."""
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=PAD,
    )
    generated: list[int] = output[0, len(prompt) :].tolist()
    return generated


def edit_json(path: Path, **fields: Any) -> None:
    """Sets fields of a JSON object in a file; None takes a field out."""
    value = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: field for name, field in value.items() if field is not None}))


def _tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_SPECIAL,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_SPECIAL[BOS],
        eos_token=_SPECIAL[EOS],
        pad_token=_SPECIAL[PAD],
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
