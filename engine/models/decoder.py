"""The forward pass: token ids to hidden states to logits, over a paged KV pool. Inference only, no autograd.

It knows no requests and no blocks: what a token attends to is the AttentionBatch's business.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.attention import AttentionBatch, HeadNorms, Rotary
from engine.elementwise import ElementWise, ElementWiseStep
from engine.kernels.choice import choose_elementwise
from engine.models.linear import Embedding, GatedLinear, Linear, make_embedding, make_gated, make_linear
from engine.models.rope import inverse_frequencies, rotary
from engine.models.spec import ModelSpec
from engine.models.tensors import EMBEDDING, FINAL_NORM, HEAD, layer_prefix

_CPU_MLP_TOKENS = 512

TakeTensor = Callable[[str], Tensor]
"""A tensor of the checkpoint by its name, on the right device and of the right dtype."""


@dataclass(frozen=True)
class _Layer:
    input_norm: Tensor
    qkv: Linear
    """Query, key and value heads of a token side by side: `[.., num_heads + 2 num_kv_heads, head_dim]`."""
    head_norms: HeadNorms | None
    output: Linear
    mlp_norm: Tensor
    gate_up: GatedLinear
    down: Linear


class Decoder:
    def __init__(self, spec: ModelSpec, take: TakeTensor, elementwise: ElementWise | None = None) -> None:
        """Builds the weights from `take`, each tensor taken once. Without `elementwise`, what is best on their
        device."""
        self.spec = spec
        self._embedding, self._head = _take_ends(spec, take)
        self._layers = [_take_layer(spec, layer, take) for layer in range(spec.num_layers)]
        self._final_norm = take(FINAL_NORM)
        self._frequencies = inverse_frequencies(spec.rope, spec.head_dim).to(self.device)
        row_sizes = (spec.hidden_size, spec.intermediate_size)
        self._elementwise = elementwise or choose_elementwise(self.device, self.dtype, row_sizes, spec.norm_eps)

    @property
    def device(self) -> torch.device:
        return self._final_norm.device

    @property
    def dtype(self) -> torch.dtype:
        return self._final_norm.dtype

    def forward(self, token_ids: Tensor, positions: Tensor, attention: AttentionBatch) -> Tensor:
        """Hidden states `[num_tokens, hidden_size]`, normed, of `token_ids` `[num_tokens]` at `positions`.

        Writes the tokens' keys and values to the pool that `attention` was made for.
        """
        turns = rotary(self._frequencies, positions)
        hidden = self._embedding(token_ids)
        step, delta = self._elementwise.step(hidden), None
        for index, layer in enumerate(self._layers):
            delta = self._attend(index, layer, step.add_norm(delta, layer.input_norm), turns, attention)
            delta = self._mlp(layer, step.add_norm(delta, layer.mlp_norm), step)
        return step.add_norm(delta, self._final_norm)

    def logits(self, hidden: Tensor) -> Tensor:
        """`[num_rows, vocab_size]`, of the weights' dtype."""
        return self._head(hidden)

    def _attend(self, index: int, layer: _Layer, x: Tensor, turns: Rotary, attention: AttentionBatch) -> Tensor:
        query = attention.rotate_and_write(index, layer.qkv(x), turns, layer.head_norms)
        return layer.output(attention.attend(index, query, self.spec.windows[index]))

    def _mlp(self, layer: _Layer, x: Tensor, step: ElementWiseStep) -> Tensor:
        """In slices on a CPU: a long chunk's intermediate values would be fresh pages from the system every time."""
        if x.device.type != "cpu" or len(x) <= _CPU_MLP_TOKENS:
            return layer.down(layer.gate_up(x, step))
        return torch.cat([layer.down(layer.gate_up(part, step)) for part in torch.split(x, _CPU_MLP_TOKENS)])


def _take_ends(spec: ModelSpec, take: TakeTensor) -> tuple[Embedding, Linear]:
    weight = take(EMBEDDING)
    head = make_linear(weight if spec.tied_embeddings else take(HEAD))
    return make_embedding(weight, head if spec.tied_embeddings else None), head


def _take_layer(spec: ModelSpec, layer: int, take: TakeTensor) -> _Layer:
    prefix = layer_prefix(layer)

    def together(names: tuple[str, ...], suffix: str) -> Tensor:
        parts = [take(f"{prefix}{name}.{suffix}") for name in names]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def tensors(names: tuple[str, ...], bias: bool) -> tuple[Tensor, Tensor | None]:
        return together(names, "weight"), together(names, "bias") if bias else None

    head_norms = None
    if spec.qk_norm:
        query, key = (take(f"{prefix}self_attn.{name}.weight") for name in ("q_norm", "k_norm"))
        head_norms = HeadNorms(query, key, spec.norm_eps)
    return _Layer(
        input_norm=take(f"{prefix}input_layernorm.weight"),
        qkv=make_linear(*tensors(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), spec.qkv_bias)),
        head_norms=head_norms,
        output=make_linear(*tensors(("self_attn.o_proj",), spec.output_bias)),
        mlp_norm=take(f"{prefix}post_attention_layernorm.weight"),
        gate_up=make_gated(*tensors(("mlp.gate_proj", "mlp.up_proj"), spec.mlp_bias)),
        down=make_linear(*tensors(("mlp.down_proj",), spec.mlp_bias)),
    )
