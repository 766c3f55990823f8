"""What a machine allows, against what can be reckoned by hand."""

from __future__ import annotations

import pytest

from bench.roofline import Peaks, Work, closed_batch_seconds, decode_seconds, prefill_seconds
from bench.workloads import w1
from engine.models.spec import ModelSpec, RopeSpec

M_HALF = ModelSpec(
    family="qwen2",
    vocab_size=32000,
    hidden_size=896,
    intermediate_size=4864,
    num_heads=14,
    num_kv_heads=2,
    head_dim=64,
    norm_eps=1e-6,
    rope=RopeSpec(theta=1e4),
    max_model_len=4096,
    windows=(None,) * 24,
)
WORK = Work(M_HALF, itemsize=2)
PEAKS = Peaks(read_bytes_per_second=50e9, flops_per_second=1000e9)


def test_the_work_is_the_models() -> None:
    matrices = 24 * (896 * 896 * 2 + 896 * 128 * 2 + 3 * 896 * 4864) + 32000 * 896
    assert WORK.weight_bytes == 2 * matrices
    assert WORK.kv_bytes(1) == 2 * 24 * 2 * 64 * 2
    assert WORK.flops(0, drawn=True) == 2 * matrices


def test_a_sliding_window_bounds_what_is_read() -> None:
    windowed = Work(ModelSpec(**(vars(M_HALF) | {"windows": (None, 100)})), itemsize=2)
    assert windowed.seen(1000) == 1100


def test_a_small_batch_is_bound_by_reading_and_a_large_one_by_arithmetic() -> None:
    assert decode_seconds(PEAKS, WORK, [0]) == WORK.weight_bytes / 50e9
    assert decode_seconds(PEAKS, WORK, [0] * 1000) == 1000 * WORK.flops(0, drawn=True) / 1000e9
    more = decode_seconds(PEAKS, WORK, [4096] * 8) - decode_seconds(PEAKS, WORK, [64] * 8)
    assert more == pytest.approx(8 * (4096 - 64) * WORK.kv_bytes(1) / 50e9)


def test_a_prompt_is_bound_by_arithmetic_and_never_by_less_than_the_weights() -> None:
    assert prefill_seconds(PEAKS, WORK, 1) == WORK.weight_bytes / 50e9
    assert prefill_seconds(PEAKS, WORK, 2048) > 2048 * WORK.flops(0, drawn=False) / 1000e9


def test_w1_cannot_be_faster_than_its_prompts_and_its_steps() -> None:
    """The bound that the figures of this workload are quoted with, for about this machine: 8.4 s."""
    assert closed_batch_seconds(PEAKS, WORK, w1(32000)) == pytest.approx(8.4, rel=0.1)
