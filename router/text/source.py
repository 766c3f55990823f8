"""From a checkpoint's text files to transformers' tokenizer, or a CheckpointError that says which file is wrong."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jinja2

from baton.errors import CheckpointError
from baton.model_files import in_one_line, model_directory, read_json, unusable

_TOKENIZER = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
_BESIDE = (_CONFIG, "special_tokens_map.json", "added_tokens.json")
_TEMPLATE = "chat_template.jinja"
_FAST = "a tokenizer in Hugging Face's fast format, as transformers' AutoTokenizer saves it (save_pretrained)"
_FILES = ("tokenizer*", "*token*.json", "chat_template*", "config.json")


def fast_tokenizer(source: str) -> Any:
    """The PreTrainedTokenizerFast of a directory or a hub id. Blocks. Raises CheckpointError."""
    from transformers import PreTrainedTokenizerFast  # here, so that importing router.text stays quick

    directory = model_directory(source, _FILES)
    read_json(directory / _TOKENIZER, _FAST)  # a damaged file is named before the loader reports it in its own words
    for name in _BESIDE:
        read_json(directory / name, optional=True)
    _check_template_file(directory / _TEMPLATE)
    try:
        fast = PreTrainedTokenizerFast.from_pretrained(str(directory), local_files_only=True)
    except Exception as error:  # whatever the loader makes of a wrong file: there is no one class for it
        raise CheckpointError(
            f"{directory / _TOKENIZER}, with {_CONFIG} beside it, holds no tokenizer that can be used: "
            f"{in_one_line(error)}"
        ) from error
    _check_vocabulary(fast, directory)
    _check_template(fast, directory)
    return fast


def _check_vocabulary(fast: Any, directory: Path) -> None:
    """That it is the model's own. Added tokens may lie beyond the model's table, as some checkpoints' padding token
    does: a prompt with one is refused."""
    size = read_json(directory / "config.json", optional=True).get("vocab_size")
    highest = max(fast.backend_tokenizer.get_vocab(with_added_tokens=False).values(), default=-1)
    if highest < 0:
        raise CheckpointError(f"{directory / _TOKENIZER} has an empty vocabulary")
    if isinstance(size, int) and highest >= size:
        raise CheckpointError(
            f"{directory / _TOKENIZER} has token ids up to {highest}, and config.json says vocab_size {size}: "
            "it must be the tokenizer that the model was trained with"
        )


def _check_template_file(path: Path) -> None:
    """It is plain text, so anything would pass for a template."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        if not os.path.lexists(path):
            return
        raise unusable(path, "a chat template", error) from None
    if "{" not in text:
        raise unusable(path, "a chat template", ValueError("it shows no message of a conversation"))


def _check_template(fast: Any, directory: Path) -> None:
    """That it compiles, which the first rendering finds out, and which later ones need not do again. What it makes of
    a conversation is for each request to see."""
    if not fast.chat_template:
        return
    path = directory / _TEMPLATE if (directory / _TEMPLATE).exists() else directory / _CONFIG
    if not isinstance(fast.chat_template, str | dict):
        raise CheckpointError(f"{path}: chat_template is {fast.chat_template!r}; it must be a Jinja template")
    try:
        fast.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
    except jinja2.TemplateSyntaxError as error:
        raise CheckpointError(
            f"{path}: the chat template does not compile, at its line {error.lineno}: {in_one_line(error)}"
        ) from error
    except Exception:  # it may refuse this conversation and take others
        return
