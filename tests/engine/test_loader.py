"""What the loader takes, and what it makes of it. What it refuses is in test_damaged_checkpoints.py."""

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
from engine import memory
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


def test_shards_are_the_same_model(llama: Path, tmp_path: Path) -> None:
    sharded = build_checkpoint("llama", tmp_path / "sharded", tokenizer=False, max_shard_size="100KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    prompt = [[5, 6, 7]]
    whole, shards = load_model(str(llama)), load_model(str(sharded))
    assert shards.fingerprint == whole.fingerprint
    assert Driver(shards).generate(prompt, 5) == Driver(whole).generate(prompt, 5)


def test_a_single_file_goes_before_the_index_of_other_files(llama: Path) -> None:
    (llama / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "gone.safetensors"}}')
    load_model(str(llama))


def test_the_fingerprint_is_the_files_and_nothing_else(llama: Path, tmp_path: Path) -> None:
    script = f"from engine.loader import load_model; print(load_model({str(llama)!r}).fingerprint.hex())"
    elsewhere = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    fingerprint = load_model(str(llama)).fingerprint
    assert len(fingerprint) == 16
    assert elsewhere.stdout.strip() == fingerprint.hex()
    other = build_checkpoint("llama", tmp_path / "other", tokenizer=False, seed=1)
    assert load_model(str(other)).fingerprint != fingerprint
    assert load_model(str(llama), "bfloat16").fingerprint == fingerprint, "the dtype is the layout's"
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


@pytest.mark.parametrize("named", ["float33", "float64", 16])
def test_what_the_config_says_of_the_dtype_is_of_no_matter_where_one_is_asked_for(named: object, llama: Path) -> None:
    edit_json(llama / "config.json", dtype=named)
    assert load_model(str(llama), "bfloat16").dtype == "bfloat16"


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


def test_remote_code_is_refused_and_not_run(llama: Path) -> None:
    (llama / "modeling_evil.py").write_text("raise SystemExit('ran')")
    edit_json(llama / "config.json", architectures=["EvilForCausalLM"], auto_map={"AutoConfig": "modeling_evil.Evil"})
    with pytest.raises(CheckpointError, match="EvilForCausalLM and brings Python code of its own, which is never run"):
        load_model(str(llama))
    edit_json(llama / "config.json", architectures=["LlamaForCausalLM"])
    load_model(str(llama))


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


@pytest.mark.parametrize(("dtype", "advice"), [("float32", " or a --dtype of 16 bits"), ("bfloat16", "")])
def test_weights_that_do_not_fit_are_refused_before_they_are_read(
    llama: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, advice: str
) -> None:
    monkeypatch.setattr(memory, "available", lambda device: 1000)
    with pytest.raises(ConfigError, match=rf"the weights take .* GiB in {dtype} and cpu has 0.0 GiB left") as error:
        load_model(str(llama), dtype)
    assert error.value.message.endswith(f"serve a smaller model{advice}")
