"""Rotary position embedding: frequencies and angles. What turns the heads by them is the AttentionBatch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.attention import Rotary
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


def rotary(frequencies: Tensor, positions: Tensor) -> Rotary:
    angles = positions.to(torch.float32)[:, None] * frequencies[None, :]
    return Rotary(angles.cos(), angles.sin())
