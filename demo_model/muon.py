"""Muon, an optimizer for matrices, whose costly half the processes of a run share.

torch has one too; it works in bfloat16, which takes eight seconds a step on a CPU that has no arithmetic for it, and it
makes every process do all of the work.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist

_MOMENTUM = 0.95
_STEPS = 5
_A, _B, _C = 3.4445, -4.7750, 2.0315
_MATCH_ADAM = 0.2
"""Root mean square of AdamW's updates, in learning rates, which ours are scaled to."""


class Muon(torch.optim.Optimizer):
    """Muon (Jordan, 2024) with Nesterov momentum and decoupled weight decay.

    Every process has to hold the same matrices and gradients, of two dimensions and dtype float32.
    """

    def __init__(self, matrices: Iterable[torch.nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # torch allows a closure; nobody here gives one
        for group in self.param_groups:
            matrices: list[torch.nn.Parameter] = group["params"]
            directions = self._directions(matrices)
            for matrix, direction in zip(matrices, directions, strict=True):
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.sub_(direction, alpha=group["lr"] * _MATCH_ADAM * max(matrix.shape) ** 0.5)

    def _directions(self, matrices: list[torch.nn.Parameter]) -> tuple[torch.Tensor, ...]:
        """Each process makes its share orthogonal and leaves zeros for the rest; the sum is what all go on with."""
        rank, processes = dist.get_rank(), dist.get_world_size()
        all_of_them = torch.zeros(sum(matrix.numel() for matrix in matrices))
        parts = all_of_them.split([matrix.numel() for matrix in matrices])
        for place, (matrix, part) in enumerate(zip(matrices, parts, strict=True)):
            momentum = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
            assert matrix.grad is not None, "no backward pass came before"
            momentum.lerp_(matrix.grad, 1 - _MOMENTUM)
            if place % processes == rank:
                part.copy_(orthogonal(matrix.grad.lerp(momentum, _MOMENTUM)).flatten())
        dist.all_reduce(all_of_them)
        return tuple(part.view_as(matrix) for matrix, part in zip(matrices, parts, strict=True))


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The nearest matrix whose singular values are all about 1, by a Newton-Schulz iteration of the fifth order with
    Jordan's coefficients: 0.7 to 1.2 in five steps, which is near enough."""
    wide = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    x: torch.Tensor = wide / wide.norm().clamp(min=1e-7)
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.mT if matrix.shape[0] > matrix.shape[1] else x
