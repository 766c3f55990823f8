"""The engine's step, and the one thread that owns the engine's state.

    plan   = scheduler.schedule(pace)  # pure Python
    result = runner.run(plan)          # torch
    events = scheduler.apply(result)   # out, in one batch

How long each step took goes to the pacer (engine/pacing.py), which sets the pace of the next ones. Everyone else
sends commands and is told events (engine/messages.py). engine/thread.py runs steps one behind the other without a gap.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

from baton.clock import Clock, MonotonicClock
from baton.metrics import EngineMetrics
from engine.messages import Command, Event, Load
from engine.pacing import Pace, Pacer
from engine.plan import StepPlan, StepResult
from engine.scheduler import Scheduler
from engine.step_cost import StepShape


class Pending(Protocol):
    """A step that a device computes."""

    def wait(self) -> StepResult:
        """Blocks until it has. From one thread, in the order of the steps."""


class Runner(Protocol):
    def run(self, plan: StepPlan) -> StepResult | Pending:
        """Computes the plan, or has a device do so behind what it has to do before."""


class Engine:
    """Scheduler and runner, one step at a time. For one thread."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        metrics: EngineMetrics | None = None,
        *,
        pacer: Pacer | None = None,
        clock: Clock | None = None,
    ) -> None:
        """Without a pacer, open streams limit no prompt."""
        self.scheduler = scheduler
        self.runner = runner
        self._metrics = metrics
        self.pacer = pacer
        self._clock = clock or MonotonicClock()
        self._planned: deque[tuple[StepPlan, Pace | None]] = deque()
        self._counted = (0, 0, 0)

    def handle(self, command: Command) -> None:
        self.scheduler.handle(command)

    def plan(self) -> StepPlan:
        """The next step. Where it is not empty, it is to be run behind those that were planned before, and its result
        to come to `take_in`."""
        pace = self.pacer.pace() if self.pacer is not None else None
        plan = self.scheduler.schedule(pace)
        if not plan.is_empty:
            self._planned.append((plan, pace))
        return plan

    def predict(self, plan: StepPlan) -> float:
        """Seconds that the plan will take to run; 0 where nothing is known."""
        return self.pacer.predict(StepShape.of(plan.scheduled)) if self.pacer is not None else 0.0

    def take_in(self, result: StepResult, seconds: float) -> None:
        """Of the oldest plan whose result is outstanding; `seconds` that it took."""
        plan, pace = self._planned.popleft()
        self.scheduler.apply(result)
        self._account(plan, pace, result, seconds)

    def step(self) -> bool:
        """Plans, runs and takes in, one after the other. False: there is nothing to do until another command comes."""
        started = self._clock.now()
        plan = self.plan()
        if plan.is_empty:
            return False
        result = self.runner.run(plan)
        if not isinstance(result, StepResult):
            result = result.wait()
        self.take_in(result, self._clock.now() - started)
        return True

    def _account(self, plan: StepPlan, pace: Pace | None, result: StepResult, seconds: float) -> None:
        if self._metrics is not None:
            self._metrics.step_seconds.observe(seconds)
            self._metrics.iteration_tokens.observe(plan.num_tokens)
        if self.pacer is None or pace is None:
            return
        if plan.moves:
            self.pacer.observe_moves(len(plan.moves), result.move_seconds)
        if not plan.scheduled:
            return
        shape = StepShape.of(plan.scheduled)
        self.pacer.observe(shape, seconds - result.move_seconds)
        if self._metrics is not None:
            most = self.scheduler.limits.max_num_batched_tokens - shape.decodes
            streams = StepShape(decodes=shape.decodes, decode_attended=shape.decode_attended)
            self._metrics.prefill_budget.set(pace.chunk(streams, 0, most) if shape.decodes else most)
            self._metrics.step_prediction_error.set(self.pacer.error)

    def drain_events(self) -> list[Event]:
        return self.scheduler.drain_events()

    def load(self) -> Load:
        """The load at this moment; brings the metrics up to date with it."""
        load = self.scheduler.load()
        if self._metrics is not None:
            self._update_metrics(self._metrics, load)
        return load

    def _update_metrics(self, metrics: EngineMetrics, load: Load) -> None:
        metrics.num_requests_running.set(load.running)
        metrics.num_requests_waiting.set(load.waiting)
        metrics.num_requests_swapped.set(load.swapped)
        metrics.kv_cache_usage_perc.set(1 - load.blocks.available / load.blocks.total)
        for state, gauge in metrics.kv_blocks.items():
            gauge.set(getattr(load.blocks, state))
        counters = self.scheduler.counters
        now = (counters.prefix_queries, counters.prefix_hits, counters.preemptions)
        queries, hits, preemptions = (new - old for new, old in zip(now, self._counted, strict=True))
        self._counted = now
        metrics.prefix_cache_queries.inc(queries)
        metrics.prefix_cache_hits.inc(hits)
        metrics.num_preemptions.inc(preemptions)
