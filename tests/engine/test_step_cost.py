"""What a step costs is learned from restless measurements, and told for steps that were not measured."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.plan import ScheduledSequence
from engine.step_cost import Coefficients, StepCost, StepShape, solve_non_negative

TRUE = Coefficients(fixed=0.018, token=8.4e-4, decode=1e-3, decode_attended=6e-7, chunk_attended=3e-7)
positive = st.floats(1e-9, 1e-1)


def shape_of(chunk: int, chunk_start: int, decodes: int, context: int) -> StepShape:
    attended = chunk * chunk_start + chunk * (chunk + 1) // 2
    return StepShape(chunk, attended, decodes, decodes * context)


def some_shape(rng: random.Random) -> StepShape:
    chunk = rng.choice((0, 0, rng.randrange(16, 200)))
    return shape_of(chunk, rng.randrange(0, 1500), rng.randrange(1, 32), rng.randrange(50, 800))


def learn(cost: StepCost, steps: int, measured: Callable[[float], float], seed: int = 0) -> StepCost:
    rng = random.Random(seed)
    for _ in range(steps):
        shape = some_shape(rng)
        cost.observe(shape, measured(TRUE.seconds(shape)))
    return cost


def worst_error(cost: StepCost, factor: float = 1.0) -> float:
    rng = random.Random(99)
    shapes = [some_shape(rng) for _ in range(200)]
    return max(abs(cost.coefficients.seconds(s) / (factor * TRUE.seconds(s)) - 1) for s in shapes)


def test_a_shape_adds_up_what_its_tokens_see() -> None:
    sequences = [(7, 5), (0, 3), (40, 1), (0, 1), (100, 20)]
    shape = StepShape.of(ScheduledSequence(slot, start, n, (), True) for slot, (start, n) in enumerate(sequences))
    seen = [[position + 1 for position in range(start, start + n)] for start, n in sequences]
    assert (shape.chunk_tokens, shape.decodes) == (28, 2)
    assert shape.decode_attended == 41 + 1
    assert shape.chunk_attended == sum(sum(s) for s in seen) - 42


@given(
    coefficients=st.builds(
        Coefficients, token=positive, chunk_attended=st.just(0.0) | st.floats(1e-12, 1e-4), fixed=positive
    ),
    start=st.integers(0, 100_000),
    seconds=st.floats(1e-6, 10),
)
def test_the_longest_chunk_fits_and_one_more_token_does_not(
    coefficients: Coefficients, start: int, seconds: float
) -> None:
    def costs(count: int) -> float:
        attended = count * start + count * (count + 1) // 2
        return coefficients.token * count + coefficients.chunk_attended * attended

    count = coefficients.tokens_within(seconds, start, most=4096)
    assert 0 <= count <= 4096
    assert costs(count) <= seconds * (1 + 1e-9)
    assert count == 4096 or costs(count + 1) > seconds * (1 - 1e-9)


def test_nothing_fits_into_no_time() -> None:
    assert TRUE.tokens_within(0.0, 0, 100) == 0
    assert TRUE.tokens_within(-1.0, 0, 100) == 0


@given(st.integers(0, 10**9), st.integers(2, 12))
def test_no_coefficient_is_negative_and_no_other_choice_is_better(seed: int, count: int) -> None:
    rng = random.Random(seed)
    rows = [[rng.choice((0.0, rng.uniform(-3, 3))) for _ in range(6)] for _ in range(count)]
    gram = [[sum(r[i] * r[j] for r in rows) + (1e-3 if i == j else 0) for j in range(5)] for i in range(5)]
    moments = [sum(r[i] * r[5] for r in rows) for i in range(5)]

    def loss(x: list[float]) -> float:
        return sum(x[i] * (sum(gram[i][j] * x[j] for j in range(5)) / 2 - moments[i]) for i in range(5))

    best = solve_non_negative(gram, moments)
    assert min(best) >= 0
    for _ in range(50):
        other = [max(0.0, x + rng.gauss(0, 10 ** rng.uniform(-4, 1))) for x in best]
        assert loss(best) <= loss(other) + 1e-6 * (1 + abs(loss(other)))


def test_exact_measurements_are_learned_exactly() -> None:
    assert worst_error(learn(StepCost(0.1), 300, lambda seconds: seconds)) < 0.02


@pytest.mark.parametrize("seed", range(5))
def test_noise_averages_out(seed: int) -> None:
    noise = random.Random(seed)
    cost = learn(StepCost(0.1), 400, lambda seconds: seconds * math.exp(noise.gauss(0, 0.1)), seed)
    assert worst_error(cost) < 0.15


@pytest.mark.parametrize("seed", range(5))
def test_hiccups_move_little(seed: int) -> None:
    noise = random.Random(seed)

    def measured(seconds: float) -> float:
        hiccup = noise.uniform(3, 30) if noise.random() < 0.03 else 1.0
        return seconds * math.exp(noise.gauss(0, 0.05)) * hiccup

    assert worst_error(learn(StepCost(0.1), 400, measured, seed)) < 0.2


def test_slow_first_steps_are_forgotten() -> None:
    count = iter(range(10**6))
    cost = learn(StepCost(0.1), 200, lambda seconds: seconds * (20 if next(count) < 5 else 1))
    assert worst_error(cost) < 0.03


def test_a_machine_that_became_slower_for_good_is_noticed() -> None:
    cost = learn(StepCost(0.1), 300, lambda seconds: seconds)
    learn(cost, 400, lambda seconds: 2 * seconds, seed=1)
    assert worst_error(cost, factor=2) < 0.25


def test_a_long_spell_of_decodes_does_not_make_it_forget_what_chunks_cost() -> None:
    cost = learn(StepCost(0.1), 300, lambda seconds: seconds)
    rng = random.Random(1)
    for _ in range(20_000):
        shape = shape_of(0, 0, rng.randrange(1, 4), rng.randrange(50, 100))
        cost.observe(shape, TRUE.seconds(shape))
    assert worst_error(cost) < 0.15


def test_what_cannot_be_told_apart_is_put_down_to_the_tokens_of_chunks() -> None:
    cost = StepCost(0.1)
    cost.observe(shape_of(2048, 0, 0, 0), 1.6)
    assert cost.coefficients.token * 2048 == pytest.approx(1.6, rel=0.1)


@pytest.mark.parametrize("seed", range(5))
def test_more_streams_than_were_ever_open_are_not_feared(seed: int) -> None:
    noise, cost = random.Random(seed), StepCost(0.1)
    cost.observe(shape_of(2048, 0, 0, 0), TRUE.seconds(shape_of(2048, 0, 0, 0)))
    for step in range(60):
        alone = shape_of(0, 0, 1, 176 + step)
        cost.observe(alone, TRUE.seconds(alone) * math.exp(noise.gauss(0, 0.05)))
    eight = shape_of(0, 0, 8, 200)
    assert cost.coefficients.seconds(eight) < 2 * TRUE.seconds(eight)
    for _ in range(3):
        cost.observe(eight, TRUE.seconds(eight))
    assert cost.coefficients.seconds(eight) == pytest.approx(TRUE.seconds(eight), rel=0.2)


def test_a_measurement_of_nothing_is_survived() -> None:
    cost = StepCost(0.1)
    for _ in range(20):
        cost.observe(shape_of(0, 0, 1, 10), 0.0)
        cost.observe(StepShape(), 0.0)
    assert cost.coefficients.seconds(shape_of(0, 0, 1, 10)) < 1e-3
