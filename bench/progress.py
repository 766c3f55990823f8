"""Shows how far a measurement is: tqdm's bar on a terminal; where there is none, a line for each thing done, so that a
log tells what has come out so far.
"""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Protocol


class Progress(Protocol):
    def advance(self, what: str, count: int = 1) -> None:
        """`what` has been done."""

    def __enter__(self) -> Progress: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class _Lines:
    """On stderr. What is the same as before, as with each request of one load, makes no new line."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._last = total, 0, ""

    def advance(self, what: str, count: int = 1) -> None:
        self._done += count
        if what != self._last:
            self._last = what
            print(f"[{self._done}/{self._total}] {what}", file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class _Bar(_Lines):
    def __init__(self, total: int, unit: str) -> None:
        from tqdm import tqdm

        self._tqdm = tqdm(total=total, unit=unit, leave=False, dynamic_ncols=True)

    def advance(self, what: str, count: int = 1) -> None:
        self._tqdm.set_description_str(what, refresh=False)
        self._tqdm.update(count)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tqdm.close()


def bar(total: int, unit: str) -> Progress:
    if sys.stderr.isatty():
        try:
            return _Bar(total, unit=f" {unit}")
        except ImportError:  # tqdm comes with the dev extra
            pass
    return _Lines(total)
