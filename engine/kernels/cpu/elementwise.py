"""Element-wise work by the compiled kernels: passes addresses to elementwise.c."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

import torch
from torch import Tensor

from engine.kernels.cpu.library import DTYPES, Kernel, Setting

_STEP = 16  # rows.h: rows are whole multiples of it


class CompiledElementWise:
    def __init__(self, kernel: Kernel, norm_eps: float) -> None:
        self.kernel, self.norm_eps = kernel, norm_eps

    @staticmethod
    def supports(dtype: torch.dtype, sizes: Iterable[int]) -> bool:
        """`sizes`: of the rows."""
        return _name(dtype) in DTYPES and all(size % _STEP == 0 for size in sizes)

    def step(self, hidden: Tensor) -> CompiledElementWiseStep:
        return CompiledElementWiseStep(self, hidden)


class CompiledElementWiseStep:
    """What does not change from layer to layer is looked up once: a call is to cost little more than its kernel."""

    def __init__(self, owner: CompiledElementWise, hidden: Tensor) -> None:
        kernel = owner.kernel
        self._library, self._norm_eps = kernel.library, owner.norm_eps
        self._setting = ctypes.byref(Setting(DTYPES.index(_name(hidden.dtype)), int(kernel.isa), kernel.team()))
        self._hidden, self._normed, self._gated = hidden, torch.empty_like(hidden), hidden.new_empty(0)
        self._shape, self._dtype = hidden.shape, hidden.dtype
        self._addresses = hidden.data_ptr(), self._normed.data_ptr()
        self._check(hidden)

    def add_norm(self, delta: Tensor | None, weight: Tensor) -> Tensor:
        added = None
        if delta is not None:
            self._check(delta)
            assert delta.shape == self._shape, f"{delta.shape} for {self._shape}"
            added = delta.data_ptr()
        hidden, normed = self._addresses
        self._library.baton_add_norm(
            self._setting, hidden, added, weight.data_ptr(), normed, *self._shape, self._norm_eps
        )
        return self._normed

    def gate(self, gate_up: Tensor) -> Tensor:
        self._check(gate_up)
        num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        if len(self._gated) < num_rows:
            self._gated = gate_up.new_empty((num_rows, size))
        self._library.baton_gate(self._setting, gate_up.data_ptr(), self._gated.data_ptr(), num_rows, size)
        return self._gated[:num_rows]

    def _check(self, rows: Tensor) -> None:
        assert rows.dtype is self._dtype, f"{rows.dtype} for a stream of {self._dtype}"
        assert rows.is_contiguous(), "rows lie apart"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
