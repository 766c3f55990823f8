"""A model directory that is damaged or of another architecture: one line says which file, what is wrong with it and
what would be right. The router's half of it is in tests/text/test_damaged_tokenizers.py."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from baton.errors import CheckpointError
from engine.loader import load_model
from tests.checkpoints import build_checkpoint, edit_json
from tests.text.checkpoints import GIT_LFS_POINTER

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint("llama", tmp_path_factory.mktemp("whole"), tokenizer=False)


@pytest.fixture
def llama(whole: Path, tmp_path: Path) -> Path:
    """A checkpoint of the test's own, to be broken."""
    return shutil.copytree(whole, tmp_path / "llama")


@pytest.fixture(scope="module")
def whole_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint("llama", tmp_path_factory.mktemp("shards"), tokenizer=False, max_shard_size="100KB")


@pytest.fixture
def shards(whole_shards: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole_shards, tmp_path / "shards")


def refused(directory: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_model(str(directory))
    message = caught.value.message
    assert "\n" not in message
    assert str(directory) in message
    for part in words:
        assert part in message


def write(name: str, content: str | bytes) -> Damage:
    data = content.encode() if isinstance(content, str) else content
    return lambda directory: (directory / name).write_bytes(data)


def cut(name: str, size: int) -> Damage:
    """Keeps the first `size` bytes, or all but the last `-size`."""
    return lambda directory: (directory / name).write_bytes((directory / name).read_bytes()[:size])


def replaced(name: str, make: Callable[[Path], object]) -> Damage:
    def damage(directory: Path) -> None:
        (directory / name).unlink()
        make(directory / name)

    return damage


def header(size: int, rest: bytes = b"") -> Damage:
    """Another length of the header, and what then follows; without `rest`, what followed before."""
    return lambda d: (d / WEIGHTS).write_bytes(struct.pack("<Q", size) + (rest or (d / WEIGHTS).read_bytes()[8:]))


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(directory: Path) -> None:
        changed = load_file(directory / WEIGHTS)
        change(changed)
        save_file(changed, directory / WEIGHTS, metadata={"format": "pt"})

    return damage


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (replaced(CONFIG, lambda path: None), ["is missing"]),
        (replaced(CONFIG, lambda path: path.mkdir()), ["is a directory"]),
        (replaced(CONFIG, lambda path: path.symlink_to("/blobs/5")), ["is a link to '/blobs/5'"]),
        (write(CONFIG, ""), ["is empty; expected is a JSON object"]),
        (write(CONFIG, GIT_LFS_POINTER), ["is a git-lfs pointer", "git lfs pull"]),
        (write(CONFIG, "<!DOCTYPE html><html>404"), ["is a web page"]),
        (cut(CONFIG, 400), ["cannot be read", "line "]),
        (write(CONFIG, b"\xff\xfe\xff"), ["cannot be read", "0xff"]),
        (write(CONFIG, "[" * 100_000), ["cannot be read", "recursion"]),
        (write(CONFIG, "[]"), ["holds []; expected is a JSON object"]),
        (write(CONFIG, "null"), ["holds null; expected is a JSON object"]),
        (write(CONFIG, "{}"), ["the architecture is not named; served are LlamaForCausalLM"]),
    ],
)
def test_a_damaged_config_is_named(damage: Damage, words: list[str], llama: Path) -> None:
    damage(llama)
    refused(llama, "llama/config.json", *words)


@pytest.mark.parametrize(
    "architecture",
    ["GPT2LMHeadModel", "MixtralForCausalLM", "BertForMaskedLM", "Qwen2VLForConditionalGeneration", "MambaForCausalLM"],
)
def test_another_architecture_is_named_with_those_that_are_served(architecture: str, llama: Path) -> None:
    edit_json(llama / CONFIG, architectures=[architecture])
    served = "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM"
    refused(llama, f"config.json: the architecture is {architecture}; served are {served}")


SIZES = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]


@pytest.mark.parametrize("name", SIZES)
def test_a_size_that_no_family_can_guess_must_be_there(name: str, llama: Path) -> None:
    edit_json(llama / CONFIG, **{name: None})
    refused(llama, f"config.json: it has no {name}; it must be a whole number")


