"""Watches a stream of text for stop strings. Owns the text that may still become one; knows nothing of tokens.

The match that ends first wins, for at that moment the answer is over; of matches that end together the longest wins.
So what is cut does not depend on how the text was cut into pieces. Text before the match is emitted, the match and
what follows it are not.

One Knuth-Morris-Pratt automaton a stop string: each character is looked at once a string, however the strings repeat
themselves, and the longest automaton state is exactly what must be held back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopResult:
    emit: str
    """Text that is now certain to belong to the answer."""
    matched: str = ""
    """The stop string that ended the answer; empty while none has."""


class StopStrings:
    """One stream's. After a match, nothing more is emitted."""

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops`: none of them empty. No stop strings: everything is emitted as it comes."""
        assert all(stops), "an empty stop string would match everywhere"
        self._stops = tuple(dict.fromkeys(stops))
        self._failures = tuple(_failure_function(stop) for stop in self._stops)
        self._states = [0] * len(self._stops)
        self._held = ""
        self._matched = ""

    def push(self, text: str) -> StopResult:
        if self._matched:
            return StopResult("", self._matched)
        if not self._stops:
            return StopResult(text)
        for position, character in enumerate(text):
            matched = self._advance(character)
            if matched:
                whole = self._held + text[: position + 1]
                self._matched, self._held = matched, ""
                return StopResult(whole[: len(whole) - len(matched)], matched)
        whole = self._held + text
        sure = len(whole) - max(self._states)
        self._held = whole[sure:]
        return StopResult(whole[:sure])

    def flush(self) -> StopResult:
        """The stream has ended: what was held back cannot become a stop string any more."""
        held, self._held = self._held, ""
        return StopResult(held, self._matched)

    def _advance(self, character: str) -> str:
        """Moves every automaton by one character; the longest stop string that ends here, or nothing."""
        longest = ""
        for i, stop in enumerate(self._stops):
            state = self._states[i]
            failure = self._failures[i]
            while state and stop[state] != character:
                state = failure[state - 1]
            if stop[state] == character:
                state += 1
            self._states[i] = state
            if state == len(stop) and state > len(longest):
                longest = stop
        return longest


def _failure_function(pattern: str) -> tuple[int, ...]:
    """Entry i: length of the longest proper prefix of `pattern` that is also a suffix of `pattern[: i + 1]`.
    (Knuth, Morris, Pratt: Fast pattern matching in strings, 1977.)"""
    failure = [0] * len(pattern)
    length = 0
    for i in range(1, len(pattern)):
        while length and pattern[i] != pattern[length]:
            length = failure[length - 1]
        if pattern[i] == pattern[length]:
            length += 1
        failure[i] = length
    return tuple(failure)
