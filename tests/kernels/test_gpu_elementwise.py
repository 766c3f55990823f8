"""The Triton element-wise kernels beside torch's operations in float32 over the same values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.elementwise import ElementWiseStep
from engine.kernels.gpu.elementwise import MAX_HIDDEN_SIZE, TritonElementWise
from engine.kernels.torch_elementwise import TorchElementWise
from tests.kernels.dtypes import DTYPES

EPS = 1e-6
# One rounding of values around 1 to 8, at most.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
NORMED = [(1, 16), (3, 896), (37, 80), (2, 5120), (1, MAX_HIDDEN_SIZE), (129, 64)]  # rows, values
GATED = [(1, 16), (3, 4864), (37, 80), (2, 2048), (2, 65_536), (1, 13_696)]

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# Of exp(-gate), which may be infinity, numpy says so.
pytestmark = pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """`expected` is float32, and not rounded."""
    assert actual.dtype is dtype
    torch.testing.assert_close(actual.float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def random(device: torch.device, dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def ours(hidden: Tensor) -> ElementWiseStep:
    return TritonElementWise(EPS).step(hidden)


def exact(hidden: Tensor) -> ElementWiseStep:
    return TorchElementWise(EPS).step(hidden.float())


@every_dtype
@pytest.mark.parametrize(("rows", "size"), NORMED)
def test_the_residual_sum_is_torchs_and_its_norm_the_exact_one_rounded_once(
    device: torch.device, dtype: torch.dtype, rows: int, size: int
) -> None:
    hidden, delta = random(device, dtype, rows, size), random(device, dtype, rows, size, seed=1)
    weight = random(device, dtype, size, seed=2)
    step = ours(hidden)
    close(step.add_norm(None, weight), exact(hidden).add_norm(None, weight.float()), dtype)
    total, added = hidden + delta, delta.clone()
    normed = step.add_norm(delta, weight)
    assert torch.equal(hidden, total)
    assert torch.equal(delta, added)
    close(normed, exact(total).add_norm(None, weight.float()), dtype)


@every_dtype
@pytest.mark.parametrize(("rows", "size"), GATED)
def test_the_gate_is_the_exact_one_rounded_once(device: torch.device, dtype: torch.dtype, rows: int, size: int) -> None:
    gate_up = random(device, dtype, rows, 2 * size)
    gate_up[:, :size] *= 4
    hidden = random(device, dtype, rows, 16)
    close(ours(hidden).gate(gate_up), exact(hidden).gate(gate_up.float()), dtype)


def test_slices_of_different_lengths_share_a_steps_buffer(device: torch.device) -> None:
    gate_up = random(device, torch.float32, 37, 160)
    step = ours(random(device, torch.float32, 37, 16))
    whole = step.gate(gate_up)
    expected, address = whole.clone(), whole.data_ptr()
    for start in range(0, 37, 20):
        part = step.gate(gate_up[start : start + 20])
        assert part.data_ptr() == address
        assert torch.equal(part, expected[start : start + 20])


def test_the_gate_of_large_and_of_strange_values_is_torchs(device: torch.device) -> None:
    values = [0.0, -0.0, 80.0, -80.0, 1e30, -1e30, -3e38, float("inf"), float("-inf"), float("nan")]
    gate = torch.tensor(values, device=device)
    gated = ours(gate[None].clone()).gate(torch.cat((gate, torch.ones_like(gate)))[None])
    torch.testing.assert_close(gated[0], torch.nn.functional.silu(gate), equal_nan=True, atol=1e-30, rtol=1e-5)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype is not torch.float32], ids=str)
def test_16_bit_sums_are_rounded_as_torch_rounds_them(device: torch.device, dtype: torch.dtype) -> None:
    """Sums of every finite number with half a last place and others near it: ties, carries, subnormals, overflow."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype).view(-1, 256)
    for other in (every, every.nextafter(torch.zeros(1, dtype=dtype)) / 256, every.flip(0), every.flip(1) / 512):
        hidden, delta = every.to(device), other.contiguous().to(device)
        expected = hidden + delta
        ours(hidden).add_norm(delta, torch.ones(256, dtype=dtype, device=device))
        torch.testing.assert_close(hidden, expected, equal_nan=True, atol=0, rtol=0)


@every_dtype
def test_company_does_not_change_a_bit_of_a_row(device: torch.device, dtype: torch.dtype) -> None:
    hidden, delta = random(device, dtype, 33, 896), random(device, dtype, 33, 896, seed=1)
    weight, gate_up = random(device, dtype, 896, seed=2), random(device, dtype, 33, 2 * 896, seed=3)

    def results(rows: slice) -> Tensor:
        stream = hidden[rows].clone()
        step = ours(stream)
        return torch.cat((step.add_norm(delta[rows], weight), stream, step.gate(gate_up[rows])), dim=1)

    together = results(slice(0, 33))
    for row in (0, 18, 32):
        assert torch.equal(results(slice(row, row + 1)), together[row : row + 1])


def test_a_step_without_rows_does_nothing(device: torch.device) -> None:
    step = ours(torch.empty(0, 64, device=device))
    assert step.add_norm(torch.empty(0, 64, device=device), torch.ones(64, device=device)).shape == (0, 64)
    assert step.gate(torch.empty(0, 256, device=device)).shape == (0, 128)


def test_what_it_cannot_hold_is_refused() -> None:
    assert TritonElementWise.supports(torch.bfloat16, MAX_HIDDEN_SIZE)
    assert not TritonElementWise.supports(torch.bfloat16, MAX_HIDDEN_SIZE + 1)
    assert not TritonElementWise.supports(torch.float64, 64)
    with pytest.raises(AssertionError, match="rows of 16385"):
        ours(torch.zeros(1, MAX_HIDDEN_SIZE + 1))
    with pytest.raises(AssertionError, match="rows lie apart"):
        ours(torch.zeros(4, 4).t())


@pytest.mark.gpu
def test_a_step_can_be_captured_and_replayed() -> None:
    device = torch.device("cuda")
    hidden, delta = random(device, torch.bfloat16, 5, 896), random(device, torch.bfloat16, 5, 896, seed=1)
    weight, gate_up = random(device, torch.bfloat16, 896, seed=2), random(device, torch.bfloat16, 5, 512, seed=3)
    expected_step, stream = ours(hidden.clone()), hidden.clone()
    expected = expected_step.add_norm(delta, weight).clone(), expected_step.gate(gate_up).clone()
    ours(stream).gate(gate_up)  # compiles outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step = ours(stream)
        captured = step.add_norm(delta, weight), step.gate(gate_up)
    for _ in range(2):
        stream.copy_(hidden)
        graph.replay()
        assert torch.equal(captured[0], expected[0])
        assert torch.equal(captured[1], expected[1])
