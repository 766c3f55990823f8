"""Merges by index what the workers of a request generated. Owns the answer's token ids; never repeats or skips one.

Two workers report tokens of one answer: the prefill worker the first, the decode worker all from the first on, and
after a loss others go on where these stopped. Every report says its index. A token at a known index must be the same
token; a token behind a gap is held back until the gap is filled.
"""

from __future__ import annotations

from collections.abc import Sequence

from baton.errors import InternalError


class TokenLog:
    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._known: list[int] = []
        self._ahead: dict[int, int] = {}

    def __len__(self) -> int:
        """How many tokens are known without a gap."""
        return len(self._known)

    @property
    def known(self) -> Sequence[int]:
        return self._known

    def add(self, index: int, token_ids: Sequence[int]) -> None:
        """Raises InternalError where a report contradicts an earlier one or max_tokens."""
        if index + len(token_ids) > self._max_tokens:
            raise InternalError(
                f"a worker reported token {index + len(token_ids) - 1}; max_tokens ends the answer "
                f"behind token {self._max_tokens - 1}"
            )
        for position, token_id in enumerate(token_ids, start=index):
            self._add_one(position, token_id)

    def _add_one(self, position: int, token_id: int) -> None:
        if position < len(self._known):
            self._require_same(position, self._known[position], token_id)
        elif position > len(self._known):
            self._require_same(position, self._ahead.setdefault(position, token_id), token_id)
        else:
            if self._ahead:
                self._require_same(position, self._ahead.pop(position, token_id), token_id)
            self._known.append(token_id)
            while self._ahead and len(self._known) in self._ahead:
                self._known.append(self._ahead.pop(len(self._known)))

    def _require_same(self, position: int, known: int, reported: int) -> None:
        if known != reported:
            raise InternalError(f"two workers disagree on token {position}: {known} was reported first, now {reported}")

    def drop_held_back(self) -> None:
        """Forgets tokens behind a gap: another attempt will generate them again."""
        self._ahead.clear()
