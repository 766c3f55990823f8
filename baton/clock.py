"""Time as a dependency: deadlines are kept by the holder's own monotonic clock.

Tests and the simulator bring theirs.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol


class Clock(Protocol):
    def now(self) -> float:
        """Seconds since a moment of this process's own; never goes back. Durations travel, this never does."""


class MonotonicClock:
    def now(self) -> float:
        return time.monotonic()


@dataclass
class ManualClock:
    """Stands still until it is moved."""

    seconds: float = 0.0

    def now(self) -> float:
        return self.seconds

    def advance(self, seconds: float) -> None:
        self.seconds += seconds
