"""The forward pass: token ids to hidden states to logits, over a paged KV pool. Inference only, no autograd.

It knows no requests and no blocks: what a token attends to is the AttentionBatch's business.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.attention import AttentionBatch
from engine.models.linear import Embedding, Linear, make_embedding, make_linear
from engine.models.rope import cos_sin, inverse_frequencies, rotate
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
    query_norm: Tensor | None
    key_norm: Tensor | None
    output: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


class Decoder:
    def __init__(self, spec: ModelSpec, take: TakeTensor) -> None:
        """Builds the weights from `take`, each tensor taken once."""
        self.spec = spec
        self._embedding, self._head = _take_ends(spec, take)
        self._layers = [_take_layer(spec, layer, take) for layer in range(spec.num_layers)]
        self._final_norm = take(FINAL_NORM)
        self._frequencies = inverse_frequencies(spec.rope, spec.head_dim).to(self.device)

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
        cos, sin = cos_sin(self._frequencies, positions, self.dtype)
        hidden = self._embedding(token_ids)
        for index, layer in enumerate(self._layers):
            hidden = hidden + self._attend(index, layer, self._norm(hidden, layer.input_norm), cos, sin, attention)
            hidden = hidden + self._mlp(layer, self._norm(hidden, layer.mlp_norm))
        return self._norm(hidden, self._final_norm)

    def logits(self, hidden: Tensor) -> Tensor:
        """`[num_rows, vocab_size]`, of the weights' dtype."""
        return self._head(hidden)

    def _attend(
        self, index: int, layer: _Layer, x: Tensor, cos: Tensor, sin: Tensor, attention: AttentionBatch
    ) -> Tensor:
        spec = self.spec
        split = [spec.num_heads, spec.num_kv_heads]
        heads = layer.qkv(x).view(len(x), spec.num_heads + 2 * spec.num_kv_heads, spec.head_dim)
        query_key, value = torch.split(heads, [spec.num_heads + spec.num_kv_heads, spec.num_kv_heads], dim=1)
        if layer.query_norm is not None and layer.key_norm is not None:
            query, key = torch.split(query_key, split, dim=1)
            query_key = torch.cat((self._norm(query, layer.query_norm), self._norm(key, layer.key_norm)), dim=1)
        query, key = torch.split(rotate(query_key, cos, sin), split, dim=1)
        attention.write(index, key, value)
        return layer.output(attention.attend(index, query, spec.windows[index]))

    def _mlp(self, layer: _Layer, x: Tensor) -> Tensor:
        """In slices on a CPU: a long chunk's intermediate values would be fresh pages from the system every time."""
        slices = torch.split(x, _CPU_MLP_TOKENS) if x.device.type == "cpu" and len(x) > _CPU_MLP_TOKENS else (x,)
        outputs = []
        for part in slices:
            gate, up = layer.gate_up(part).chunk(2, dim=-1)
            outputs.append(layer.down(F.silu(gate).mul_(up)))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.spec.norm_eps)


def _take_ends(spec: ModelSpec, take: TakeTensor) -> tuple[Embedding, Linear]:
    weight = take(EMBEDDING)
    head = make_linear(weight if spec.tied_embeddings else take(HEAD))
    return make_embedding(weight, head if spec.tied_embeddings else None), head


def _take_layer(spec: ModelSpec, layer: int, take: TakeTensor) -> _Layer:
    prefix = layer_prefix(layer)

    def linear(names: tuple[str, ...], bias: bool) -> Linear:
        def together(suffix: str) -> Tensor:
            parts = [take(f"{prefix}{name}.{suffix}") for name in names]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        return make_linear(together("weight"), together("bias") if bias else None)

    return _Layer(
        input_norm=take(f"{prefix}input_layernorm.weight"),
        qkv=linear(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), spec.qkv_bias),
        query_norm=take(f"{prefix}self_attn.q_norm.weight") if spec.qk_norm else None,
        key_norm=take(f"{prefix}self_attn.k_norm.weight") if spec.qk_norm else None,
        output=linear(("self_attn.o_proj",), spec.output_bias),
        mlp_norm=take(f"{prefix}post_attention_layernorm.weight"),
        gate_up=linear(("mlp.gate_proj", "mlp.up_proj"), spec.mlp_bias),
        down=linear(("mlp.down_proj",), spec.mlp_bias),
    )
