"""A storm: load on a real system under the faults of a seed, and then a look at what they left behind."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.injector import Injector
from tests.faults.load import Ending, Load, plain
from tests.faults.oracle import Known
from tests.faults.schedule import Kind, faults
from tests.faults.system import FaultySystem, Shape, faulty_system, tails

_PROGRESS_SECONDS = 5.0
_IDLE_SECONDS = 20.0
"""After the last request: a lease, a transport's timeout and a breath."""
_TOLD = 40


@dataclass
class Summary:
    shape: Shape
    seed: int
    asked: int
    seconds: float
    """Under faults."""
    endings: Counter[Ending]
    faults: Counter[Kind]
    resumes: int
    transferred: int
    leaked: list[str]
    idle_seconds: float
    """From the last terminal reply until nothing was held."""
    defects: list[str]
    """Parts that ended by themselves; questions that were not answered after the storm."""
    problems: list[str]
    story: list[str] = field(repr=False)

    @property
    def wrong(self) -> int:
        return self.endings[Ending.WRONG]

    @property
    def hung(self) -> int:
        return self.endings[Ending.HUNG]

    @property
    def good(self) -> bool:
        return not (self.wrong or self.hung or self.leaked or self.defects)

    def __str__(self) -> str:
        every = self.seconds / max(1, self.faults.total())
        ends = ", ".join(f"{self.endings[ending]} {ending.value}" for ending in Ending if self.endings[ending])
        return (
            f"{self.shape}, seed {self.seed}: {self.asked} requests and {self.faults.total()} faults in "
            f"{self.seconds:.0f} s, one every {every:.1f} s; wrong {self.wrong}, hung {self.hung}, "
            f"leaked {len(self.leaked)}, defects {len(self.defects)} ({ends}; {self.resumes} resumes, "
            f"{self.transferred} blocks moved, idle after {self.idle_seconds:.1f} s)"
        )

    def explain(self, directory: Path) -> str:
        """All that is needed to understand a bad one."""
        kinds = ", ".join(f"{count} {kind.value}" for kind, count in self.faults.most_common())
        return "\n".join([
            str(self),
            "leaked:", *(f"  {line}" for line in self.leaked),
            "defects:", *(f"  {line}" for line in self.defects),
            "requests:", *(f"  {line}" for line in self.problems[:_TOLD]),
            f"faults ({kinds}), the last {_TOLD}:", *(f"  {line}" for line in self.story[-_TOLD:]),
            f"logs in {directory}:", tails(directory),
        ])  # fmt: skip


async def storm(
    shape: Shape,
    seed: int,
    known: list[Known],
    directory: Path,
    *,
    enough: Callable[[int, float], bool],
    mean_gap: float = 1.3,
    without: Collection[Kind] = (),
    say: Callable[[str], None],
) -> Summary:
    """`enough` is asked of the number of requests so far and of the seconds: True ends the storm. `without` leaves
    kinds of faults out: where no worker is killed, none forgets what it leaked."""
    async with faulty_system(shape, directory, seed) as system:
        load, injector = Load(system, known, seed), Injector(system)
        begin = time.monotonic()
        schedule = faults(seed, list(system.parts), system.links(), mean_gap, without)
        striking = asyncio.create_task(injector.run(schedule))

        def over() -> bool:
            """Asked before each request. Those that are open then may end without more faults."""
            if not striking.done() and not enough(load.asked, time.monotonic() - begin):
                return False
            striking.cancel()
            return True

        telling = asyncio.create_task(_tell(load, injector, begin, say))
        try:
            await load.run(over)
        finally:
            seconds = time.monotonic() - begin
            for task in (striking, telling):
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
        await injector.heal()
        ended = time.monotonic()
        leaked = await _held(system)
        idle_seconds = time.monotonic() - ended
        return Summary(
            shape=shape,
            seed=seed,
            asked=load.asked,
            seconds=seconds,
            endings=Counter(load.endings),
            faults=injector.done,
            resumes=load.resumes,
            transferred=load.transferred,
            leaked=leaked,
            idle_seconds=idle_seconds,
            defects=system.defects() + await _unanswered(system, load, known),
            problems=load.problems,
            story=injector.story,
        )


async def _held(system: FaultySystem) -> list[str]:
    """What is still held when it should not be any more."""
    deadline = time.monotonic() + _IDLE_SECONDS
    while (held := await system.held()) and time.monotonic() < deadline:  # noqa: ASYNC110 - metrics set no event
        await asyncio.sleep(0.2)  # what is waited for happens in other processes
    return held


async def _unanswered(system: FaultySystem, load: Load, known: list[Known]) -> list[str]:
    """Questions that a system without faults does not answer."""
    failed = []
    async with system.client() as client:
        for number in range(4):
            ending, what = await load.judge(client, plain(known[number % len(known)], number))
            if ending is not Ending.ANSWERED:
                failed.append(f"after the storm, question {number} {ending.value}: {what}")
    return failed


async def _tell(load: Load, injector: Injector, begin: float, say: Callable[[str], None]) -> None:
    while True:
        await asyncio.sleep(_PROGRESS_SECONDS)
        ends = load.endings
        say(
            f"{time.monotonic() - begin:6.0f} s: {load.asked} requests, {injector.done.total()} faults, "
            f"{ends[Ending.ANSWERED]} answered, {ends[Ending.WRONG]} wrong, {ends[Ending.HUNG]} hung, "
            f"{ends[Ending.FAILED] + ends[Ending.LOST]} lost or failed"
        )