@pytest.mark.parametrize("size", [0, -1, 64.0, "64", True, 10**12])
@pytest.mark.parametrize("name", [*SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings"])
def test_a_size_that_cannot_be_is_refused(name: str, size: object, llama: Path) -> None:
    edit_json(llama / CONFIG, **{name: size})
    refused(llama, f"config.json: {name} is {size!r}; it must be a whole number from 1 to ")


LENGTH = "original_max_position_embeddings"
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    LENGTH: 64,
}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"architectures": "LlamaForCausalLM"}, ["architectures is 'LlamaForCausalLM'; it must be a list of names"]),
        ({"architectures": [["LlamaForCausalLM"]]}, ["it must be a list of names"]),
        ({"model_type": "gpt2"}, ["model_type is 'gpt2'; of LlamaForCausalLM it is 'llama'"]),
        ({"hidden_size": 65}, ["hidden size (65) is not a multiple", "heads (4)"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads is 4; it must be a multiple of num_key_value_heads (3)"]),
        ({"num_key_value_heads": 8}, ["num_attention_heads is 4; it must be a multiple of num_key_value_heads (8)"]),
        ({"head_dim": 15}, ["even", "`head_dim`=15"]),
        ({"num_hidden_layers": 1001}, ["num_hidden_layers is 1001", "from 1 to 1000"]),
        ({"hidden_act": "gelu"}, ["hidden_act is 'gelu'; silu is served"]),
        ({"rms_norm_eps": 0.0}, ["rms_norm_eps is 0.0", "above 0"]),
        ({"rms_norm_eps": float("nan")}, ["rms_norm_eps is nan"]),
        ({"rms_norm_eps": "small"}, ["rms_norm_eps", "small"]),
        ({"dtype": "float33"}, ["dtype is 'float33'; float32, bfloat16, float16 are served"]),
        ({"dtype": "int8"}, ["dtype is 'int8'"]),
        ({"dtype": 16}, ["dtype is 16"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config"]),
        ({"rope_parameters": 7}, ["rope_parameters"]),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, ["rope_type is 'dynamic'"]),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, ["factor"]),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": "2"}}, ["factor is '2'", "positive"]),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": -2}}, ["factor is -2", "positive"]),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, ["rope_theta is 0", "positive number"]),
        ({"rope_parameters": LLAMA3 | {"high_freq_factor": 1}}, ["high_freq_factor is 1; it must be above", "is 1"]),
        ({"rope_parameters": LLAMA3 | {"low_freq_factor": 8.0}}, ["high_freq_factor is 4; it must be above", "is 8"]),
        ({"rope_parameters": LLAMA3 | {LENGTH: 0.5}}, [f"{LENGTH} is 0.5; it must be a whole number from 1"]),
        ({"rope_parameters": LLAMA3 | {LENGTH: 1e300}}, [f"{LENGTH} is 1e+300; it must be a whole number from 1"]),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            ["partial_rotary_factor is 0.5"],
        ),
    ],
)
def test_a_config_that_is_not_served_says_which_field(fields: dict[str, Any], words: list[str], llama: Path) -> None:
    edit_json(llama / CONFIG, **fields)
    refused(llama, "llama/config.json: ", *words)


def test_layers_that_are_not_served_are_refused(tmp_path: Path) -> None:
    path = build_checkpoint("qwen2", tmp_path, tokenizer=False)
    edit_json(path / CONFIG, sliding_window=-3)
    refused(path, "config.json: sliding_window is -3; it must be at least 1")
    edit_json(path / CONFIG, sliding_window=8, layer_types=["full_attention", "chunked_attention"])
    refused(path, "config.json")
    edit_json(path / CONFIG, layer_types=["full_attention"])
    refused(path, "config.json")


