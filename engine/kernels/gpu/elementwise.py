"""Element-wise work on a GPU: the residual sum with its norm, and the gated activation, each one pass over memory.

All arithmetic is float32. The residual sum is rounded to the stream's dtype before it is normed; all else is rounded
once, where it is stored. A row of the stream is one program's, so its bits do not depend on its company.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.gpu.launch import Launch
from engine.kernels.gpu.overlap import take_turn

MAX_HIDDEN_SIZE = 16_384
"""A program holds a whole row of the stream in registers."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Launch parameters. NORM_VALUES: of a row, for each warp; 16 values a thread are two 16-byte loads of a 16-bit dtype.
NORM_VALUES, MAX_NORM_WARPS = 512, 16
GATE_BLOCK, GATE_WARPS = 2048, 4


class TritonElementWise:
    def __init__(self, norm_eps: float) -> None:
        self._norm_eps = norm_eps

    @staticmethod
    def supports(dtype: torch.dtype, hidden_size: int) -> bool:
        return dtype in _DTYPES and hidden_size <= MAX_HIDDEN_SIZE

    def step(self, hidden: Tensor) -> TritonElementWiseStep:
        return TritonElementWiseStep(hidden, self._norm_eps)


class TritonElementWiseStep:
    """Its buffers are allocated where it is made, and at the first `gate`: a step that is captured in a graph is made
    inside the capture."""

    def __init__(self, hidden: Tensor, norm_eps: float) -> None:
        _check(hidden, hidden.dtype)
        assert TritonElementWise.supports(hidden.dtype, hidden.shape[1]), f"rows of {hidden.shape[1]} {hidden.dtype}"
        self._hidden, self._norm_eps = hidden, norm_eps
        self._normed, self._gated = torch.empty_like(hidden), hidden.new_empty((0, 0))
        self._block, self._warps = norm_launch(hidden.shape[1])

    def add_norm(self, delta: Tensor | None, weight: Tensor) -> Tensor:
        hidden = self._hidden
        if delta is not None:
            _check(delta, hidden.dtype)
            assert delta.shape == hidden.shape, f"{tuple(delta.shape)} for {tuple(hidden.shape)}"
        arguments = {
            "hidden": hidden,
            "delta": hidden if delta is None else delta,
            "weight": weight,
            "normed": self._normed,
            "size": hidden.shape[1],
            "eps": self._norm_eps,
            "HAS_DELTA": delta is not None,
            "BLOCK": self._block,
        }
        Launch(add_norm_rows, (len(hidden),), arguments, self._warps).run()
        return self._normed

    def gate(self, gate_up: Tensor) -> Tensor:
        _check(gate_up, self._hidden.dtype)
        num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        if len(self._gated) < num_rows or self._gated.shape[1] != size:
            self._gated = gate_up.new_empty((num_rows, size))
        arguments = {"gate_up": gate_up, "gated": self._gated, "size": size, "BLOCK": GATE_BLOCK}
        Launch(gate_rows, (num_rows, triton.cdiv(size, GATE_BLOCK)), arguments, GATE_WARPS).run()
        return self._gated[:num_rows]


def norm_launch(hidden_size: int) -> tuple[int, int]:
    """BLOCK and num_warps for rows of `hidden_size`."""
    block = triton.next_power_of_2(hidden_size)
    return block, min(max(block // NORM_VALUES, 1), MAX_NORM_WARPS)


def _check(rows: Tensor, dtype: torch.dtype) -> None:
    assert rows.dtype is dtype, f"{rows.dtype} for a stream of {dtype}"
    assert rows.is_contiguous(), "rows lie apart"


@triton.jit
def add_norm_rows(
    hidden: tl.tensor,
    delta: tl.tensor,
    weight: tl.tensor,
    normed: tl.tensor,
    size: tl.tensor,
    eps: tl.tensor,
    HAS_DELTA: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
) -> None:
    """A program: one row. `delta` is not read without HAS_DELTA."""
    take_turn(OVERLAPS)
    columns = tl.arange(0, BLOCK)
    is_value = columns < size
    at = tl.program_id(0).to(tl.int64) * size + columns
    stream = tl.load(hidden + at, mask=is_value, other=0.0)
    if HAS_DELTA:
        added = tl.load(delta + at, mask=is_value, other=0.0)
        stream = (stream.to(tl.float32) + added.to(tl.float32)).to(stream.dtype)
        tl.store(hidden + at, stream, mask=is_value)
    values = stream.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / size + eps)
    weights = tl.load(weight + columns, mask=is_value, other=0.0).to(tl.float32)
    tl.store(normed + at, (values * scale * weights).to(stream.dtype), mask=is_value)


@triton.jit
def gate_rows(
    gate_up: tl.tensor, gated: tl.tensor, size: tl.tensor, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr
) -> None:
    """A program: BLOCK values of one row. silu(gate) = gate / (1 + exp(-gate))."""
    take_turn(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_value = columns < size
    at = gate_up + row * 2 * size + columns
    gate = tl.load(at, mask=is_value, other=0.0).to(tl.float32)
    up = tl.load(at + size, mask=is_value, other=0.0).to(tl.float32)
    product = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(gated + row * size + columns, product.to(gated.dtype.element_ty), mask=is_value)
