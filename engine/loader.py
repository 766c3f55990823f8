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
from engine.checkpoint import Checkpoint, read_json
from engine.hub import model_directory
from engine.models.decoder import Decoder
from engine.models.families import FAMILIES, model_spec
from engine.models.spec import ModelSpec
from engine.models.tensors import EMBEDDING, expected_tensors, ignored
from engine.progress import LoadProgress, Progress

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class LoadedModel:
    decoder: Decoder
    directory: Path
    """Also holds the tokenizer's files."""
    dtype: str
    """float32, bfloat16 or float16: of weights, activations and KV."""
    eos_token_ids: tuple[int, ...]
    fingerprint: bytes
    """16 bytes over config, dtype and weights; the same in every process and on every host for the same files."""

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
    directory = model_directory(model)
    config, spec = _read_config(directory)
    expected = expected_tensors(spec)
    with Checkpoint(directory) as checkpoint:
        checkpoint.check(expected, lambda names: ignored(names, spec))
        run_dtype = _choose_dtype(dtype, config, checkpoint.dtype(EMBEDDING))
        show = progress or LoadProgress(directory.name)
        total = sum(prod(shape) for shape in expected.values()) * run_dtype.itemsize
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
    identity = f"{spec!r}\n{_DTYPE_NAMES[run_dtype]}\n".encode() + content
    return LoadedModel(
        decoder=decoder,
        directory=directory,
        dtype=_DTYPE_NAMES[run_dtype],
        eos_token_ids=_eos_token_ids(directory, config),
        fingerprint=hashlib.sha256(b"baton.model.v1\n" + identity).digest()[:16],
    )


def _read_config(directory: Path) -> tuple[Any, ModelSpec]:
    """The config as transformers completes it, and our spec of it."""
    raw = read_json(directory / "config.json")
    architectures = raw.get("architectures") or []
    architecture = next((name for name in architectures if name in FAMILIES), None)
    if architecture is None:
        code = " and brings Python code of its own, which is never run" if raw.get("auto_map") else ""
        raise CheckpointError(
            f"{directory / 'config.json'} names architecture {', '.join(map(str, architectures)) or 'none'}{code}; "
            f"served are {', '.join(FAMILIES)}"
        )
    from transformers import CONFIG_MAPPING

    family = FAMILIES[architecture].name
    try:
        # The family's own class, not what model_type or auto_map say: nothing of the checkpoint picks code to run.
        config = CONFIG_MAPPING[family].from_dict(raw)
    except Exception as error:  # whatever a field's wrong type or value makes transformers raise
        raise CheckpointError(f"{directory / 'config.json'} is no valid {family} config: {error}") from error
    return config, model_spec(config, architecture)


def _choose_dtype(wanted: str, config: Any, stored: torch.dtype) -> torch.dtype:
    if wanted != "auto":
        if wanted not in _DTYPES:
            raise ConfigError(f"dtype is {wanted!r}; it must be auto, {', '.join(_DTYPES)}", param="dtype")
        return _DTYPES[wanted]
    named = getattr(config, "dtype", None)
    named = getattr(torch, named, None) if isinstance(named, str) else named
    return named if named in _DTYPE_NAMES else stored


def _eos_token_ids(directory: Path, config: Any) -> tuple[int, ...]:
    """generation_config.json has the last word: chat models list the end of a turn there."""
    path = directory / "generation_config.json"
    ids = read_json(path).get("eos_token_id") if path.exists() else None
    if ids is None:
        ids = config.eos_token_id
    if ids is None:
        return ()
    listed = tuple(ids) if isinstance(ids, list) else (ids,)
    for token_id in listed:
        if not isinstance(token_id, int) or not 0 <= token_id < config.vocab_size:
            raise CheckpointError(
                f"{directory}: eos_token_id is {token_id!r}; it must be a token id below {config.vocab_size}"
            )
    return listed
