"""What the loader takes, and what it refuses: with the file, the tensor and what would be right."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from baton.clock import ManualClock
from baton.errors import CheckpointError, ConfigError
from engine.loader import LoadedModel, load_model
from engine.progress import LoadProgress
from tests.checkpoints import EOS, build_checkpoint, edit_json
from tests.engine.driver import Driver

WEIGHTS = "model.safetensors"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A checkpoint of the test's own, to be broken."""
    return build_checkpoint("llama", tmp_path / "llama", tokenizer=False)


def _edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})


def _refused(path: Path, *parts: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_model(str(path))
    for part in parts:
        assert part in caught.value.message


def test_shards_are_the_same_model(llama: Path, tmp_path: Path) -> None:
    sharded = build_checkpoint("llama", tmp_path / "sharded", tokenizer=False, max_shard_size="100KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    prompt = [[5, 6, 7]]
    whole, shards = load_model(str(llama)), load_model(str(sharded))
    assert shards.fingerprint == whole.fingerprint
    assert Driver(shards).generate(prompt, 5) == Driver(whole).generate(prompt, 5)


def test_the_fingerprint_is_the_files_and_nothing_else(llama: Path, tmp_path: Path) -> None:
    script = f"from engine.loader import load_model; print(load_model({str(llama)!r}).fingerprint.hex())"
    elsewhere = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    fingerprint = load_model(str(llama)).fingerprint
    assert len(fingerprint) == 16
    assert elsewhere.stdout.strip() == fingerprint.hex()
    other = build_checkpoint("llama", tmp_path / "other", tokenizer=False, seed=1)
    assert load_model(str(other)).fingerprint != fingerprint
    assert load_model(str(llama), "bfloat16").fingerprint != fingerprint
    edit_json(llama / "config.json", rms_norm_eps=1e-3)
    assert load_model(str(llama)).fingerprint != fingerprint


def test_one_changed_tensor_changes_the_fingerprint(llama: Path) -> None:
    before = load_model(str(llama)).fingerprint
    _edit_weights(llama, lambda tensors: tensors["model.layers.1.mlp.down_proj.weight"].neg_())
    assert load_model(str(llama)).fingerprint != before


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_auto_is_the_checkpoints(stored: torch.dtype, tmp_path: Path) -> None:
    path = build_checkpoint("qwen3", tmp_path, dtype=stored, tokenizer=False)
    name = str(stored).removeprefix("torch.")
    assert load_model(str(path)).kv_layout(16).dtype == name
    edit_json(path / "config.json", dtype=None)
    assert load_model(str(path)).dtype == name
    edit_json(path / "config.json", torch_dtype="float16")
    assert load_model(str(path)).dtype == "float16"
    assert load_model(str(path), "float32").dtype == "float32"


def test_unknown_dtype_is_refused(llama: Path) -> None:
    with pytest.raises(ConfigError, match="dtype is 'int8'; it must be auto, float32"):
        load_model(str(llama), "int8")


def test_eos_comes_from_the_generation_config_first(llama: Path) -> None:
    assert load_model(str(llama)).eos_token_ids == (EOS,)
    edit_json(llama / "generation_config.json", eos_token_id=[3, 4])
    assert load_model(str(llama)).eos_token_ids == (3, 4)
    edit_json(llama / "generation_config.json", eos_token_id=None)
    assert load_model(str(llama)).eos_token_ids == (EOS,)
    (llama / "generation_config.json").unlink()
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    assert load_model(str(llama)).eos_token_ids == ()
    edit_json(llama / "config.json", eos_token_id=4096)
    _refused(llama, "eos_token_id is 4096", "below 384")


def test_model_length_is_the_configs_unless_less_is_wanted(loaded: Callable[[str], LoadedModel]) -> None:
    assert loaded("llama").max_model_len(0) == 4096
    assert loaded("llama").max_model_len(100) == 100
    with pytest.raises(ConfigError, match="max_model_len is 5000; the model's own limit is 4096"):
        loaded("llama").max_model_len(5000)


def test_derived_tensors_of_old_checkpoints_are_passed_over(llama: Path, tmp_path: Path) -> None:
    _edit_weights(
        llama, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    )
    load_model(str(llama))
    tied = build_checkpoint("qwen3", tmp_path / "tied", tokenizer=False)
    _edit_weights(tied, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(384, 64)}))
    load_model(str(tied))


def test_no_directory_and_no_config_are_refused(llama: Path) -> None:
    _refused(llama / "nowhere", "nowhere", "no such directory")
    _refused(llama / WEIGHTS, "is a file")
    (llama / "config.json").rename(llama / "config.txt")
    _refused(llama, "has no config.json")
    (llama / "config.json").write_text("{not json")
    _refused(llama, "config.json", "cannot be read as JSON")
    (llama / "config.json").write_text("[]")
    _refused(llama, "config.json", "must hold an object")
    (llama / "config.json").write_bytes(b"\xff\xfe\xff")
    _refused(llama, "config.json", "cannot be read as JSON")


def test_pickles_are_refused(llama: Path) -> None:
    (llama / WEIGHTS).rename(llama / "pytorch_model.bin")
    _refused(llama, "pytorch_model.bin", "pickle", "convert it to safetensors")
    (llama / "pytorch_model.bin").unlink()
    _refused(llama, "neither model.safetensors nor model.safetensors.index.json")


