"""Open streams keep the inter-token objective beside prompts, on a machine in virtual time (simulated_machine.py)."""

from __future__ import annotations

import logging
import random
from dataclasses import replace

import pytest

from baton.ids import AttemptId
from baton.metrics import EngineMetrics, Metrics
from baton.sampling import SamplingParams
from engine.block_pool import BlockPool
from engine.engine import Engine
from engine.limits import SchedulerLimits
from engine.messages import AddRequest, Ended, Task, Tokens
from engine.pacing import LEAST_CHUNK, Pace, Pacer
from engine.scheduler import Scheduler
from engine.step_cost import Coefficients, StepShape
from tests.engine.simulated_machine import Machine

OBJECTIVE = 0.1
BUDGET = 2048
LEARNING = 100
"""Steps with an open stream until the cost has to be known."""


class Served:
    def __init__(
        self,
        machine: Machine,
        objective: float = OBJECTIVE,
        blocks: int = 4096,
        seqs: int = 32,
        metrics: EngineMetrics | None = None,
    ) -> None:
        self.machine = machine
        self.pacer = Pacer(objective) if objective else None
        limits = SchedulerLimits(16, seqs, BUDGET, 4096, frozenset(), b"model")
        pool = BlockPool(blocks, enable_prefix_caching=False)
        self.scheduler = Scheduler(pool, limits)
        self.engine = Engine(self.scheduler, machine, metrics, pacer=self.pacer, clock=machine.clock)
        self.first_token_at: dict[str, float] = {}
        self.tokens: dict[str, int] = {}
        self.ended: set[str] = set()

    def add(self, name: str, prompt: int, count: int = 5, task: Task = Task.LOCAL) -> None:
        sampling = SamplingParams(max_tokens=count, seed=0, ignore_eos=True)
        tokens = tuple(random.Random(name).choices(range(50), k=prompt))
        self.engine.handle(AddRequest(AttemptId(name, 0), task, tokens, prompt, sampling))

    def step(self) -> bool:
        stepped = self.engine.step()
        for event in self.engine.drain_events():
            if isinstance(event, Tokens):
                self.first_token_at.setdefault(event.id.request_id, self.machine.clock.now())
                self.tokens[event.id.request_id] = event.index + 1
            elif isinstance(event, Ended):
                self.ended.add(event.id.request_id)
        return stepped

    def run(self) -> None:
        while self.step():
            pass

    def paced(self) -> list[tuple[StepShape, float]]:
        """Steps with an open stream, without those in which the cost was still being learned."""
        return [step for step in self.machine.steps if step[0].decodes][LEARNING:]


def busy(machine: Machine, steps: int = 1500, objective: float = OBJECTIVE) -> Served:
    """Prompts of mixed lengths come in as fast as they can be computed, and are answered at mixed lengths."""
    served, rng = Served(machine, objective), random.Random(machine.seed)
    for number in range(steps):
        if served.scheduler.load().waiting < 3:
            served.add(f"r{number}", rng.choice((20, 64, 256, 700, 2000)), rng.choice((10, 60, 150)))
        served.step()
    return served


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[int(share * len(values))]


def chunks(served: Served) -> list[int]:
    return [shape.chunk_tokens for shape, _ in served.paced() if shape.chunk_tokens]


