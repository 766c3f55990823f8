"""The thread that owns the engine's state, and those that compute. They and everyone else exchange messages.

    commands ──► inbox ──► owner: plan ──plans──► compute: run ──pending──► results: wait
                   ▲              │                  │                         │
                   └──────────────┼──── computed ────┴─────────────────────────┘
                                  └──► on_events

While a step runs the next one is planned, and waits for the compute thread when that is done; what the step before drew
is taken in and told meanwhile. The later a step is planned, the more it knows of: a request that comes while one runs
joins the next one, unless that is planned already. So planning begins when the step in flight has nearly taken as long
as it is expected to; behind a device's, as much before as it takes to plan a step and to queue it, which is learned.
Where the step ends sooner, its result is taken in first, and nothing is lost but the time to plan.

The owner waits for messages alone, the compute thread for plans alone. On a CPU a step that was run is done. A GPU
goes on by itself: the next step is put behind it, and a third thread waits for what it drew.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from baton.clock import Clock, MonotonicClock
from engine.engine import Engine, Pending
from engine.messages import Command, Ended, EndReason, Event, Load
from engine.plan import StepPlan, StepResult

log = logging.getLogger(__name__)

_MOST_IN_FLIGHT = 2
"""One that runs and one that waits for it to end."""
_EARLY_SHARE, _EARLY_SECONDS = 0.1, 0.004
"""How long before the expected end of the step in flight the next one is planned at the least: for what it was foreseen
too long, and for the planning. A step that was foreseen worse costs a gap."""
_QUEUEING_MARGIN = 1.5
"""What it takes to queue a step on a device varies."""
_FORGETTING = 0.1


class Lead:
    """How long before a step's expected end the next one is to be planned, so that the device need not wait for it."""

    def __init__(self) -> None:
        self._queueing = 0.0
        """Seconds from the beginning of a plan until it is queued: of the last few the longest, more or less."""

    def learn(self, queueing: float) -> None:
        self._queueing = max(queueing, self._queueing + _FORGETTING * (queueing - self._queueing))

    def seconds(self, expected: float) -> float:
        return max(_EARLY_SHARE * expected, _EARLY_SECONDS, _QUEUEING_MARGIN * self._queueing)


@dataclass(frozen=True, slots=True)
class _Planned:
    plan: StepPlan
    began: float
    """When it was begun to be planned, by the clock."""


@dataclass(frozen=True, slots=True)
class _Queued:
    pending: Pending
    started: float
    queueing: float


@dataclass(frozen=True, slots=True)
class _Computed:
    result: StepResult
    seconds: float
    ended: float
    """When, by the clock."""
    queueing: float = 0.0
    """Seconds that it took to plan the step and to queue it on a device."""


@dataclass(frozen=True, slots=True)
class _Failed:
    error: BaseException


class _Stop:
    pass


