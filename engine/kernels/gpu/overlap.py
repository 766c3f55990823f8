"""A decode step is hundreds of short kernels, each of which has to fill the GPU and to run empty again. With
programmatic dependent launch (compute capability 9.0 on) the next one's programs take their places while this one's
still run, and wait.

The rule: every program of a kernel that has OVERLAPS calls `take_turn` before it reads what any kernel has written, and
before it writes at all. Then whatever was launched before has ended, and what it wrote is seen.
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
