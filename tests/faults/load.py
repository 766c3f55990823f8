"""Questions asked one after the other by several askers, and what became of each, judged token by token."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from enum import Enum

from baton.client import Client
from baton.errors import BatonError, DeadlineExceeded, Overloaded, Unavailable
from baton.sampling import SamplingParams
from baton.v1 import inference_pb2
from tests.faults.oracle import LONGEST, Known
from tests.faults.system import FaultySystem

PATIENCE = 60.0
"""Deadline of a request that is to be answered, in seconds: one that runs into it hung."""
GRACE = 5.0
"""How much later than its deadline a terminal reply may come on a busy machine."""

_BREATH = 0.2
"""Before the next request, where nobody could serve this one."""


class Ending(Enum):
    ANSWERED = "answered"
    CANCELLED = "cancelled"
    """By the asker."""
    DEADLINE = "past its deadline"
    """A short one, as it was drawn."""
    LOST = "lost with the router"
    FAILED = "ended with a clear error"
    WRONG = "wrong"
    """Another token than transformers', or a stream that is not one: a gap, a repeat, an error that is a defect."""
    HUNG = "hung"
    """No terminal reply in time."""


@dataclass(frozen=True)
class Ask:
    number: int
    known: Known
    max_tokens: int
    ignore_eos: bool
    salt: bytes
    deadline: float
    """Seconds."""
    leaves: float | None
    """After so many seconds the asker goes away."""

    @property
    def expected(self) -> tuple[int, ...]:
        return self.known.expected(self.max_tokens, self.ignore_eos)


@dataclass(frozen=True)
class Mix:
    """Of requests: shares of all, and seconds."""

    leaving: float = 0.15
    """Cancelled by their askers."""
    stay: float = 1.5
    """Longest that one of those waits."""
    hurried: float = 0.1
    """With a short deadline."""


def draw(seed: int, number: int, known: Sequence[Known], mix: Mix) -> Ask:
    rng = random.Random(f"request {seed} {number}")
    fate = rng.random()
    one = rng.choice(known)
    return Ask(
        number=number,
        known=one,
        max_tokens=rng.randint(1, min(LONGEST, len(one.greedy))),
        ignore_eos=rng.random() < 0.7,
        salt=b"" if rng.random() < 0.3 else f"{seed}-{number}".encode(),  # those without one hit each other's blocks
        leaves=rng.uniform(0.0, mix.stay) if fate < mix.leaving else None,
        deadline=rng.uniform(0.05, 2.0) if mix.leaving <= fate < mix.leaving + mix.hurried else PATIENCE,
    )


def plain(known: Known, number: int) -> Ask:
    """A question that nothing disturbs, asked as if nobody had asked it before."""
    return Ask(number, known, LONGEST, False, f"plain-{number}".encode(), PATIENCE, None)


class Load:
    def __init__(
        self, system: FaultySystem, known: Sequence[Known], seed: int, *, at_once: int = 8, mix: Mix | None = None
    ) -> None:
        self._system = system
        self._known = known
        self._seed = seed
        self._at_once = at_once
        self._mix = mix or Mix()
        self.asked = 0
        self.endings: Counter[Ending] = Counter()
        self.resumes = 0
        self.transferred = 0
        """Blocks that moved for answers."""
        self.problems: list[str] = []
        """Of what was wrong or hung or failed, in the order in which it was seen."""

    async def run(self, enough: Callable[[], bool]) -> None:
        """Until `enough`, and until all that was asked has ended."""
        async with asyncio.TaskGroup() as group:
            for _ in range(self._at_once):
                group.create_task(self._ask_on(enough))

    async def _ask_on(self, enough: Callable[[], bool]) -> None:
        router = self._system.parts["router"]
        while not enough():
            await router.ready.wait()
            pid = router.pid

            def lives(pid: int | None = pid) -> bool:
                return router.ready.is_set() and router.pid == pid

            async with self._system.client() as client:  # a new one for each router: the old would wait before it tries
                while lives() and not enough():
                    await self._ask(client, lives)

    async def _ask(self, client: Client, lives: Callable[[], bool]) -> None:
        ask = draw(self._seed, self.asked, self._known, self._mix)
        self.asked += 1
        began = time.monotonic()
        ending, what = await self.judge(client, ask)
        took = time.monotonic() - began
        if ending is Ending.LOST and lives():
            ending = Ending.WRONG
        if took > ask.deadline + GRACE:
            ending = Ending.HUNG
        self.endings[ending] += 1
        if ending in (Ending.WRONG, Ending.HUNG, Ending.FAILED):
            self.problems.append(f"request {ask.number} {ending.value} after {took:.2f} s: {what}")
        if ending is Ending.FAILED:
            await asyncio.sleep(_BREATH)

    async def judge(self, client: Client, ask: Ask) -> tuple[Ending, str]:
        """Asks, and says what became of it."""
        got: list[int] = []
        try:
            async with asyncio.timeout(ask.leaves):
                finished = await self._hear(client, ask, got)
        except TimeoutError:
            return Ending.CANCELLED, ""
        except _Wrong as error:
            return Ending.WRONG, str(error)
        except DeadlineExceeded as error:
            return (Ending.HUNG if ask.deadline == PATIENCE else Ending.DEADLINE), error.message
        except Unavailable as error:
            lost = error.message.startswith(("the router at", "no router answers"))
            return (Ending.LOST if lost else Ending.FAILED), error.message
        except Overloaded as error:
            return Ending.FAILED, error.message
        except BatonError as error:
            return Ending.WRONG, f"{type(error).__name__} after {len(got)} tokens: {error.message}"
        if tuple(got) != ask.expected:
            return Ending.WRONG, f"ended after {got} where {list(ask.expected)} is right"
        self.resumes += finished.timings.resumes
        self.transferred += finished.timings.transfer_blocks
        return Ending.ANSWERED, ""

    async def _hear(self, client: Client, ask: Ask, got: list[int]) -> inference_pb2.Finished:
        sampling = SamplingParams(max_tokens=ask.max_tokens, ignore_eos=ask.ignore_eos)
        parts = client.generate(
            ask.known.prompt, sampling, request_id=f"ask-{ask.number}", cache_salt=ask.salt, timeout=ask.deadline
        )
        finished: inference_pb2.Finished | None = None
        async with aclosing(parts):
            async for part in parts:
                if finished is not None:
                    raise _Wrong(f"behind its end came {part.token_ids}")
                got += part.token_ids
                if tuple(got) != ask.expected[: len(got)]:
                    raise _Wrong(f"said {got} where {list(ask.expected)} is right")
                if part.HasField("finished"):
                    finished = part.finished
        if finished is None:
            raise _Wrong(f"the stream ended after {got} without its last message")
        return finished


class _Wrong(Exception):
    pass
