"""`python -m bench.gpu.tune`: tries launch parameters of attention on this GPU and writes the fastest to its file in
engine/kernels/gpu/configs/, where workers on such a GPU find them. Kernels are compiled by all cores, then timed one by
one."""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch

from baton.layout import KVLayout
from bench.gpu.timing import milliseconds
from bench.progress import bar
from engine.attention import Span
from engine.kernels.gpu import tuning
from engine.kernels.gpu.attention import TritonAttention
from engine.kernels.gpu.attention_prefill_hopper import suits
from engine.kernels.gpu.tuning import LaunchConfig
from engine.kv_cache import KVCache

_HEAD_DIMS = (64, 128, 256)
_HEADS, _KV_HEADS, _BLOCK_SIZE = 32, 8, 16
_DECODES, _PREFILLS = ((64, 4096), (256, 1024), (4, 4096)), ((4, 2048), (1, 8192))
"""Sequences, and the context or the prompt of each."""
_RUNS = 3
DECODE, PREFILL = "attention_decode", "attention_prefill"
_KEPT = ("num_warps", "num_stages", "block_m", "block_n", "programs", "max_splits", "split_positions")


def candidates(kernel: str, default: LaunchConfig) -> Iterator[LaunchConfig]:
    """All else is as in `default`."""
    fields = vars_of(default)
    if kernel == DECODE:
        for block_n, warps, stages in product((32, 64, 128), (2, 4, 8), (2, 3, 4)):
            yield LaunchConfig(**{**fields, "block_n": block_n, "num_warps": warps, "num_stages": stages})
    else:
        for block_m, block_n, warps, stages in product((64, 128, 256), (32, 64, 128), (4, 8), (2, 3)):
            shape = {"block_m": block_m, "block_n": block_n, "num_warps": warps, "num_stages": stages}
            yield LaunchConfig(**{**fields, **shape})


def vars_of(config: LaunchConfig) -> dict[str, int]:
    return {name: getattr(config, name) for name in _KEPT}


def changed(config: LaunchConfig) -> dict[str, int]:
    """As files have it: what is not as LaunchConfig has it by itself."""
    plain = LaunchConfig(config.num_warps, config.num_stages)
    return {
        name: value
        for name, value in vars_of(config).items()
        if name in ("num_warps", "num_stages") or value != getattr(plain, name)
    }


def best(times: dict[LaunchConfig, Sequence[float]]) -> LaunchConfig:
    """The least by the geometric mean over the cases: none of them outweighs the others for being longer."""
    return min(times, key=lambda config: sum(map(math.log, times[config])))


@torch.inference_mode()
def seconds(
    kernel: str, head_dim: int, config: LaunchConfig, sizes: Sequence[tuple[int, int]], runs: int
) -> list[float]:
    def configure(name: str, device_name: str, size: int) -> LaunchConfig:
        return config if name == kernel else tuning.config(name, device_name, size)

    found = []
    for batch, length in sizes:
        layout = KVLayout(2, _KV_HEADS, _BLOCK_SIZE, head_dim, "bfloat16", b"tune")
        cache = KVCache(layout, batch * length // _BLOCK_SIZE, "cuda")
        cache.tensor.normal_()
        tables = np.random.default_rng(0).permutation(cache.num_blocks).astype(np.int32).reshape(batch, -1)
        attention = TritonAttention(cache, tables, _HEADS, configure)
        if kernel == DECODE:
            buffers = attention.decode_buffers(batch, torch.from_numpy(tables).cuda())
            buffers.slots.copy_(torch.arange(batch))
            buffers.lengths.fill_(length)
            made, rows = attention.static_batch(buffers), batch
        else:
            made, rows = attention.batch([Span(i * length, 0, length, i) for i in range(batch)]), batch * length
        query = torch.randn(rows, _HEADS, head_dim, dtype=torch.bfloat16, device="cuda")
        calls = [partial(made.attend, layer, query, None) for layer in range(2)]
        found.append(statistics.median(milliseconds(calls, runs)) / 1e3)
    return found


def main() -> int:
    asked = _arguments()
    if not torch.cuda.is_available():
        print("tune: this machine has no CUDA device that torch can use; there is nothing to tune for", file=sys.stderr)
        return 1
    name = torch.cuda.get_device_name()
    cases = [
        (kernel, head_dim, config)
        for kernel in (DECODE, PREFILL)
        for head_dim in _HEAD_DIMS
        for config in candidates(kernel, tuning.config(kernel, name, head_dim))
        if kernel == DECODE or not _has_its_own(head_dim)
    ]
    if asked.compile is not None:
        for case in cases[asked.compile :: asked.of]:
            _tried(*case, sizes=((1, 256),), runs=1)
        return 0
    workers = max(1, min(16, len(os.sched_getaffinity(0)) - 1))
    print(f"tune: {name}: compiling {len(cases)} kernels, {workers} at a time", flush=True)
    command = [sys.executable, "-m", "bench.gpu.tune", f"--of={workers}"]
    for process in [subprocess.Popen([*command, f"--compile={index}"]) for index in range(workers)]:
        process.wait()
    times: dict[tuple[str, int], dict[LaunchConfig, Sequence[float]]] = {}
    with bar(len(cases), "kernels") as progress:
        for kernel, head_dim, config in cases:
            took = _tried(kernel, head_dim, config, sizes=_DECODES if kernel == DECODE else _PREFILLS, runs=_RUNS)
            if took is not None:
                times.setdefault((kernel, head_dim), {})[config] = took
            progress.advance(f"{kernel}, heads of {head_dim}")
    path = tuning.path_of(name)
    file: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else {}
    for (kernel, head_dim), of_one in times.items():
        file.setdefault(kernel, {})[str(head_dim)] = changed(best(of_one))
        print(f"{kernel}, heads of {head_dim}: {changed(best(of_one))}")
    path.write_text(json.dumps(file, indent=2) + "\n")
    print(f"tune: written: {path}")
    return 0


def _has_its_own(head_dim: int) -> bool:
    """On Hopper another kernel serves some prefills; its shapes leave nothing to choose."""
    return suits(torch.empty((1, 1, 2, 1, _BLOCK_SIZE, head_dim), dtype=torch.bfloat16, device="cuda"))


def _tried(
    kernel: str, head_dim: int, config: LaunchConfig, *, sizes: Sequence[tuple[int, int]], runs: int
) -> list[float] | None:
    """None: this GPU can't have it, as with tiles that are larger than its memory for them."""
    try:
        return seconds(kernel, head_dim, config, sizes, runs)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of Triton, its compiler or the driver: each has a tree of its own
        print(f"left out: {kernel}, heads of {head_dim}, {changed(config)}: {type(error).__name__}", file=sys.stderr)
        return None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.tune", description=__doc__)
    parser.add_argument("--compile", type=int, default=None, help="only compile: the so manyth part of --of")
    parser.add_argument("--of", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
