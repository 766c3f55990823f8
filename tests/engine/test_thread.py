"""The engine's threads under a runner that shows every bookkeeping error, or that waits until a test lets it go on."""

from __future__ import annotations

import math
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from baton.ids import AttemptId
from baton.sampling import SamplingParams
from engine.block_pool import BlockPool
from engine.engine import Engine, Pending
from engine.limits import SchedulerLimits
from engine.messages import Abort, AddRequest, Ended, EndReason, Event, Load, Task, Tokens
from engine.pacing import Pace, Pacer
from engine.plan import StepPlan, StepResult
from engine.scheduler import Scheduler
from engine.step_cost import Coefficients
from engine.thread import EngineThread, Lead
from tests.engine.scripted_runner import ScriptedRunner, continuation

BLOCK = 4
SECONDS = 20.0


class Gated(ScriptedRunner):
    """Runs a step for each time that it is let."""

    def __init__(self) -> None:
        super().__init__(BLOCK)
        self.plans: list[StepPlan] = []
        self._gate = threading.Semaphore(0)

    def let(self, steps: int = 1) -> None:
        self._gate.release(steps)

    def run(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        assert self._gate.acquire(timeout=SECONDS)
        return super().run(plan)


class Foreseen(Pacer):
    """Knows what a step takes."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._fixed = Coefficients(fixed=seconds)

    def pace(self) -> Pace:
        return Pace(math.inf, 1000, self._fixed)

    def predict(self, shape: object) -> float:
        return self._fixed.fixed


class Running:
    def __init__(self, runner: ScriptedRunner | Behind, blocks: int, pacer: Pacer | None) -> None:
        pool = BlockPool(blocks, on_take=runner.on_take)
        self.scheduler = Scheduler(pool, SchedulerLimits(BLOCK, 8, 32, 128, frozenset(), b"model"))
        self.pool, self.runner = pool, runner
        self.tokens: dict[AttemptId, list[int]] = defaultdict(list)
        self.ended: dict[AttemptId, Ended] = {}
        self.failures: list[BaseException] = []
        self.load: Load | None = None
        self.thread = EngineThread(Engine(self.scheduler, runner, pacer=pacer), self._on_events, self.failures.append)

    def _on_events(self, events: list[Event], load: Load) -> None:
        for event in events:
            if isinstance(event, Tokens):
                assert event.index == len(self.tokens[event.id])
                self.tokens[event.id] += event.token_ids
            elif isinstance(event, Ended):
                assert event.id not in self.ended
                self.ended[event.id] = event
        self.load = load

    def add(self, name: str, prompt: list[int], count: int) -> AttemptId:
        request = AttemptId(name, 0)
        sampling = SamplingParams(max_tokens=count, seed=0, ignore_eos=True)
        self.thread.send(AddRequest(request, Task.LOCAL, tuple(prompt), len(prompt), sampling))
        return request


@contextmanager
def running(runner: ScriptedRunner | Behind, blocks: int = 64, pacer: Pacer | None = None) -> Iterator[Running]:
    system = Running(runner, blocks, pacer)
    system.thread.start()
    try:
        yield system
    finally:
        if isinstance(runner, Gated):
            runner.let(1000)
        system.thread.stop(SECONDS)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it does not come to pass"
        time.sleep(0.001)


def test_many_requests_that_come_and_go_at_any_time_are_answered_exactly_and_leave_nothing() -> None:
    rng = random.Random(0)
    with running(ScriptedRunner(BLOCK), blocks=24) as system:
        prompts = {}
        for number in range(150):
            prompt = [rng.randrange(50) for _ in range(rng.randint(1, 20))]
            prompts[system.add(f"r{number}", prompt, rng.randint(1, 12))] = prompt
            if rng.random() < 0.3:
                system.thread.send(Abort(rng.choice(list(prompts))))
            if rng.random() < 0.5:
                time.sleep(rng.random() / 500)
        until(lambda: set(system.ended) == set(prompts))
        until(lambda: system.pool.counts().active == 0)
        for request, prompt in prompts.items():
            assert system.tokens[request] == continuation(prompt, len(system.tokens[request]))
        assert {ended.reason for ended in system.ended.values()} == {EndReason.LENGTH, EndReason.CANCELLED}
    assert not system.failures


def test_the_next_step_is_planned_while_one_runs_and_nothing_is_told_late() -> None:
    runner = Gated()
    with running(runner) as system:
        request = system.add("a", [1, 2, 3], 5)
        until(lambda: len(runner.plans) == 1)
        assert not system.tokens[request]
        runner.let()
        until(lambda: len(runner.plans) == 2)
        until(lambda: len(system.tokens[request]) == 1)
        runner.let(4)
        until(lambda: request in system.ended)
        assert len(runner.plans) == 5, "no step is planned behind the last token that was asked for"
        assert system.tokens[request] == continuation([1, 2, 3], 5)


def test_a_request_that_comes_while_a_step_runs_joins_the_next_one() -> None:
    runner = Gated()
    with running(runner, pacer=Foreseen(100.0)) as system:
        first = system.add("a", [1, 2, 3], 5)
        until(lambda: len(runner.plans) == 1)
        second = system.add("b", [4, 5, 6], 5)
        runner.let()
        until(lambda: len(runner.plans) == 2)
        assert len(runner.plans[1].scheduled) == 2
        runner.let(10)
        until(lambda: len(system.ended) == 2)
        assert system.tokens[first] == continuation([1, 2, 3], 5)
        assert system.tokens[second] == continuation([4, 5, 6], 5)


def test_an_abort_is_answered_while_a_step_runs_and_its_blocks_are_kept_until_that_is_done() -> None:
    runner = Gated()
    with running(runner, pacer=Foreseen(100.0)) as system:
        request = system.add("a", [1, 2, 3], 5)
        until(lambda: len(runner.plans) == 1)
        system.thread.send(Abort(request))
        until(lambda: request in system.ended)
        assert system.pool.counts().active == 1
        runner.let()
        until(lambda: system.pool.counts().active == 0)


def test_a_step_that_raises_ends_all_requests_and_is_told_once() -> None:
    class Broken(Gated):
        def run(self, plan: StepPlan) -> StepResult:
            super().run(plan)
            raise ValueError("no more")

    runner = Broken()
    with running(runner) as system:
        requests = [system.add(name, [1, 2], 5) for name in "abc"]
        runner.let(10)
        until(lambda: system.failures)
        assert [str(error) for error in system.failures] == ["no more"]
        assert set(system.ended) <= set(requests), "those that came later were never taken"
        assert {ended.reason for ended in system.ended.values()} == {EndReason.UNAVAILABLE}


def test_stopping_waits_for_the_step_in_flight() -> None:
    runner = Gated()
    with running(runner) as system:
        system.add("a", [1, 2, 3], 5)
        until(lambda: len(runner.plans) == 1)
        stopper = threading.Thread(target=system.thread.stop)
        stopper.start()
        stopper.join(0.05)
        assert stopper.is_alive()
        runner.let(10)
        stopper.join(SECONDS)
        assert not stopper.is_alive()


class Behind:
    """A device: a step is queued at once, and done when somebody waits for it and is let."""

    def __init__(self) -> None:
        self._scripted = ScriptedRunner(BLOCK)
        self.on_take = self._scripted.on_take
        self.queued = 0
        self.gate = threading.Semaphore(0)
        self.fails = False

    def run(self, plan: StepPlan) -> Pending:
        self.queued += 1
        return _Later(self, self._scripted.run(plan))


class _Later:
    def __init__(self, device: Behind, result: StepResult) -> None:
        self._device, self._result = device, result

    def wait(self) -> StepResult:
        if self._device.fails:
            raise RuntimeError("the device is lost")
        assert self._device.gate.acquire(timeout=SECONDS)
        return self._result


def test_a_step_is_queued_behind_one_that_a_device_computes() -> None:
    runner = Behind()
    with running(runner) as system:
        request = system.add("a", [1, 2, 3], 6)
        until(lambda: runner.queued == 2)
        assert not system.tokens, "nothing is told before the device is done"
        runner.gate.release()
        until(lambda: len(system.tokens[request]) == 1 and runner.queued == 3)
        runner.gate.release(100)
        until(lambda: request in system.ended)
        assert system.tokens[request] == continuation([1, 2, 3], 6)
        assert not system.failures


def test_the_next_step_is_planned_as_much_earlier_as_it_takes_to_queue_it() -> None:
    """Queueing takes longer than the tenth of a step that is left for it where nothing is learned, so that each step
    would come late."""
    seconds, queueing = 0.2, 0.05

    class Slow(Behind):
        def __init__(self) -> None:
            super().__init__()
            self.ends = [0.0]
            self.in_time: list[bool] = []

        def run(self, plan: StepPlan) -> Pending:
            later = super().run(plan)
            time.sleep(queueing)
            now = time.monotonic()
            self.in_time.append(now < self.ends[-1])
            self.ends.append(max(now, self.ends[-1]) + seconds)
            return _Timed(later, self.ends[-1])

    runner = Slow()
    runner.gate.release(100)
    with running(runner, pacer=Foreseen(seconds)) as system:
        request = system.add("a", [1, 2, 3], 12)
        until(lambda: request in system.ended)
        assert any(runner.in_time[3:])
        assert system.tokens[request] == continuation([1, 2, 3], 12)


class _Timed:
    def __init__(self, later: Pending, end: float) -> None:
        self._later, self._end = later, end

    def wait(self) -> StepResult:
        time.sleep(max(0.0, self._end - time.monotonic()))
        return self._later.wait()


def test_the_lead_grows_at_once_and_shrinks_slowly() -> None:
    lead = Lead()
    assert lead.seconds(0.1) == 0.1 * 0.1
    lead.learn(0.03)
    assert lead.seconds(0.1) == 1.5 * 0.03
    lead.learn(0.01)
    assert 1.5 * 0.025 < lead.seconds(0.1) < 1.5 * 0.03
    for _ in range(100):
        lead.learn(0.001)
    assert lead.seconds(0.1) == 0.1 * 0.1
    assert lead.seconds(0.01) == 0.004


def test_a_device_that_fails_ends_all_requests() -> None:
    runner = Behind()
    runner.fails = True
    with running(runner) as system:
        request = system.add("a", [1, 2, 3], 6)
        until(lambda: system.failures)
        assert system.ended[request].reason is EndReason.UNAVAILABLE
        assert "the device is lost" in system.ended[request].message
