"""What this machine can do at best, in memory read and in arithmetic; measured in the run that it is shown beside."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from bench.roofline import Peaks
from engine.models.linear import make_linear

_READ_BYTES = 512 << 20  # far beyond any cache
_GEMM_SIZES = {"cpu": 2048, "cuda": 8192}
_GPU_READ_BYTES = 4 << 30
_LEAST_SECONDS = 0.3
_GROUPS = 3


@torch.inference_mode()
def measure(dtype: torch.dtype, device: torch.device, *, read_bytes: int = 0) -> Peaks:
    """The best of some tries: a peak, not a habit."""
    read_bytes = read_bytes or (_READ_BYTES if device.type == "cpu" else _GPU_READ_BYTES)
    size = _GEMM_SIZES[device.type]
    reads = max(_read_matrix(dtype, device, read_bytes), _read_floats(device, read_bytes))
    x = torch.randn(size, size, device=device).to(dtype)
    weight = torch.randn(size, size, device=device).to(dtype)
    linear = make_linear(weight)
    seconds = min(_best(lambda: F.linear(x, weight), device), _best(lambda: linear(x), device))
    return Peaks(read_bytes_per_second=reads, flops_per_second=2 * size**3 / seconds)


def _read_matrix(dtype: torch.dtype, device: torch.device, num_bytes: int) -> float:
    """Bytes a second, as a decode step reads weights."""
    columns = 8192
    matrix = torch.ones(max(1, num_bytes // (columns * dtype.itemsize)), columns, dtype=dtype, device=device)
    vector = torch.ones(columns, dtype=dtype, device=device)
    return matrix.nbytes / _best(lambda: torch.mv(matrix, vector), device)


def _read_floats(device: torch.device, num_bytes: int) -> float:
    floats = torch.ones(num_bytes // 4, device=device)
    return floats.nbytes / _best(floats.sum, device)


def _best(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, over groups of calls that take long enough to be timed."""
    once = _timed(call, 2, device)
    count = max(1, int(_LEAST_SECONDS / max(once, 1e-6)))
    return min(_timed(call, count, device) for _ in range(_GROUPS))


def _timed(call: Callable[[], object], count: int, device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    for _ in range(count):
        call()
    synchronize(device)
    return (time.perf_counter() - started) / count


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
