"""From a directory or hub id to a model that is ready to run, or a CheckpointError that says what is wrong with it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from baton.errors import CheckpointError, ConfigError
from baton.layout import KVLayout
from baton.model_files import in_one_line, model_directory, read_json
from engine import memory
from engine.checkpoint import CONFIG, Checkpoint
from engine.models.decoder import Decoder
from engine.models.families import FAMILIES, architecture_of, check_fields, model_spec
from engine.models.spec import ModelSpec
from engine.models.tensors import EMBEDDING, expected_tensors, ignored
from engine.progress import LoadProgress, Progress

# What serving needs and nothing that could be executed: no pickles, no Python.
_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_DTYPE_FIELDS = ("dtype", "torch_dtype")
"""Of config.json: what the field is called now, and what it was called before."""


@dataclass(frozen=True)
class LoadedModel:
    decoder: Decoder
    directory: Path
    """Also holds the tokenizer's files."""
    dtype: str
    """float32, bfloat16 or float16: of weights, activations and KV."""
    eos_token_ids: tuple[int, ...]
    fingerprint: bytes
    """16 bytes over config and weights as they are stored; the same in every process and on every host for the same
    files. Which dtype they are converted to is the layout's to say."""

    @property
    def spec(self) -> ModelSpec:
        return self.decoder.spec

    def kv_layout(self, block_size: int) -> KVLayout:
        return KVLayout(
            num_layers=self.spec.num_layers,
            num_kv_heads=self.spec.num_kv_heads,
            block_size=block_size,
            head_dim=self.spec.head_dim,
            dtype=self.dtype,
            model_fingerprint=self.fingerprint,
        )

    def max_model_len(self, wanted: int) -> int:
        """`wanted`, or the model's own for 0. Raises ConfigError for more than the model can do."""
        if wanted > self.spec.max_model_len:
            raise ConfigError(
                f"max_model_len is {wanted}; the model's own limit is {self.spec.max_model_len}", param="max_model_len"
            )
        return wanted or self.spec.max_model_len


def load_model(
    model: str, dtype: str = "auto", device: torch.device | str = "cpu", progress: Progress | None = None
) -> LoadedModel:
    """Loads `model`, a directory or a hub id. Raises CheckpointError for what cannot be served, naming file and tensor.

    `dtype` auto is what the config names, else what the weights are stored in. Weights of another float dtype are
    converted. Shows a long load's progress on stderr unless `progress` is given.
    """
    directory = model_directory(model, _FILES)
    raw = read_json(directory / CONFIG)
    try:
        config, spec = _interpret(raw, dtype)
    except CheckpointError as error:
        raise CheckpointError(f"{directory / CONFIG}: {error.message}") from error
    eos_token_ids = _eos_token_ids(directory, config)
    expected = expected_tensors(spec)
    with Checkpoint(directory) as checkpoint:
        checkpoint.check(expected, lambda names: ignored(names, spec))
        run_dtype = _choose_dtype(dtype, raw, checkpoint.dtype(EMBEDDING))
        show = progress or LoadProgress(directory.name)
        total = sum(prod(shape) for shape in expected.values()) * run_dtype.itemsize
        _check_room(total, torch.device(device), _DTYPE_NAMES[run_dtype])
        done = 0

        def take(name: str) -> Tensor:
            nonlocal done
            tensor = checkpoint.read(name).to(device=device, dtype=run_dtype, copy=True)
            done += tensor.nbytes
            show(done, total)
            return tensor

        with torch.inference_mode():
            decoder = Decoder(spec, take)
        content = checkpoint.content_digest()
    identity = f"{spec!r}\n".encode() + content
    return LoadedModel(
        decoder=decoder,
        directory=directory,
        dtype=_DTYPE_NAMES[run_dtype],
        eos_token_ids=eos_token_ids,
        fingerprint=hashlib.sha256(b"baton.model.v1\n" + identity).digest()[:16],
    )


def read_spec(model: str, dtype: str = "auto") -> tuple[ModelSpec, str, tuple[int, ...]]:
    """What a checkpoint's weights would be, the dtype that they would run in, and what ends an answer, without reading
    them. Raises CheckpointError, ConfigError."""
    directory = model_directory(model, ("*.json",))
    raw = read_json(directory / CONFIG)
    try:
        config, spec = _interpret(raw, dtype)
    except CheckpointError as error:
        raise CheckpointError(f"{directory / CONFIG}: {error.message}") from error
    named = _named_dtype(raw) if dtype == "auto" else dtype
    if named is None:
        raise ConfigError(f"{directory / CONFIG} names no dtype; give --dtype", param="dtype")
    return spec, _DTYPE_NAMES[_choose_dtype(named, raw, torch.float32)], _eos_token_ids(directory, config)


def _check_room(weights: int, device: torch.device, dtype: str) -> None:
    room = memory.available(device)
    if weights > room:
        raise ConfigError(
            f"the weights take {weights / 2**30:.1f} GiB in {dtype} and {device} has {room / 2**30:.1f} GiB left; "
            "free some, or serve a smaller model" + (" or a --dtype of 16 bits" if dtype == "float32" else "")
        )


def _interpret(raw: dict[str, Any], dtype: str) -> tuple[Any, ModelSpec]:
    """The config as transformers completes it, and our spec of it. Raises CheckpointError, naming the field. Which
    dtype the config names is of no matter unless `dtype` is auto."""
    architecture = architecture_of(raw)
    check_fields(raw, architecture)
    if dtype == "auto" and _named_dtype(raw) not in (None, *_DTYPES):
        raise CheckpointError(f"dtype is {_named_dtype(raw)!r}; {', '.join(_DTYPES)} are served")
    from transformers import CONFIG_MAPPING

    family = FAMILIES[architecture].name
    try:
        # The family's own class, not what model_type or auto_map say: nothing of the checkpoint picks code to run.
        config = CONFIG_MAPPING[family].from_dict({k: v for k, v in raw.items() if k not in _DTYPE_FIELDS})
    except Exception as error:  # whatever a field's wrong type or value makes transformers raise
        raise CheckpointError(f"this is no valid {family} config: {in_one_line(error)}") from error
    return config, model_spec(config, architecture)


def _named_dtype(raw: dict[str, Any]) -> Any:
    return next((raw[field] for field in _DTYPE_FIELDS if raw.get(field)), None)


def _choose_dtype(wanted: str, raw: dict[str, Any], stored: torch.dtype) -> torch.dtype:
    if wanted == "auto":
        named = _named_dtype(raw)
        return stored if named is None else _DTYPES[named]
    if wanted not in _DTYPES:
        raise ConfigError(f"dtype is {wanted!r}; it must be auto, {', '.join(_DTYPES)}", param="dtype")
    return _DTYPES[wanted]


def _eos_token_ids(directory: Path, config: Any) -> tuple[int, ...]:
    """generation_config.json has the last word: chat models list the end of a turn there."""
    path = directory / "generation_config.json"
    ids = read_json(path, optional=True).get("eos_token_id")
    if ids is None:
        path, ids = directory / CONFIG, config.eos_token_id
    if ids is None:
        return ()
    listed = tuple(ids) if isinstance(ids, list) else (ids,)
    for token_id in listed:
        if type(token_id) is not int or not 0 <= token_id < config.vocab_size:
            raise CheckpointError(
                f"{path}: eos_token_id is {token_id!r}; it must be a token id below {config.vocab_size}"
            )
    return listed