ENDLESS = b'{"lm_head.weight": {"data_offsets": [0, 1e999]}}'


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (replaced(WEIGHTS, lambda path: path.mkdir()), ["is a directory; expected is a whole safetensors file"]),
        (replaced(WEIGHTS, lambda path: path.symlink_to("/blobs/5")), ["is a link to '/blobs/5'"]),
        (write(WEIGHTS, ""), ["is empty"]),
        (write(WEIGHTS, GIT_LFS_POINTER), ["is a git-lfs pointer", "git lfs pull"]),
        (write(WEIGHTS, "<html>404" + " " * 1000), ["is a web page"]),
        (write(WEIGHTS, b"PK\x03\x04" + bytes(1000)), ["cannot be read"]),
        (cut(WEIGHTS, 5), ["cannot be read", "header too small"]),
        (cut(WEIGHTS, 1000), ["cannot be read", "invalid header length"]),
        (cut(WEIGHTS, -100), ["bytes; by its header it must have", "copy it again"]),
        (header(2**62), ["cannot be read", "header too large"]),
        (header(200_000_000), ["cannot be read", "header too large"]),
        (header(0), ["cannot be read", "invalid JSON in header"]),
        (header(20, b"x" * 20 + bytes(100)), ["cannot be read", "invalid JSON in header"]),
        (header(2, b"[]"), ["cannot be read"]),
        (header(len(ENDLESS), ENDLESS), ["cannot be read"]),
        (tensors(lambda t: t.update({"model.norm.weight": torch.ones(64).to(torch.int8)})), ["is stored as I8"]),
        (tensors(lambda t: t.update({"model.norm.weight": torch.ones(64).double()})), ["stored as F64", "F32, BF16"]),
        (tensors(lambda t: t.update({"model.norm.weight": torch.ones(63)})), ["shape [63]; it must be [64]"]),
        (tensors(lambda t: t.update({"model.norm.weight": torch.ones(64, 1)})), ["has shape [64, 1]; it must be [64]"]),
        (tensors(lambda t: t["model.norm.weight"][7:8].fill_(torch.nan)), ["model.norm.weight", "no finite numbers"]),
        (tensors(lambda t: t["model.norm.weight"][7:8].fill_(torch.inf)), ["model.norm.weight", "no finite numbers"]),
        (tensors(lambda t: [t.pop("lm_head.weight"), t.pop("model.norm.weight")]),
         ["has no lm_head.weight, model.norm.weight, which", "config.json calls for"]),
    ],
)  # fmt: skip
def test_damaged_weights_are_named(damage: Damage, words: list[str], llama: Path) -> None:
    damage(llama)
    refused(llama, "model.safetensors", *words)


def test_a_dtype_that_nobody_knows_is_named(llama: Path) -> None:
    data = (llama / WEIGHTS).read_bytes()
    (llama / WEIGHTS).write_bytes(data.replace(b'"F32"', b'"F99"', 1))
    refused(llama, "llama/model.safetensors cannot be read", "F99")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"intermediate_size": 96}, ["layers.0.mlp.gate_proj.weight", "has shape [160, 64]; it must be [96, 64]"]),
        ({"num_hidden_layers": 4}, ["has no model.layers.3.input_layernorm.weight"]),
        ({"num_hidden_layers": 2}, ["has model.layers.2.input_layernorm.weight (in model.safetensors)"]),
        ({"attention_bias": True}, ["has no model.layers.0.self_attn.k_proj.bias", "and 8 more"]),
    ],
)
def test_a_config_of_another_model_than_the_weights_is_named(
    fields: dict[str, Any], words: list[str], llama: Path
) -> None:
    edit_json(llama / CONFIG, **fields)
    refused(llama, str(llama / CONFIG), "model.safetensors", *words)


def test_a_tensor_that_a_lone_shard_lacks_is_missed_in_the_index(llama: Path) -> None:
    tensors(lambda t: t.pop("lm_head.weight"))(llama)
    shard = "model-00001-of-00001.safetensors"
    (llama / WEIGHTS).rename(llama / shard)
    (llama / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(load_file(llama / shard), shard)}))
    refused(llama, f"{llama / INDEX} has no lm_head.weight")


def test_tensors_that_no_part_of_the_model_takes_are_named(llama: Path) -> None:
    tensors(lambda t: t.update({"model.layers.3.surprise": torch.ones(2)}))(llama)
    refused(llama, "model.layers.3.surprise (in model.safetensors), which", "config.json does not call for")


def test_weights_that_are_not_there_or_are_pickled_are_named(llama: Path) -> None:
    (llama / WEIGHTS).rename(llama / "pytorch_model.bin")
    refused(llama, "pytorch_model.bin", "pickle", "convert it to safetensors")
    (llama / "pytorch_model.bin").unlink()
    refused(llama, "neither model.safetensors nor model.safetensors.index.json")


