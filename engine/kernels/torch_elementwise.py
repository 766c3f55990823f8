"""Element-wise work out of torch operations: right on every device, and the oracle of the compiled kernels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


class TorchElementWise:
    def __init__(self, norm_eps: float) -> None:
        self._norm_eps = norm_eps

    def step(self, hidden: Tensor) -> TorchElementWiseStep:
        return TorchElementWiseStep(hidden, self._norm_eps)


class TorchElementWiseStep:
    def __init__(self, hidden: Tensor, norm_eps: float) -> None:
        self._hidden, self._norm_eps = hidden, norm_eps

    def add_norm(self, delta: Tensor | None, weight: Tensor) -> Tensor:
        if delta is not None:
            self._hidden += delta
        return F.rms_norm(self._hidden, weight.shape, weight, self._norm_eps)

    def gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)
