"""Attention by the Triton kernels beside the torch reference in float32 over the same values. The pool is NaN wherever
nobody has written.

Where there is a GPU they are compiled for it; elsewhere Triton's interpreter runs them on the CPU, which
tests/conftest.py sees to before anything imports triton. Without triton these tests fail: nothing else would run the
kernels on such a machine.
"""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.kernels.gpu import tuning
from engine.kernels.gpu.attention import TritonAttention
from engine.kernels.gpu.attention_decode import DecodeScratch, choose_num_splits
from engine.kernels.gpu.attention_prefill import tile_map
from engine.kernels.gpu.tuning import Configure, LaunchConfig
from tests.kernels.paged import DTYPES, LAYER, Pool, Shape, default_tiles, small_tiles

SHAPES = [
    Shape(num_kv_heads=2),
    Shape(head_dim=80, num_kv_heads=2, group=1, block_size=8, window=20),
    Shape(head_dim=96, num_kv_heads=1, group=2, block_size=32, window=64),
    Shape(head_dim=128, num_kv_heads=1, group=8, block_size=16, window=1),
    Shape(head_dim=256, num_kv_heads=1, group=7, block_size=32),
    Shape(head_dim=64, num_kv_heads=1, group=16, block_size=5, window=33),
]
DECODES = [(0, 1), (15, 1), (16, 1), (100, 1), (131, 1)]
MIXED = [(7, 1), (0, 21), (90, 10), (63, 1), (31, 2), (0, 1)]

every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_kind = pytest.mark.parametrize("batch", [DECODES, MIXED], ids=["decodes", "mixed"])
every_tiling = pytest.mark.parametrize("configure", [small_tiles, default_tiles], ids=["small", "default"])


@every_dtype
@every_shape
@every_kind
def test_a_batch_equals_the_reference(
    shape: Shape, dtype: str, batch: list[tuple[int, int]], device: torch.device
) -> None:
    pool = Pool(replace(shape, dtype=dtype), batch, device)
    pool.check(pool.attend(pool.triton().batch(pool.spans)))


@pytest.mark.parametrize("shape", SHAPES[::2], ids=str)
@every_kind
def test_tiles_of_the_default_size_give_the_same(
    shape: Shape, batch: list[tuple[int, int]], device: torch.device
) -> None:
    pool = Pool(shape, batch, device, seed=1)
    pool.check(pool.attend(pool.triton(default_tiles).batch(pool.spans)))


@pytest.mark.parametrize("seed", range(16))
def test_any_batch_equals_the_reference(seed: int, device: torch.device) -> None:
    draw = random.Random(seed)
    shape = Shape(
        head_dim=draw.choice((64, 80, 96, 128, 256)),
        num_kv_heads=draw.randint(1, 2),
        group=draw.choice((1, 2, 3, 7, 8)),
        block_size=draw.choice((8, 16, 32)),
        window=draw.choice((None, draw.randint(1, 150))),
        dtype=draw.choice(DTYPES),
    )
    most = draw.choice((1, 40))
    batch = [(draw.randint(0, 150), draw.randint(1, most)) for _ in range(draw.randint(1, 3))]
    pool = Pool(shape, batch, device, seed)
    pool.check(pool.attend(pool.triton().batch(pool.spans)))


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("num_splits", range(1, 9))
def test_every_number_of_splits_gives_the_same(num_splits: int, window: int | None, device: torch.device) -> None:
    pool = Pool(Shape(group=2, window=window), [(5, 1), (32, 1), (190, 1)], device)
    attention = pool.triton()
    scratch = DecodeScratch.empty(len(pool.spans), pool.shape.num_heads, num_splits, pool.shape.head_dim, device)
    scratch.averages.fill_(float("nan"))
    scratch.log_sums.fill_(float("nan"))
    buffers = replace(pool.buffers(attention), scratch=scratch)
    pool.check(pool.attend(attention.static_batch(buffers)))


