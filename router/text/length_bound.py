"""How much text one token can stand for: what a text's length alone says about its number of tokens."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer as Backend

from router.text.pieces import BYTE_ALPHABET

_MAX_COMPOSED = 4
"""Characters that Unicode's normal forms compose into one at most."""


def max_characters_per_token(backend: Backend, vocabulary: dict[str, int]) -> int | None:
    """None where no bound is known.

    A piece of n characters stands for at most n characters of text, times what the normaliser composes, if no step
    drops text and every byte has a token, so that no unknown token swallows a run. Each step must be one that is known
    to keep what it is given.
    """
    if type(backend.model).__name__ != "BPE" or not _every_byte_has_a_token(vocabulary):
        return None
    if any(token.lstrip or token.rstrip for token in backend.get_added_tokens_decoder().values()):
        return None  # they take the white space beside them along
    composed = 1
    for step in _steps(backend.normalizer, "normalizers"):
        match step:
            case {"type": "NFC" | "NFD" | "NFKC" | "NFKD"}:
                composed = _MAX_COMPOSED
            case {"type": "Prepend" | "ByteLevel" | "Lowercase"}:
                pass
            case {"type": "Replace", "pattern": {"String": old}, "content": new} if len(new) >= len(old):
                pass
            case _:
                return None
    for step in _steps(backend.pre_tokenizer, "pretokenizers"):
        match step:
            case {"type": "ByteLevel" | "Metaspace" | "Digits"}:
                pass
            case {"type": "Split", "behavior": behavior} if behavior != "Removed":
                pass
            case _:
                return None
    return composed * max(map(len, vocabulary))


def _every_byte_has_a_token(vocabulary: dict[str, int]) -> bool:
    return all(character in vocabulary for character in BYTE_ALPHABET) or all(
        f"<0x{byte:02X}>" in vocabulary for byte in range(256)
    )


def _steps(part: Any, members: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    state: dict[str, Any] = json.loads(part.__getstate__())
    if state["type"] != "Sequence":
        return [state]
    steps: list[dict[str, Any]] = state[members]
    return steps
