"""One form for every log line: when, who, how bad, what. Lines that strangers cause are kept from filling the log."""

from __future__ import annotations

import logging
import sys
import threading

from baton.clock import Clock, MonotonicClock

_QUIET_SECONDS = 60.0
_MAX_MESSAGE = 500


def configure(level: str, part: str) -> None:
    """Logs to stderr; stdout is for answers and ready lines."""
    logging.basicConfig(
        level=level.upper(),
        stream=sys.stderr,
        format=f"%(asctime)s {part} %(levelname).1s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )


class Rarely:
    """Logs the first of each kind, and then one a minute at most, with how many were left out. Thread-safe."""

    def __init__(self, log: logging.Logger, clock: Clock | None = None) -> None:
        self._log = log
        self._clock = MonotonicClock() if clock is None else clock
        self._lock = threading.Lock()
        self._quiet_until: dict[str, float] = {}
        self._left_out: dict[str, int] = {}

    def info(self, kind: str, message: str) -> None:
        """`kind` is one of a few; `message` may hold a stranger's words, and so is logged as a repr: nobody outside is
        to make up a line."""
        with self._lock:
            now = self._clock.now()
            if now < self._quiet_until.get(kind, now):
                self._left_out[kind] = self._left_out.get(kind, 0) + 1
                return
            self._quiet_until[kind] = now + _QUIET_SECONDS
            left_out = self._left_out.pop(kind, 0)
        more = f" (and {left_out} more since the last such line)" if left_out else ""
        self._log.info("%s: %r%s", kind, message[:_MAX_MESSAGE], more)
