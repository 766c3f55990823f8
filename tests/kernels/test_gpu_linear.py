"""The product of few rows beside torch's in float32 over the same values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.kernels.gpu import linear
from engine.kernels.gpu.linear import MAX_ROWS, TritonLinear, choose_splits
from tests.kernels.dtypes import DTYPES

# Values around 1: one rounding of each result.
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3}
SHAPES = [(64, 128), (192, 2048), (65, 512), (40, 1088), (130, 72), (64, 4096)]  # out_features, in_features

every_dtype = pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype.itemsize == 2], ids=str)


def _random(device: torch.device, dtype: torch.dtype, *shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


@every_dtype
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("features", "depth"), SHAPES)
@pytest.mark.parametrize("rows", [1, 7, MAX_ROWS])
def test_it_is_torchs_product_rounded_once(
    device: torch.device, dtype: torch.dtype, rows: int, features: int, depth: int, bias: bool
) -> None:
    weight = _random(device, dtype, features, depth, seed=1) / depth**0.5
    added = _random(device, dtype, features, seed=2) if bias else None
    x = _random(device, dtype, rows, depth + 8, seed=3)[:, :depth]  # rows that lie apart
    product = TritonLinear(weight, added)
    expected = x.double() @ weight.double().T + (0 if added is None else added.double())
    for _ in range(2):  # the counters are 0 again
        torch.testing.assert_close(product(x).double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@every_dtype
def test_neither_company_nor_repetition_changes_a_bit(device: torch.device, dtype: torch.dtype) -> None:
    product = TritonLinear(_random(device, dtype, 128, 4096, seed=1), None)
    x = _random(device, dtype, MAX_ROWS, 4096, seed=2)
    together = product(x)
    assert torch.equal(product(x), together)
    assert torch.equal(product(x[3:4]), together[3:4])


def test_no_row_reads_anothers_nan(device: torch.device) -> None:
    product = TritonLinear(_random(device, torch.float16, 64, 512, seed=1), None)
    x = _random(device, torch.float16, 3, 512, seed=2)
    alone = product(x[:1])
    x[1:] = float("nan")
    assert torch.equal(product(x)[:1], alone)
    assert product(x)[1:].isnan().all()


def test_more_rows_are_torchs(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "Launch", None)
    weight, x = (_random(device, torch.float16, n, 256, seed=n) for n in (64, MAX_ROWS + 1))
    torch.testing.assert_close(TritonLinear(weight, None)(x), x @ weight.T)


def test_the_depth_is_shared_out_where_columns_are_few() -> None:
    assert choose_splits(tiles=448, chunks=16) == 1
    assert choose_splits(tiles=96, chunks=16) == 2
    assert choose_splits(tiles=64, chunks=56) == 4
    assert choose_splits(tiles=1, chunks=1) == 1
