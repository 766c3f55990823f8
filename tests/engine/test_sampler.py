from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from baton.sampling import SamplingParams
from engine.kernels.cpu.library import load_kernel
from engine.kernels.cpu.sampling import CompiledSampler
from engine.loader import LoadedModel
from engine.sampler import Draw, ReferenceSampler, Sampler, philox, probabilities, uniforms
from tests.engine.driver import Driver

RANDOM = SamplingParams(temperature=1.0, seed=7)

MakeSampler = Callable[[list[int]], Sampler]


def _compiled(eos_token_ids: list[int]) -> Sampler:
    kernel = load_kernel()
    assert kernel is not None, "set-up needs a C compiler and builds the sampler; without it it would not be tested"
    return CompiledSampler(kernel, eos_token_ids)


@pytest.fixture(params=[ReferenceSampler, _compiled], ids=["reference", "compiled"])
def make_sampler(request: pytest.FixtureRequest) -> MakeSampler:
    make: MakeSampler = request.param
    return make


@pytest.fixture
def sampler(make_sampler: MakeSampler) -> Sampler:
    return make_sampler([])


def _draw(
    sampler: Sampler, logits: torch.Tensor, params: SamplingParams, position: int = 10, generated: int = 5
) -> int:
    return sampler.sample(logits[None].clone(), [Draw(params, position, generated)])[0]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_known_answers(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    """Random123's kat_vectors, philox4x32 with 10 rounds."""
    words = philox([torch.tensor([word]) for word in counter], [torch.tensor([word]) for word in key])
    assert tuple(words[0].tolist()) == expected


def test_uniforms_are_uniform_and_differ_by_seed_position_and_token() -> None:
    many, one = torch.arange(5000), torch.ones(5000, dtype=torch.int64)
    seen: set[float] = set()
    for seeds, positions, quads in ((-one, many, one), (many, one, one * 7), (one, one * 9, many)):
        drawn = uniforms(seeds, positions, quads).flatten()
        assert drawn.min() > 0
        assert drawn.max() < 1
        chi_square = ((torch.histc(drawn, 50, 0, 1) - 400) ** 2 / 400).sum()
        assert chi_square < 86  # 99.9 % of 49 degrees of freedom
        seen |= set(drawn.tolist())
    assert len(seen) > 59_900, "32 bits: a few of 60,000 may meet"


def test_a_token_on_the_edge_of_the_nucleus_moves_no_other(sampler: Sampler) -> None:
    """Rounding decides whether it is in: where it does not win itself, the same token is drawn."""
    logits = torch.randn(200, generator=torch.Generator().manual_seed(5))
    with_it, without_it = replace(RANDOM, top_k=40), replace(RANDOM, top_k=39)
    edge = int(logits.topk(40).indices[-1])
    drawn = [(_draw(sampler, logits, with_it, p), _draw(sampler, logits, without_it, p)) for p in range(300)]
    assert any(token == edge for token, _ in drawn), "else this shows nothing"
    assert all(token == other for token, other in drawn if token != edge)


def test_greedy_takes_the_first_of_the_best(sampler: Sampler) -> None:
    assert _draw(sampler, torch.tensor([0.0, 3.0, 1.0, 3.0]), SamplingParams()) == 1


@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
@pytest.mark.parametrize("top_k", [0, 1, 5, 1000])
@pytest.mark.parametrize("top_p", [1e-6, 0.5, 0.9, 1.0])
def test_probabilities_equal_those_of_transformers(temperature: float, top_k: int, top_p: float) -> None:
    logits = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)) * 2
    expected = TemperatureLogitsWarper(temperature)(None, logits.clone()) if temperature != 1 else logits.clone()
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    ours = probabilities(logits.clone(), [params] * 4)
    torch.testing.assert_close(ours / ours.sum(-1, keepdim=True), expected.softmax(-1))


def test_rows_of_a_batch_keep_their_own_parameters() -> None:
    logits = torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
    params = [
        replace(RANDOM, top_k=3),
        replace(RANDOM, temperature=0.3),
        replace(RANDOM, top_p=0.4, top_k=20),
        RANDOM,
    ]
    together = probabilities(logits.clone(), params)
    for row, one in enumerate(params):
        assert torch.equal(together[row], probabilities(logits[row : row + 1].clone(), [one])[0])


