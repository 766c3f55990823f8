"""How much memory is left on a device, and how much of it a KV pool may take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

_HOST_SHARE = 0.25
_MARGIN = 256 << 20
"""Bytes of a GPU's memory for what libraries take once they are used, and for what is lost between allocations."""


@dataclass(frozen=True, slots=True)
class MemoryRoom:
    """Bytes of a device."""

    device: torch.device
    left: int
    """That could be had now, beside what steps take."""
    for_pool: int
    """Of these, what a pool takes that nobody gave a size."""
    advice: str = ""
    """How it could be more."""


def room(device: torch.device, utilization: float, activations: int) -> MemoryRoom:
    """`utilization`: the part of a GPU's whole memory that this process may take, all that it has taken included.
    `activations`: bytes that its steps take besides weights and pool."""
    if device.type != "cuda":
        left = available(device)
        return MemoryRoom(device, left, int(left * _HOST_SHARE))
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    own = torch.cuda.memory_reserved(device)
    advice = (
        f"; {free >> 20} of {total >> 20} MiB are free, this process holds {own >> 20}, its steps take "
        f"{activations >> 20}: give a higher --gpu-memory-utilization or a smaller --max-num-batched-tokens, or free "
        "some"
    )
    left = free - activations - _MARGIN
    return MemoryRoom(device, left, min(left, int(total * utilization) - own - activations - _MARGIN), advice)


def available(device: torch.device) -> int:
    """Bytes that could be had now: of device memory, or of host memory, where a container's own limit counts too."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo") as meminfo:
        fields = dict(line.split(":", 1) for line in meminfo)
    return int(min(int(fields["MemAvailable"].split()[0]) * 1024, _cgroup_room()))


def _cgroup_room() -> float:
    """What a container's own limit leaves; infinite without one."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):
        return float("inf")
    return float("inf") if limit == "max" else max(0, int(limit) - used)
