"""Sampling alone: milliseconds a step of the compiled sampler and of the torch reference, in turns.

    python -m bench.sampling_step [--threads 2] [--rows 1 8 32] [--rounds 5] [--json FILE]

Logits are normal with a deviation of 2.5, of a vocabulary of 151,936, in bfloat16 and float32: flatter than a trained
model's, so that almost every token stays in the race. They have just been written when a round begins, as a head leaves
them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from baton.sampling import SamplingParams
from engine.kernels.cpu.library import load_kernel
from engine.kernels.cpu.sampling import CompiledSampler
from engine.sampler import Draw, ReferenceSampler, Sampler

VOCAB_SIZE = 151_936
DEVIATION = 2.5

CASES = {
    "greedy": SamplingParams(),
    "temperature 1": SamplingParams(temperature=1.0, seed=1),
    "temperature 0.7": SamplingParams(temperature=0.7, seed=1),
    "temperature 1, top-k 50": SamplingParams(temperature=1.0, top_k=50, seed=1),
    "temperature 1, top-p 0.9": SamplingParams(temperature=1.0, top_p=0.9, seed=1),
    "temperature 0.7, top-k 20, top-p 0.8": SamplingParams(temperature=0.7, top_k=20, top_p=0.8, seed=1),
}


@dataclass(frozen=True)
class Line:
    case: str
    dtype: str
    rows: int
    side: str
    ms: float


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    kernel = load_kernel()
    if kernel is None:
        parser.exit(1, "there is no compiled sampler to measure\n")
    sides: dict[str, Sampler] = {"torch": ReferenceSampler([]), "compiled": CompiledSampler(kernel, [])}
    print(f"{kernel.isa.name}, {arguments.threads} threads")
    lines: list[Line] = []
    for dtype in (torch.bfloat16, torch.float32):
        for rows in arguments.rows:
            logits = (torch.randn(rows, VOCAB_SIZE) * DEVIATION).to(dtype)
            for name, params in CASES.items():
                runs: dict[str, list[float]] = {side: [] for side in sides}
                for position in range(arguments.rounds + 1):  # the first warms up
                    draws = [Draw(params, position + 100 * row, 1) for row in range(rows)]
                    for side, sampler in sides.items():
                        runs[side].append(step(sampler, logits, draws))
                for side, times in runs.items():
                    lines.append(Line(name, str(dtype), rows, side, 1e3 * statistics.median(times[1:])))
                pair = ", ".join(f"{line.side} {line.ms:9.3f} ms" for line in lines[-2:])
                print(f"{dtype!s:15} {rows:2} rows, {name:36} {pair}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(line) for line in lines], indent=1) + "\n")


def step(sampler: Sampler, logits: torch.Tensor, draws: Sequence[Draw]) -> float:
    """Seconds."""
    fresh = logits.clone()
    started = time.perf_counter()
    sampler.sample(fresh, draws)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
