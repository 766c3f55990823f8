"""The model families that are served: from a Hugging Face config to a ModelSpec.

A family is one row of `FAMILIES`: the name of its architecture in config.json and what sets it apart from the plain
decoder. A family with other parts (another norm, another MLP) also needs a switch in ModelSpec, its tensors in
engine/models/tensors.py and its branch in engine/models/decoder.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from baton.errors import CheckpointError
from engine.models.spec import ModelSpec, RopeKind, RopeSpec

_MOST = 1 << 24
_SIZES = {
    "vocab_size": _MOST,
    "hidden_size": _MOST,
    "intermediate_size": _MOST,
    "num_hidden_layers": 1000,  # each makes a dozen objects before the first weight is looked at
    "num_attention_heads": _MOST,
    "num_key_value_heads": _MOST,
    "head_dim": _MOST,
    "max_position_embeddings": _MOST,
}
"""Fields of config.json that are sizes, and the most that they can sensibly be."""
_DEFAULTED = ("num_key_value_heads", "head_dim", "max_position_embeddings")
"""Those that a config may leave to its family."""
_TRAINED_LENGTH = "original_max_position_embeddings"


@dataclass(frozen=True)
class Family:
    name: str
    switches: Callable[[Any], dict[str, bool]]
    """From the config: the fields of ModelSpec in which the family differs."""
    sliding_layers: Callable[[Any], list[bool]]
    """From the config: which layers see no more than `config.sliding_window` positions."""


def _llama_switches(config: Any) -> dict[str, bool]:
    return {
        "qkv_bias": bool(config.attention_bias),
        "output_bias": bool(config.attention_bias),
        "mlp_bias": bool(config.mlp_bias),
    }


def _qwen3_switches(config: Any) -> dict[str, bool]:
    bias = bool(config.attention_bias)
    return {"qkv_bias": bias, "output_bias": bias, "qk_norm": True}


def _no_layer(config: Any) -> list[bool]:
    return [False] * config.num_hidden_layers


def _every_layer(config: Any) -> list[bool]:
    return [config.sliding_window is not None] * config.num_hidden_layers


def _layers_by_type(config: Any) -> list[bool]:
    """transformers works `layer_types` out of use_sliding_window and max_window_layers where they are not given."""
    known = {"full_attention": False, "sliding_attention": config.sliding_window is not None}
    for kind in config.layer_types:
        if kind not in known:
            raise CheckpointError(f"layer_types has {kind!r}; full_attention and sliding_attention are served")
    return [known[kind] for kind in config.layer_types]


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family("llama", _llama_switches, _no_layer),
    "MistralForCausalLM": Family("mistral", lambda config: {}, _every_layer),
    "Qwen2ForCausalLM": Family("qwen2", lambda config: {"qkv_bias": True}, _layers_by_type),
    "Qwen3ForCausalLM": Family("qwen3", _qwen3_switches, _layers_by_type),
}


def architecture_of(raw: Mapping[str, Any]) -> str:
    """The served architecture that a config.json names. Raises CheckpointError where it names none."""
    named: list[str] = raw.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise CheckpointError(
            f"architectures is {named!r}; it must be a list of names, of which {_served()} are served"
        )
    for name in named:
        if name in FAMILIES:
            return name
    code = " and brings Python code of its own, which is never run" if raw.get("auto_map") else ""
    raise CheckpointError(f"the architecture is {', '.join(named) or 'not named'}{code}; served are {_served()}")


def check_fields(raw: Mapping[str, Any], architecture: str) -> None:
    """Raises CheckpointError for what transformers would take from a config.json, complete in silence, or choke on."""
    for name, most in _SIZES.items():
        size = raw.get(name)
        if size is None and name in _DEFAULTED:
            continue
        if type(size) is not int or not 1 <= size <= most:
            said = f"{name} is {size!r}" if name in raw else f"it has no {name}"
            raise CheckpointError(f"{said}; it must be a whole number from 1 to {most}")
    family = FAMILIES[architecture].name
    if raw.get("model_type", family) != family:
        raise CheckpointError(f"model_type is {raw['model_type']!r}; of {architecture} it is {family!r}")


def _served() -> str:
    return ", ".join(FAMILIES)


def model_spec(config: Any, architecture: str) -> ModelSpec:
    """The spec of a transformers config. Raises CheckpointError for what is not served, naming the field."""
    family = FAMILIES[architecture]
    if config.hidden_act != "silu":
        raise CheckpointError(f"hidden_act is {config.hidden_act!r}; silu is served")
    if getattr(config, "quantization_config", None):
        raise CheckpointError("quantization_config is set; weights in float32, bfloat16 or float16 are served")
    if not 0 < config.rms_norm_eps < 1:
        raise CheckpointError(f"rms_norm_eps is {config.rms_norm_eps}; it must be above 0 and below 1")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if config.num_attention_heads % config.num_key_value_heads:
        raise CheckpointError(
            f"num_attention_heads is {config.num_attention_heads}; it must be a multiple of "
            f"num_key_value_heads ({config.num_key_value_heads})"
        )
    sliding = family.sliding_layers(config)
    if any(sliding) and config.sliding_window < 1:
        raise CheckpointError(f"sliding_window is {config.sliding_window}; it must be at least 1")
    if len(sliding) != config.num_hidden_layers:
        raise CheckpointError(
            f"layer_types names {len(sliding)} layers; num_hidden_layers is {config.num_hidden_layers}"
        )
    rope = _rope_spec(config)
    stretch = rope.factor if rope.kind is RopeKind.LINEAR else 1.0
    return ModelSpec(
        family=family.name,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        norm_eps=config.rms_norm_eps,
        rope=rope,
        max_model_len=int(config.max_position_embeddings * stretch),
        windows=tuple(config.sliding_window if windowed else None for windowed in sliding),
        tied_embeddings=bool(config.tie_word_embeddings),
        **family.switches(config),
    )


def _rope_spec(config: Any) -> RopeSpec:
    """transformers 5 keeps all in rope_parameters, and moves older configs' rope_theta and rope_scaling there."""
    parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {
        "rope_theta": config.rope_theta,
        **(getattr(config, "rope_scaling", None) or {}),
    }
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError(f"partial_rotary_factor is {parameters['partial_rotary_factor']}; 1.0 is served")
    name = parameters.get("rope_type") or parameters.get("type") or "default"
    served = {kind.value: kind for kind in RopeKind}
    if name not in served:
        raise CheckpointError(f"rope_type is {name!r}; {', '.join(served)} are served")

    def positive(field: str) -> float:
        value = parameters.get(field)
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            said = f"{field} is {value!r}" if field in parameters else f"lacks {field}"
            raise CheckpointError(f"rope_parameters of rope_type {name!r}: {said}; it must be a positive number")
        return float(value)

    kind, theta = served[name], positive("rope_theta")
    if kind is RopeKind.LINEAR:
        return RopeSpec(theta, kind, factor=positive("factor"))
    if kind is RopeKind.LLAMA3:
        low, high, length = (positive(f) for f in ("low_freq_factor", "high_freq_factor", _TRAINED_LENGTH))
        if high <= low:
            raise CheckpointError(f"high_freq_factor is {high:g}; it must be above low_freq_factor, which is {low:g}")
        if not length.is_integer() or length > _MOST:
            raise CheckpointError(f"{_TRAINED_LENGTH} is {length:g}; it must be a whole number from 1 to {_MOST}")
        return RopeSpec(
            theta,
            kind,
            factor=positive("factor"),
            low_freq_factor=low,
            high_freq_factor=high,
            original_max_len=int(length),
        )
    return RopeSpec(theta)
