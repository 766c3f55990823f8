"""Finds a checkpoint's text files: a directory as it is, or a hub id, of which only these files are fetched."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from baton.errors import CheckpointError

TOKENIZER_FILE = "tokenizer.json"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_PATTERNS = ("tokenizer*", "*token*.json", "chat_template*", "config.json")


def checkpoint_directory(source: str) -> Path:
    """The directory that holds the tokenizer of `source`. Raises CheckpointError."""
    directory = Path(source).expanduser()
    if not source or not directory.is_dir():
        directory = _fetched(source)
    if not (directory / TOKENIZER_FILE).is_file():
        raise CheckpointError(
            f"{directory} has no {TOKENIZER_FILE}; it must hold a tokenizer in Hugging Face's fast format"
        )
    return directory


def read_json(path: Path) -> dict[str, Any]:
    """The object in the file; empty where there is no such file. Raises CheckpointError that names a damaged one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; it must be a JSON object") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}; it must be a JSON object")
    return value


def _fetched(source: str) -> Path:
    path = Path(source).expanduser()
    if source and path.exists():
        raise CheckpointError(f"{source} is a file; it must be a checkpoint's directory or a hub id")
    if not _HUB_ID.fullmatch(source):
        raise CheckpointError(f"{source!r} is neither a directory nor a hub id such as Qwen/Qwen3-0.6B")
    from huggingface_hub import snapshot_download  # here, so that a local checkpoint needs no network library
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=list(_PATTERNS)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"no directory {source} exists and its tokenizer could not be fetched from the hub: {reason}"
        ) from error
