"""Drives an engine's scheduler under the scripted runner, one step after the other or overlapped, and keeps what it
tells."""

from __future__ import annotations

import random
from collections import defaultdict, deque

import pytest

from baton.clock import Clock
from baton.hashing import root_hash
from baton.ids import AttemptId
from baton.sampling import SamplingParams
from engine.block_pool import BlockPool
from engine.engine import Engine
from engine.limits import SchedulerLimits
from engine.messages import AddRequest, Ended, Event, Reserved, Task, Tokens
from engine.pacing import Pacer
from engine.plan import StepPlan
from engine.scheduler import Scheduler
from engine.step_cost import Coefficients
from engine.swap import SwapPool
from tests.engine.scripted_runner import ScriptedRunner

BLOCK = 4
ROOT = root_hash(b"model")
KNOWN = Coefficients(token=1e-3)
"""Of a machine where computing a token again costs a millisecond."""


class Harness:
    overlap = False
    """Each step is planned before the one before it is run: whatever is taken away or given out too early is seen."""

    def __init__(
        self,
        blocks: int = 64,
        seqs: int = 8,
        budget: int = 32,
        max_len: int = 128,
        caching: bool = True,
        clock: Clock | None = None,
        swap: int = 0,
        pacer: Pacer | None = None,
    ):
        """With a clock, prompts are paced by what it says."""
        self.runner = ScriptedRunner(BLOCK)
        self.pool = BlockPool(blocks, enable_prefix_caching=caching, on_take=self.runner.on_take)
        limits = SchedulerLimits(BLOCK, seqs, budget, max_len, frozenset(), b"model")
        self.swap = SwapPool(swap)
        self.scheduler = Scheduler(self.pool, limits, self.swap)
        if clock is not None:
            pacer = Pacer(0.1)
        self.clock = clock
        self.engine = Engine(self.scheduler, self.runner, pacer=pacer, clock=clock)
        self.in_flight: deque[StepPlan] = deque()
        self.tokens: dict[AttemptId, list[int]] = defaultdict(list)
        self.ended: dict[AttemptId, Ended] = {}
        self.cached: dict[AttemptId, int] = {}
        self.events: list[Event] = []
        self.task: dict[AttemptId, Task] = {}
        self.fetched: set[AttemptId] = set()
        """Of which the transfer of a prefix is settled, one way or the other."""

    def add(
        self,
        name: str,
        prompt: list[int],
        count: int = 5,
        task: Task = Task.LOCAL,
        salt: bytes = b"",
        fetch: int = 0,
    ) -> AttemptId:
        request_id = AttemptId(name, 0)
        sampling = SamplingParams(max_tokens=count, seed=0, ignore_eos=True)
        self.task[request_id] = task
        self.engine.handle(AddRequest(request_id, task, tuple(prompt), len(prompt), sampling, salt, fetch))
        return request_id

    def step(self) -> bool:
        stepped = self.overlapped_step() if self.overlap else self.engine.step()
        self.take_events()
        counts = self.pool.counts()
        assert counts.total == self.pool.num_blocks
        return stepped

    def overlapped_step(self) -> bool:
        plan = self.engine.plan()
        if not plan.is_empty:
            self.in_flight.append(plan)
        if len(self.in_flight) == 2 or (plan.is_empty and self.in_flight):
            began = self.clock.now() if self.clock else 0.0
            result = self.runner.run(self.in_flight.popleft())
            self.engine.take_in(result, self.clock.now() - began if self.clock else 0.0)
            return True
        return not plan.is_empty

    def take_events(self) -> None:
        for event in self.engine.drain_events():
            self.events.append(event)
            if isinstance(event, Tokens):
                assert event.index == len(self.tokens[event.id]), "a token is missing or repeated"
                self.tokens[event.id] += event.token_ids
                self.cached[event.id] = event.num_cached_tokens
            elif isinstance(event, Ended):
                assert event.id not in self.ended, "two terminal replies"
                self.ended[event.id] = event

    def run(self, most: int = 2000) -> None:
        for _ in range(most):
            if not self.step():
                return
        pytest.fail("the scheduler does not come to rest")

    def of(self, kind: type[Event], request_id: AttemptId) -> list:  # the events' own fields are checked by callers
        return [e for e in self.events if isinstance(e, kind) and e.id == request_id]

    def idle(self) -> bool:
        counts = self.pool.counts()
        return (
            counts.active == counts.offered == counts.landing == counts.quarantined == 0
            and self.swap.available == self.swap.num_slots
            and not self.scheduler._holdings._coming  # what stays there would put others off for ever
        )


class RestlessClock:
    """Anything may have taken any time."""

    def __init__(self, rng: random.Random) -> None:
        self._rng, self._seconds = rng, 0.0

    def now(self) -> float:
        self._seconds += self._rng.choice((0.0, self._rng.random() / 100, self._rng.random()))
        return self._seconds


def prompt_of(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(50) for _ in range(length)]


def land(h: Harness, request: AttemptId, prompt: list[int]) -> None:
    """Does what a transfer does: fills the reserved blocks."""
    reserved = h.of(Reserved, request)[0]
    for position, token in enumerate(prompt):
        if position // BLOCK >= reserved.first_missing:
            h.runner.kv[reserved.blocks[position // BLOCK].index][position % BLOCK] = token
