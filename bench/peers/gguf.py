"""Makes a GGUF file of a Qwen2 checkpoint in bfloat16, for llama.cpp: run by a Python that has gguf and numpy.

PYTHON -m bench.peers.gguf MODEL_DIRECTORY FILE [bf16|q8_0]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

_WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_IN_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_NUM_SPECIAL = 4
_CONTROL, _NORMAL = 3, 1


def main(model: Path, path: str, quantization: str = "bf16") -> None:
    config = json.loads((model / "config.json").read_text())
    if config["architectures"] != ["Qwen2ForCausalLM"]:
        raise SystemExit(f"{model} is {config['architectures']}; this converts Qwen2ForCausalLM alone")
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_name(model.name)
    _add_shape(writer, config)
    _add_tokenizer(writer, config, json.loads((model / "tokenizer.json").read_text())["model"])
    kind = gguf.GGMLQuantizationType[quantization.upper()]
    for name, tensor in _tensors(model / "model.safetensors"):
        if tensor.ndim == 1:
            writer.add_tensor(_renamed(name), tensor)
        else:
            writer.add_tensor(_renamed(name), gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_shape(writer: Any, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    writer.add_rope_freq_base(theta)


def _add_tokenizer(writer: Any, config: dict[str, Any], bpe: dict[str, Any]) -> None:
    words = sorted(bpe["vocab"], key=bpe["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    writer.add_token_types([_CONTROL if i < _NUM_SPECIAL else _NORMAL for i in range(len(words))])
    writer.add_token_merges([" ".join(merge) if isinstance(merge, list) else merge for merge in bpe["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])


def _renamed(name: str) -> str:
    if name in _WHOLE:
        return _WHOLE[name]
    _, _, layer, rest = name.split(".", 3)  # model.layers.N.…
    part, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{_IN_LAYER[part]}.{kind}"


def _tensors(path: Path) -> Iterator[tuple[str, Any]]:
    """In float32. numpy has no bfloat16: its bits are the upper half of a float32's."""
    raw = np.memmap(path, np.uint8, "r")
    header_size = int(raw[:8].view("<u8")[0])
    header = json.loads(bytes(raw[8 : 8 + header_size]))
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] != "BF16":
            raise SystemExit(f"{path}: {name} is {entry['dtype']}; this converts BF16 alone")
        start, end = (8 + header_size + offset for offset in entry["data_offsets"])
        upper = raw[start:end].view("<u2").astype("<u4")
        yield name, (upper << 16).view("<f4").reshape(entry["shape"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
