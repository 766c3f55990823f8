"""The compiled attention kernel beside the torch reference, in float32 over the same values: every instruction set that
this machine has, over shapes, dtypes and batches. The pool is NaN wherever nobody has written."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from baton.layout import KVLayout
from engine.attention import AttentionBatch, BlockTables, Span
from engine.kernels.cpu.attention import CompiledAttention
from engine.kernels.cpu.library import Isa, Kernel, load_kernel
from engine.kernels.reference import ReferenceAttention
from engine.kv_cache import KVCache

KERNEL = load_kernel()
assert KERNEL is not None, "set-up needs a C compiler and builds the kernel; without it nothing here would be tested"
ISAS = [isa for isa in Isa if isa <= KERNEL.isa]
LAYERS, LAYER = 3, 1

# Outputs are averages of values around 1. In 16 bits they are rounded once; with dpbf16 the weights are rounded before.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1.6e-2, "float16": 2e-3}


@dataclass(frozen=True)
class Shape:
    head_dim: int = 64
    num_kv_heads: int = 2
    group: int = 7
    block_size: int = 16
    window: int | None = None
    dtype: str = "float32"


SHAPES = [
    Shape(),
    Shape(head_dim=16, num_kv_heads=1, group=4, block_size=5, window=7),
    Shape(head_dim=128, num_kv_heads=3, group=1, block_size=1),
    Shape(head_dim=80, num_kv_heads=1, group=3, block_size=3, window=100),
    Shape(head_dim=96, num_kv_heads=2, group=5, block_size=100, window=300),
    Shape(head_dim=256, num_kv_heads=1, group=71, block_size=32),
]
BATCHES = [
    [(0, 1)],
    [(7, 1), (699, 1), (0, 70)],
    [(255, 1), (130, 40), (256, 3), (0, 1), (63, 2), (500, 9)],
]


class Pool:
    """Sequences of random keys and values over shuffled blocks, and a batch that extends each of them."""

    def __init__(self, shape: Shape, batch: Sequence[tuple[int, int]], seed: int = 0) -> None:
        """`batch`: (start, count) of each sequence."""
        self.shape = shape
        generator = torch.Generator().manual_seed(seed)
        blocks = [-(-(start + count) // shape.block_size) for start, count in batch]
        order = torch.randperm(sum(blocks) + 2, generator=generator).to(torch.int32)
        # Slots in another order than rows, and tables that name no block behind the last.
        self.tables: BlockTables = np.full((len(batch) + 1, max(blocks) + 1), 2**30, dtype=np.int32)
        self.spans, row = [], 0
        for index, (start, count) in enumerate(batch):
            slot = len(batch) - index
            self.tables[slot, : blocks[index]] = order[sum(blocks[:index]) :][: blocks[index]].numpy()
            self.spans.append(Span(row, start, count, slot))
            row += count
        self.cache = self._empty(shape.dtype, len(order))
        past = [Span(0, 0, span.start, span.slot) for span in self.spans if span.start]

        def random(tokens: int, heads: int) -> Tensor:
            return torch.randn(tokens, heads, shape.head_dim, generator=generator).to(self.cache.tensor.dtype)

        for span in past:
            before = ReferenceAttention(self.cache, self.tables, (None,)).batch([span])
            before.write(LAYER, random(span.count, shape.num_kv_heads), random(span.count, shape.num_kv_heads))
        # Views with other heads between the tokens, as the model's are.
        heads = random(row, (shape.group + 2) * shape.num_kv_heads)
        self.query, self.key, self.value = torch.split(
            heads, [shape.group * shape.num_kv_heads, shape.num_kv_heads, shape.num_kv_heads], dim=1
        )

    def compiled(self, isa: Isa) -> CompiledAttention:
        return CompiledAttention(kernel(isa), self.cache, self.tables)

    def attend(self, batch: AttentionBatch) -> Tensor:
        batch.write(LAYER, self.key, self.value)
        return batch.attend(LAYER, self.query, self.shape.window)

    def expected(self) -> Tensor:
        """In float32, of the very values that the pool holds."""
        exact = self._empty("float32", self.cache.num_blocks)
        exact.tensor.copy_(self.cache.tensor)
        batch = ReferenceAttention(exact, self.tables, (self.shape.window,)).batch(self.spans)
        batch.write(LAYER, self.key.float(), self.value.float())
        return batch.attend(LAYER, self.query.float(), self.shape.window)

    def _empty(self, dtype: str, num_blocks: int) -> KVCache:
        shape = self.shape
        layout = KVLayout(LAYERS, shape.num_kv_heads, shape.block_size, shape.head_dim, dtype, b"test")
        cache = KVCache(layout, num_blocks)
        cache.tensor.fill_(float("nan"))
        return cache


def kernel(isa: Isa) -> Kernel:
    assert KERNEL is not None  # mypy forgets it in a function
    return KERNEL.with_isa(isa)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check(pool: Pool, isa: Isa) -> None:
    expected = pool.expected()
    attended = pool.attend(pool.compiled(isa).batch(pool.spans)).float()
    assert not expected.isnan().any()
    bound = TOLERANCE[pool.shape.dtype]
    torch.testing.assert_close(attended, expected, atol=bound, rtol=bound)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_instruction_set_equals_the_reference(isa: Isa, dtype: str, shape: Shape) -> None:
    shape = Shape(**{**vars(shape), "dtype": dtype})
    for seed, batch in enumerate(BATCHES):
        check(Pool(shape, batch, seed), isa)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.builds(
        Shape,
        head_dim=st.sampled_from(range(16, 257, 16)),
        num_kv_heads=st.integers(1, 3),
        group=st.integers(1, 12),
        block_size=st.integers(1, 40),
        window=st.none() | st.integers(1, 400),
        dtype=st.sampled_from(tuple(TOLERANCE)),
    ),
    batch=st.lists(st.tuples(st.integers(0, 600), st.just(1) | st.integers(1, 90)), min_size=1, max_size=5),
    isa=st.sampled_from(ISAS or [Isa.GENERIC]),
    seed=st.integers(0, 1000),
)
def test_any_batch_equals_the_reference(shape: Shape, batch: list[tuple[int, int]], isa: Isa, seed: int) -> None:
    check(Pool(shape, batch, seed), isa)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_neither_company_nor_threads_change_a_bit(dtype: str) -> None:
    pool = Pool(Shape(dtype=dtype, window=400), [(699, 1), (130, 90), (8, 1), (0, 200), (520, 9)])
    attention = pool.compiled(ISAS[-1])
    together = pool.attend(attention.batch(pool.spans))
    with threads(2):
        assert torch.equal(pool.attend(attention.batch(pool.spans)), together)
    for span in pool.spans:
        rows = slice(span.row, span.row + span.count)
        alone = attention.batch([Span(0, span.start, span.count, span.slot)])
        assert torch.equal(alone.attend(LAYER, pool.query[rows], 400), together[rows])


def test_one_long_sequence_is_shared_among_threads_without_changing_a_bit() -> None:
    pool = Pool(Shape(num_kv_heads=1, dtype="bfloat16"), [(3000, 1)])
    check(pool, ISAS[-1])
    with threads(2):
        check(pool, ISAS[-1])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_exactly_the_batchs_positions_are_written(dtype: str) -> None:
    pool = Pool(Shape(dtype=dtype, block_size=5), [(699, 1), (130, 90), (0, 3)])
    before = pool.cache.tensor.clone()
    ReferenceAttention(pool.cache, pool.tables, (None,)).batch(pool.spans).write(LAYER, pool.key, pool.value)
    expected = pool.cache.tensor.clone()
    for count in (1, 2):
        pool.cache.tensor.copy_(before)
        with threads(count):
            pool.compiled(ISAS[-1]).batch(pool.spans).write(LAYER, pool.key, pool.value)
        assert torch.equal(pool.cache.tensor.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_positions_before_the_window_are_not_read(isa: Isa) -> None:
    pool = Pool(Shape(window=10, block_size=4), [(100, 1), (60, 3)])
    for span in pool.spans:
        for position in range(span.start - 9):
            block = int(pool.tables[span.slot, position // 4])
            pool.cache.tensor[block, :, :, :, position % 4] = float("nan")
    check(pool, isa)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("which", [0, 1], ids=["key", "value"])
def test_a_nan_that_is_seen_shows(isa: Isa, which: int) -> None:
    """Else no test could tell that unwritten positions are left alone."""
    pool = Pool(Shape(dtype="bfloat16"), [(100, 1)])
    pool.cache.tensor[int(pool.tables[1, 3]), LAYER, which, 1, 5, 7] = float("nan")
    attended = pool.attend(pool.compiled(isa).batch(pool.spans)).view(2, 7, 64)
    assert not attended[0].isnan().any()
    assert attended[1, :, 7].isnan().all()


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("scale", [1e-6, 1e15])
def test_scores_of_any_size_stay_finite(isa: Isa, scale: float) -> None:
    pool = Pool(Shape(), [(400, 1), (0, 33)])
    pool.query = pool.query * scale
    check(pool, isa)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_single_position_gives_its_value_bit_for_bit(isa: Isa, dtype: str) -> None:
    """Every finite number of 16 bits there and back; but bfloat16 products take subnormals for zeros."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(getattr(torch, dtype))
    lost = ~every.isfinite()
    if isa >= Isa.AVX512_BF16 and dtype == "bfloat16":
        lost |= every.abs() < 2.0**-126
    every = every.masked_fill(lost, 0.0)
    cache = KVCache(KVLayout(1, 1, 1, 256, dtype, b"test"), 256)
    tables = np.arange(256, dtype=np.int32)[:, None]
    batch = CompiledAttention(kernel(isa), cache, tables).batch([Span(s, 0, 1, s) for s in range(256)])
    zeros = torch.zeros(256, 1, 256, dtype=every.dtype)
    batch.write(0, zeros, every.view(256, 1, 256))
    assert torch.equal(batch.attend(0, zeros, None).ravel(), every)


def test_threads_are_torchs_own() -> None:
    pool = Pool(Shape(), [(699, 1), (130, 90)])
    with threads(2):
        torch.ones(1 << 20).add_(1)
        before = len(os.listdir("/proc/self/task"))
        pool.attend(pool.compiled(ISAS[-1]).batch(pool.spans))
        assert len(os.listdir("/proc/self/task")) == before
