"""Where a model's files are: a directory as it is named, or a snapshot of a Hugging Face hub repository."""

from __future__ import annotations

import re
from pathlib import Path

from baton.errors import CheckpointError

# What serving needs and nothing that could be executed: no pickles, no Python.
_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def model_directory(model: str) -> Path:
    """The directory of `model`, brought over from the hub if it is a hub id. Raises CheckpointError."""
    directory = Path(model).expanduser()
    if directory.is_dir():
        return directory
    if directory.exists():
        raise CheckpointError(f"model {model!r} is a file; it must be a directory or a hub id", param="model")
    if not _HUB_ID.fullmatch(model):
        raise CheckpointError(f"model {model!r}: there is no such directory", param="model")
    return _snapshot(model)


def _snapshot(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(hub_id, allow_patterns=list(_FILES), ignore_patterns=["consolidated*", "original/*"])
        )
    except Exception as error:  # the hub client's errors have no common base
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"model {hub_id!r} is no directory here, and the Hugging Face hub did not give it: {reason}", param="model"
        ) from error
