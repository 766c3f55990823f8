"""What memory a process and its children hold, as Linux tells it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")


@dataclass(frozen=True)
class Resident:
    """Bytes."""

    anonymous: int
    file: int
    """Of files, most of it libraries."""
    shared: int
    """Shared memory: a Baton worker's KV pool lies there on a CPU."""

    @property
    def total(self) -> int:
        return self.anonymous + self.file + self.shared


def resident(pid: int) -> Resident:
    """Of the process and all that came of it; what they share counts once a process."""
    found = [parse_status((_PROC / str(each) / "status").read_text()) for each in _tree(pid)]
    return Resident(
        anonymous=sum(r.anonymous for r in found), file=sum(r.file for r in found), shared=sum(r.shared for r in found)
    )


def parse_status(text: str) -> Resident:
    """Of /proc/PID/status; a process that has ended but not been waited for holds nothing."""
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)

    def size(name: str) -> int:
        return int(fields[name].split()[0]) * 1024 if name in fields else 0

    return Resident(anonymous=size("RssAnon"), file=size("RssFile"), shared=size("RssShmem"))


def _tree(pid: int) -> Iterator[int]:
    yield pid
    with suppress(FileNotFoundError):  # a thread that has just ended
        for children in (_PROC / str(pid) / "task").glob("*/children"):
            for child in children.read_text().split():
                yield from _tree(int(child))
