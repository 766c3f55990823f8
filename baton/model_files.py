"""Where a model's files are, and what is wrong with one that cannot be used. Workers and the router read a directory
through this, so that both say the same of it. It knows nothing of what is in the files.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from baton.errors import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_GIT_LFS = b"version https://git-lfs.github.com/spec/"
_WEB_PAGE = re.compile(rb"\s*<(!doctype|html|\?xml)", re.IGNORECASE)
_MOST_WORDS = 300
"""Characters of another library's words in a message of ours."""


def model_directory(model: str, files: Sequence[str]) -> Path:
    """The directory of `model`; if that is a hub id, a snapshot with the files that match `files`. Raises
    CheckpointError."""
    path = _path(model)
    try:
        if model:
            os.scandir(path).close()
            return path
    except NotADirectoryError:
        raise CheckpointError(f"model {model!r} is a file; it must be a directory or a hub id", param="model") from None
    except FileNotFoundError:
        if path.is_symlink():
            raise CheckpointError(
                f"model {model!r} is a link to {os.readlink(path)!r}, which does not exist", param="model"
            ) from None
    except OSError as error:
        raise CheckpointError(f"model {model!r} cannot be read: {error.strerror}", param="model") from None
    if not _HUB_ID.fullmatch(model):
        raise CheckpointError(
            f"model {model!r}: there is no such directory, and a hub id looks like Qwen/Qwen3-0.6B", param="model"
        )
    return _snapshot(model, files)


def local_directory(model: str) -> Path | None:
    """The directory that `model` names, absolute and without links; None where it names none, as a hub id."""
    path = _path(model)
    return path.resolve() if model and os.path.isdir(path) else None


def read_json(path: Path, right: str = "a JSON object", *, optional: bool = False) -> dict[str, Any]:
    """The JSON object in the file; with `optional`, an empty one where there is no file. Raises CheckpointError, which
    names `right` as what should be there."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if optional and not os.path.lexists(path):
            return {}
        raise unusable(path, right, error) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {json.dumps(value)[:40]}; expected is {right}")
    return value


def unusable(path: Path, right: str, error: BaseException) -> CheckpointError:
    """For a file that could not be used, by `error`: says what lies there in place of `right`."""
    wrong = _in_its_place(path) or f"cannot be read ({in_one_line(error)})"
    return CheckpointError(f"{path} {wrong}; expected is {right}")


def in_one_line(error: BaseException) -> str:
    """What another library says of a failure, as a part of a line."""
    words = " ".join(str(error).split())[:_MOST_WORDS]
    return words if " " in words else f"{type(error).__name__} {words}".rstrip()


def _path(model: str) -> Path:
    return Path(os.path.expanduser(model))  # Path.expanduser raises where there is no such user


def _in_its_place(path: Path) -> str:
    """Empty where it may well be what it should."""
    try:
        with path.open("rb") as file:
            start = file.read(256)
    except FileNotFoundError:
        return f"is a link to {os.readlink(path)!r}, which does not exist" if path.is_symlink() else "is missing"
    except IsADirectoryError:
        return "is a directory"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if not start:
        return "is empty"
    if start.startswith(_GIT_LFS):
        return "is a git-lfs pointer, not the file itself, which `git lfs pull` fetches"
    return "is a web page" if _WEB_PAGE.match(start) else ""


def _snapshot(hub_id: str, files: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download  # here, so that a local model needs no network library

    try:
        return Path(
            snapshot_download(hub_id, allow_patterns=list(files), ignore_patterns=["consolidated*", "original/*"])
        )
    except Exception as error:  # the hub client's errors have no common base
        raise CheckpointError(
            f"model {hub_id!r} is no directory here, and the Hugging Face hub did not give it: {in_one_line(error)}",
            param="model",
        ) from error
