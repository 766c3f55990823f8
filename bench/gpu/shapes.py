"""Models of random weights, made on the device, in the shapes of those that people run."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from engine.loader import LoadedModel
from engine.models.decoder import Decoder
from engine.models.spec import ModelSpec, RopeSpec
from engine.models.tensors import expected_tensors

_SCALE = 0.02
SHAPES = {
    "Llama-3-8B": ModelSpec(
        family="llama",
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        norm_eps=1e-5,
        rope=RopeSpec(theta=500_000.0),
        max_model_len=8192,
        windows=(None,) * 32,
    ),
    "Qwen3-0.6B": ModelSpec(
        family="qwen3",
        vocab_size=151_936,
        hidden_size=1024,
        intermediate_size=3072,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        norm_eps=1e-6,
        rope=RopeSpec(theta=1_000_000.0),
        max_model_len=8192,
        windows=(None,) * 28,
        tied_embeddings=True,
        qk_norm=True,
    ),
}


@torch.inference_mode()
def random_model(name: str, device: torch.device) -> LoadedModel:
    """bfloat16. The same weights every time on one kind of device."""
    spec, generator = SHAPES[name], torch.Generator(device).manual_seed(0)
    shapes = expected_tensors(spec)

    def take(tensor: str) -> Tensor:
        values = torch.empty(shapes[tensor], dtype=torch.bfloat16, device=device)
        return values.fill_(1) if len(shapes[tensor]) == 1 else values.normal_(0, _SCALE, generator=generator)

    return LoadedModel(
        decoder=Decoder(spec, take),
        directory=Path(f"random-{name}"),
        dtype="bfloat16",
        eos_token_ids=(),
        fingerprint=name.encode().ljust(16, b"\0")[:16],
    )