@pytest.mark.parametrize("num_splits", [1, 4])
def test_rows_of_no_sequence_read_and_write_nothing_and_get_zeros(num_splits: int, device: torch.device) -> None:
    pool = Pool(Shape(group=2), DECODES, device)
    attention = pool.triton()
    buffers = pool.buffers(attention, padding=3)
    scratch = DecodeScratch.empty(len(DECODES) + 3, pool.shape.num_heads, num_splits, pool.shape.head_dim, device)
    scratch.log_sums.fill_(float("nan"))
    batch = attention.static_batch(replace(buffers, scratch=scratch))
    pool.check(pool.attend(batch, padding=3))
    assert not buffers.output[len(DECODES) :].any()
    written = ~pool.cache.tensor[:, LAYER, 0, 0, :, 0].isnan()
    assert written.sum() == sum(start + 1 for start, _ in DECODES)


def test_the_same_buffers_serve_sequences_that_grow(device: torch.device) -> None:
    """As a captured graph does: grid, addresses and numbers of splits stay as they were for one position."""
    shape = Shape(group=2)
    longest = Pool(shape, [(150, 1), (150, 1)], device)
    attention = longest.triton()
    buffers = longest.buffers(attention)
    batch, tables = attention.static_batch(buffers), buffers.block_tables.clone()
    for seed, lengths in enumerate([(1, 1), (2, 30), (96, 31), (97, 151)]):
        pool = Pool(shape, [(length - 1, 1) for length in lengths], device, seed)
        buffers.block_tables.copy_(tables.fill_(2**30))
        buffers.block_tables[:, : pool.tables.shape[1]] = torch.from_numpy(pool.tables)
        longest.cache.tensor.fill_(float("nan"))
        longest.cache.tensor[: pool.cache.num_blocks] = pool.cache.tensor
        buffers.lengths.copy_(torch.tensor(lengths))
        pool.check(pool.attend(batch))


