"""What engine/thread.py's three threads do, in virtual time: an owner that takes messages, plans and tells, and a
compute thread that runs plans one behind the other. How long each takes to hear of the other is drawn, and how long a
step takes: true time, whatever the process's clock shows."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from engine.engine import Engine
from engine.messages import Command, Event, Load
from engine.plan import StepPlan, StepResult
from sim.loop import Timer, VirtualLoop

_MOST_IN_FLIGHT = 2


@dataclass(frozen=True)
class StepTimes:
    """Seconds."""

    base: float
    per_token: float
    move: float
    """Of one block to or from host memory."""
    hop: float
    """Longest way of a message from thread to thread."""


class EngineDriver:
    def __init__(
        self,
        loop: VirtualLoop,
        engine: Engine,
        times: StepTimes,
        draw: Random,
        on_events: Callable[[list[Event], Load], None],
        stepped: Callable[[StepPlan, StepResult], None],
        touched: Callable[[], None],
    ) -> None:
        """`touched` is called whenever the owner has had the engine in its hands: nobody else changes its books."""
        self.engine = engine
        self._times = times
        self._draw = draw
        self._on_events = on_events
        self._stepped = stepped
        self._touched = touched
        self._loop = loop
        self._inbox: deque[Command | tuple[StepResult, float]] = deque()
        self._plans: deque[StepPlan] = deque()
        self._in_flight = 0
        self._computing = False
        self._may_plan_at = 0.0
        self._waking: Timer | None = None
        self._wakes_at = 0.0
        self._told: Load | None = None
        self._heard_at = self._loop.now

    def start(self) -> None:
        self._wake(0.0)

    def send(self, command: Command) -> None:
        self._inbox.append(command)
        self._wake(self._hop())

    def _hop(self) -> float:
        return self._draw.uniform(0, self._times.hop)

    def _wake(self, seconds: float) -> None:
        at = self._loop.now + seconds
        if self._waking is None or self._wakes_at > at:
            if self._waking is not None:
                self._waking.cancel()
            self._waking, self._wakes_at = self._loop.at(at, self._own), at

    def _own(self) -> None:
        self._waking = None
        while self._inbox:
            message = self._inbox.popleft()
            if isinstance(message, tuple):
                self._in_flight -= 1
                self.engine.take_in(*message)
            else:
                self.engine.handle(message)
        if self._in_flight < _MOST_IN_FLIGHT:
            if not self._in_flight or self._loop.now >= self._may_plan_at:
                self._plan()
            else:
                self._wake(self._may_plan_at - self._loop.now)
        self._tell()
        self._touched()

    def _plan(self) -> None:
        plan = self.engine.plan()
        if plan.is_empty:
            return
        self._plans.append(plan)
        self._in_flight += 1
        if not self._computing:
            self._compute()

    def _compute(self) -> None:
        """A step's reads and writes happen at its beginning or at its end: both are moments that may be wrong."""
        plan = self._plans.popleft()
        self._computing = True
        times, slower = self._times, self._draw.uniform(0.7, 1.5)
        moving = times.move * len(plan.moves)
        seconds = (times.base + times.per_token * plan.num_tokens + moving) * slower
        self._may_plan_at = self._loop.now + seconds * self._draw.uniform(0, 1.3)
        early = self.engine.runner.run(plan) if self._draw.random() < 0.5 else None
        self._loop.later(seconds, self._computed, plan, early, seconds, moving * slower)
        self._wake(max(0.0, self._may_plan_at - self._loop.now))

    def _computed(self, plan: StepPlan, early: object, seconds: float, move_seconds: float) -> None:
        result = self.engine.runner.run(plan) if early is None else early
        assert isinstance(result, StepResult)
        result = StepResult(result.token_ids, move_seconds)
        self._stepped(plan, result)
        self._computing = False
        self._inbox.append((result, seconds))
        if self._plans:
            self._compute()
        self._wake(self._hop())

    def _tell(self) -> None:
        events, load = self.engine.drain_events(), self.engine.load()
        if events or load != self._told:
            self._told = load
            self._heard_at = max(self._heard_at + 1e-9, self._loop.now + self._hop())  # in order
            self._loop.at(self._heard_at, self._on_events, events, load)
