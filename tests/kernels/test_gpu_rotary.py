"""Norms, rotary embedding and writing by the Triton kernels, beside the torch reference in float32. Run as
test_gpu_attention.py says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.attention import HeadNorms, Rotary
from engine.kernels.gpu.rotary_write import rotary_write
from engine.models.rope import inverse_frequencies, rotary
from engine.models.spec import RopeSpec
from tests.kernels.paged import DTYPES, LAYER, Pool, Shape, default_tiles, small_tiles

EPS = 1e-6
# One rounding of values around 1 to 8, at most.
TOLERANCE = {"float32": 2e-6, "bfloat16": 4e-3, "float16": 5e-4}
BATCH = [(130, 1), (30, 4), (0, 3)]
NUM_TOKENS = 8
SHAPES = [
    Shape(),
    Shape(head_dim=80, num_kv_heads=4, group=1, block_size=8),
    Shape(head_dim=96, num_kv_heads=2, group=2, block_size=5),
    Shape(head_dim=128, num_kv_heads=1, group=8, block_size=32),
    Shape(head_dim=256, num_kv_heads=2, group=3, block_size=40),
]

every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
with_and_without_norms = pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])


def turns(pool: Pool) -> Rotary:
    """On the CPU."""
    positions = torch.cat([torch.arange(span.start, span.end) for span in pool.spans])
    return rotary(inverse_frequencies(RopeSpec(10000.0), pool.shape.head_dim), positions)


def head_norms(pool: Pool, normed: bool) -> HeadNorms | None:
    if not normed:
        return None
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2, pool.shape.head_dim, generator=generator).to(pool.cache.tensor.dtype)
    return HeadNorms(*weights.to(pool.device), EPS)


def on(pool: Pool, angles: Rotary) -> Rotary:
    return Rotary(angles.cos.to(pool.device), angles.sin.to(pool.device))


def expected(pool: Pool, norms: HeadNorms | None) -> Tensor:
    """The query; keys and values are then in `pool.exact`."""
    exact = norms and HeadNorms(norms.query.float().cpu(), norms.key.float().cpu(), EPS)
    return pool.reference().rotate_and_write(LAYER, pool.qkv.float().cpu(), turns(pool), exact)


def check(pool: Pool, query: Tensor, expected_query: Tensor) -> None:
    bound = TOLERANCE[pool.shape.dtype]
    torch.testing.assert_close(query.float().cpu(), expected_query, atol=bound, rtol=bound)
    held = pool.cache.tensor.float().cpu()
    torch.testing.assert_close(held, pool.exact.tensor, atol=bound, rtol=bound, equal_nan=True)


def written(pool: Pool, before: Tensor) -> Tensor:
    """`[blocks, layers, 2, heads, block_size]`: whose vectors are not what they were."""
    return (pool.cache.tensor.view(torch.uint8) != before.view(torch.uint8)).any(-1)


@every_dtype
@every_shape
@with_and_without_norms
def test_heads_are_turned_and_written_and_nothing_else_of_the_pool(
    shape: Shape, dtype: str, normed: bool, device: torch.device
) -> None:
    pool = Pool(replace(shape, dtype=dtype), BATCH, device)
    before, value, norms = pool.cache.tensor.clone(), pool.heads()[2].clone(), head_norms(pool, normed)
    exact = expected(pool, norms)
    query = pool.triton().batch(pool.spans).rotate_and_write(LAYER, pool.qkv, on(pool, turns(pool)), norms)
    check(pool, query, exact)
    rows = written(pool, before)
    assert rows[:, LAYER].sum() == NUM_TOKENS * 2 * shape.num_kv_heads
    assert rows.sum() == rows[:, LAYER].sum()
    for span in pool.spans:  # as they are, bit for bit
        block, offset = divmod(span.start, shape.block_size)
        held = pool.cache.tensor[int(pool.tables[span.slot, block]), LAYER, 1, :, offset]
        assert torch.equal(held, value[span.row])


@with_and_without_norms
def test_heads_of_the_default_tiling_give_the_same(normed: bool, device: torch.device) -> None:
    pool = Pool(Shape(), BATCH, device)
    norms = head_norms(pool, normed)
    exact = expected(pool, norms)
    batch = pool.triton(default_tiles).batch(pool.spans)
    check(pool, batch.rotate_and_write(LAYER, pool.qkv, on(pool, turns(pool)), norms), exact)


@every_dtype
def test_rows_of_no_sequence_are_left_alone(dtype: str, device: torch.device) -> None:
    """A length of 0 is enough, and a slot below 0 is too: a slot that is named by nobody has no blocks."""
    pool = Pool(Shape(group=2, dtype=dtype), [(17, 1), (0, 1)], device)
    norms = head_norms(pool, True)
    exact, angles = expected(pool, norms), turns(pool)
    before, attention = pool.cache.tensor.clone(), pool.triton()
    buffers = pool.buffers(attention, padding=3)
    buffers.slots[2], buffers.lengths[3] = 0, 5
    qkv = torch.cat((pool.qkv, pool.qkv, pool.qkv[:1]))
    padded = Rotary(torch.cat((angles.cos, angles.cos, angles.cos[:1])), torch.cat((angles.sin,) * 3)[:5].clone())
    untouched = qkv.clone()
    query = attention.static_batch(buffers).rotate_and_write(LAYER, qkv, on(pool, padded), norms)
    check(pool, query[:2], exact)
    assert torch.equal(qkv[2:], untouched[2:])
    assert written(pool, before).sum() == 2 * 2 * pool.shape.num_kv_heads


def test_the_query_can_go_elsewhere(device: torch.device) -> None:
    pool = Pool(Shape(), [(17, 1), (0, 1)], device)
    exact, before = expected(pool, None), pool.qkv.clone()
    buffers = pool.buffers(pool.triton())
    query = torch.full((2, pool.shape.num_heads, pool.shape.head_dim), float("nan"), device=device)
    rotary_write(
        pool.qkv,
        pool.cache.tensor,
        LAYER,
        rotary=on(pool, turns(pool)),
        norms=None,
        slots=buffers.slots,
        lengths=buffers.lengths,
        block_tables=buffers.block_tables,
        query=query,
        config=small_tiles("rotary_write", "", 64),
    ).run()
    check(pool, query, exact)
    assert torch.equal(pool.qkv, before)


@every_dtype
@every_shape
def test_keys_and_values_are_written_bit_for_bit(shape: Shape, dtype: str, device: torch.device) -> None:
    pool = Pool(replace(shape, dtype=dtype), BATCH, device)
    _, key, value = pool.heads()
    pool.reference().write(LAYER, key.float().cpu(), value.float().cpu())
    pool.triton().batch(pool.spans).write(LAYER, key, value)
    torch.testing.assert_close(pool.cache.tensor.float().cpu(), pool.exact.tensor, atol=0, rtol=0, equal_nan=True)