@pytest.mark.gpu
@every_dtype
def test_a_captured_graph_serves_sequences_that_grow(dtype: str, device: torch.device) -> None:
    pool = Pool(Shape(dtype=dtype, head_dim=128, window=None), [(600, 1), (40, 1)], device)
    attention = pool.triton(default_tiles)
    buffers = pool.buffers(attention)
    batch = attention.static_batch(buffers)
    pool.check(pool.attend(batch))  # compiles
    grown = buffers.lengths.clone()
    buffers.lengths.fill_(1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = batch.attend(LAYER, pool.heads()[0], None)
    buffers.lengths.copy_(grown)
    graph.replay()
    pool.check(output.float().cpu())


@every_kind
def test_positions_before_the_window_are_not_read(batch: list[tuple[int, int]], device: torch.device) -> None:
    pool = Pool(Shape(group=2, window=10, block_size=8), batch, device)
    for span in pool.spans:
        for position in range(span.start - 9):
            pool.forget(position, span)
    pool.check(pool.attend(pool.triton().batch(pool.spans)))


@pytest.mark.parametrize("which", [0, 1], ids=["key", "value"])
@pytest.mark.parametrize("count", [1, 5])
def test_a_nan_that_is_seen_shows(which: int, count: int, device: torch.device) -> None:
    """Else no test could tell that unwritten positions are left alone."""
    pool = Pool(Shape(num_kv_heads=2, group=2), [(100, count)], device)
    pool.cache.tensor[int(pool.tables[1, 3]), LAYER, which, 1, 5, 7] = float("nan")
    attended = pool.attend(pool.triton().batch(pool.spans)).view(count, 2, 2, 64)
    assert not attended[:, 0].isnan().any()
    assert attended[:, 1, :, 7].isnan().all()


@every_kind
@pytest.mark.parametrize("scale", [1e-6, 1e15])
def test_scores_of_any_size_stay_finite(batch: list[tuple[int, int]], scale: float, device: torch.device) -> None:
    pool = Pool(Shape(group=2), batch, device)
    pool.heads()[0].mul_(scale)
    pool.check(pool.attend(pool.triton().batch(pool.spans)))


@every_tiling
def test_a_span_of_one_among_others_gets_what_it_gets_alone(configure: Configure, device: torch.device) -> None:
    """To rounding: alone it is a decode, by another kernel."""
    pool = Pool(Shape(), [(40, 1), (0, 33)], device)
    attention = pool.triton(configure)
    together = pool.attend(attention.batch(pool.spans))
    alone = attention.batch(pool.spans[:1]).attend(LAYER, pool.heads()[0][:1], None)
    torch.testing.assert_close(alone.cpu(), together[:1], atol=1e-5, rtol=1e-5)


def test_no_spans_are_no_batch_to_stumble_over(device: torch.device) -> None:
    pool = Pool(Shape(), [(3, 1)], device)
    batch = pool.triton().batch([])
    query, key, value = (x[:0] for x in pool.heads())
    batch.write(LAYER, key, value)
    assert batch.attend(LAYER, query, None).shape == (0, pool.shape.num_heads * 64)


def test_the_block_tables_are_taken_as_they_are_when_the_batch_is_made(device: torch.device) -> None:
    pool = Pool(Shape(group=2), MIXED, device)
    expected, batch = pool.expected(), pool.triton().batch(pool.spans)
    pool.tables.fill(2**30)
    torch.testing.assert_close(pool.attend(batch), expected, atol=1e-5, rtol=1e-5)


def test_a_pool_is_supported_or_refused_by_its_layout(device: torch.device) -> None:
    layout = Pool(Shape(), [(0, 1)], device).cache.layout
    assert TritonAttention.supports(layout)
    assert not TritonAttention.supports(replace(layout, head_dim=512))
    assert not TritonAttention.supports(replace(layout, head_dim=20))


@pytest.mark.parametrize("seed", range(20))
def test_tiles_cover_every_token_once_and_the_longest_come_first(seed: int) -> None:
    generator = np.random.default_rng(seed)
    num_spans, tokens = generator.integers(0, 9), int(generator.integers(1, 20))
    starts = generator.integers(0, 1000, num_spans).astype(np.int32)
    counts = generator.integers(1, 70, num_spans).astype(np.int32)
    spans, firsts = tile_map(starts, counts, tokens)
    assert spans.dtype == firsts.dtype == np.int32
    covered = [
        (span, token)
        for span, first in zip(spans.tolist(), firsts.tolist(), strict=True)
        for token in range(first, min(first + tokens, int(counts[span])))
    ]
    assert sorted(covered) == [(span, token) for span, count in enumerate(counts) for token in range(count)]
    assert all(first < counts[span] for span, first in zip(spans, firsts, strict=True))
    seen = starts[spans] + firsts
    assert (np.diff(seen) <= 0).all()


def test_splits_fill_the_device_but_none_is_for_nothing() -> None:
    config = LaunchConfig(4, 2, programs=500, max_splits=32, split_positions=256)
    assert choose_num_splits(config, 1, 8, 1 << 20) == 32
    assert choose_num_splits(config, 16, 8, 1 << 20) == 4
    assert choose_num_splits(config, 1000, 8, 1 << 20) == 1
    assert choose_num_splits(config, 1, 8, 513) == 3
    assert choose_num_splits(config, 0, 8, 0) == 1


@pytest.mark.parametrize("device_name", ["NVIDIA H200", "NVIDIA A100-SXM4-80GB", "cpu"])
@pytest.mark.parametrize("kernel", ["attention_decode", "attention_reduce", "attention_prefill", "rotary_write"])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_every_device_has_launch_parameters(kernel: str, device_name: str, head_dim: int) -> None:
    chosen = tuning.config(kernel, device_name, head_dim)
    for parameter in (chosen.num_warps, chosen.block_m, chosen.block_n):
        assert parameter >= 1
        assert parameter & (parameter - 1) == 0
    assert chosen.for_element(2) is chosen


def test_a_devices_file_is_named_as_cuda_names_it() -> None:
    assert tuning.file_name("NVIDIA H200") == "nvidia_h200"
    assert tuning.file_name("NVIDIA A100-SXM4-80GB") == "nvidia_a100_sxm4_80gb"
