"""Waits until the processors are idle, so that no side is measured beside what another one left running: some engines
keep their threads spinning for a second after their last token.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

_STAT = Path("/proc/stat")
_SAMPLE_SECONDS = 0.2
_MOST_BUSY = 0.1
"""Share of all processors' time. One of two that spins is 0.5."""
_PATIENCE, _PATIENCE_THEN = 50, 10
"""Samples: 10 seconds, and 2 once it has shown that somebody else is busy, who will be so the next time, too."""

Ticks = tuple[int, int]
"""Busy, and all, of the whole machine so far."""


class Quiet:
    """Says on stderr, once, that the machine never was quiet; what is measured is then not the sides' alone."""

    def __init__(
        self, read: Callable[[], Ticks | None] | None = None, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        """Where `read` tells nothing, as without Linux's /proc, nothing is waited for."""
        self._read, self._sleep, self._said = read or _ticks, sleep, False

    def __call__(self) -> None:
        before = self._read()
        if before is None:
            return
        share = 0.0
        for _ in range(_PATIENCE_THEN if self._said else _PATIENCE):
            self._sleep(_SAMPLE_SECONDS)
            after = self._read()
            if after is None:
                return
            share = (after[0] - before[0]) / max(1, after[1] - before[1])
            if share <= _MOST_BUSY:
                return
            before = after
        if not self._said:
            self._said = True
            print(
                f"something else keeps {share:.0%} of the processors busy: figures are not the sides' alone. End it, "
                "or measure where nothing else runs",
                file=sys.stderr,
            )


def _ticks() -> Ticks | None:
    try:
        first = _STAT.read_text().split("\n", 1)[0]
    except OSError:
        return None
    user, nice, system, idle, io, *others = map(int, first.split()[1:9])
    busy = user + nice + system + sum(others)
    return busy, busy + idle + io
