"""The model that figures are quoted for: the shape of Qwen2.5-0.5B with a vocabulary of 32,000, random, bfloat16."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

VOCAB_SIZE = 32000


def half_billion(path: Path) -> Path:
    """Writes the checkpoint (0.8 GB) to `path` unless it is there. Weights only: the engine needs no tokenizer."""
    if (path / "model.safetensors").exists():
        return path
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.02)
    model.to(dtype=torch.bfloat16).save_pretrained(path)
    return path
