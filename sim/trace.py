"""What happened, in order: a running hash of everything, by which two runs are compared, and lines for a reader."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable

_OFTEN = 4


class Trace:
    def __init__(self, now: Callable[[], float], *, story: bool) -> None:
        """With `story`, it is told in lines; it is hashed either way."""
        self.story = story
        self.events = 0
        self.lines: list[str] = []
        self._now = now
        self._told: Counter[str] = Counter()
        self._hash = hashlib.blake2b(digest_size=8)

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def note(self, text: str) -> None:
        """Something that a reader wants to know."""
        self.count(text.encode(), lambda: text)

    def count(self, data: bytes, tell: Callable[[], str] | None = None) -> None:
        """One event. `tell` makes its line, where a story is wanted; an empty line is left out."""
        self.events += 1
        self._hash.update(b"%.9f|%b" % (self._now(), data))
        if self.story and tell is not None and (line := tell()):
            self._tell(line)

    def _tell(self, line: str) -> None:
        """What is said again and again, as leases are renewed, is told a few times."""
        self._told[line] += 1
        times = self._told[line]
        if times <= _OFTEN:
            self.lines.append(f"{self._now():9.4f}  {line}" + (" (and so on)" if times == _OFTEN else ""))
