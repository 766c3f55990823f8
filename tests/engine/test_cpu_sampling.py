"""The compiled sampler beside the torch reference: the same tokens, from each instruction set of this machine."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from baton.sampling import SamplingParams
from engine.kernels.choice import choose_sampler
from engine.kernels.cpu.library import Isa, Kernel, load_kernel
from engine.kernels.cpu.sampling import CompiledSampler
from engine.sampler import Draw, ReferenceSampler, philox
from tests.engine.test_cpu_attention import threads

KERNEL = load_kernel()
assert KERNEL is not None, "set-up needs a C compiler and builds the sampler; without it nothing here would be tested"
ISAS = [isa for isa in (Isa.GENERIC, Isa.AVX2) if isa <= KERNEL.isa]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LARGE = 151_936

TEMPERATURES = [0.0, 1e-7, 0.3, 1.0, 5.0]
TOP_PS = [1e-30, 0.01, 0.3, 0.5, 0.9, 0.99, 1.0, 1.0, 1.0]

# Two arrivals closer than rounding, or a token within rounding of the edge of top-p that is itself the first: about
# once in a million draws (docs/decisions/0009).
UNLIKE = 1e-4


def kernel(isa: Isa) -> Kernel:
    assert KERNEL is not None  # mypy forgets it in a function
    return KERNEL.with_isa(isa)


def random_draws(rng: random.Random, rows: int, vocab_size: int) -> list[Draw]:
    params = [
        SamplingParams(
            temperature=rng.choice(TEMPERATURES),
            top_k=rng.choice([0, 0, 1, 5, 50, 700, vocab_size // 2, vocab_size, vocab_size + 1]),
            top_p=rng.choice(TOP_PS),
            seed=rng.getrandbits(64),
            min_tokens=rng.choice([0, 0, 9]),
            stop_token_ids=tuple(rng.randrange(vocab_size) for _ in range(3)),
        )
        for _ in range(rows)
    ]
    return [Draw(p, rng.choice([rng.randrange(5000), 2**40]), rng.choice([3, 9])) for p in params]


def random_logits(seed: int, rows: int, vocab_size: int) -> Tensor:
    """Steep and flat ones, with ties and with -inf."""
    rng = random.Random(seed)
    logits = torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * rng.choice([0.1, 1, 3, 20])
    if rng.random() < 0.3:
        logits.round_()
    if rng.random() < 0.2:
        logits[:, :: rng.choice([2, 3])] = -torch.inf
    return logits


def unlike(isa: Isa, logits: Tensor, draws: Sequence[Draw]) -> int:
    expected = ReferenceSampler([1]).sample(logits.clone(), draws)
    got = CompiledSampler(kernel(isa), [1]).sample(logits.clone(), draws)
    return sum(one != other for one, other in zip(expected, got, strict=True))


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("vocab_size", "rows", "rounds"), [(7, 100, 30), (100, 100, 20), (1537, 50, 20), (33_000, 16, 2), (LARGE, 4, 2)]
)
def test_the_token_is_the_references(isa: Isa, dtype: torch.dtype, vocab_size: int, rows: int, rounds: int) -> None:
    rng, different = random.Random(vocab_size), 0
    for seed in range(rounds):
        logits = random_logits(seed, rows, vocab_size).to(dtype)
        different += unlike(isa, logits, random_draws(rng, rows, vocab_size))
    assert different <= UNLIKE * rows * rounds


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_extreme_size_and_shape_give_the_references_token(isa: Isa, dtype: torch.dtype) -> None:
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
    for _ in range(20):
        logits = torch.stack(rows).to(dtype)
        draws = [replace(draw, num_generated=9) for draw in random_draws(rng, len(rows), 1000)]
        assert unlike(isa, logits, draws) == 0


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_smaller_than_the_dtypes_normal_ones_are_told_apart(isa: Isa, dtype: torch.dtype) -> None:
    logits = torch.arange(1000) * (torch.finfo(dtype).smallest_normal / 4)
    for position in range(50):
        for params in (SamplingParams(), SamplingParams(temperature=1.0, top_k=5, seed=1)):
            assert unlike(isa, logits.to(dtype)[None], [Draw(params, position, 9)]) == 0


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_is_found_wherever_it_is(isa: Isa, dtype: torch.dtype) -> None:
    sampler = CompiledSampler(kernel(isa), [])
    for vocab_size in (1, 255, 256, 257, 1100):
        logits = torch.eye(vocab_size).to(dtype)
        greedy = [Draw(SamplingParams(), 5, 5)] * vocab_size
        assert sampler.sample(logits, greedy) == list(range(vocab_size))


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_random_words_are_philoxs(isa: Isa) -> None:
    words = np.zeros(64, dtype=np.uint32)
    rng = random.Random(2)
    for seed, position, quad in ((0, 0, 0), *((rng.getrandbits(64), rng.getrandbits(63), q) for q in (0, 9, 2**30))):
        count = kernel(isa).library.baton_words(int(isa), seed, position, quad, words.ctypes.data)
        quads = torch.arange(quad, quad + count // 4)
        same = torch.zeros_like(quads)
        low = 2**32 - 1
        counter = (same + (position & low), same + (position >> 32), quads, same)
        expected = philox(counter, (same + (seed & low), same + (seed >> 32)))
        assert words[:count].tolist() == expected.flatten().tolist()
        if seed == 0:
            assert words[:4].tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]  # Random123's kat_vectors


@pytest.mark.parametrize("vocab_size", [1537, LARGE])
def test_neither_company_nor_threads_change_a_token(vocab_size: int) -> None:
    """Few rows are cut into slices that threads share, many are shared whole."""
    rows = 12
    logits = random_logits(0, rows, vocab_size).bfloat16()
    draws = random_draws(random.Random(3), rows, vocab_size)
    sampler = CompiledSampler(kernel(ISAS[-1]), [1])
    with threads(1):
        together = sampler.sample(logits.clone(), draws)
        alone = [sampler.sample(logits[row : row + 1].clone(), draws[row : row + 1])[0] for row in range(rows)]
    assert alone == together
    with threads(2):
        assert sampler.sample(logits.clone(), draws) == together
        for some in (slice(0, 1), slice(4, 7)):
            assert sampler.sample(logits[some].clone(), draws[some]) == together[some]


def test_rows_may_lie_apart_and_nothing_but_banned_tokens_is_overwritten() -> None:
    wide = random_logits(4, 6, 1000)
    logits = wide[:, 100:900]
    before = wide.clone()
    draws = [Draw(SamplingParams(min_tokens=3, stop_token_ids=(5, 7)), 9, row) for row in range(6)]
    expected = ReferenceSampler([1]).sample(logits.clone(), draws)
    assert CompiledSampler(kernel(ISAS[-1]), [1]).sample(logits, draws) == expected
    changed = (wide != before).nonzero().tolist()
    assert changed == [[row, 100 + token] for row in range(3) for token in (1, 5, 7)]
    columns = before[:, 100:900].t().contiguous().t()
    assert CompiledSampler(kernel(ISAS[-1]), [1]).sample(columns, draws) == expected


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_draws_have_the_distribution_of_what_is_kept(isa: Isa) -> None:
    """Among thousands of tokens, in blocks and slices of their own: those of weight come as often as they should."""
    logits = torch.full((20_000,), -12.0)
    heavy = [3, 300, 4097, 9000, 16_384, 17_000, 19_999]
    logits[heavy] = torch.tensor([0.0, -1.0, 0.5, -2.0, 0.0, 1.0, -0.5])
    params = SamplingParams(temperature=1.0, top_p=0.999, seed=11)
    kept = logits.softmax(-1)[heavy]
    count, counts = 6000, Counter[int]()
    sampler = CompiledSampler(kernel(isa), [])
    for start in range(0, count, 60):
        draws = [Draw(params, position, 5) for position in range(start, start + 60)]
        counts.update(sampler.sample(logits.expand(60, -1).clone(), draws))
    light = count - sum(counts[token] for token in heavy)
    expected = [*(kept * count).tolist(), float(1 - kept.sum()) * count]
    observed = [*(counts[token] for token in heavy), light]
    assert sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True)) < 24.3  # 99.9 % of 7 degrees


def test_it_serves_logits_on_a_cpu() -> None:
    assert isinstance(choose_sampler(torch.device("cpu"), ()), CompiledSampler)
    assert isinstance(choose_sampler(torch.device("cuda"), ()), ReferenceSampler)