class EngineThread:
    """Runs an engine. `on_events` is called from the engine's thread: it must hand over and return at once."""

    def __init__(
        self,
        engine: Engine,
        on_events: Callable[[list[Event], Load], None],
        on_failure: Callable[[BaseException], None],
        *,
        clock: Clock | None = None,
    ) -> None:
        """`on_failure` is told when a step raised: all open requests have ended by then, and the engine is dead."""
        self._engine = engine
        self._on_events = on_events
        self._on_failure = on_failure
        self._clock = clock or MonotonicClock()
        self._inbox: SimpleQueue[Command | _Computed | _Failed | _Stop] = SimpleQueue()
        self._plans: SimpleQueue[_Planned | None] = SimpleQueue()
        self._queued: SimpleQueue[_Queued | None] = SimpleQueue()
        self._lead = Lead()
        self._in_flight: list[StepPlan] = []
        self._plan_at = 0.0
        self._at_rest = True
        """Nothing could be planned, and nothing has come since."""
        self._told: Load | None = None
        self._owner = threading.Thread(target=self._own, name="baton-engine", daemon=True)
        self._compute = threading.Thread(target=self._run_plans, name="baton-compute", daemon=True)
        self._results = threading.Thread(target=self._wait_for_results, name="baton-results", daemon=True)

    def start(self) -> None:
        for thread in self._threads():
            thread.start()

    def send(self, command: Command) -> None:
        """From any thread; what is planned from then on knows of it."""
        self._inbox.put(command)

    def stop(self, timeout: float = 30.0) -> None:
        """After the steps in flight."""
        self._inbox.put(_Stop())
        for thread in self._threads():
            if thread.is_alive():
                thread.join(timeout)

    def _threads(self) -> tuple[threading.Thread, ...]:
        return self._owner, self._compute, self._results

    # --- the owner

    def _own(self) -> None:
        try:
            self._tell()  # the first load, before any request
            while self._take_messages():
                if self._may_plan():
                    self._plan()
                self._tell()
        except BaseException as error:
            log.exception("the engine failed; it takes no more requests")
            try:
                self._end_all(error)
            finally:
                self._on_failure(error)
        finally:
            self._plans.put(None)

    def _take_messages(self) -> bool:
        """All that have come; waits for one where nothing else is to be done. False: stop."""
        try:
            message = self._inbox.get(timeout=self._patience())
            while True:
                if isinstance(message, _Stop):
                    return False
                self._take(message)
                message = self._inbox.get_nowait()
        except Empty:
            return True

    def _patience(self) -> float | None:
        """Seconds until something is to be done without a message; None: nothing is."""
        if self._at_rest or len(self._in_flight) == _MOST_IN_FLIGHT:
            return None
        return max(0.0, self._plan_at - self._clock.now()) if self._in_flight else 0.0

    def _take(self, message: Command | _Computed | _Failed) -> None:
        self._at_rest = False
        if isinstance(message, _Failed):
            raise message.error
        if not isinstance(message, _Computed):
            self._engine.handle(message)
            return
        del self._in_flight[0]
        self._lead.learn(message.queueing)
        self._expect(message.ended)
        self._engine.take_in(message.result, message.seconds)

    def _may_plan(self) -> bool:
        if self._at_rest or len(self._in_flight) == _MOST_IN_FLIGHT:
            return False
        return not self._in_flight or self._clock.now() >= self._plan_at

    def _plan(self) -> None:
        began = self._clock.now()
        plan = self._engine.plan()
        if plan.is_empty:
            self._at_rest = True
            return
        self._plans.put(_Planned(plan, began))
        self._in_flight.append(plan)
        if len(self._in_flight) == 1:
            self._expect(self._clock.now())

    def _expect(self, began: float) -> None:
        """The first step in flight has begun then."""
        if self._in_flight:
            expected = self._engine.predict(self._in_flight[0])
            self._plan_at = began + expected - self._lead.seconds(expected)

    def _tell(self) -> None:
        events, load = self._engine.drain_events(), self._engine.load()
        if events or load != self._told:
            self._told = load
            self._on_events(events, load)

    def _end_all(self, error: BaseException) -> None:
        message = f"the worker's engine failed: {type(error).__name__}: {error}"
        scheduler = self._engine.scheduler
        ended: list[Event] = [Ended(i, EndReason.UNAVAILABLE, message) for i in scheduler.open_requests()]
        self._on_events(ended, scheduler.load())

    # --- the compute thread, and the one that waits for a device

    def _run_plans(self) -> None:
        try:
            while (planned := self._plans.get()) is not None:
                started = self._clock.now()
                result = self._engine.runner.run(planned.plan)
                now = self._clock.now()
                if isinstance(result, StepResult):
                    self._inbox.put(_Computed(result, now - started, now))
                else:
                    self._queued.put(_Queued(result, started, now - planned.began))
        except BaseException as error:
            self._inbox.put(_Failed(error))
        finally:
            self._queued.put(None)

    def _wait_for_results(self) -> None:
        try:
            idle_since = 0.0
            while (queued := self._queued.get()) is not None:
                result = queued.pending.wait()
                now = self._clock.now()
                seconds = now - max(queued.started, idle_since)  # it began when the one before ended
                self._inbox.put(_Computed(result, seconds, now, queued.queueing))
                idle_since = now
        except BaseException as error:
            self._inbox.put(_Failed(error))