def test_remote_code_is_refused_and_not_run(llama: Path) -> None:
    (llama / "modeling_evil.py").write_text("raise SystemExit('ran')")
    edit_json(llama / "config.json", architectures=["EvilForCausalLM"], auto_map={"AutoConfig": "modeling_evil.Evil"})
    _refused(llama, "EvilForCausalLM", "never run")
    edit_json(llama / "config.json", architectures=["LlamaForCausalLM"])
    load_model(str(llama))


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            ["GPT2LMHeadModel", "served are LlamaForCausalLM", "Qwen3ForCausalLM"],
        ),
        ({"architectures": None}, ["names architecture none"]),
        ({"hidden_act": "gelu"}, ["hidden_act is 'gelu'", "silu"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads is 4", "multiple of num_key_value_heads (3)"]),
        ({"head_dim": 15}, ["even", "`head_dim`=15"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers is 0", "positive"]),
        ({"vocab_size": -1}, ["vocab_size is -1", "positive"]),
        ({"hidden_size": "wide"}, ["config.json", "no valid llama config"]),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, ["rope_type is 'dynamic'"]),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, ["factor"]),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            ["partial_rotary_factor is 0.5"],
        ),
    ],
)
def test_configs_that_are_not_served_are_refused(fields: dict[str, Any], parts: list[str], llama: Path) -> None:
    edit_json(llama / "config.json", **fields)
    _refused(llama, *parts)


def test_layers_that_are_not_served_are_refused(tmp_path: Path) -> None:
    path = build_checkpoint("qwen2", tmp_path, tokenizer=False)
    edit_json(path / "config.json", sliding_window=-3)
    _refused(path, "sliding_window is -3", "at least 1")
    edit_json(path / "config.json", sliding_window=8, layer_types=["full_attention", "chunked_attention"])
    _refused(path, "config.json")
    edit_json(path / "config.json", layer_types=["full_attention"])
    _refused(path, "config.json")


def test_missing_tensors_are_named(llama: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.1.self_attn.q_proj.weight"], tensors["lm_head.weight"]

    _edit_weights(llama, drop)
    _refused(llama, "lacks lm_head.weight, model.layers.1.self_attn.q_proj.weight")


def test_unexpected_tensors_are_named(llama: Path) -> None:
    _edit_weights(llama, lambda tensors: tensors.update({"model.layers.3.surprise": torch.ones(2)}))
    _refused(llama, "model.layers.3.surprise (in model.safetensors)")


def test_wrong_shapes_are_shown_with_the_right_ones(llama: Path) -> None:
    _edit_weights(llama, lambda tensors: tensors.update({"model.norm.weight": torch.ones(63)}))
    _refused(llama, "model.norm.weight in model.safetensors has shape [63]; it must be [64]")


def test_weights_of_a_dtype_that_is_not_served_are_refused(llama: Path) -> None:
    _edit_weights(llama, lambda tensors: tensors.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}))
    _refused(llama, "model.norm.weight is stored as I8")


@pytest.mark.parametrize("kept", [0, 5, 1000, -100])
def test_truncated_files_are_refused(kept: int, llama: Path) -> None:
    data = (llama / WEIGHTS).read_bytes()
    (llama / WEIGHTS).write_bytes(data[:kept])
    _refused(llama, WEIGHTS, "no whole safetensors file")


def test_an_index_that_lies_is_refused(tmp_path: Path) -> None:
    path = build_checkpoint("llama", tmp_path, tokenizer=False, max_shard_size="100KB")
    index = json.loads((path / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    swapped = dict.fromkeys(index["weight_map"], shards[0])
    edit_json(path / "model.safetensors.index.json", weight_map=swapped)
    _refused(path, "index.json says that", "it is not")
    edit_json(path / "model.safetensors.index.json", weight_map={"lm_head.weight": "../elsewhere.safetensors"})
    _refused(path, "names '../elsewhere.safetensors'")
    edit_json(path / "model.safetensors.index.json", weight_map=["lm_head.weight"])
    _refused(path, "has no weight_map")
    edit_json(path / "model.safetensors.index.json", weight_map=index["weight_map"])
    (path / shards[1]).unlink()
    _refused(path, f"names '{shards[1]}'", "no such file")


def test_a_hub_that_cannot_be_reached_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **kwargs: object) -> str:
        raise OSError("name resolution failed")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(CheckpointError, match=r"'org/model' is no directory here.*name resolution failed"):
        load_model("org/model")


def test_only_files_without_code_are_fetched_from_the_hub(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def fetch(hub_id: str, **kwargs: Any) -> str:
        asked.update(kwargs, hub_id=hub_id)
        return str(llama)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert load_model("org/model").spec.family == "llama"
    assert asked["hub_id"] == "org/model"
    assert not any(pattern.endswith((".bin", ".py", ".pt", "*")) for pattern in asked["allow_patterns"])


def test_progress_is_shown_for_long_loads_only() -> None:
    clock, stream = ManualClock(), io.StringIO()
    show = LoadProgress("m", stream, clock)
    show(10**9, 4 * 10**9)
    show(4 * 10**9, 4 * 10**9)
    assert stream.getvalue() == ""
    for wait in (2.5, 0.1, 1.4):
        clock.advance(wait)
        show(2 * 10**9, 4 * 10**9)
    show(4 * 10**9, 4 * 10**9)
    assert stream.getvalue().splitlines() == [
        "loading m:  50 % of 4.00 GB, 2 s",
        "loading m:  50 % of 4.00 GB, 4 s",
        "loading m: 100 % of 4.00 GB, 4 s",
    ]


def test_progress_ends_with_all_bytes_done(llama: Path) -> None:
    seen: list[tuple[int, int]] = []
    load_model(str(llama), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1]
    assert seen == sorted(seen)
