"""Attention alone: milliseconds a step over all layers, of the compiled kernel and of the torch reference, in turns.

    python -m bench.attention_step [--threads 2] [--dtype bfloat16] [--rounds 7] [--json FILE]

Shapes are those of a model of half a billion weights: 24 layers, 14 query and 2 KV heads of 64. Caches are emptied
before every step, as a step's weights would do. `bytes` is what reading the keys and values takes at this machine's
speed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from baton.layout import KVLayout
from engine.attention import Attention, Span
from engine.kernels.cpu.attention import CompiledAttention
from engine.kernels.cpu.library import Isa, load_kernel
from engine.kernels.reference import ReferenceAttention
from engine.kv_cache import KVCache

NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 24, 14, 2, 64, 16
FLUSHED_BYTES = 256 << 20

Batch = Sequence[tuple[int, int]]  # (start, count) of each sequence

CASES: dict[str, Batch] = {
    "decode, batch 32, contexts 8 to 504, 8,160 tokens in all": [(6 + 16 * i, 1) for i in range(32)],
    "decode, batch 8, context 64": [(63, 1)] * 8,
    "decode, batch 8, context 4,096": [(4095, 1)] * 8,
    "decode, batch 1, context 4,096": [(4095, 1)],
    "chunk of 512 behind 0": [(0, 512)],
    "chunk of 512 behind 1,536": [(1536, 512)],
    "decode of 31 and a chunk of 480": [*((6 + 16 * i, 1) for i in range(31)), (0, 480)],
}


@dataclass(frozen=True)
class Line:
    case: str
    side: str
    attend_ms: float
    write_ms: float
    bytes_ms: float


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    kernel = load_kernel()
    if kernel is None:
        parser.exit(1, "there is no compiled kernel to measure\n")
    speed = read_speed()
    print(f"{kernel.isa.name}, {arguments.threads} threads, {arguments.dtype}, memory read {speed / 1e9:.0f} GB/s")
    lines: list[Line] = []
    for name, batch in CASES.items():
        pool, tables, spans = pool_of(batch, arguments.dtype)
        sides: dict[str, Attention] = {"torch": ReferenceAttention(pool, tables, (None,))}
        for isa in Isa:
            if isa <= kernel.isa:
                sides[isa.name] = CompiledAttention(kernel.with_isa(isa), pool, tables)
        seen = sum(span.end for span in spans) * pool.layout.block_bytes / BLOCK_SIZE
        runs: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
        for _ in range(arguments.rounds + 1):  # the first warms up
            for side, attention in sides.items():
                runs[side].append(step(attention, spans, pool.tensor.dtype))
        for side, times in runs.items():
            attend, write = (1e3 * statistics.median(column) for column in zip(*times[1:], strict=True))
            lines.append(Line(name, side, attend, write, 1e3 * seen / speed))
            print(f"{name:58} {side:12} attend {attend:8.2f} ms, write {write:6.2f}, bytes {1e3 * seen / speed:6.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(line) for line in lines], indent=1) + "\n")


def pool_of(batch: Batch, dtype: str) -> tuple[KVCache, np.ndarray, list[Span]]:
    """A pool that just holds the batch, in blocks in random order."""
    blocks = [-(-(start + count) // BLOCK_SIZE) for start, count in batch]
    pool = KVCache(KVLayout(NUM_LAYERS, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM, dtype, b"bench"), sum(blocks))
    pool.tensor.normal_()
    order = np.random.default_rng(0).permutation(sum(blocks)).astype(np.int32)
    tables, spans = np.zeros((len(batch), max(blocks)), dtype=np.int32), []
    for slot, (start, count) in enumerate(batch):
        tables[slot, : blocks[slot]] = order[sum(blocks[:slot]) :][: blocks[slot]]
        spans.append(Span(sum(count for _, count in batch[:slot]), start, count, slot))
    return pool, tables, spans


def step(attention: Attention, spans: Sequence[Span], dtype: torch.dtype) -> tuple[float, float]:
    """Seconds of all layers' attend and of their write; what a batch costs to make counts with the first."""
    tokens = spans[-1].row + spans[-1].count
    heads = torch.randn(tokens, NUM_HEADS + 2 * NUM_KV_HEADS, HEAD_DIM).to(dtype)
    query, key, value = torch.split(heads, [NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS], dim=1)
    torch.ones(FLUSHED_BYTES // 4).sum()
    started = time.perf_counter()
    batch = attention.batch(spans)
    made = time.perf_counter()
    attend = write = 0.0
    for layer in range(NUM_LAYERS):
        begun = time.perf_counter()
        batch.write(layer, key, value)
        written = time.perf_counter()
        batch.attend(layer, query, None)
        attend += time.perf_counter() - written
        write += written - begun
    return made - started + attend, write


def read_speed() -> float:
    """Bytes a second, the best of some sums over far more than any cache."""
    floats = torch.ones(128 << 20)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        floats.sum()
        best = min(best, time.perf_counter() - started)
    return floats.nbytes / best


if __name__ == "__main__":
    main()
