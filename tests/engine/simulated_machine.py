"""A machine in virtual time: a runner whose steps take what a hidden cost says, and noise. It draws token 1 for all."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

from baton.clock import ManualClock
from engine.plan import StepPlan, StepResult
from engine.step_cost import StepShape


@dataclass
class Machine:
    """About the half-billion model on two cores: matrices cost nothing more up to some rows, then linearly."""

    noise: float = 0.0
    """Standard deviation of the logarithm of a step's time."""
    hiccups: float = 0.0
    """Share of steps in which somebody else took the machine."""
    slowness: float = 1.0
    free_rows: int = 8
    seed: int = 0
    clock: ManualClock = field(default_factory=ManualClock)
    steps: list[tuple[StepShape, float]] = field(default_factory=list)
    """What was computed, and how long it took without hiccups."""
    plans: list[StepPlan] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)

    def run(self, plan: StepPlan) -> StepResult:
        shape = StepShape.of(plan.scheduled)
        rows = shape.chunk_tokens + shape.decodes
        seconds = 0.018 + 0.84e-3 * max(0, rows - self.free_rows) + 0.3e-3 * shape.decodes
        seconds += 6e-7 * shape.decode_attended + 3e-7 * shape.chunk_attended
        seconds *= self.slowness * math.exp(self._rng.gauss(0, self.noise))
        if len(self.steps) < 3:
            seconds *= 4  # what libraries set up on first use
        self.plans.append(plan)
        self.steps.append((shape, seconds))
        self.clock.advance(seconds * (self._rng.uniform(3, 10) if self._rng.random() < self.hiccups else 1))
        return StepResult(tuple(1 for s in plan.scheduled if s.sample))
