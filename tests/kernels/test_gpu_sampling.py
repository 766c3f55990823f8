"""The GPU's sampler beside the torch reference: the same tokens.

The race is float32 within a chunk of the vocabulary and float64 between chunks; the reference's is float64 over float32
probabilities. So a draw may differ where two tokens arrive within some units of float32's last place, and where a token
within rounding of the edge of top-p is itself the first: about once in a million draws. UNLIKE allows for far less than
an error would make, and far more than that. Ties of top-p are of x here, and of float32 probabilities there, which x
less than 1e-7 apart can share.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from baton.sampling import SamplingParams
from engine.kernels.gpu import sampling
from engine.kernels.gpu.counting import count_tokens
from engine.kernels.gpu.race import exact_waits, neighbours_words, tokens_words, waits
from engine.kernels.gpu.sampling import TritonSampler, reference_logits, reference_sample, sample_on_device
from engine.kernels.gpu.sampling_table import IN_PROMPT, SamplingTensors
from engine.kernels.gpu.slot_sampler import SlotSampler
from engine.plan import NewSequence
from engine.sampler import Draw, ReferenceSampler, Sampler, uniforms
from tests.kernels.dtypes import DTYPES
from tests.kernels.interpreter import patch_once_a_launch

LARGE = 151_936
UNLIKE = 1e-4
ROUNDS = 50 if torch.cuda.is_available() else 1  # the interpreter takes some 50 ms a row
TEMPERATURES = [0.0, 1e-6, 0.3, 1.0, 1.0, 5.0]
TOP_PS = [1e-30, 0.01, 0.3, 0.5, 0.9, 0.99, 1.0, 1.0, 1.0]
MIN_PS = [0.0, 0.0, 0.0, 1e-4, 0.02, 0.3, 1.0]

patch_once_a_launch()

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# Numpy says of the interpreter's arithmetic what a GPU does without a word: log(0), inf - inf, exp that is 0.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def random_params(rng: random.Random, device: torch.device, rows: int, vocab_size: int) -> SamplingTensors:
    params = SamplingTensors.neutral(rows, device, max_banned=3)

    def fill(column: Tensor, values: list[float]) -> None:
        column.copy_(torch.tensor(values, dtype=column.dtype))

    top_ks = [0, 0, 1, 5, 50, 700, vocab_size // 2, vocab_size, vocab_size + 1]
    fill(params.temperature, [rng.choice(TEMPERATURES) for _ in range(rows)])
    fill(params.top_k, [rng.choice(top_ks) for _ in range(rows)])
    fill(params.top_p, [rng.choice(TOP_PS) for _ in range(rows)])
    fill(params.min_p, [rng.choice(MIN_PS) for _ in range(rows)])
    params.seed.copy_(torch.tensor([rng.getrandbits(64) - 2**63 for _ in range(rows)]))
    params.position.copy_(torch.tensor([rng.choice([rng.randrange(5000), 2**40]) for _ in range(rows)]))
    params.banned.copy_(torch.tensor([[rng.randrange(vocab_size) for _ in range(3)] for _ in range(rows)]))
    fill(params.num_banned, [rng.choice([0, 0, 1, 3]) for _ in range(rows)])
    params.banned_until.copy_(torch.tensor([rng.choice([0, 2**62, 2**63 - 1]) for _ in range(rows)]))
    return params


def with_penalties(rng: random.Random, params: SamplingTensors, vocab_size: int, slots: int = 40) -> SamplingTensors:
    device, rows = params.table.device, params.num_rows
    counts = torch.zeros(slots, vocab_size, dtype=torch.int32)
    for slot in range(slots):
        for _ in range(min(vocab_size // 2, 300)):
            counts[slot, rng.randrange(vocab_size)] = rng.choice([1, 2, 7, IN_PROMPT, IN_PROMPT + 1, IN_PROMPT + 40])
    params.slot.copy_(torch.tensor(rng.sample(range(slots), rows)))
    params.repetition.copy_(torch.tensor([rng.choice([1.0, 1.1, 1.7, 0.8]) for _ in range(rows)]))
    params.presence.copy_(torch.tensor([rng.choice([0.0, 0.6, -0.5]) for _ in range(rows)]))
    params.frequency.copy_(torch.tensor([rng.choice([0.0, 0.25, -0.1]) for _ in range(rows)]))
    return replace(params, counts=counts.to(device))


def random_logits(seed: int, device: torch.device, rows: int, vocab_size: int) -> Tensor:
    """Steep and flat ones, with ties and with -inf."""
    rng = random.Random(seed)
    logits = torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * rng.choice([0.1, 1, 3, 20])
    if rng.random() < 0.3:
        logits.round_()
    if rng.random() < 0.2:
        logits[:, :: rng.choice([2, 3])] = -torch.inf
    return logits.to(device)


def drawn(logits: Tensor, params: SamplingTensors, *, limited: bool = True) -> list[int]:
    out = torch.full((len(logits),), -1, dtype=torch.int64, device=logits.device)
    before = logits.clone()
    sample_on_device(logits, params, out, limited=limited)
    assert torch.equal(logits.nan_to_num(1.5), before.nan_to_num(1.5))
    return out.tolist()


def unlike(logits: Tensor, params: SamplingTensors) -> int:
    expected, got = reference_sample(logits.clone(), params), drawn(logits, params)
    return sum(one != other for one, other in zip(expected, got, strict=True))


@every_dtype
@pytest.mark.parametrize(
    ("vocab_size", "rows"), [(1, 2), (7, 25), (100, 30), (4096, 8), (4099, 12), (33_000, 4), (LARGE, 2)]
)
def test_the_token_is_the_references(device: torch.device, dtype: torch.dtype, vocab_size: int, rows: int) -> None:
    rng, different = random.Random(vocab_size), 0
    for seed in range(ROUNDS):
        logits = random_logits(seed, device, rows, vocab_size).to(dtype)
        different += unlike(logits, random_params(rng, device, rows, vocab_size))
    assert different <= UNLIKE * rows * ROUNDS


@every_dtype
@pytest.mark.parametrize(("vocab_size", "rows"), [(100, 15), (9000, 6)])
def test_penalties_change_the_token_as_in_the_reference(
    device: torch.device, dtype: torch.dtype, vocab_size: int, rows: int
) -> None:
    rng, different, changed = random.Random(vocab_size), 0, 0
    for seed in range(ROUNDS):
        logits = random_logits(seed, device, rows, vocab_size).to(dtype)
        plain = random_params(rng, device, rows, vocab_size)
        without = drawn(logits, plain)
        penalised = with_penalties(rng, plain, vocab_size)
        different += unlike(logits, penalised)
        changed += sum(one != other for one, other in zip(without, drawn(logits, penalised), strict=True))
    assert different <= UNLIKE * rows * ROUNDS
    assert changed > 0


@every_dtype
def test_logits_of_extreme_size_and_shape_give_the_references_token(device: torch.device, dtype: torch.dtype) -> None:
    rng, most = random.Random(1), torch.finfo(dtype).max
    one_left = torch.full((1000,), -torch.inf)
    one_left[777] = -3.0
    rows = [
        torch.zeros(1000),
        torch.full((1000,), -most),
        torch.linspace(-most / 2, most / 2, 1000),
        torch.tensor([most, -most]).repeat(500),
        torch.arange(1000) % 3 * -1.0,
        torch.linspace(-90, 0, 1000),
        one_left,
    ]
    logits = torch.stack(rows).to(dtype).to(device)
    for _ in range(2 * ROUNDS):
        params = random_params(rng, device, len(rows), 1000)
        params.num_banned.zero_()
        assert unlike(logits, params) == 0


@every_dtype
def test_logits_smaller_than_the_dtypes_normal_ones_are_told_apart(device: torch.device, dtype: torch.dtype) -> None:
    """But by top-p: there the reference keeps what ties in float32 probability, and these all do."""
    logits = (torch.arange(1000) * (torch.finfo(dtype).smallest_normal / 4)).to(dtype).to(device).repeat(6, 1)
    params = SamplingTensors.neutral(6, device)
    params.temperature[2:], params.top_k[2:] = 1.0, 5
    params.position.copy_(torch.arange(6))
    assert unlike(logits, params) == 0


@every_dtype
def test_distributions_that_leave_many_tokens_are_gone_through_whole(device: torch.device, dtype: torch.dtype) -> None:
    """Flat ones, many ties, and a top-k above the number of blocks: more tokens than the list holds."""
    vocab_size = 6000
    assert vocab_size > sampling.CAPACITY
    limits = [(0, 0.5), (0, 0.97), (5000, 1.0), (5000, 0.9), (5, 1.0), (0, 1e-6)]  # top-k, top-p
    flat = torch.randn(len(limits), vocab_size, generator=torch.Generator().manual_seed(0)) * 0.3
    params = SamplingTensors.neutral(len(limits), device)
    params.temperature.fill_(1)
    params.top_k.copy_(torch.tensor([top_k for top_k, _ in limits]))
    params.top_p.copy_(torch.tensor([top_p for _, top_p in limits]))
    for round_ in range(ROUNDS):
        params.position.fill_(round_)
        for logits in (flat, flat.round()):
            assert unlike(logits.to(dtype).to(device), params) == 0
    params.temperature.fill_(100)
    params.min_p.fill_(0.01)
    assert unlike(flat.to(dtype).to(device), params) == 0


@every_dtype
def test_greedy_rows_get_the_first_of_the_largest_wherever_it_is(device: torch.device, dtype: torch.dtype) -> None:
    for vocab_size in (1, 127, 129, 1100):
        steps = range(0, vocab_size, max(1, vocab_size // 60))
        logits = torch.eye(vocab_size)[steps].to(dtype).to(device)
        assert drawn(logits, SamplingTensors.neutral(len(logits), device)) == list(steps)
    edges = [0, 4095, 4096, 8191, 8192, 8999]
    logits = torch.zeros(len(edges) + 2, 9000)
    for row, edge in enumerate(edges):
        logits[row, edges[row:]] = 1
        logits[row, edge + 1 :: 2] = 1
    logits[-2, ::2] = -0.0
    expected = [*edges, 0, 0]
    assert drawn(logits.to(dtype).to(device), SamplingTensors.neutral(len(logits), device)) == expected


@every_dtype
@pytest.mark.parametrize("vocab_size", [500, 9000])
def test_nan_leads_and_rows_without_a_finite_largest_give_0(
    device: torch.device, dtype: torch.dtype, vocab_size: int
) -> None:
    logits = random_logits(3, device, 6, vocab_size).clamp_(-50, 50)
    logits[0, [3, vocab_size - 2]] = torch.nan
    logits[1, vocab_size - 5] = torch.inf
    logits[2] = -torch.inf
    logits[3, [5, 9]] = torch.tensor([torch.inf, torch.nan], device=device)
    logits[4, vocab_size - 1] = -torch.nan
    logits[5, 7] = 60
    greedy = SamplingTensors.neutral(6, device)
    assert drawn(logits.to(dtype), greedy) == [3, vocab_size - 5, 0, 9, vocab_size - 1, 7]
    for top_k, top_p, min_p in ((0, 1.0, 0.0), (5, 1.0, 0.0), (0, 0.9, 0.0), (0, 1.0, 0.5)):
        params = SamplingTensors.neutral(6, device)
        params.temperature.fill_(1e-3)
        params.top_k.fill_(top_k)
        params.top_p.fill_(top_p)
        params.min_p.fill_(min_p)
        assert drawn(logits.to(dtype), params) == [0, 0, 0, 0, 0, 7]


def test_the_random_words_are_the_references_and_their_waits_near(device: torch.device) -> None:
    rng, count = random.Random(2), 1 << 12
    params = SamplingTensors.neutral(1, device)
    outputs = [torch.zeros(count, dtype=dtype, device=device) for dtype in (torch.int64, torch.int64, torch.float32)]
    for seed, position, first in ((0, 0, 0), *((rng.getrandbits(64), rng.getrandbits(63), q) for q in (0, 4 * 9999))):
        params.seed.fill_(seed - 2**64 if seed >= 2**63 else seed)
        params.position.fill_(position)
        store_race[(1,)](params.table, first, *outputs, COUNT=count)
        same = torch.ones(count // 4, dtype=torch.int64)
        quads = torch.arange(first // 4, first // 4 + count // 4)
        expected = uniforms(same * params.seed.cpu(), same * params.position.cpu(), quads).flatten()
        words = (expected * 2.0**32 - 0.5).long()
        assert outputs[0].tolist() == outputs[1].tolist() == words.tolist()
        torch.testing.assert_close(outputs[2].cpu().double(), -expected.log(), atol=0, rtol=4e-7)
        if seed == 0:
            assert words[:4].tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]  # Random123's kat_vectors


@triton.jit
def store_race(
    table: tl.tensor, first: tl.tensor, one: tl.tensor, other: tl.tensor, waited: tl.tensor, COUNT: tl.constexpr
) -> None:
    at = tl.arange(0, COUNT)
    words = neighbours_words(table, first, COUNT)
    tl.store(one + at, words.to(tl.int64))
    tl.store(other + at, tokens_words(table, first + at).to(tl.int64))
    tl.store(waited + at, waits(words))


@triton.jit
def store_waits(words: tl.tensor, near: tl.tensor, exact: tl.tensor, COUNT: tl.constexpr) -> None:
    at = tl.arange(0, COUNT)
    some = tl.load(words + at).to(tl.uint32)
    tl.store(near + at, waits(some))
    tl.store(exact + at, exact_waits(some))


def test_waits_are_near_over_all_words(device: torch.device) -> None:
    """The first and the last, where the logarithm is largest and smallest, those where its form changes, and others."""
    edges = [offset + at for at in (0, 2**31, 2**32) for offset in range(-600, 600)]
    words = [word for word in edges if 0 <= word < 2**32]
    words += [int(word) for word in torch.linspace(0, 2**32 - 1, 4096 - len(words), dtype=torch.float64)]
    column = torch.tensor(words, device=device)
    near, exact = torch.zeros(4096, device=device), torch.zeros(4096, dtype=torch.float64, device=device)
    store_waits[(1,)](column, near, exact, COUNT=4096)
    expected = -((column.cpu().double() + 0.5) * 2.0**-32).log()
    torch.testing.assert_close(near.cpu().double(), expected, atol=0, rtol=4e-7)
    torch.testing.assert_close(exact.cpu(), expected, atol=0, rtol=1e-9)


@pytest.mark.parametrize("vocab_size", [1537, 9000])
def test_company_does_not_change_a_token(device: torch.device, vocab_size: int) -> None:
    rng, rows = random.Random(3), 6
    logits = random_logits(0, device, rows, vocab_size).half()
    params = with_penalties(rng, random_params(rng, device, rows, vocab_size), vocab_size)
    together = drawn(logits, params)
    for some in (slice(0, 1), slice(2, 5)):
        few = replace(params, table=params.table[some], banned=params.banned[some])
        assert drawn(logits[some], few) == together[some]


def test_rows_may_lie_apart(device: torch.device) -> None:
    wide = random_logits(4, device, 6, 1000)
    params = random_params(random.Random(0), device, 6, 800)
    assert drawn(wide[:, 100:900], params) == drawn(wide[:, 100:900].contiguous(), params)
    narrow = torch.full((6,), -1, dtype=torch.int32, device=device)
    sample_on_device(wide[:, 100:900], params, narrow)
    assert narrow.tolist() == drawn(wide[:, 100:900], params)
    with pytest.raises(AssertionError, match="lie apart"):
        drawn(wide.t(), SamplingTensors.neutral(1000, device))


def test_what_falls_short_of_min_p_is_never_drawn(device: torch.device) -> None:
    logits = torch.tensor([0.5, 0.3, 0.149, 0.051], device=device).log().repeat(30, 1)
    params = SamplingTensors.neutral(30, device)
    params.temperature.fill_(1)
    params.position.copy_(torch.arange(30))
    for min_p, left in ((0.29, {0, 1, 2}), (0.31, {0, 1}), (1.0, {0})):
        params.min_p.fill_(min_p)
        assert set(drawn(logits, params)) == left


def test_penalties_are_those_of_their_papers() -> None:
    counts = torch.tensor([[0, 1, 3, IN_PROMPT, IN_PROMPT + 2, 0]], dtype=torch.int32)
    params = SamplingTensors.neutral(1, "cpu", counts=counts)
    logits = torch.tensor([[2.0, 2.0, -2.0, 2.0, -2.0, -2.0]])
    assert torch.equal(reference_logits(logits, params), logits)
    params.repetition.fill_(2)
    assert reference_logits(logits, params).tolist() == [[2, 1, -4, 1, -4, -2]]
    params.presence.fill_(0.5)
    assert reference_logits(logits, params).tolist() == [[2, 0.5, -4.5, 1, -4.5, -2]]
    params.repetition.fill_(1)
    params.frequency.fill_(0.25)
    assert reference_logits(logits, params).tolist() == [[2, 1.25, -3.25, 2, -3, -2]]


def test_tokens_are_counted_where_there_is_a_penalty(device: torch.device) -> None:
    counts = torch.zeros(5, 100, dtype=torch.int32, device=device)
    counts[3, 7] = IN_PROMPT
    params = SamplingTensors.neutral(4, device, counts=counts)
    params.slot.copy_(torch.tensor([4, 3, 0, 1]))
    params.repetition[0], params.presence[1], params.frequency[3] = 1.2, 0.1, -0.1
    for _ in range(2):
        count_tokens(params, torch.tensor([99, 7, 5, 0], dtype=torch.int32, device=device))
    assert counts.nonzero().tolist() == [[1, 0], [3, 7], [4, 99]]
    assert counts[[1, 3, 4], [0, 7, 99]].tolist() == [2, IN_PROMPT + 2, 2]
    count_tokens(SamplingTensors.neutral(4, device), torch.zeros(4, device=device))


def random_draws(rng: random.Random, rows: int, vocab_size: int) -> list[Draw]:
    return [
        Draw(
            SamplingParams(
                temperature=rng.choice([*TEMPERATURES, 1e-7]),
                top_k=rng.choice([0, 5, 50, 2**31 - 1]),
                top_p=rng.choice(TOP_PS),
                seed=rng.getrandbits(64),
                min_tokens=rng.choice([0, 9]),
                stop_token_ids=tuple(rng.randrange(vocab_size) for _ in range(rng.randrange(4))),
                ignore_eos=rng.random() < 0.3,
            ),
            position=rng.choice([rng.randrange(5000), 2**40]),
            num_generated=rng.choice([3, 9]),
        )
        for _ in range(rows)
    ]


@every_dtype
def test_a_sampler_like_the_others(device: torch.device, dtype: torch.dtype) -> None:
    rng, ours = random.Random(5), TritonSampler([1, 2])
    sampler: Sampler = ours
    for seed in range(ROUNDS):
        logits = random_logits(seed, device, 20, 777).to(dtype)
        logits[:, 1] += 5  # which `min_tokens` suppresses
        draws = random_draws(rng, 20, 777)
        expected = ReferenceSampler([1, 2]).sample(logits.clone(), draws)
        assert sampler.sample(logits, draws) == expected
        unlimited = [replace(draw, params=replace(draw.params, top_k=0, top_p=1.0)) for draw in draws]
        expected = ReferenceSampler([1, 2]).sample(logits.clone(), unlimited)
        assert sampler.sample(logits, unlimited) == expected
    assert sampler.sample(logits[:0], []) == []
    assert ours.supports(torch.bfloat16, sampling.MAX_VOCAB_SIZE)
    assert not ours.supports(torch.float64, 1000)
    assert not ours.supports(torch.bfloat16, sampling.MAX_VOCAB_SIZE + 1)


def test_a_row_that_is_drawn_needs_a_seed(device: torch.device) -> None:
    with pytest.raises(AssertionError, match="no seed for temperature 1"):
        TritonSampler(()).sample(torch.zeros(1, 9, device=device), [Draw(SamplingParams(temperature=1.0), 5, 0)])


def test_a_slots_parameters_hold_from_step_to_step(device: torch.device) -> None:
    """Ends are suppressed until `min_tokens` are generated, wherever a request begins again."""
    rng, vocab_size, num_slots = random.Random(7), 500, 5
    sampler = SlotSampler([1, 2], num_slots + 1, device)
    draws = random_draws(rng, num_slots, vocab_size)
    prompts = [3, 50, 7, 1000, 9]
    for slot, draw in enumerate(draws):
        sampler.fill(slot, NewSequence(slot, (0,) * prompts[slot], prompts[slot], (), draw.params))
    slots = torch.tensor([4, 0, num_slots, 2, 1, 3], device=device)
    for generated in (0, 1, 8, 9, 10):
        logits = random_logits(generated, device, len(slots), vocab_size)
        logits[:, 1] += 5
        positions = [generated + (prompts[slot] if slot < num_slots else 0) for slot in slots.tolist()]
        out = torch.zeros(len(slots), dtype=torch.int64, device=device)
        sampler.draw(logits.clone(), slots, torch.tensor(positions, device=device), out)
        params = [draws[slot].params if slot < num_slots else SamplingParams() for slot in slots.tolist()]
        expected = [Draw(p, position, generated) for p, position in zip(params, positions, strict=True)]
        assert out.tolist() == ReferenceSampler([1, 2]).sample(logits, expected)


@pytest.mark.gpu
def test_draws_are_captured_and_replayed_with_other_parameters() -> None:
    device, rng, vocab_size, rows = torch.device("cuda"), random.Random(6), LARGE, 8
    logits = random_logits(0, device, rows, vocab_size).bfloat16()
    counts = torch.zeros(40, vocab_size, dtype=torch.int32, device=device)
    params = SamplingTensors.neutral(rows, device, 3, counts)
    out = torch.zeros(rows, dtype=torch.int32, device=device)
    sample_on_device(logits, params, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sample_on_device(logits, params, out)
    for seed in range(10):
        fresh = with_penalties(rng, random_params(rng, device, rows, vocab_size), vocab_size)
        logits.copy_(random_logits(seed, device, rows, vocab_size))
        params.table.copy_(fresh.table)
        params.banned.copy_(fresh.banned)
        counts.copy_(fresh.counts)
        graph.replay()
        assert out.tolist() == reference_sample(logits.clone(), params)
