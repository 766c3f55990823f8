"""Shows a person how far a measurement is: tqdm's bar on a terminal, and nothing where there is none or no tqdm."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol


class Progress(Protocol):
    def advance(self, what: str, count: int = 1) -> None:
        """`what` has been done."""

    def __enter__(self) -> Progress: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class _NoBar:
    def advance(self, what: str, count: int = 1) -> None:
        pass

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class _Bar(_NoBar):
    def __init__(self, total: int, unit: str) -> None:
        from tqdm import tqdm

        self._tqdm = tqdm(total=total, unit=unit, disable=None, leave=False, dynamic_ncols=True)

    def advance(self, what: str, count: int = 1) -> None:
        self._tqdm.set_description_str(what, refresh=False)
        self._tqdm.update(count)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tqdm.close()


def bar(total: int, unit: str) -> Progress:
    try:
        return _Bar(total, f" {unit}")
    except ImportError:  # tqdm comes with the dev extra
        return _NoBar()
