"""Knocks at all doors, as often as asked, each knock decided by the seed and its number."""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from baton.clock import ManualClock, MonotonicClock
from baton.metrics import Metrics, TransferMetrics
from kvtransfer.destination import Puller
from kvtransfer.refusal import Refusals
from kvtransfer.threads import Threads
from kvtransfer.transports.chooser import Connector
from tests.fuzz.data_port import DataPortDoor
from tests.fuzz.doors import AddressDoor, Broken, Door, FrameDoor, TicketDoor
from tests.fuzz.landings import HostileSource, LandingDoor
from tests.fuzz.lends import LendDoor
from tests.fuzz.mutator import Mutator
from tests.fuzz.pulls import PullDoor
from tests.fuzz.sessions import decode_door, prefill_door
from tests.kvtransfer.rig import LAYOUT, PULLER_ID, make_rig

_REST = 20_000
"""Knocks between two looks at what is held."""


@dataclass
class Report:
    seed: int
    knocks: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    lines: int = 0
    """Logged."""

    def __str__(self) -> str:
        total = self.knocks.total()
        return (
            f"seed {self.seed}: {total:,} messages in {self.seconds:.0f} s, nothing broken, {self.lines} lines logged ("
            + ", ".join(f"{count:,} {name}" for name, count in self.knocks.most_common())
            + ")"
        )


class _Lines(logging.Handler):
    """Counts, and keeps records from whoever else would keep a million of them."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += 1


async def fuzz(seed: int, count: int, say: Callable[[str], None], every: float = 10.0) -> Report:
    """Raises Broken, naming seed, number and door, where something is taken, held or changed that must not be."""
    report, began = Report(seed), time.monotonic()
    told = began
    with _counted_lines() as lines:
        async with _doors() as doors:
            names, weights = list(doors), [weight for _, weight in doors.values()]
            for number in range(count):
                rng = random.Random(f"fuzz {seed} {number}")
                name = rng.choices(names, weights)[0]
                door = doors[name][0]
                await _at(door, door.knock(Mutator(rng)), seed, number)
                report.knocks[name] += 1
                if number % _REST == _REST - 1 or number == count - 1:
                    for each, _ in doors.values():
                        await _at(each, each.rest(), seed, number)
                if time.monotonic() - told >= every:
                    told = time.monotonic()
                    say(f"{told - began:6.0f} s: {number + 1:,} of {count:,} messages, {lines.count} lines logged")
        report.lines = lines.count
    report.seconds = time.monotonic() - began
    return report


async def _at(door: Door, doing: Awaitable[None], seed: int, number: int) -> None:
    try:
        await doing
    except Exception as error:
        raise Broken(f"{door.name}, seed {seed}, message {number}: {type(error).__name__}: {error}") from error


@asynccontextmanager
async def _doors() -> AsyncIterator[dict[str, tuple[Door, float]]]:
    """Each with its share of the knocks: the quick ones have more."""
    threads, source = Threads.create(), HostileSource()
    async with make_rig("shm", clock=ManualClock()) as rig:
        victim = Puller(
            memory=rig.destination,
            layout=LAYOUT,
            worker_id=PULLER_ID,
            connector=Connector(rig.destination, threads, setting="shm"),
            threads=threads,
            clock=MonotonicClock(),
            metrics=TransferMetrics(Metrics()),
            open_channel=source,
        )
        port = DataPortDoor(rig.source, Refusals(TransferMetrics(Metrics())))
        doors: list[tuple[Door, float]] = [
            (TicketDoor(rig), 30),
            (PullDoor(rig), 25),
            (FrameDoor(), 20),
            (decode_door(), 8),
            (prefill_door(), 8),
            (LendDoor(), 4),
            (AddressDoor(rig), 4),
            (LandingDoor(rig, victim, source), 3),
            (port, 2),
        ]
        yield {door.name: (door, weight) for door, weight in doors}
        port.close()
        await victim.close()
    threads.close()


@contextmanager
def _counted_lines() -> Iterator[_Lines]:
    lines, root = _Lines(), logging.getLogger()
    others, level = root.handlers[:], root.level
    root.handlers[:] = [lines]
    root.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        root.handlers[:] = others
        root.setLevel(level)