def mean(values: list[int]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("noise", [0.0, 0.05, 0.1])
def test_steps_of_open_streams_keep_the_objective_once_it_is_known_what_they_cost(noise: float, seed: int) -> None:
    served = busy(Machine(noise=noise, seed=seed))
    seconds = [s for _, s in served.paced()]
    assert len(seconds) > 1000
    assert percentile(seconds, 0.99) <= 1.2 * OBJECTIVE
    assert percentile(seconds, 0.5) >= 0.6 * OBJECTIVE, "the time that the objective leaves is given to prompts"


def test_a_cost_that_is_no_straight_line_is_met_where_the_objective_is() -> None:
    seconds = [s for _, s in busy(Machine(noise=0.05, free_rows=128)).paced()]
    assert percentile(seconds, 0.99) <= 1.2 * OBJECTIVE
    assert percentile(seconds, 0.5) >= 0.6 * OBJECTIVE


def test_without_an_objective_streams_wait_for_whole_prompts() -> None:
    """The other tests could fail."""
    seconds = [s for _, s in busy(Machine(), objective=0).paced()]
    assert percentile(seconds, 0.99) > 5 * OBJECTIVE


def test_with_no_stream_open_prompts_take_the_whole_budget() -> None:
    for served in (Served(Machine()), busy(Machine(), steps=300)):  # before anything is known, and after
        served.run()
        before = len(served.machine.steps)
        for name in "abcd":
            served.add(name, BUDGET, count=1)
        served.run()
        assert [shape.chunk_tokens for shape, _ in served.machine.steps[before:]] == [BUDGET] * 4


def test_a_prefill_worker_always_takes_the_whole_budget() -> None:
    served = Served(Machine())
    for number, prompt in enumerate((BUDGET + 1, 1, BUDGET, 1500)):
        served.add(f"r{number}", prompt, task=Task.PREFILL)
    served.run()
    computed = [plan.num_tokens for plan in served.machine.plans]
    assert computed == [BUDGET, BUDGET, 2 * 1 + BUDGET + 1500 - BUDGET], "the last token of a prompt is nobody's stream"


@pytest.mark.parametrize("seed", range(3))
def test_hiccups_do_not_take_the_prompts_their_share(seed: int) -> None:
    calm = busy(Machine(noise=0.05, seed=seed))
    restless = busy(Machine(noise=0.05, hiccups=0.03, seed=seed))
    assert mean(chunks(restless)) > 0.75 * mean(chunks(calm))
    assert percentile([s for _, s in restless.paced()], 0.99) <= 1.2 * OBJECTIVE, "but for the hiccups themselves"


@pytest.mark.parametrize("seed", range(3))
def test_noise_does_not_starve_the_prompts(seed: int) -> None:
    calm, noisy = busy(Machine(seed=seed)), busy(Machine(noise=0.25, hiccups=0.05, seed=seed))
    assert mean(chunks(noisy)) > 0.5 * mean(chunks(calm))
    assert mean(chunks(noisy)) > 1.5 * LEAST_CHUNK


def test_a_machine_that_slows_down_is_followed() -> None:
    served = busy(Machine(noise=0.05))
    before = mean(chunks(served))
    served.machine.slowness = 1.6
    start = len(served.machine.steps)
    rng = random.Random(5)
    for number in range(600):
        if served.scheduler.load().waiting < 3:
            served.add(f"late{number}", rng.choice((64, 700, 2000)), rng.choice((10, 60)))
        served.step()
    late = [(shape, s) for shape, s in served.machine.steps[start + 100 :] if shape.decodes]
    assert percentile([s for _, s in late], 0.95) <= 1.2 * OBJECTIVE
    assert LEAST_CHUNK < mean([shape.chunk_tokens for shape, _ in late if shape.chunk_tokens]) < before


def test_an_objective_out_of_reach_is_said_once_and_prompts_go_on(caplog: pytest.LogCaptureFixture) -> None:
    served = Served(Machine(), objective=0.01)
    with caplog.at_level(logging.WARNING):
        served.add("stream", 20, count=1000)
        for _ in range(40):
            served.step()
        before = len(served.machine.steps)
        for number in range(3):
            served.add(f"long{number}", 500, count=2)
        served.run()
    sizes = [shape.chunk_tokens for shape, _ in served.machine.steps[before:]]
    assert sizes[: 3 * 500 // LEAST_CHUNK] == [LEAST_CHUNK] * (3 * 500 // LEAST_CHUNK)
    assert len(served.ended) == 4
    (said,) = [record.getMessage() for record in caplog.records]
    assert "--itl-objective-ms is 10 and cannot be met: a step takes about 1" in said
    assert "(open streams: 1)" in said
    assert "by 16 tokens a step" in said


def test_an_objective_that_is_kept_is_not_complained_about(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        busy(Machine(noise=0.1, hiccups=0.05))
    assert not caplog.records


def test_the_room_for_prompts_is_told() -> None:
    registry = Metrics()
    served = Served(Machine(), metrics=EngineMetrics(registry, "m"))

    def value(name: str) -> float:
        return registry.registry.get_sample_value(name) or 0.0

    served.add("stream", 2048, count=100)
    served.step()
    assert value("baton_prefill_budget_tokens") == BUDGET
    for _ in range(50):
        served.step()
    served.add("long", 2000, count=1)
    for _ in range(15):
        served.step()
    assert 0.5 < served.machine.steps[-1][0].chunk_tokens / value("baton_prefill_budget_tokens") <= 1
    assert value("baton_prefill_budget_tokens") < 200
    assert 0 < value("baton_step_prediction_error") < 0.5


def test_prompts_are_served_first_come_first_served() -> None:
    served = busy(Machine(), steps=300)
    served.run()
    served.add("stream", 20, count=3000)
    for _ in range(3):
        served.step()
    served.add("long", 2000, count=1)
    served.add("short", 64, count=1)
    while "short" not in served.ended:
        served.step()
    assert served.first_token_at["long"] <= served.first_token_at["short"]
    for plan in served.machine.plans[-60:]:
        assert sum(s.count > 1 and not s.sample for s in plan.scheduled) <= 1, "one prompt at a time is left unfinished"


def test_what_a_preempted_stream_computes_again_is_paced_like_a_prompt() -> None:
    served = Served(Machine(), blocks=256, seqs=8)
    for number in range(12):
        served.add(f"early{number}", 500, count=40)
    served.run()
    assert served.scheduler.counters.preemptions == 0, "these are to learn from"
    start = len(served.machine.steps)
    for number in range(4):
        served.add(f"r{number}", 900, count=400)
    served.run()
    assert served.scheduler.counters.preemptions > 0
    assert set(served.tokens.values()) == {40, 400}
    assert all(s <= 1.2 * OBJECTIVE for shape, s in served.machine.steps[start:] if shape.decodes)


def test_the_same_commands_and_paces_give_the_same_plans() -> None:
    pace = Pace(OBJECTIVE, 200, Coefficients(0.02, 8e-4, 1e-3, 6e-7, 3e-7))

    def plans() -> list[object]:
        served = Served(Machine())
        made: list[object] = []
        for number in range(6):
            served.add(f"r{number}", 300 * (number + 1), count=30)
        while (plan := served.scheduler.schedule(pace)).scheduled:
            made.append(plan)
            served.scheduler.apply(served.machine.run(plan))
        return made

    assert plans() == plans()


def test_an_unknown_machine_is_tried_with_a_short_chunk_and_then_longer_ones() -> None:
    served = Served(Machine(), objective=10.0)
    served.add("stream", 2, count=500)
    for _ in range(20):
        served.step()
    served.add("long", 2000, count=1)
    sizes: list[int] = []
    while "long" not in served.ended:
        served.step()
        sizes.append(served.machine.steps[-1][0].chunk_tokens)
    assert sizes[:3] == [32, 64, 128]


def test_the_first_chunks_of_a_step_get_some_and_the_next_ones_only_what_is_left() -> None:
    pace = Pace(0.1, 4096, Coefficients(fixed=0.2, token=1e-3))
    streams = StepShape(decodes=4, decode_attended=400)
    assert pace.chunk(streams, 0, 500) == LEAST_CHUNK
    assert pace.chunk(streams, 0, 5) == 5
    assert pace.chunk(replace(streams, chunk_tokens=5, chunk_attended=15), 0, 500) == LEAST_CHUNK - 5
    assert pace.chunk(replace(streams, chunk_tokens=16, chunk_attended=136), 0, 500) == 0
