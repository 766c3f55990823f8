"""The compiled element-wise kernels beside torch's operations in float32 over the same values: every instruction set
that this machine has, over shapes and dtypes. Whole models beside themselves without a compiler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.attention import HeadNorms, Rotary, Span
from engine.elementwise import ElementWiseStep
from engine.kernels import choice
from engine.kernels.choice import choose_attention, choose_elementwise
from engine.kernels.cpu.elementwise import CompiledElementWise
from engine.kernels.cpu.library import Isa
from engine.kernels.reference import ReferenceAttention
from engine.kernels.torch_elementwise import TorchElementWise
from engine.kv_cache import KVCache
from engine.loader import LoadedModel, load_model
from engine.models.decoder import Decoder
from engine.models.rope import inverse_frequencies, rotary
from engine.models.spec import RopeSpec
from tests.checkpoints import FAMILIES, build_checkpoint
from tests.engine.test_cpu_attention import ISAS, LAYER, Pool, Shape, kernel, threads

EPS = 1e-6
# One rounding of values around 1 to 8, at most.
TOLERANCE = {"float32": 2e-6, "bfloat16": 4e-3, "float16": 5e-4}
DTYPES = {name: getattr(torch, name) for name in TOLERANCE}
SIZES = [(1, 16), (3, 896), (37, 80), (129, 4864)]  # rows, values; the last is shared out among threads

every_isa = pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE)
every_size = pytest.mark.parametrize(("rows", "size"), SIZES)


def close(actual: Tensor, expected: Tensor, dtype: str) -> None:
    """`expected` is float32, and not rounded."""
    assert actual.dtype is DTYPES[dtype]
    torch.testing.assert_close(actual.float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def random(dtype: str, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DTYPES[dtype])


def compiled(hidden: Tensor, isa: Isa) -> ElementWiseStep:
    return CompiledElementWise(kernel(isa), EPS).step(hidden)


def exact(hidden: Tensor) -> ElementWiseStep:
    return TorchElementWise(EPS).step(hidden.float())


@every_isa
@every_dtype
@every_size
def test_the_residual_sum_is_torchs_and_its_norm_the_exact_one_rounded_once(
    isa: Isa, dtype: str, rows: int, size: int
) -> None:
    hidden, delta, weight = random(dtype, rows, size), random(dtype, rows, size, seed=1), random(dtype, size, seed=2)
    step = compiled(hidden, isa)
    close(step.add_norm(None, weight), exact(hidden).add_norm(None, weight.float()), dtype)
    total = hidden + delta
    normed = step.add_norm(delta, weight)
    assert torch.equal(hidden, total)
    close(normed, exact(total).add_norm(None, weight.float()), dtype)


@every_isa
@every_dtype
@every_size
def test_the_gate_is_the_exact_one_rounded_once(isa: Isa, dtype: str, rows: int, size: int) -> None:
    gate_up = random(dtype, rows, 2 * size)
    gate_up[:, :size] *= 4
    hidden = random(dtype, rows, size)
    close(compiled(hidden, isa).gate(gate_up), exact(hidden).gate(gate_up.float()), dtype)


def test_slices_of_different_lengths_share_a_steps_buffer() -> None:
    gate_up = random("bfloat16", 37, 160)
    step = compiled(random("bfloat16", 37, 16), ISAS[-1])
    whole = step.gate(gate_up).clone()
    assert torch.equal(torch.cat([step.gate(part).clone() for part in gate_up.split(20)]), whole)


@every_isa
def test_the_gate_of_large_and_of_strange_values_is_torchs(isa: Isa) -> None:
    values = [0.0, -0.0, 80.0, -80.0, 1e30, -1e30, -3e38, float("inf"), float("-inf"), float("nan")]
    gate = torch.tensor([*values, *(1.0,) * 6])
    gate_up = torch.cat((gate, torch.ones(16)))[None]
    gated = compiled(gate[None].clone(), isa).gate(gate_up)
    torch.testing.assert_close(gated[0], torch.nn.functional.silu(gate), equal_nan=True, atol=1e-30, rtol=1e-5)


@every_isa
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_values_are_rounded_as_torch_rounds_them(isa: Isa, dtype: str) -> None:
    """Sums of every finite number with half a last place and others near it: ties, carries, subnormals, overflow."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(DTYPES[dtype]).view(-1, 256)
    for other in (every, every.nextafter(torch.zeros(1, dtype=every.dtype)) / 256, every.flip(0), every.flip(1) / 512):
        hidden = every.clone()
        compiled(hidden, isa).add_norm(other.contiguous(), torch.ones(256, dtype=every.dtype))
        torch.testing.assert_close(hidden, every + other, equal_nan=True, atol=0, rtol=0)


