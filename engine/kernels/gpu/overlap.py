"""A decode step is hundreds of short kernels, each of which has to fill the GPU and to run empty again. With
programmatic dependent launch (compute capability 9.0 on) the next one's programs take their places while this one's
still run, fetch what does not depend on it, and wait.

The rule: every program of a kernel that has OVERLAPS calls `take_turn` (or its two halves) before it reads what any
kernel has written, and before it writes at all. Then whatever was launched before has ended, and what it wrote is seen.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def take_turn(OVERLAPS: tl.constexpr) -> None:
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def let_next_begin(OVERLAPS: tl.constexpr) -> None:
    if OVERLAPS:
        gdc_launch_dependents()


@triton.jit
def wait_for_turn(OVERLAPS: tl.constexpr) -> None:
    if OVERLAPS:
        gdc_wait()


@triton.jit
def fetch_to_l2(pointers: tl.tensor) -> None:
    """The lines that they are in, without waiting."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )
