"""Which fault strikes what, and when: all of it from one seed, before anything runs."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

_LONGEST = 6.0


class Kind(Enum):
    KILL = "kill"
    """SIGKILL, and a start at the same address after `seconds`."""
    RESTART = "restart"
    """SIGTERM, and a start at the same address once it has ended."""
    STOP = "stop"
    """SIGSTOP, and SIGCONT after `seconds`."""
    CUT = "cut"
    """What `client` has open to the target is reset."""
    TEAR = "tear"
    """The same, in the middle of the next message."""
    HALF_CLOSE = "half-close"
    """One direction of it ends."""
    STALL = "stall"
    """Nothing passes between the two for `seconds`, and nothing closes."""
    DEAF = "deaf"
    """The same, of what the target says alone."""
    DELAY = "delay"
    """Whatever passes between the two takes longer, for `seconds`."""


_OF_PARTS = {"worker": {Kind.KILL: 4, Kind.RESTART: 1, Kind.STOP: 4}, "router": {Kind.KILL: 1, Kind.STOP: 1},
             "redis": {Kind.KILL: 1, Kind.STOP: 1}}  # fmt: skip
_OF_LINKS = {Kind.CUT: 3, Kind.TEAR: 3, Kind.HALF_CLOSE: 2, Kind.STALL: 4, Kind.DEAF: 2, Kind.DELAY: 3}
_LINKS_SHARE = 0.5


@dataclass(frozen=True)
class Fault:
    at: float
    """Seconds from the begin."""
    kind: Kind
    target: str
    """A part, or the server's side of a link."""
    client: str = ""
    """Of a link: who dials."""
    seconds: float = 0.0

    def __str__(self) -> str:
        link = f"{self.client} -> " if self.client else ""
        lasting = f" for {self.seconds:.2f} s" if self.seconds else ""
        return f"{self.at:7.2f} s  {self.kind.value} {link}{self.target}{lasting}"


def faults(
    seed: int,
    parts: Sequence[str],
    links: Sequence[tuple[str, str]],
    mean_gap: float,
    without: Collection[Kind] = (),
) -> Iterator[Fault]:
    """Without an end, one every `mean_gap` seconds on average. `links` are (client, server)."""
    rng = random.Random(f"faults {seed}")
    of_links = {kind: weight for kind, weight in _OF_LINKS.items() if kind not in without}
    of_parts = [
        (part, kind, weight) for part in parts for kind, weight in _OF_PARTS[_role(part)].items() if kind not in without
    ]
    now = 0.0
    while True:
        now += rng.expovariate(1 / mean_gap)
        seconds = min(_LONGEST, rng.expovariate(1 / 1.5))
        if rng.random() < _LINKS_SHARE:
            kind = rng.choices(list(of_links), list(of_links.values()))[0]
            client, server = rng.choice(links)
            yield Fault(now, kind, server, client, seconds if kind in (Kind.STALL, Kind.DEAF, Kind.DELAY) else 0.0)
        else:
            part, kind, _ = rng.choices(of_parts, [weight for _, _, weight in of_parts])[0]
            yield Fault(now, kind, part, seconds=0.0 if kind is Kind.RESTART else seconds)


def _role(part: str) -> str:
    return part if part in _OF_PARTS else "worker"
