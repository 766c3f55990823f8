"""Reads a checkpoint's weights: safetensors in one file or in shards. It checks all names and shapes before it reads
the first weight, and it never opens a pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from baton.errors import CheckpointError
from baton.model_files import in_one_line, read_json, unusable

CONFIG = "config.json"
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_SAMPLES, _SAMPLE_BYTES = 16, 4096
_SHOWN = 4  # names in a message
_MAX_HEADER_BYTES = 100_000_000  # as safetensors has it


class Checkpoint:
    """The weights of one directory. A context manager: it holds its files open."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        self._digests: dict[str, bytes] = {}
        try:
            for name in _file_names(directory):
                self._files[name] = _open(directory / name)
                for tensor in self._files[name].keys():  # noqa: SIM118  # safe_open is no mapping
                    self._file_of[tensor] = name
            if _SINGLE not in self._files:
                _check_index(directory, self._file_of)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        for file in self._files.values():
            file.__exit__(None, None, None)
        self._files = {}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(self._slice(name).get_shape()) for name in self._file_of}

    def dtype(self, name: str) -> torch.dtype:
        """float32, bfloat16 or float16; raises CheckpointError for any other."""
        stored = self._slice(name).get_dtype()
        if stored not in _FLOATS:
            raise CheckpointError(f"{self._file(name)}: {name} is stored as {stored}; {', '.join(_FLOATS)} are served")
        return _FLOATS[stored]

    def check(self, expected: Mapping[str, tuple[int, ...]], ignored: Callable[[set[str]], set[str]]) -> None:
        """Raises CheckpointError unless exactly the expected tensors are there, in shape and in a served dtype."""
        shapes, config = self.shapes(), self._directory / CONFIG
        missing = sorted(expected.keys() - shapes.keys())
        if missing:
            place = self._directory / (_SINGLE if _SINGLE in self._files else _INDEX)
            raise CheckpointError(f"{place} has no {_listed(missing)}, which {config} calls for")
        extra = shapes.keys() - expected.keys()
        extra -= ignored(extra)
        if extra:
            places = [f"{name} (in {self._file_of[name]})" for name in sorted(extra)]
            raise CheckpointError(f"{self._directory} has {_listed(places)}, which {config} does not call for")
        wrong = [
            f"{name} in {self._file_of[name]} has shape {list(shapes[name])}; it must be {list(shape)}"
            for name, shape in expected.items()
            if shapes[name] != shape
        ]
        if wrong:
            raise CheckpointError(f"{config} calls for other shapes: {_listed(wrong)}")
        for name in expected:
            self.dtype(name)

    def read(self, name: str) -> Tensor:
        """The tensor on the CPU, as stored. It lies in the mapped file: copy it to keep it."""
        try:
            tensor: Tensor = self._files[self._file_of[name]].get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{self._file(name)}: {name} cannot be read: {in_one_line(error)}") from None
        if not torch.stack(tensor.aminmax()).isfinite().all():
            raise CheckpointError(f"{self._file(name)}: {name} holds values that are no finite numbers; copy it again")
        self._digests[name] = _digest(tensor)
        return tensor

    def content_digest(self) -> bytes:
        """Names the weights that were read: their names, dtypes, shapes and samples of their data. It does not depend
        on how they are spread over files, on the order of reading, or on the host."""
        digest = hashlib.sha256()
        for name in sorted(self._digests):
            digest.update(name.encode() + b"\0" + self._digests[name])
        return digest.digest()

    def _file(self, name: str) -> Path:
        return self._directory / self._file_of[name]

    def _slice(self, name: str) -> Any:
        return self._files[self._file_of[name]].get_slice(name)


def _file_names(directory: Path) -> list[str]:
    """A single file goes before an index, as transformers has it."""
    if os.path.lexists(directory / _SINGLE):
        return [_SINGLE]
    if os.path.lexists(directory / _INDEX):
        names = sorted(set(_weight_map(directory).values()))
        for name in names:
            if Path(name).name != name or not os.path.lexists(directory / name):
                raise CheckpointError(f"{directory / _INDEX} names {name!r}, and {directory} has no such file")
        return names
    pickles = sorted(path.name for path in directory.iterdir() if path.suffix in _PICKLES)
    if pickles:
        raise CheckpointError(
            f"{directory} has its weights as pickle ({', '.join(pickles[:_SHOWN])}), which can run code when it is "
            f"opened; convert it to safetensors ({_SINGLE})"
        )
    raise CheckpointError(f"{directory} has neither {_SINGLE} nor {_INDEX}; its weights must be in one of them")


def _weight_map(directory: Path) -> dict[str, str]:
    weight_map = read_json(directory / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{directory / _INDEX} has no weight_map from tensor names to file names")
    return weight_map


def _check_index(directory: Path, file_of: Mapping[str, str]) -> None:
    for name, file in _weight_map(directory).items():
        if file_of.get(name) != file:
            raise CheckpointError(f"{directory / _INDEX} says that {name} is in {file}; it is not")


def _open(path: Path) -> Any:
    try:
        opened: Any = safe_open(path, framework="pt", device="cpu")
        return opened.__enter__()
    except (SafetensorError, OSError) as error:
        right = _right_size(path)
        if right is not None and right != path.stat().st_size:
            raise CheckpointError(
                f"{path} has {path.stat().st_size} bytes; by its header it must have {right}: copy it again"
            ) from None
        raise unusable(path, "a whole safetensors file", error) from None


def _right_size(path: Path) -> int | None:
    """By the header of a safetensors file; None where it has none that can be read."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size)) if size < _MAX_HEADER_BYTES else {}
        header.pop("__metadata__", None)
        return 8 + size + max(int(tensor["data_offsets"][1]) for tensor in header.values())
    except (OSError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _digest(tensor: Tensor) -> bytes:
    """Of a big tensor, evenly spread samples stand for the whole."""
    data = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    if data.size <= _SAMPLES * _SAMPLE_BYTES:
        digest.update(data.tobytes())
    else:
        stride = (data.size - _SAMPLE_BYTES) // (_SAMPLES - 1)
        for sample in range(_SAMPLES):
            digest.update(data[sample * stride : sample * stride + _SAMPLE_BYTES].tobytes())
    return digest.digest()


def _listed(items: Sequence[str]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more
