"""A tokenizer without a vocabulary: prompts come as token ids, and a token's text is its number."""

from __future__ import annotations


class _Pieces:
    leading_strip = 0

    def __getitem__(self, token_id: int) -> bytes:
        return b"%d " % token_id


class SimTokenizer:
    """What the router's detokenizer asks of one."""

    pieces = _Pieces()
    special_ids: frozenset[int] = frozenset()

    def close(self) -> None:
        pass
