"""A layer's element-wise work alone: microseconds by plain torch, by torch.compile and by our kernels, in turns.

    python -m bench.elementwise_step [--threads 1] [--rounds 200] [--compile] [--json FILE]

Shapes are those of a model of half a billion weights: hidden 896, 14 query and 2 KV heads of 64, intermediate 4,864.
The work is two residual sums with their norms, rotary embedding, KV write, and the gated activation. Printed are the
least of the rounds and their median: the least is what the work costs, in the median is what else the machine does.
`--compile` adds torch.compile, whose start-up is measured in two processes, the second with the first one's cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from baton.layout import KVLayout
from engine.attention import Rotary, Span
from engine.kernels.cpu.attention import CompiledAttention, CompiledBatch
from engine.kernels.cpu.elementwise import CompiledElementWise
from engine.kernels.cpu.library import load_kernel
from engine.kv_cache import KVCache
from engine.models.rope import inverse_frequencies, rotary
from engine.models.spec import RopeSpec

HIDDEN, INTERMEDIATE, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 896, 4864, 14, 2, 64, 16
EPS = 1e-6
TOKENS = (1, 32, 512)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Line:
    dtype: str
    num_tokens: int
    side: str
    least_us: float
    median_us: float


class Work:
    """A layer's inputs, and a batch to write to."""

    def __init__(self, num_tokens: int, dtype: str) -> None:
        def random(*shape: int) -> Tensor:
            return torch.randn(shape).to(DTYPES[dtype])

        kernel = load_kernel()
        assert kernel is not None, "there is no compiled kernel to measure"
        pool = KVCache(KVLayout(1, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM, dtype, b"bench"), -(-num_tokens // BLOCK_SIZE))
        tables = np.arange(pool.num_blocks, dtype=np.int32)[None]
        self._attention = CompiledAttention(kernel, pool, tables)
        self.batch: CompiledBatch = self._attention.batch([Span(0, 0, num_tokens, slot=0)])
        self.hidden, self.delta, self.weight = random(num_tokens, HIDDEN), random(num_tokens, HIDDEN), random(HIDDEN)
        self.qkv = random(num_tokens, (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM)
        self.gate_up = random(num_tokens, 2 * INTERMEDIATE)
        self.turns = rotary(inverse_frequencies(RopeSpec(1e6), HEAD_DIM), torch.arange(num_tokens))
        self.step = CompiledElementWise(kernel, EPS).step(self.hidden)

    def ours(self) -> None:
        self.step.add_norm(self.delta, self.weight)
        self.batch.rotate_and_write(0, self.qkv, self.turns, None)
        self.step.add_norm(self.delta, self.weight)
        self.step.gate(self.gate_up)

    def torchs(
        self,
        add_norm: Callable[..., tuple[Tensor, Tensor]],
        turn: Callable[..., tuple[Tensor, Tensor, Tensor]],
        gate: Callable[..., Tensor],
    ) -> None:
        """The write by the compiled kernel for both: scattering by torch costs far more."""
        add_norm(self.hidden, self.delta, self.weight)
        _, key, value = turn(self.qkv, self.turns)
        self.batch.write(0, key, value)
        add_norm(self.hidden, self.delta, self.weight)
        gate(self.gate_up)


def add_norm(hidden: Tensor, delta: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    hidden = hidden + delta
    return hidden, F.rms_norm(hidden, weight.shape, weight, EPS)


def turn(qkv: Tensor, turns: Rotary) -> tuple[Tensor, Tensor, Tensor]:
    """In the dtype of the heads, as most do."""
    heads = qkv.view(len(qkv), -1, HEAD_DIM)
    query_key, value = torch.split(heads, [NUM_HEADS + NUM_KV_HEADS, NUM_KV_HEADS], dim=1)
    cos, sin = turns.cos.to(qkv.dtype)[:, None], turns.sin.to(qkv.dtype)[:, None]
    first, second = query_key.chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    query, key = torch.split(turned, [NUM_HEADS, NUM_KV_HEADS], dim=1)
    return query, key, value


def gate(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def compiled() -> list[Callable[..., Any]]:
    """add_norm, turn and gate by inductor, once for any number of tokens: a compilation for each would never end."""
    return [torch.compile(f, dynamic=True) for f in (add_norm, turn, gate)]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--start-up", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.start_up:
        print(start_up())
        return
    if arguments.compile:
        with tempfile.TemporaryDirectory() as cache:
            command = ["env", f"TORCHINDUCTOR_CACHE_DIR={cache}", sys.executable, "-m", "bench.elementwise_step"]
            command += ["--start-up", f"--threads={arguments.threads}"]
            for name in ("first", "cached"):
                seconds = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                print(f"torch.compile, {name} start: {float(seconds):.1f} s")
    lines: list[Line] = []
    for dtype in DTYPES:
        for num_tokens in TOKENS:
            work = Work(num_tokens, dtype)
            sides: dict[str, Callable[[], Any]] = {
                "kernels": work.ours,
                "torch": partial(work.torchs, add_norm, turn, gate),
            }
            if arguments.compile:
                sides["torch.compile"] = partial(work.torchs, *compiled())
            for side, times in measure(sides, arguments.rounds).items():
                least, median = 1e6 * min(times), 1e6 * statistics.median(times)
                lines.append(Line(dtype, num_tokens, side, least, median))
                print(f"{dtype:9} {num_tokens:4} tokens  {side:14} {least:9.1f} us, median {median:9.1f}")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(line) for line in lines], indent=1) + "\n")


def measure(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each round, by side."""
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(3 + rounds):  # the first few warm up
        for side, work in sides.items():
            started = time.perf_counter()
            work()
            times[side].append(time.perf_counter() - started)
    return {side: each[3:] for side, each in times.items()}


def start_up() -> float:
    """Seconds until torch.compile has served one token and many, of one dtype."""
    works, three = [Work(num_tokens, "bfloat16") for num_tokens in (32, 1)], compiled()
    started = time.perf_counter()
    for work in works:
        work.torchs(*three)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
