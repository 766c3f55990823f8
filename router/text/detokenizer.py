"""Turns one stream's token ids into text as they come. Owns the bytes of a character that is not complete yet.

The pushes and the flush together are the UTF-8 decoding of the tokens' bytes; special tokens have none. A character
(code point) is given out whole, when its last byte has come. Bytes that are no UTF-8 become U+FFFD, one for each
maximal part of a character (Unicode 17, section 3.9), as soon as it is sure that they are none. Byte-fallback
tokenizers' own `decode` replaces a whole run of byte tokens where one of them is bad; a stream cannot look ahead so
far, so here the good characters of such a run stay.

The prompt decides two things: bytes with which it ends in mid-character are completed by the answer, and a tokenizer
that strips the leading space of a text does so only where the answer begins one: behind nothing or a special token.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from router.text.pieces import PieceTable
    from router.text.tokenizer import Tokenizer

_TAIL = 8
"""Prompt tokens that are looked at. A character has at most four bytes, so it began at most three tokens ago; the rest
is for special tokens between."""
_MAX_HELD = 16
"""Tokens of a decoder of its own kind that are held while its text ends in U+FFFD."""


class Detokenizer:
    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()) -> None:
        """`prompt_ids`: the prompt, or its last tokens."""
        tail = tuple(prompt_ids[-_TAIL:])
        if tokenizer.pieces is not None:
            begins_text = not tail or tail[-1] in tokenizer.special_ids
            self._stream: _PieceStream | _WindowStream = _PieceStream(tokenizer.pieces, tail, begins_text)
        else:
            self._stream = _WindowStream(tokenizer, tail)

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that has become certain with these tokens."""
        return self._stream.push(token_ids)

    def flush(self) -> str:
        """The stream has ended: what is left of an incomplete character, as U+FFFD once."""
        return self._stream.flush()


class _PieceStream:
    """For decoders that give every token its own bytes: one look-up a token."""

    def __init__(self, pieces: PieceTable, tail: tuple[int, ...], begins_text: bool) -> None:
        self._pieces = pieces
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._utf8.decode(b"".join([pieces[token_id] for token_id in tail]))
        self._to_strip = pieces.leading_strip if begins_text else 0

    def push(self, token_ids: Sequence[int]) -> str:
        pieces = self._pieces
        return self._strip(self._utf8.decode(b"".join([pieces[token_id] for token_id in token_ids])))

    def flush(self) -> str:
        return self._strip(self._utf8.decode(b"", final=True))

    def _strip(self, text: str) -> str:
        while self._to_strip and text:
            if not text.startswith(" "):
                self._to_strip = 0
                break
            text = text[1:]
            self._to_strip -= 1
        return text


class _WindowStream:
    """For all other decoders: decodes a window of tokens that were given out and those that were not, and gives out
    what the latter add. The window moves on with every text given out, so a token's cost is bounded."""

    def __init__(self, tokenizer: Tokenizer, tail: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        self._given = list(tail)
        self._held: list[int] = []

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join([self._push_one(token_id) for token_id in token_ids])

    def _push_one(self, token_id: int) -> str:
        self._held.append(token_id)
        added = self._added()
        if not added or (added.endswith("\N{REPLACEMENT CHARACTER}") and len(self._held) < _MAX_HELD):
            if len(self._held) >= 2 * _MAX_HELD:  # special tokens and the like, which have no text
                self._held = self._held[-_MAX_HELD:]
            return ""
        self._given, self._held = self._held[-_TAIL:], []
        return added

    def flush(self) -> str:
        added = self._added()
        self._given, self._held = [], []
        return added

    def _added(self) -> str:
        before = self._tokenizer.decode(self._given)
        return self._tokenizer.decode(self._given + self._held)[len(before) :]
