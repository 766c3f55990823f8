"""The engine's step, and the one thread that owns the engine's state.

    plan   = scheduler.schedule(pace)  # pure Python
    result = runner.run(plan)          # torch
    events = scheduler.apply(result)   # out, in one batch

How long each step took goes to the pacer (engine/pacing.py), which sets the pace of the next ones. Everyone else
sends commands and is told events (engine/messages.py). The thread never waits for anything but commands, and for
those only when there is nothing to compute.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Protocol

from baton.clock import Clock, MonotonicClock
from baton.metrics import EngineMetrics
from engine.messages import Command, Ended, EndReason, Event, Load
from engine.pacing import Pace, Pacer
from engine.plan import StepPlan, StepResult
from engine.scheduler import Scheduler
from engine.step_cost import StepShape

log = logging.getLogger(__name__)


class Runner(Protocol):
    def run(self, plan: StepPlan) -> StepResult: ...


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
        self._runner = runner
        self._metrics = metrics
        self.pacer = pacer
        self._clock = clock or MonotonicClock()
        self._counted = (0, 0, 0)

    def handle(self, command: Command) -> None:
        self.scheduler.handle(command)

    def step(self) -> bool:
        """Computes what there is to compute. False: nothing can be, until another command comes."""
        started = self._clock.now()
        pace = self.pacer.pace() if self.pacer is not None else None
        plan = self.scheduler.schedule(pace)
        if not plan.scheduled:
            return False
        self.scheduler.apply(self._runner.run(plan))
        self._account(plan, pace, self._clock.now() - started)
        return True

    def _account(self, plan: StepPlan, pace: Pace | None, seconds: float) -> None:
        if self._metrics is not None:
            self._metrics.step_seconds.observe(seconds)
            self._metrics.iteration_tokens.observe(plan.num_tokens)
        if self.pacer is None or pace is None:
            return
        shape = StepShape.of(plan.scheduled)
        self.pacer.observe(shape, seconds)
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


class EngineThread:
    """Runs an engine. `on_events` is called from the engine's thread: it must hand over and return at once."""

    def __init__(
        self,
        engine: Engine,
        on_events: Callable[[list[Event], Load], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        """`on_failure` is told when a step raised: all open requests have ended by then, and the engine is dead."""
        self._engine = engine
        self._on_events = on_events
        self._on_failure = on_failure
        self._inbox: SimpleQueue[Command | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="baton-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def send(self, command: Command) -> None:
        """From any thread; taken before the next step."""
        self._inbox.put(command)

    def stop(self, timeout: float = 30.0) -> None:
        """After the step in progress."""
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _run(self) -> None:
        try:
            self._publish()  # the first load, before any request
            can_compute = False
            while self._take_commands(wait=not can_compute):
                can_compute = self._engine.step()
                self._publish()
        except BaseException as error:
            log.exception("the engine failed; it takes no more requests")
            try:
                self._end_all(error)
            finally:
                self._on_failure(error)

    def _take_commands(self, *, wait: bool) -> bool:
        """False: stop."""
        try:
            command = self._inbox.get(block=wait)
            while command is not None:
                self._engine.handle(command)
                command = self._inbox.get_nowait()
        except Empty:
            return True
        return False

    def _publish(self) -> None:
        self._on_events(self._engine.drain_events(), self._engine.load())

    def _end_all(self, error: BaseException) -> None:
        message = f"the worker's engine failed: {type(error).__name__}: {error}"
        scheduler = self._engine.scheduler
        ended: list[Event] = [Ended(i, EndReason.UNAVAILABLE, message) for i in scheduler.open_requests()]
        self._on_events(ended, scheduler.load())
