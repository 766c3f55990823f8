"""Products with 16-bit weights alone: ours, of each instruction set, beside torch's in the dtype itself and in float32.

    python -m bench.linear_step [--threads 1] [--dtype bfloat16] [--rows 1 4 8 64 256] [--rounds 5] [--json FILE]

Shapes are a half-billion model's, and one of a larger model. As many weights as no cache holds take turns, so that each
call reads its own from memory. Figures are the best call of all rounds, in which the sides take turns. With one thread
that thread's own time counts, which other processes hardly lengthen. `read` is what summing as many bytes gives.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.cpu.library import Isa, Kernel, load_kernel
from engine.kernels.cpu.linear import PanelLinear
from engine.models.linear import PackedLinear, can_pack

SHAPES = ((1152, 896), (896, 896), (9728, 896), (896, 4864), (4096, 4096), (151936, 896))
"""`[out_features, in_features]`."""
UNCACHED_BYTES = 128 << 20
SLICE_SECONDS = 0.05

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Side:
    name: str
    dtype: torch.dtype
    products: Sequence[Product]


@dataclass(frozen=True)
class Line:
    out_features: int
    in_features: int
    rows: int
    side: str
    microseconds: float
    gflops: float
    weight_gigabytes_per_second: float
    read_gigabytes_per_second: float


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 64, 256])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    kernel, dtype = load_kernel(), getattr(torch, arguments.dtype)
    if kernel is None or not PanelLinear.supports(kernel, dtype):
        parser.exit(1, f"there is no compiled kernel for {arguments.dtype} here\n")
    print(f"{kernel.isa.name}, {arguments.threads} threads, {arguments.dtype}")
    clock = time.thread_time if arguments.threads == 1 else time.perf_counter
    lines: list[Line] = []
    for out_features, in_features in SHAPES:
        weight = torch.randn(out_features, in_features).to(dtype)
        sides = sides_of(kernel, weight)
        read = torch.ones(max(weight.nbytes, UNCACHED_BYTES) // 4)
        for rows in arguments.rows:
            x = torch.randn(rows, in_features).to(dtype)
            calls = [[partial(product, x.to(side.dtype)) for product in side.products] for side in sides]
            best = best_seconds([*calls, [read.sum]], arguments.rounds, clock)
            speed = read.nbytes / best.pop() / 1e9
            for side, seconds in zip(sides, best, strict=True):
                num_bytes = weight.numel() * side.dtype.itemsize
                flops = 2 * rows * weight.numel()
                figures = 1e6 * seconds, flops / seconds / 1e9, num_bytes / seconds / 1e9
                lines.append(Line(out_features, in_features, rows, side.name, *figures, speed))
                print(
                    f"{out_features:6} x {in_features:4}, {rows:3} rows, {side.name:18} {figures[0]:9.0f} us,"
                    f" {figures[1]:6.1f} GFLOP/s, weights {figures[2]:5.1f} GB/s, read {speed:5.1f}",
                    flush=True,
                )
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(line) for line in lines], indent=1) + "\n")


def sides_of(kernel: Kernel, weight: Tensor) -> list[Side]:
    def side(name: str, dtype: torch.dtype, product: Callable[[], Product]) -> Side:
        copies = max(1, UNCACHED_BYTES // (weight.numel() * dtype.itemsize))
        return Side(name, dtype, [product() for _ in range(copies)])

    ours = [
        side(f"panels, {isa.name}", weight.dtype, partial(PanelLinear, kernel.with_isa(isa), weight))
        for isa in (Isa.AVX2, Isa.AVX512, Isa.AMX)
        if isa <= kernel.isa
    ]
    if can_pack(weight):
        ours.append(side("oneDNN, packed", weight.dtype, partial(PackedLinear, weight, None)))
    by_torch = [
        side(f"torch, {str(dtype).removeprefix('torch.')}", dtype, partial(_dense, weight, dtype))
        for dtype in (torch.float32, weight.dtype)
    ]
    return ours + by_torch


def best_seconds(
    sides: Sequence[Sequence[Callable[[], object]]], rounds: int, clock: Callable[[], float]
) -> list[float]:
    """Of one call of each side; in each round, a side's calls take turns for a while."""
    best = [float("inf")] * len(sides)
    for _ in range(rounds):
        for index, calls in enumerate(sides):
            begun, done = time.perf_counter(), 0
            while done < 2 or time.perf_counter() - begun < SLICE_SECONDS:
                started = clock()
                calls[done % len(calls)]()
                best[index] = min(best[index], clock() - started)
                done += 1
    return best


def _dense(weight: Tensor, dtype: torch.dtype) -> Product:
    own = weight.to(dtype, copy=True)
    return lambda x: F.linear(x, own)


if __name__ == "__main__":
    main()
