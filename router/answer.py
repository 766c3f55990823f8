"""Turns one stream's tokens into text, and ends it at a stop string. Owns what is held back; knows no worker.

Tokens are taken one by one, so that where an answer is cut does not depend on how tokens were bundled. A token that
ends the answer (end-of-sequence, a stop token) is kept among the token ids and left out of the text. min_tokens goes
before stop strings: text of the first min_tokens tokens is not searched.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from router.text.detokenizer import Detokenizer
from router.text.stop import StopStrings


@dataclass(frozen=True, slots=True)
class Gain:
    text: str
    token_ids: tuple[int, ...]
    stop_string: str = ""
    """The stop string that has ended the answer; tokens behind it were not taken."""


class Answer:
    def __init__(
        self, detokenizer: Detokenizer, stop: Sequence[str], silent_ids: Collection[int], min_tokens: int
    ) -> None:
        self._detokenizer = detokenizer
        self._stops = StopStrings(stop)
        self._silent_ids = silent_ids
        self._min_tokens = min_tokens
        self.num_tokens = 0

    def push(self, token_ids: Sequence[int]) -> Gain:
        texts: list[str] = []
        for count, token_id in enumerate(token_ids, start=1):
            self.num_tokens += 1
            if token_id in self._silent_ids:
                continue
            text = self._detokenizer.push((token_id,))
            if self.num_tokens <= self._min_tokens:
                texts.append(text)
                continue
            result = self._stops.push(text)
            texts.append(result.emit)
            if result.matched:
                return Gain("".join(texts), tuple(token_ids[:count]), result.matched)
        return Gain("".join(texts), tuple(token_ids))

    def flush(self) -> Gain:
        """The last token has been pushed: what was held back."""
        result = self._stops.push(self._detokenizer.flush())
        if result.matched:
            return Gain(result.emit, (), result.matched)
        return Gain(result.emit + self._stops.flush().emit, ())
