"""A kernel's launch as plain data: run it, or compile it ahead of time for a device that is not here; and what kernels
are told of the pool."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import triton
from torch import Tensor

from engine.kernels.gpu.again import Again

Arguments = dict[str, Any]
"""By the names of the kernel's parameters."""

ALL = 2**31 - 1
"""A window that takes in every position."""
OVERLAPS = "OVERLAPS"
"""A constant that kernels have which may begin before those that were launched before them have ended (overlap.py)."""
_LEAST_OVERLAPPING = 90
LEAST_ROWS = 16
"""What tl.dot multiplies has no fewer rows, columns or depth."""


@dataclass(frozen=True, slots=True)
class Launch:
    kernel: Any
    """What `triton.jit` makes of a function."""
    grid: tuple[int, ...]
    arguments: Arguments
    num_warps: int
    num_stages: int = 3
    """How many turns of a loop are on their way at a time; this many is Triton's own choice."""

    def run(self) -> None:
        if _instead is not None:
            _instead(self)
        elif 0 not in self.grid:
            last = _last.get(id(self.kernel), ())
            if not any(again.run(self) for again in last):
                compiled = self.kernel[self.grid](**self.keywords(current_arch()))
                if not _interpreted():
                    again = Again(self, self.told(current_arch()), compiled)
                    if again.can_be_repeated:
                        _last[id(self.kernel)] = (again, *last[: _REMEMBERED - 1])

    def compile(self) -> Any:
        """For the device that Triton's driver says; what has been compiled."""
        return self.kernel.run(grid=self.grid, warmup=True, **self.keywords(current_arch()))

    def keywords(self, arch: int) -> Arguments:
        """Arguments and options, on a device of that compute capability."""
        return {**self.complete(arch), **self.options(arch)}

    def complete(self, arch: int) -> Arguments:
        """Arguments with what the kernel is told of the device."""
        return {**self.arguments, **self.told(arch)}

    def told(self, arch: int) -> Arguments:
        return {OVERLAPS: arch >= _LEAST_OVERLAPPING} if OVERLAPS in self.kernel.arg_names else {}

    def options(self, arch: int) -> dict[str, int | bool]:
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if OVERLAPS in self.kernel.arg_names and arch >= _LEAST_OVERLAPPING:
            return {**options, "launch_pdl": True}
        return options


@cache
def _interpreted() -> bool:
    return bool(triton.knobs.runtime.interpret)


def current_arch() -> int:
    """Compute capability, such as 90; 0 in the interpreter."""
    return 0 if _interpreted() else int(triton.runtime.driver.active.get_current_target().arch)


_last: dict[int, tuple[Again, ...]] = {}
"""By kernels, which stay as long as the process does; the newest first."""
_REMEMBERED = 8
"""So many different ones of a kernel: a layer's four products and the head take turns."""
_instead: Callable[[Launch], None] | None = None


@contextmanager
def instead_of_running(handle: Callable[[Launch], None]) -> Iterator[None]:
    """Launches of this process are handed to `handle` meanwhile, and not run."""
    global _instead
    before, _instead = _instead, handle
    try:
        yield
    finally:
        _instead = before


def paged(pool: Tensor, layer: int, block_tables: Tensor) -> Arguments:
    """`pool` `[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]`, each head's tile contiguous;
    `block_tables` `[num_slots, max_blocks]` int32."""
    block_size, head_dim = pool.shape[-2:]
    assert pool.stride()[-2:] == (head_dim, 1), f"a head's tile of strides {pool.stride()[-2:]}"
    assert block_tables.stride(1) == 1, "a slot's blocks lie apart"
    block_stride, layer_stride, value_stride, head_stride = pool.stride()[:4]
    return {
        "pool": pool,
        "tables": block_tables,
        "layer": layer,
        "table_stride": block_tables.stride(0),
        "block_stride": block_stride,
        "layer_stride": layer_stride,
        "value_stride": value_stride,
        "head_stride": head_stride,
        "HEAD_DIM": head_dim,
        "BLOCK_SIZE": block_size,
    }


def rows_of_heads(x: Tensor) -> Tensor:
    """`x` `[num_tokens, num_heads, head_dim]` with a token's heads behind each other; tokens may be apart."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def power_of_two(least: int, floor: int = 1) -> int:
    """The smallest that is neither below `least` nor below the power of two `floor`."""
    return max(floor, 1 << (least - 1).bit_length())


def score_scale(head_dim: int) -> float:
    """1 / sqrt(head_dim), for softmax by powers of 2."""
    return math.log2(math.e) / math.sqrt(head_dim)
