"""What bytes each token id stands for. Owns the reading of a tokenizer's decoder; keeps no stream's state.

Decoders of the byte-level kind (Llama 3, Qwen) and of the byte-fallback kind (Llama 2, Mistral) give every token its
own bytes, whatever its neighbours. The one exception is a leading space that byte-fallback decoders strip from the
very beginning of a text. So the text of a stream is the UTF-8 decoding of its tokens' bytes, one look-up a token.
Other decoders (WordPiece's, say) join pieces by rules of their own: `piece_table` returns None for these.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer as Backend

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class _Rules:
    """A decoder, reduced to what it does to one piece and to the beginning of a text."""

    piece_bytes: Callable[[str], bytes]
    leading_strip: int = 0
    """So many leading spaces are removed from the beginning of a text."""


class PieceTable:
    """Bytes of token ids, computed when first asked for."""

    def __init__(self, backend: Backend, rules: _Rules, special_ids: frozenset[int]) -> None:
        self._backend = backend
        self._rules = rules
        self._bytes: dict[int, bytes] = dict.fromkeys(special_ids, b"")
        self.leading_strip = rules.leading_strip

    def __getitem__(self, token_id: int) -> bytes:
        """Empty for special tokens and for ids that the tokenizer does not know: a model's vocabulary may be padded."""
        known = self._bytes.get(token_id)
        if known is None:
            piece = self._backend.id_to_token(token_id)
            known = b"" if piece is None else self._rules.piece_bytes(piece)
            self._bytes[token_id] = known
        return known


def piece_table(backend: Backend, special_ids: frozenset[int]) -> PieceTable | None:
    """None where the decoder does not work piece by piece."""
    if backend.decoder is None:
        return None
    rules = _rules(json.loads(backend.decoder.__getstate__()))
    return None if rules is None else PieceTable(backend, rules, special_ids)


def _rules(decoder: dict[str, Any]) -> _Rules | None:
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    if [step["type"] for step in steps] == ["ByteLevel"]:
        return _Rules(_byte_level_bytes)
    return _byte_fallback_rules(steps)


def _byte_fallback_rules(steps: list[dict[str, Any]]) -> _Rules | None:
    """Replace (before the pieces are fused), ByteFallback, Fuse, and a Strip at the beginning of the fused text."""
    replacements: list[tuple[str, str]] = []
    byte_tokens = fused = False
    leading_strip = 0
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": old}, "content": new} if not fused and not byte_tokens:
                replacements.append((old, new))
            case {"type": "ByteFallback"} if not fused:
                byte_tokens = True
            case {"type": "Fuse"}:
                fused = True
            case {"type": "Strip", "content": " ", "start": start, "stop": 0} if fused:
                leading_strip = start
            case _:
                return None
    if not fused:
        return None

    def piece_bytes(piece: str) -> bytes:
        for old, new in replacements:
            piece = piece.replace(old, new)
        if byte_tokens and (byte := _BYTE_TOKEN.fullmatch(piece)):
            return bytes([int(byte[1], 16)])
        return piece.encode()

    return _Rules(piece_bytes, leading_strip)


def _byte_alphabet() -> dict[str, int]:
    """The printable character that byte-level BPE writes for each byte: itself where it is printable Latin-1, else
    the next free code point from U+0100 on. (Radford et al., GPT-2, 2019.)"""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_ALPHABET = _byte_alphabet()


def _byte_level_bytes(piece: str) -> bytes:
    try:
        return bytes([BYTE_ALPHABET[character] for character in piece])
    except KeyError:  # an added token in plain text
        return piece.encode()
