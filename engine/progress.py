"""Tells a person who waits for a long start how far it is."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TextIO

from baton.clock import Clock, MonotonicClock

Progress = Callable[[int, int], None]
"""Called with how much is done and how much there is in all."""

_PATIENCE_SECONDS = 2.0
_EVERY_SECONDS = 1.0


class LoadProgress:
    """Of bytes: a line on stderr, rewritten once a second on a terminal, and nothing at all for what takes less than
    two seconds."""

    def __init__(self, what: str, stream: TextIO | None = None, clock: Clock | None = None) -> None:
        self._what, self._stream, self._clock = what, stream or sys.stderr, clock or MonotonicClock()
        self._start = self._clock.now()
        self._shown_at: float | None = None

    def __call__(self, done: int, total: int) -> None:
        now = self._clock.now()
        finished = done >= total
        if self._shown_at is None and (finished or now - self._start < _PATIENCE_SECONDS):
            return
        if not finished and self._shown_at is not None and now - self._shown_at < _EVERY_SECONDS:
            return
        self._shown_at = now
        terminal = self._stream.isatty()
        start, end = ("\r", "\n" if finished else "") if terminal else ("", "\n")
        text = f"{start}{self._said(done, total)}, {now - self._start:.0f} s{end}"
        print(text, end="", file=self._stream, flush=True)

    def _said(self, done: int, total: int) -> str:
        return f"loading {self._what}: {100 * done // max(total, 1):3d} % of {total / 1e9:.2f} GB"


class CountProgress(LoadProgress):
    """Of things, in the same way."""

    def _said(self, done: int, total: int) -> str:
        return f"{self._what}: {done} of {total}"