def in_map(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(directory: Path) -> None:
        index = json.loads((directory / INDEX).read_text())
        change(index["weight_map"])
        (directory / INDEX).write_text(json.dumps(index))

    return damage


SECOND = "model-00002-of-00008.safetensors"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (write(INDEX, "{"), [INDEX, "cannot be read"]),
        (write(INDEX, GIT_LFS_POINTER), [INDEX, "is a git-lfs pointer"]),
        (write(INDEX, "{}"), [INDEX, "has no weight_map"]),
        (write(INDEX, '{"weight_map": ["lm_head.weight"]}'), [INDEX, "has no weight_map"]),
        (in_map(lambda m: m.update({"lm_head.weight": 7})), [INDEX, "has no weight_map"]),
        (in_map(dict.clear), [INDEX, "has no lm_head.weight"]),
        (in_map(lambda m: m.update({"lm_head.weight": SECOND})), [INDEX, f"says that lm_head.weight is in {SECOND}"]),
        (in_map(lambda m: m.update({"ghost": SECOND})), [INDEX, f"says that ghost is in {SECOND}; it is not"]),
        (in_map(lambda m: m.update({"lm_head.weight": "../x.safetensors"})), [INDEX, "names '../x.safetensors'"]),
        (lambda d: (d / SECOND).unlink(), [INDEX, f"names '{SECOND}'", "no such file"]),
        (write(SECOND, GIT_LFS_POINTER), [SECOND, "is a git-lfs pointer"]),
        (cut(SECOND, -100), [SECOND, "bytes; by its header it must have"]),
        (lambda d: (d / INDEX).unlink(), ["neither model.safetensors nor model.safetensors.index.json"]),
    ],
)
def test_damaged_shards_are_named(damage: Damage, words: list[str], shards: Path) -> None:
    damage(shards)
    refused(shards, *words)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (write("generation_config.json", "{{{"), ["generation_config.json cannot be read"]),
        (write("generation_config.json", "[]"), ["generation_config.json holds []"]),
        (write("generation_config.json", GIT_LFS_POINTER), ["generation_config.json is a git-lfs pointer"]),
        (
            write("generation_config.json", '{"eos_token_id": [1, 999]}'),
            ["config.json: eos_token_id is 999"],
        ),
        (write("generation_config.json", '{"eos_token_id": "</s>"}'), ["eos_token_id is '</s>'", "below 384"]),
        (write("generation_config.json", '{"eos_token_id": true}'), ["eos_token_id is True", "below 384"]),
    ],
)
def test_a_damaged_generation_config_is_named(damage: Damage, words: list[str], llama: Path) -> None:
    damage(llama)
    refused(llama, *words)


def test_a_damaged_generation_config_is_found_before_the_weights_are_read(llama: Path) -> None:
    tensors(lambda t: t["model.norm.weight"].fill_(torch.nan))(llama)
    write("generation_config.json", "{{{")(llama)
    refused(llama, "generation_config.json cannot be read")


def test_without_a_generation_config_the_config_names_the_end(llama: Path) -> None:
    (llama / "generation_config.json").unlink()
    edit_json(llama / CONFIG, eos_token_id=4096)
    refused(llama, "config.json: eos_token_id is 4096; it must be a token id below 384")


def test_what_is_no_directory_is_said(llama: Path, tmp_path: Path) -> None:
    refused(llama / "nowhere", "there is no such directory", "hub id")
    refused(llama / WEIGHTS, "is a file; it must be a directory")
    (tmp_path / "link").symlink_to("/snapshots/7")
    refused(tmp_path / "link", "is a link to '/snapshots/7', which does not exist")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "empty/config.json is missing")


@pytest.fixture
def open_to_all() -> Iterator[Path]:
    """A directory that other users can reach, unlike tmp_path; meanwhile this process is no superuser."""
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)
        os.seteuid(user)


def _without_rights(user: int) -> None:
    if user == 0:
        os.seteuid(65534)


@pytest.mark.parametrize(
    ("closed", "words"),
    [(".", ["llama' cannot be read: Permission denied"]), (CONFIG, ["config.json cannot be read: Permission denied"]),
     (WEIGHTS, ["model.safetensors cannot be read: Permission denied"])],
)  # fmt: skip
def test_what_may_not_be_read_is_said(closed: str, words: list[str], whole: Path, open_to_all: Path) -> None:
    directory = shutil.copytree(whole, open_to_all / "llama")
    directory.chmod(0o755)
    for path in directory.iterdir():
        path.chmod(0o644)
    (directory / closed).chmod(0)
    _without_rights(os.geteuid())
    refused(directory, *words)
