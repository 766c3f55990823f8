"""Matrix products with weights: the plain one, Triton's for few rows on a GPU, and two with weights packed at load. Our
own is for processors with AMX and for those without 16-bit arithmetic, oneDNN's for those between.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.elementwise import ElementWiseStep
from engine.kernels.cpu.library import Isa, Kernel, load_kernel
from engine.kernels.cpu.linear import PanelLinear
from engine.kernels.fallback import warn_of_torch

Embedding = Callable[[Tensor], Tensor]
"""`[num_tokens]` token ids to their rows `[num_tokens, hidden_size]`."""


class Linear(Protocol):
    def __call__(self, x: Tensor) -> Tensor:
        """`x` `[num_tokens, in_features]` to `[num_tokens, out_features]`, of the weights' dtype."""


class DenseLinear:
    """Weight `[out_features, in_features]` as it is in the checkpoint."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight, self._bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)


class PackedLinear:
    """Weight in oneDNN's blocked order. Out of cache, small batches run at twice the speed of DenseLinear's."""

    _ROWS = 32  # batch size that the blocking is chosen for; measured good from 1 to 512

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, self._ROWS)
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return product


def make_linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """The fastest for the weight's device and dtype. Where it packs the weight, it keeps no other copy.

    Packing is for 16-bit dtypes on a CPU: float32 stays with the products whose rounding the exactness tests compare.
    """
    if weight.device.type != "cpu":
        triton_linear = _triton_linear(weight)
        return DenseLinear(weight, bias) if triton_linear is None else triton_linear(weight, bias)
    kernel = _panel_kernel(weight)
    if kernel is not None:
        return PanelLinear(kernel, weight, bias)
    return PackedLinear(weight, bias) if can_pack(weight) else DenseLinear(weight, bias)


class GatedLinear(Protocol):
    """Two products side by side, gate and up, and the activation that makes one of them."""

    def __call__(self, x: Tensor, step: ElementWiseStep) -> Tensor:
        """`x` `[num_tokens, in_features]` to silu(gate) * up `[num_tokens, out_features / 2]`, good until `step`'s next
        call."""


class GatedByStep:
    def __init__(self, linear: Linear) -> None:
        self._linear = linear

    def __call__(self, x: Tensor, step: ElementWiseStep) -> Tensor:
        return step.gate(self._linear(x))


class GatedPanels:
    """With the activation where sums are rounded: both products are never written, nor read."""

    def __init__(self, panels: PanelLinear) -> None:
        self._panels = panels

    def __call__(self, x: Tensor, step: ElementWiseStep) -> Tensor:
        return self._panels(x)


def make_gated(weight: Tensor, bias: Tensor | None = None) -> GatedLinear:
    """As make_linear, of gate's rows and, behind them, up's."""
    kernel = _panel_kernel(weight)
    if kernel is not None and PanelLinear.supports_gated(kernel, weight):
        return GatedPanels(PanelLinear(kernel, weight, bias, gated=True))
    return GatedByStep(make_linear(weight, bias))


def make_embedding(weight: Tensor, tied: Linear | None) -> Embedding:
    """Rows of `weight` `[vocab_size, hidden_size]`; where the product that it is `tied` to can give these back, without
    keeping it."""
    return tied.rows if isinstance(tied, PanelLinear) else partial(_rows, weight)


def _rows(weight: Tensor, token_ids: Tensor) -> Tensor:
    return F.embedding(token_ids, weight)


def _triton_linear(weight: Tensor) -> Callable[[Tensor, Tensor | None], Linear] | None:
    """Where Triton compiles it for the weight's device; on none, to see what there is to compile."""
    try:
        from engine.kernels.gpu.linear import TritonLinear
    except ImportError:
        return None
    works = TritonLinear.supports(weight) and (weight.device.type == "meta" or _tried(weight.device, weight.dtype))
    return TritonLinear if works else None


@cache
def _tried(device: torch.device, dtype: torch.dtype) -> bool:
    from engine.kernels.gpu.linear import TritonLinear

    weight = torch.zeros((64, 4096), dtype=dtype, device=device)
    try:
        TritonLinear(weight, None)(weight[:1])
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of Triton, its compiler or the driver: each has a tree of its own
        warn_of_torch(device, error)
        return False
    return True


def _panel_kernel(weight: Tensor) -> Kernel | None:
    """What packs this weight into panels; None where something else is faster, or can do it at all."""
    if weight.device.type != "cpu" or weight.dtype not in (torch.bfloat16, torch.float16):
        return None
    kernel = load_kernel()
    if kernel is None or not PanelLinear.supports(kernel, weight.dtype):
        return None
    ours = PanelLinear.uses_amx(kernel, weight) or not _has_arithmetic(kernel, weight.dtype)
    return kernel if ours else None


def _has_arithmetic(kernel: Kernel, dtype: torch.dtype) -> bool:
    """Whether the processor multiplies numbers of `dtype`. What oneDNN says of bfloat16 is not that: it has kernels for
    every AVX-512, which without avx512_bf16 go by way of float32. Every processor with AMX has avx512_bf16 too."""
    if dtype is torch.bfloat16:
        return kernel.isa >= Isa.AVX512_BF16
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def can_pack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if weight.dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if weight.dtype is torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return False
