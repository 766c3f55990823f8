"""Rotary position embedding: frequencies, and the rotation of query and key heads."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.models.spec import RopeKind, RopeSpec


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> Tensor:
    """`[head_dim / 2]` float32, radians a position: theta^(-2i / head_dim), stretched as `rope.kind` says.

    RoFormer (Su et al. 2021); LINEAR is position interpolation (Chen et al. 2023); LLAMA3 (Llama 3.1) divides slow
    frequencies by the factor, keeps fast ones, and blends in between.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.kind is RopeKind.LINEAR:
        return frequencies / rope.factor
    if rope.kind is RopeKind.LLAMA3:
        turns = rope.original_max_len * frequencies / (2 * math.pi)  # over the trained context
        blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        blend = blend.clamp(0.0, 1.0)
        return (1 - blend) * frequencies / rope.factor + blend * frequencies
    return frequencies


def cos_sin(frequencies: Tensor, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two `[num_tokens, 1, head_dim / 2]` of `dtype`; the angles are computed in float32."""
    angles = positions.to(torch.float32)[:, None] * frequencies[None, :]
    return angles.cos().to(dtype)[:, None], angles.sin().to(dtype)[:, None]


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`heads` `[num_tokens, num_heads, head_dim]`, each pair (i, i + head_dim / 2) turned by its angle."""
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