def test_draws_have_the_distribution_of_the_logits(sampler: Sampler) -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, -torch.inf])
    draws = [Draw(RANDOM, position, position) for position in range(20000)]
    counts = Counter(sampler.sample(logits.expand(len(draws), -1).clone(), draws))
    expected = logits.softmax(-1) * len(draws)
    assert counts[4] == 0
    chi_square = sum((counts[token] - float(expected[token])) ** 2 / float(expected[token]) for token in range(4))
    assert chi_square < 16.3  # 99.9 % of 3 degrees of freedom


def test_what_is_cut_off_is_never_drawn(sampler: Sampler) -> None:
    logits = torch.linspace(0, 1, 50)
    for params, allowed in ((replace(RANDOM, top_k=4), range(46, 50)), (replace(RANDOM, top_p=1e-9), [49])):
        drawn = {_draw(sampler, logits, params, position) for position in range(500)}
        assert drawn == set(allowed)


def test_a_draw_depends_on_seed_and_position_and_not_on_the_batch(sampler: Sampler) -> None:
    logits = torch.randn(500, generator=torch.Generator().manual_seed(3))
    company = [Draw(SamplingParams(), 4, 4), Draw(replace(RANDOM, seed=1, top_k=3), 9, 0), Draw(RANDOM, 10, 5)]
    assert sampler.sample(logits.expand(3, -1).clone(), company)[2] == _draw(sampler, logits, RANDOM)
    assert len({_draw(sampler, logits, RANDOM, position) for position in range(30)}) > 10
    assert len({_draw(sampler, logits, replace(RANDOM, seed=seed)) for seed in range(30)}) > 10


def test_ending_tokens_wait_for_min_tokens(make_sampler: MakeSampler) -> None:
    logits = torch.tensor([0.0, 3.0, 2.0, 1.0])
    sampler = make_sampler([1])

    def token(generated: int, **fields: object) -> int:
        params = replace(SamplingParams(min_tokens=3, stop_token_ids=(2,)), **fields)  # type: ignore[arg-type]  # fields of mixed types
        return sampler.sample(logits[None].clone(), [Draw(params, 20, generated)])[0]

    assert [token(generated) for generated in range(5)] == [3, 3, 3, 1, 1]
    assert token(0, ignore_eos=True) == 1, "with ignore_eos the end-of-sequence token is one like any other"
    assert token(0, temperature=0.01, seed=0) == 3
    assert token(0, stop_token_ids=()) == 2
    assert token(0, stop_token_ids=(), ignore_eos=True) == 1, "nothing ends the answer, so nothing has to wait"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_that_are_not_numbers_have_an_answer(sampler: Sampler, dtype: torch.dtype) -> None:
    """Greedy: NaN is larger than all, and the first of equals is taken. Else: token 0."""
    nan, inf = torch.nan, torch.inf
    for row, greedy in (
        ([0, nan, inf, nan], 1),
        ([-inf, inf, 3, inf], 1),
        ([-inf] * 4, 0),
        ([-inf, -inf, -1, -inf], 2),
    ):
        logits = torch.tensor([[*row, *[-inf] * 600, row[1]]], dtype=dtype)
        assert _draw(sampler, logits[0], SamplingParams()) == greedy
        assert _draw(sampler, logits[0], replace(RANDOM, top_k=2, top_p=0.5)) == (2 if greedy == 2 else 0)


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-7])
def test_a_temperature_next_to_nothing_takes_the_best(sampler: Sampler, temperature: float) -> None:
    logits = torch.tensor([-20.0, 30.0, 29.9, 0.0])
    assert {_draw(sampler, logits, replace(RANDOM, temperature=temperature), position) for position in range(50)} == {1}


def test_seeded_streams_are_the_same_alone_in_a_batch_and_after_preemption(
    loaded: Callable[[str], LoadedModel],
) -> None:
    prompts = [[seed, seed + 1, seed + 2] * (seed + 1) for seed in range(12)]
    params = [SamplingParams(temperature=1.0, top_p=0.95, top_k=50, seed=seed) for seed in range(12)]
    together = Driver(loaded("llama"), seed=1).generate(prompts, 16, params)
    alone = Driver(loaded("llama"), seed=2)
    assert [alone.generate([p], 16, [s])[0] for p, s in zip(prompts, params, strict=True)] == together
    assert Driver(loaded("llama"), seed=3).generate(prompts, 16, params, preempt=True) == together
    assert together != Driver(loaded("llama"), seed=1).generate(prompts, 16, [replace(s, seed=99) for s in params])