@every_dtype
def test_neither_company_nor_threads_change_a_bit_of_a_row(dtype: str) -> None:
    hidden, delta, weight = random(dtype, 70, 896), random(dtype, 70, 896, seed=1), random(dtype, 896, seed=2)
    gate_up = random(dtype, 70, 2 * 896, seed=3)

    def results(rows: slice) -> Tensor:
        stream = hidden[rows].clone()
        step = compiled(stream, ISAS[-1])
        return torch.cat((step.add_norm(delta[rows], weight), stream, step.gate(gate_up[rows])), dim=1)

    together = results(slice(0, 70))
    with threads(2):
        assert torch.equal(results(slice(0, 70)), together)
    for row in (0, 18, 69):
        assert torch.equal(results(slice(row, row + 1)), together[row : row + 1])


BATCH = [(699, 1), (130, 40), (8, 1), (0, 33)]  # 75 tokens
HEADS = [
    Shape(head_dim=64, num_kv_heads=2, group=7),
    Shape(head_dim=80, num_kv_heads=4, group=1, block_size=5),
    Shape(head_dim=128, num_kv_heads=1, group=8, block_size=1),
    Shape(head_dim=256, num_kv_heads=2, group=3, block_size=40),
    Shape(head_dim=16, num_kv_heads=1, group=2),
]


def turns(pool: Pool) -> Rotary:
    positions = torch.cat([torch.arange(span.start, span.end) for span in pool.spans])
    return rotary(inverse_frequencies(RopeSpec(10000.0), pool.shape.head_dim), positions)


def qkv(pool: Pool) -> Tensor:
    return torch.cat((pool.query, pool.key, pool.value), dim=1).flatten(1)


def norms(pool: Pool, normed: bool) -> HeadNorms | None:
    dtype, head_dim = pool.shape.dtype, pool.shape.head_dim
    return HeadNorms(random(dtype, head_dim), random(dtype, head_dim, seed=1), EPS) if normed else None


