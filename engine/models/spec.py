"""What a decoder computes, as plain data: shapes, biases, windows and rotary embedding. No weights, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class RopeKind(Enum):
    """How rotary frequencies are stretched for contexts longer than those trained on."""

    DEFAULT = "default"
    LINEAR = "linear"
    LLAMA3 = "llama3"


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding over the whole head. Formulas: engine/models/rope.py."""

    theta: float
    kind: RopeKind = RopeKind.DEFAULT
    factor: float = 1.0
    """LINEAR and LLAMA3: how many times longer contexts become."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_len: int = 0
    """LLAMA3: context length, in tokens, that the unscaled frequencies were trained on."""


@dataclass(frozen=True)
class ModelSpec:
    """A pre-norm decoder with grouped-query attention and a gated SiLU MLP; the families differ in the switches."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: RopeSpec
    max_model_len: int
    """Prompt and answer together, in tokens."""
    windows: tuple[int | None, ...]
    """A layer's sliding window: how many positions a token sees, itself included. None: all before it."""
    tied_embeddings: bool = False
    """The output head is the embedding matrix."""
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMS norm over each query and key head, before the rotary embedding."""

    @property
    def num_layers(self) -> int:
        return len(self.windows)

    @property
    def query_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim
