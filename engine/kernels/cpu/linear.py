"""Products with 16-bit weights by linear.c, for processors with AMX, and for those without 16-bit arithmetic."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from engine.kernels.cpu.library import Isa, Kernel, Weight

_DTYPES = {torch.bfloat16: 1, torch.float16: 2}  # common.h's numbers


_AMX_DEPTH, _AMX_COLUMNS = 32, 32  # panel_amx.h's SQUARE_DEPTH and STRIP


class PanelLinear:
    """A weight in panels: the only copy that is needed, since rows of it can be read back."""

    def __init__(self, kernel: Kernel, weight: Tensor, bias: Tensor | None = None, *, gated: bool = False) -> None:
        """`weight` `[out_features, in_features]`, which is not kept; `bias` `[out_features]` of the same dtype.

        `gated`: of what comes out the first half are gates of the second, and silu(gate) * up is given back.
        """
        assert self.supports(kernel, weight.dtype), f"{weight.dtype} by {kernel.isa.name}"
        assert not gated or self.supports_gated(kernel, weight), f"{tuple(weight.shape)} {weight.dtype}, gated"
        assert weight.device.type == "cpu", f"the weight is on {weight.device}"
        assert bias is None or (bias.dtype is weight.dtype and bias.shape == weight.shape[:1])
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self._kernel, self._library = kernel, kernel.library
        self._bias = None if bias is None else bias.contiguous()  # kept: the kernel has its address
        self._weight = Weight(
            bias=None if self._bias is None else self._bias.data_ptr(),
            in_features=self.in_features,
            out_features=self.out_features,
            dtype=_DTYPES[weight.dtype],
            isa=int(kernel.isa),
            gated=int(gated),
        )
        self._y_features = self.out_features // 2 if gated else self.out_features
        self._address = ctypes.byref(self._weight)
        self._panels = torch.empty(self._library.baton_linear_packed_size(self._address), dtype=weight.dtype)
        self._weight.panels = self._panels.data_ptr()
        rows = weight.contiguous()
        self._library.baton_linear_pack(self._address, ctypes.byref(kernel.team()), rows.data_ptr())

    @staticmethod
    def supports(kernel: Kernel, dtype: torch.dtype) -> bool:
        if kernel.isa < Isa.AVX2 or dtype not in _DTYPES:
            return False
        return dtype is torch.bfloat16 or bool(kernel.library.baton_has_f16c())

    @staticmethod
    def uses_amx(kernel: Kernel, weight: Tensor) -> bool:
        """As linear.c's in_squares decides."""
        return kernel.isa >= Isa.AMX and weight.dtype is torch.bfloat16 and weight.shape[1] % _AMX_DEPTH == 0

    @classmethod
    def supports_gated(cls, kernel: Kernel, weight: Tensor) -> bool:
        return cls.uses_amx(kernel, weight) and weight.shape[0] % _AMX_COLUMNS == 0

    @property
    def nbytes(self) -> int:
        return self._panels.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """`[num_rows, in_features]` to `[num_rows, out_features]`, gated to half of it. Rows of `x` may lie apart."""
        assert x.dtype is self.dtype, f"{x.dtype} for a weight of {self.dtype}"
        assert x.shape == (len(x), self.in_features), f"{tuple(x.shape)} for {self.in_features} features"
        if x.stride(1) != 1:
            x = x.contiguous()
        y = torch.empty((len(x), self._y_features), dtype=self.dtype)
        self._library.baton_linear(
            self._address, ctypes.byref(self._kernel.team()), x.data_ptr(), x.stride(0), len(x), y.data_ptr()
        )
        return y

    def rows(self, indices: Tensor) -> Tensor:
        """The weight's rows `indices` `[n]`, bit for bit: `[n, in_features]`. Raises IndexError where one is none."""
        assert not self._weight.gated, "gates are not in the order of their rows"
        indices = indices.to(torch.int64).contiguous()
        rows = torch.empty((len(indices), self.in_features), dtype=self.dtype)
        read = self._library.baton_linear_unpack(
            self._address, ctypes.byref(self._kernel.team()), indices.data_ptr(), len(indices), rows.data_ptr()
        )
        if not read:
            raise IndexError(f"the weight has {self.out_features} rows, and others are asked for")
        return rows