@every_isa
@every_dtype
@pytest.mark.parametrize("shape", HEADS, ids=str)
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
def test_heads_are_turned_and_written_and_nothing_else_of_the_pool(
    isa: Isa, dtype: str, shape: Shape, normed: bool
) -> None:
    pool = Pool(Shape(**{**vars(shape), "dtype": dtype}), BATCH)
    layout = pool.cache.layout
    reference = KVCache(type(layout)(**{**vars(layout), "dtype": "float32"}), pool.cache.num_blocks)
    reference.tensor.copy_(pool.cache.tensor)
    weights = norms(pool, normed)
    exact_weights = HeadNorms(weights.query.float(), weights.key.float(), EPS) if weights else None
    batch = ReferenceAttention(reference, pool.tables, (None,)).batch(pool.spans)
    expected = batch.rotate_and_write(LAYER, qkv(pool).float(), turns(pool), exact_weights)
    before = pool.cache.tensor.clone()
    query = pool.compiled(isa).batch(pool.spans).rotate_and_write(LAYER, qkv(pool), turns(pool), weights)
    close(query, expected, dtype)
    bound = TOLERANCE[dtype]
    torch.testing.assert_close(pool.cache.tensor.float(), reference.tensor, atol=bound, rtol=bound, equal_nan=True)
    written = pool.cache.tensor.view(torch.uint8) != before.view(torch.uint8)
    rows = written.view(*before.shape, -1).any(-1).any(-1)  # [blocks, layers, 2, heads, block_size]
    assert rows[:, LAYER].sum() == 75 * 2 * shape.num_kv_heads
    assert rows.sum() == rows[:, LAYER].sum()
    values = [pool.cache.tensor[int(pool.tables[s.slot, s.start // shape.block_size]), LAYER, 1] for s in pool.spans]
    for span, value in zip(pool.spans, values, strict=True):  # as they are, bit for bit
        assert torch.equal(value[:, span.start % shape.block_size], pool.value[span.row])


@every_dtype
def test_neither_company_nor_threads_change_a_bit_of_a_turned_head(dtype: str) -> None:
    pool = Pool(Shape(dtype=dtype), BATCH)
    attention, weights, angles = pool.compiled(ISAS[-1]), norms(pool, True), turns(pool)
    together = attention.batch(pool.spans).rotate_and_write(LAYER, qkv(pool), angles, weights)
    written = pool.cache.tensor.clone()
    with threads(2):
        again = attention.batch(pool.spans).rotate_and_write(LAYER, qkv(pool), angles, weights)
    assert torch.equal(again, together)
    for span in pool.spans:
        rows = slice(span.row, span.row + span.count)
        alone = attention.batch([Span(0, span.start, span.count, span.slot)])
        own = Rotary(angles.cos[rows], angles.sin[rows])
        assert torch.equal(alone.rotate_and_write(LAYER, qkv(pool)[rows], own, weights), together[rows])
    torch.testing.assert_close(pool.cache.tensor, written, equal_nan=True, atol=0, rtol=0)


@torch.inference_mode()
def _hidden(decoder: Decoder, cache: KVCache) -> Tensor:
    """Of a prompt in two chunks, the second beside another prompt."""
    blocks = cache.num_blocks
    tables = torch.randperm(blocks, generator=torch.Generator().manual_seed(0)).int().view(2, -1).numpy()
    attention = choose_attention(cache, tables, decoder.spec.windows)
    first, second = [Span(0, 0, 61, slot=1)], [Span(0, 61, 1, slot=1), Span(1, 0, 50, slot=0)]
    hidden = []
    for spans in (first, second):
        positions = torch.cat([torch.arange(span.start, span.end) for span in spans])
        hidden.append(decoder.forward(7 * positions % 300, positions, attention.batch(spans)))
    return torch.cat(hidden).float()


def _both(load: Callable[[], LoadedModel], monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    model = load()
    ours = _hidden(model.decoder, KVCache(model.kv_layout(16), 8))
    with monkeypatch.context() as without_compiler:
        without_compiler.setattr(choice, "load_kernel", lambda: None)
        model = load()
        return ours, _hidden(model.decoder, KVCache(model.kv_layout(16), 8))


@pytest.mark.parametrize("family", FAMILIES)
def test_models_compute_the_same_with_and_without_a_compiler(
    family: str, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, torchs = _both(lambda: load_model(str(checkpoint(family))), monkeypatch)
    torch.testing.assert_close(ours, torchs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
@pytest.mark.parametrize("family", FAMILIES)
def test_models_in_16_bit_differ_by_rounding_alone(
    family: str, dtype: torch.dtype, bound: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = build_checkpoint(family, tmp_path, dtype=dtype, tokenizer=False)
    ours, torchs = _both(lambda: load_model(str(path)), monkeypatch)
    assert (ours - torchs).abs().mean() / torchs.abs().mean() < bound


def test_rows_that_the_kernels_cannot_cut_are_left_to_torch() -> None:
    cpu = torch.device("cpu")
    assert isinstance(choose_elementwise(cpu, torch.float32, (64, 160), EPS), CompiledElementWise)
    assert isinstance(choose_elementwise(cpu, torch.float32, (64, 168), EPS), TorchElementWise)
    assert isinstance(choose_elementwise(cpu, torch.float64, (64, 160), EPS), TorchElementWise)
    assert isinstance(choose_elementwise(torch.device("meta"), torch.float32, (64, 160), EPS), TorchElementWise)
