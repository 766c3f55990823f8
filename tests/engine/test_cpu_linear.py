"""Products with packed 16-bit weights beside the same in float64, by every instruction set that this machine has."""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from engine.kernels.cpu.elementwise import CompiledElementWise
from engine.kernels.cpu.library import Isa, Kernel, load_kernel
from engine.kernels.cpu.linear import PanelLinear
from engine.loader import load_model
from engine.models import linear
from engine.models.decoder import Decoder
from engine.models.linear import DenseLinear, make_embedding, make_linear
from engine.models.tensors import EMBEDDING, expected_tensors
from tests.checkpoints import build_checkpoint

KERNEL = load_kernel()
assert KERNEL is not None, "set-up needs a C compiler and builds the kernel; without it nothing here would be tested"
ISAS = [isa for isa in (Isa.AVX2, Isa.AVX512, Isa.AMX) if isa <= KERNEL.isa]
DTYPES = [torch.bfloat16, torch.float16]

# [out_features, in_features]: tails of panels, of groups of panels and of vectors; with 6,001 and with 40,000 features
# even few rows, and even one, are more than a cache holds at once.
SHAPES = [(1, 1), (16, 64), (17, 5), (33, 400), (100, 896), (289, 401), (130, 2000), (8, 6001), (3, 40000)]
SHAPES += [(1, 32), (16, 64), (47, 96), (300, 4864)]  # as AMX takes them
ROWS = [1, 2, 3, 5, 6, 7, 13, 14, 15, 16, 17, 31, 32, 33, 64, 84, 85, 200]
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Most that one rounding changes a number by, relatively."""

each_isa = pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def kernel(isa: Isa) -> Kernel:
    assert KERNEL is not None  # mypy forgets it in a function
    return KERNEL.with_isa(isa)


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@each_isa
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_product_is_that_of_float64_up_to_float32_sums_and_one_rounding(
    isa: Isa, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    weight, bias, x = random(*shape, dtype=dtype), random(shape[0], dtype=dtype), random(200, shape[1], dtype=dtype)
    for added in (None, bias):
        y = PanelLinear(kernel(isa), weight, added)(x)
        offset = 0 if added is None else added.double()
        exact = x.double() @ weight.double().T + offset
        magnitude = x.double().abs() @ weight.double().abs().T + abs(offset)
        summing = magnitude * (shape[1] + 1) * 2.0**-24
        bound = summing + UNIT[dtype] * (exact.abs() + summing) + 2.0**-25  # the last: half of float16's smallest
        assert y.dtype is dtype
        assert ((y.double() - exact).abs() <= bound).all()


@each_isa
@each_dtype
def test_sums_that_float32_holds_are_rounded_once(isa: Isa, dtype: torch.dtype) -> None:
    """Whole numbers, whose sums are exact: every bit is known, ties between two numbers of 16 bits included."""
    weight, x = (torch.randint(-3, 4, shape).to(dtype) for shape in ((100, 896), (37, 896)))
    bias = torch.randint(-3, 4, (100,)).to(dtype)
    exact = x.double() @ weight.double().T + bias.double()
    assert (exact.float() == exact).all()
    assert torch.equal(PanelLinear(kernel(isa), weight, bias)(x), exact.float().to(dtype))


@each_isa
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_neither_company_nor_threads_change_a_bit(isa: Isa, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    product = PanelLinear(kernel(isa), random(*shape, dtype=dtype), random(shape[0], dtype=dtype))
    x = random(200, shape[1], dtype=dtype)
    together = product(x)
    for count in (2, 3):
        with threads(count):
            assert torch.equal(product(x), together)
    for rows in ROWS:
        assert torch.equal(product(x[:rows]), together[:rows]), f"{rows} rows"
        assert torch.equal(product(x[-rows:]), together[-rows:]), f"the last {rows} rows"
    with threads(2):
        assert torch.equal(product(x[77:78]), together[77:78])


@each_isa
@each_dtype
@pytest.mark.parametrize("features", [1, 8, 15, 16, 17, 40])
def test_nothing_behind_the_bias_is_read(isa: Isa, dtype: torch.dtype, features: int) -> None:
    """It ends where a page begins that may not be touched: who does ends the process."""
    pages = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    second = ctypes.addressof(ctypes.c_char.from_buffer(pages)) + mmap.PAGESIZE
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(second), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    bias = torch.frombuffer(pages, dtype=dtype, count=features, offset=mmap.PAGESIZE - 2 * features)
    bias.copy_(torch.arange(features))
    product = PanelLinear(kernel(isa), torch.zeros(features, 32, dtype=dtype), bias)
    for rows in (1, 40):
        assert torch.equal(product(torch.ones(rows, 32, dtype=dtype)), bias.expand(rows, -1))


@each_isa
@each_dtype
def test_every_number_of_16_bits_times_one_is_itself(isa: Isa, dtype: torch.dtype) -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)
    y = PanelLinear(kernel(isa), every[:, None])(torch.ones(1, 1, dtype=dtype))[0]
    assert torch.equal(y.isnan(), every.isnan())
    assert torch.equal(y.nan_to_num(7.0), every.nan_to_num(7.0))
    x = PanelLinear(kernel(isa), torch.ones(1, 1, dtype=dtype))(every[:, None])[:, 0]
    assert torch.equal(x.nan_to_num(7.0), every.nan_to_num(7.0))


@each_isa
def test_what_float16_cannot_hold_is_infinite(isa: Isa) -> None:
    product = PanelLinear(kernel(isa), torch.full((1, 4), 200.0, dtype=torch.float16))
    assert product(torch.full((1, 4), -200.0, dtype=torch.float16)).item() == float("-inf")


@each_isa
@each_dtype
def test_rows_of_x_may_lie_apart(isa: Isa, dtype: torch.dtype) -> None:
    product = PanelLinear(kernel(isa), random(20, 50, dtype=dtype))
    wide = random(9, 120, dtype=dtype)
    assert torch.equal(product(wide[:, 31:81]), product(wide[:, 31:81].contiguous()))
    columns = random(50, 9, dtype=dtype)
    assert torch.equal(product(columns.T), product(columns.T.contiguous()))
    assert product(wide[:0, :50]).shape == (0, 20)


@each_isa
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_come_back_bit_for_bit(isa: Isa, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    bits = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16)
    product = PanelLinear(kernel(isa), bits.view(dtype))
    order = torch.randperm(shape[0])
    for count in (1, 2):
        with threads(count):
            assert torch.equal(product.rows(order).view(torch.int16), bits[order])
    assert torch.equal(product.rows(order[:1].to(torch.int32).expand(3)).view(torch.int16), bits[order[:1].expand(3)])


# Elsewhere make_gated gates step by step, which is the other side of this comparison.
@pytest.mark.skipif(KERNEL.isa < Isa.AMX, reason="gates belong to the products of AMX")
@pytest.mark.parametrize("shape", [(32, 32), (96, 64), (512, 4864)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_gates_are_those_of_the_two_products(shape: tuple[int, int], with_bias: bool) -> None:
    weight, x = random(*shape, dtype=torch.bfloat16), random(300, shape[1], dtype=torch.bfloat16) / 8
    bias = random(shape[0], dtype=torch.bfloat16) if with_bias else None
    plain, gated = (PanelLinear(kernel(Isa.AMX), weight, bias, gated=is_gated) for is_gated in (False, True))
    for rows in (1, 17, 32, 300):
        step = CompiledElementWise(kernel(Isa.AMX), 1e-6).step(x[:rows].contiguous())
        assert torch.equal(gated(x[:rows]), step.gate(plain(x[:rows])))


@each_isa
@pytest.mark.parametrize("index", [-1, 17])
def test_a_row_that_is_none_is_refused(isa: Isa, index: int) -> None:
    with pytest.raises(IndexError, match="17 rows"):
        PanelLinear(kernel(isa), random(17, 5, dtype=torch.bfloat16)).rows(torch.tensor([3, index]))


@each_isa
def test_a_weight_that_is_a_view_is_packed_as_it_is_seen(isa: Isa) -> None:
    weight = random(50, 40, dtype=torch.bfloat16).T[::2]
    assert torch.equal(PanelLinear(kernel(isa), weight).rows(torch.arange(20)), weight)


@each_isa
def test_threads_are_torchs_own(isa: Isa) -> None:
    product, x = PanelLinear(kernel(isa), random(500, 64, dtype=torch.bfloat16)), random(9, 64, dtype=torch.bfloat16)
    with threads(2):
        torch.ones(1 << 20).add_(1)
        before = len(os.listdir("/proc/self/task"))
        product(x)
        assert len(os.listdir("/proc/self/task")) == before


def use(monkeypatch: pytest.MonkeyPatch, isa: Isa | None) -> None:
    """make_linear on a machine that has `isa`, or where there is no compiler."""
    assert KERNEL is not None
    found = None if isa is None else replace(KERNEL, isa=isa)
    monkeypatch.setattr(linear, "load_kernel", lambda: found)


@pytest.mark.parametrize(
    ("isa", "panels"),
    [(None, False), (Isa.GENERIC, False), (Isa.AVX2, True), (Isa.AVX512, True), (Isa.AVX512_BF16, False)],
)
def test_bfloat16_is_packed_by_us_where_only_16_bit_arithmetic_is_missing(
    monkeypatch: pytest.MonkeyPatch, isa: Isa | None, panels: bool
) -> None:
    use(monkeypatch, isa)
    assert (linear._panel_kernel(random(4, 4, dtype=torch.bfloat16)) is not None) is panels


def test_float16_is_packed_by_us_where_the_processor_cannot_multiply_it(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, ISAS[-1])
    cannot = not torch.ops.mkldnn._is_mkldnn_fp16_supported()
    assert isinstance(make_linear(random(4, 4, dtype=torch.float16)), PanelLinear) is cannot


def test_float16_needs_f16c() -> None:
    assert KERNEL is not None
    without = replace(KERNEL, library=SimpleNamespace(baton_has_f16c=lambda: 0))  # type: ignore[arg-type]  # all that is asked of it
    assert not PanelLinear.supports(without, torch.float16)


def test_float32_stays_with_torch() -> None:
    assert isinstance(make_linear(random(4, 4, dtype=torch.float32)), DenseLinear)


@each_isa
@each_dtype
def test_a_tied_model_holds_one_copy_of_its_weights(
    isa: Isa, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = load_model(str(build_checkpoint("qwen2", tmp_path, tokenizer=False, tie_word_embeddings=True))).spec
    assert spec.tied_embeddings
    use(monkeypatch, isa)
    monkeypatch.setattr(linear, "_has_arithmetic", lambda kernel, dtype: False)
    shapes, alive = expected_tensors(spec), {}

    def take(name: str) -> Tensor:
        tensor = random(*shapes[name], dtype=dtype, seed=len(name))
        alive[name] = weakref.ref(tensor)
        return tensor

    decoder = Decoder(spec, take)
    kept = {name for name, tensor in alive.items() if tensor() is not None}
    assert EMBEDDING in alive
    assert not {name for name in kept if len(shapes[name]) > 1}, "matrices are held in panels alone"
    weight = take(EMBEDDING)
    ids = torch.randint(spec.vocab_size, (9,))
    assert torch.equal(decoder._embedding(ids), weight[ids])
    assert torch.equal(decoder.logits(weight[:3]), make_linear(weight)(weight[:3]).float())
    assert decoder.dtype is dtype


def test_an_embedding_that_is_not_tied_keeps_its_weight() -> None:
    weight, ids = random(9, 4, dtype=torch.bfloat16), torch.tensor([8, 0])
    assert torch.equal(make_embedding(weight, None)(ids), weight[ids])
