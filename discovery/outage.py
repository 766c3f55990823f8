"""Whether Redis answers, said once when it stops and once when it starts again."""

from __future__ import annotations

import logging

import redis.exceptions


class Outage:
    """Keeps `connected`, and the log quiet in between."""

    def __init__(self, log: logging.Logger, who: str, meanwhile: str) -> None:
        """`who` begins each line; `meanwhile` says what an outage means to them."""
        self._log = log
        self._who = who
        self._meanwhile = meanwhile
        self.connected = True
        self.count = 0

    def lost(self, error: Exception) -> None:
        if self.connected:
            self.connected = False
            self.count += 1
            self._log.warning("%s: Redis lost (%s); %s", self._who, describe(error), self._meanwhile)

    def found(self) -> None:
        if not self.connected:
            self.connected = True
            self._log.info("%s: Redis is back", self._who)


def describe(error: BaseException) -> str:
    """An error in words; some come without any."""
    if isinstance(error, TimeoutError | redis.exceptions.TimeoutError):
        return "no answer in time"
    return str(error) or type(error).__name__
