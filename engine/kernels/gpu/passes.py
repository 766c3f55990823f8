"""One launch of a kernel as plain data: run it, or look at what it would run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Pass:
    kernel: Any
    """What `triton.jit` makes of a function."""
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    """By the names of the kernel's parameters."""
    num_warps: int

    def run(self) -> None:
        if 0 not in self.grid:
            self.kernel[self.grid](**self.arguments, num_warps=self.num_warps)
