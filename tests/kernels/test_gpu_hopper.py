"""Prefill on Hopper beside the torch reference in float32, by batches for which test_gpu_attention's are too small:
tiles of queries across tiles of positions, several items to a program, blocks larger than tiles. Without such a GPU all
that can be known is that the kernels compile (test_gpu_aot)."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.gpu.attention_prefill_hopper import suits
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

pytestmark = pytest.mark.gpu


def _pool(shape: Shape, device: torch.device, seed: int) -> Pool:
    pool = Pool(shape, BATCH, device, seed)
    if not suits(pool.cache.tensor):
        pytest.skip("needs a GPU of compute capability 9")
    return pool


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("configure", [small_tiles, default_tiles], ids=["few", "many"])
def test_spans_equal_the_reference(shape: Shape, configure: Configure, device: torch.device) -> None:
    """With few programs each has many items."""
    for seed in range(3):
        pool = _pool(shape, device, seed)
        pool.check(pool.attend(pool.triton(configure).batch(pool.spans)))


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape.window], ids=str)
def test_positions_before_the_window_are_not_read(shape: Shape, device: torch.device) -> None:
    assert shape.window
    pool = _pool(shape, device, seed=0)
    for span in pool.spans:
        for position in range(max(0, span.start - shape.window - 40), span.start - shape.window + 1):
            pool.forget(position, span)
    pool.check(pool.attend(pool.triton(default_tiles).batch(pool.spans)))
