"""Prefill on Hopper beside the torch reference in float32, by batches for which test_gpu_attention's are too small:
tiles of queries across tiles of positions, several items to a program, blocks larger than tiles. Without such a GPU all
that can be known is that the kernels compile (test_gpu_aot)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.kernels.gpu.attention_prefill_hopper import item_map, suits
from engine.kernels.gpu.tuning import Configure
from tests.kernels.paged import Pool, Shape, default_tiles, small_tiles

SHAPES = [
    Shape(head_dim=128, num_kv_heads=2, group=4, dtype="bfloat16"),
    Shape(head_dim=128, num_kv_heads=1, group=8, window=1, dtype="float16"),
    Shape(head_dim=128, num_kv_heads=1, group=7, window=150, block_size=32, dtype="bfloat16"),
    Shape(head_dim=128, num_kv_heads=1, group=2, window=64, block_size=256, dtype="float16"),
    Shape(head_dim=64, num_kv_heads=2, group=7, window=33, block_size=48, dtype="float16"),
    Shape(head_dim=64, num_kv_heads=2, group=1, block_size=128, dtype="bfloat16"),
    Shape(head_dim=64, num_kv_heads=1, group=16, window=300, dtype="bfloat16"),
]
BATCH = [(300, 150), (0, 129), (127, 1), (128, 3), (0, 128), (511, 70), (1000, 40)]


def _pool(shape: Shape, device: torch.device, seed: int) -> Pool:
    pool = Pool(shape, BATCH, device, seed)
    if not suits(pool.cache.tensor):
        pytest.skip("needs a GPU of compute capability 9")
    return pool


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("configure", [small_tiles, default_tiles], ids=["few", "many"])
def test_spans_equal_the_reference(shape: Shape, configure: Configure, device: torch.device) -> None:
    """With few programs each has many items."""
    for seed in range(3):
        pool = _pool(shape, device, seed)
        pool.check(pool.attend(pool.triton(configure).batch(pool.spans)))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape.window], ids=str)
def test_positions_before_the_window_are_not_read(shape: Shape, device: torch.device) -> None:
    assert shape.window
    pool = _pool(shape, device, seed=0)
    for span in pool.spans:
        for position in range(max(0, span.start - shape.window - 40), span.start - shape.window + 1):
            pool.forget(position, span)
    pool.check(pool.attend(pool.triton(default_tiles).batch(pool.spans)))


@pytest.mark.parametrize("seed", range(20))
def test_items_cover_every_token_of_every_head_once(seed: int) -> None:
    generator = np.random.default_rng(seed)
    num_spans, heads, programs = (int(n) for n in generator.integers((1, 1, 1), (9, 9, 20)))
    starts = generator.integers(0, 1000, num_spans).astype(np.int32)
    counts = generator.integers(1, 70, num_spans).astype(np.int32)
    tokens = int(generator.integers(1, 33))
    item_heads, item_tokens = item_map(starts, counts, tokens, heads, programs)
    assert item_heads.dtype == item_tokens.dtype == np.int32
    assert len(item_heads) % min(programs, len(item_heads)) == 0
    items = [(int(head), int(token)) for head, token in zip(item_heads, item_tokens, strict=True) if head >= 0]
    wanted = [
        (span * heads + head, token)
        for span, count in enumerate(counts)
        for head in range(heads)
        for token in range(0, count, tokens)
    ]
    assert sorted(items) == wanted


@pytest.mark.parametrize(
    "batch", [[(0, 4096)] * 8, [(0, 16384)], [(8192, 1024)] * 4, [(4095, 1)] * 32 + [(0, 1024)] * 4]
)
def test_programs_have_as_much_to_do_as_each_other(batch: list[tuple[int, int]]) -> None:
    starts, counts = np.array(batch, dtype=np.int32).T
    item_heads, item_tokens = (x.reshape(-1, 132) for x in item_map(starts, counts, 32, 8, 132))
    spans = np.maximum(item_heads // 8, 0)
    positions = np.where(item_heads < 0, 0, starts[spans] + np.minimum(item_tokens + 32, counts[spans])).sum(0)
    assert positions.max() < 1.1 * positions.mean()


def test_no_spans_are_no_items() -> None:
    nothing = np.zeros(0, dtype=np.int32)
    assert [len(x) for x in item_map(nothing, nothing, 32, 8, 132)] == [0, 0]
