"""The tensors that a checkpoint of a spec holds: names and shapes, as transformers saves them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from engine.models.spec import ModelSpec

Shape = tuple[int, ...]

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"

# Saved by old versions of transformers and computed by everyone since.
_DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq|model\.rotary_emb\.inv_freq")


def layer_prefix(layer: int) -> str:
    return f"model.layers.{layer}."


def expected_tensors(spec: ModelSpec) -> dict[str, Shape]:
    """Every tensor that must be there, with its shape."""
    hidden = spec.hidden_size
    tensors: dict[str, Shape] = {EMBEDDING: (spec.vocab_size, hidden), FINAL_NORM: (hidden,)}
    if not spec.tied_embeddings:
        tensors[HEAD] = (spec.vocab_size, hidden)
    for layer in range(spec.num_layers):
        prefix = layer_prefix(layer)
        tensors |= {prefix + name: shape for name, shape in _layer_tensors(spec).items()}
    return tensors


def ignored(names: Iterable[str], spec: ModelSpec) -> set[str]:
    """Of `names`, those that may be there and carry nothing: derived ones, and a copy of the tied embedding."""
    return {name for name in names if _DERIVED.fullmatch(name) or (spec.tied_embeddings and name == HEAD)}


def _layer_tensors(spec: ModelSpec) -> dict[str, Shape]:
    hidden, inner = spec.hidden_size, spec.intermediate_size
    linears = [
        ("self_attn.q_proj", spec.query_size, hidden, spec.qkv_bias),
        ("self_attn.k_proj", spec.kv_size, hidden, spec.qkv_bias),
        ("self_attn.v_proj", spec.kv_size, hidden, spec.qkv_bias),
        ("self_attn.o_proj", hidden, spec.query_size, spec.output_bias),
        ("mlp.gate_proj", inner, hidden, spec.mlp_bias),
        ("mlp.up_proj", inner, hidden, spec.mlp_bias),
        ("mlp.down_proj", hidden, inner, spec.mlp_bias),
    ]
    tensors: dict[str, Shape] = {}
    for name, rows, columns, bias in linears:
        tensors[f"{name}.weight"] = (rows, columns)
        if bias:
            tensors[f"{name}.bias"] = (rows,)
    tensors["input_layernorm.weight"] = tensors["post_attention_layernorm.weight"] = (hidden,)
    if spec.qk_norm:
        tensors["self_attn.q_norm.weight"] = tensors["self_attn.k_norm.weight"] = (spec.head_dim,)
    return tensors
